"""Operations of JAX that are lowered to a kernel where one can run.

That is on CPU, but neither in programs that are exported, since other processes
do not know the kernel, nor where a partitioner splits the operands. Everywhere
else XLA computes the same. This module needs no llvmlite.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.extend.core as jex
import jax.numpy as jnp
from jax.interpreters import batching, mlir


def primitive(
  name: str,
  shape: Callable,
  by_xla: Callable,
  by_kernel: Callable,
  batched: Callable,
  *,
  several: bool = False,
) -> jex.Primitive:
  """A primitive of arrays and hashable keywords.

  Args:
    name: of the primitive.
    shape: from the shapes of the arrays to that of the result.
    by_xla: the operation in JAX.
    by_kernel: the operation by `jax.ffi.ffi_call`.
    batched: its rule for vmap, as `jax.interpreters.batching` has it.
    several: whether there is a list of results.
  """
  operation = jex.Primitive(name)
  operation.multiple_results = several
  operation.def_abstract_eval(shape)
  batching.primitive_batchers[operation] = batched

  @functools.cache
  def compiled(how):
    return jax.jit(functools.partial(operation.bind, **dict(how)))

  operation.def_impl(lambda *xs, **how: compiled(tuple(how.items()))(*xs))

  def lower_on_cpu(context: Any, *operands: Any, **how: Any) -> Any:
    module = context.module_context
    devices = getattr(module.axis_context, 'num_devices', None)
    is_exported = module.lowering_parameters.for_export
    run = by_kernel if devices in (None, 1) and not is_exported else by_xla
    return mlir.lower_fun(run, several)(context, *operands, **how)

  mlir.register_lowering(operation, mlir.lower_fun(by_xla, several))
  mlir.register_lowering(operation, lower_on_cpu, platform='cpu')
  return operation


def folded(
  operands: Sequence[jax.Array], axes: Sequence[int | None]
) -> tuple[int, list[jax.Array]]:
  """Operands under vmap as larger ones without it.

  Args:
    operands: with a batch that comes first, when the axis of vmap is left out.
    axes: of vmap, None of those that have none.

  Returns:
    The size of the axis, and the operands with it folded into the batch.
  """
  pairs = list(zip(operands, axes, strict=True))
  size = next(x.shape[axis] for x, axis in pairs if axis is not None)

  def fold(x, axis):
    if axis is None:
      x = jnp.broadcast_to(x, (size, *x.shape))
    else:
      x = jnp.moveaxis(x, axis, 0)
    return x.reshape(size * x.shape[1], *x.shape[2:])

  return size, [fold(*pair) for pair in pairs]
