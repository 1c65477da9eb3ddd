"""`packed`: any function on stored weights, which stay packed in products."""

import functools
from collections.abc import Callable
from typing import Any

import jax

from lowbit_jax._walk import _named, _trace
from lowbit_jax._walk._named import Named
from lowbit_jax._walk._products import Call, Unsupported
from lowbit_jax._walk._report import Report
from lowbit_jax._walk._walker import State, Use, Walk


class Packed:
  """What `packed` returns: the function, and its report."""

  def __init__(self, fn: Callable, strict: bool) -> None:
    functools.update_wrapper(self, fn)
    self.fn, self.strict = fn, strict

  def __call__(self, *args: Any, **kwargs: Any) -> Any:
    use = Strict() if self.strict else Packing()
    return self._run(use, args, kwargs)[0]

  def report(self, *args: Any, **kwargs: Any) -> Report:
    """Every use of a stored weight, without running the function.

    Args:
      *args: those of the function; `jax.ShapeDtypeStruct` leaves will do.
      **kwargs: the same.

    Returns:
      A `Report`, which prints as a table.
    """

    def run(*args, **kwargs):
      return self._run(Noting(), args, kwargs)

    return _trace.shapes(run, args, kwargs)[1]

  def _run(self, use, args, kwargs):
    traced = _trace.trace(self.fn, args, kwargs, (0,), names_arrays=False)
    return _trace.evaluate(traced, use, State())


class Packing(Use):
  """Runs products packed where they can be, and decodes elsewhere."""

  names_arrays = False
  is_anonymous = True

  def product(self, walk: Walk, call: Call) -> jax.Array:
    try:
      return call.packed()
    except Unsupported:
      return call.plain()


class Noting(Use):
  """As `Packing`, and notes each use of a stored weight."""

  names_arrays = False

  def product(self, walk: Walk, call: Call) -> jax.Array:
    product, shapes = call.product, (call.product.lhs, call.product.rhs)
    try:
      choice = call.choice()
    except Unsupported as reason:
      for x in filter(_named.is_packed, call.operands):
        self.dense(walk, call.eqn, x, shapes, str(reason))
      return call.plain()
    how = f'{choice.implementation}: {choice.note}'
    walk.note(call.eqn, product.site, (product.op, shapes, how))
    return call.packed()

  def decodes(self, walk: Walk, eqn: Any, x: Named, reason: str) -> None:
    self.dense(walk, eqn, x, (_named.shape_of(x),), reason)

  def looks_up(self, walk: Walk, eqn: Any, x: Named) -> None:
    shapes = _named.shape_of(x), _named.shape_of(eqn.outvars[0].aval)
    row = eqn.primitive.name, shapes, 'decodes what it looks up'
    walk.note(eqn, x.site, row)

  def dense(
    self, walk: Walk, eqn: Any, x: Named, shapes: tuple, reason: str
  ) -> None:
    """Notes that a whole weight is decoded."""
    row = _operation(eqn), shapes, reason, _named.decoded_bytes(x)
    walk.note(eqn, x.site, row)


class Strict(Noting):
  """Refuses what would decode a whole weight."""

  def dense(
    self, walk: Walk, eqn: Any, x: Named, shapes: tuple, reason: str
  ) -> None:
    where = f' in {walk.scope!r}' if walk.scope else ''
    raise TypeError(
      f'{_operation(eqn)} of the weight {x.site!r}, {x.content!r},{where} would'
      f' decode all of it: {reason}; change this use, or leave out strict=True'
    )


def _operation(eqn: Any) -> str:
  return 'return' if eqn is None else eqn.primitive.name


def packed(fn: Callable, *, strict: bool = False) -> Packed:
  """`fn` on quantized weights, which stay packed in its products.

  Args:
    fn: any function that `jax.jit` takes: of Linen, NNX, Equinox, Haiku, or of
      arrays alone. It may close over stored weights.
    strict: whether a use that would decode a whole weight is an error.

  Returns:
    A function of the same arguments. Where one of them, or a leaf of a tree,
    is a QArray, an `ops.Transformed` or an `ops.Prepacked`, `fn` sees an array
    of its shape and dtype; but `dot_general`, `ragged_dot` and look-ups of
    rows run on the weight as it is stored. So do products behind casts,
    transposes, reshapes, slices, splits and the like that keep blocks whole,
    and those inside jit, scan, while, cond, remat, vmap, shard_map and custom
    derivatives. Any other use gets the dense value.

    Call it under `jax.jit`: alone it traces `fn` in every call. Its derivatives
    are those of `ops`. Functions with a derivative of their own keep it, on
    decoded weights.

    Its method `report(*args, **kwargs)` lists every use of a stored weight.

  Raises:
    TypeError: if `strict`, with the weight, the operation and the reason.
    ValueError: if two weights have the same path.

  Examples:
    >>> import jax, jax.numpy as jnp
    >>> import lowbit_jax as lowbit
    >>> def layer(params, x):
    ...   return jax.nn.relu(x @ params['up'].T)
    >>> w = lowbit.quantize(jnp.ones((128, 64)), lowbit.formats.mxfp4)
    >>> jax.jit(lowbit.packed(layer))({'up': w}, jnp.ones((1, 64))).shape
    (1, 128)
  """
  if not callable(fn):
    raise TypeError(f'fn={fn!r} must be a function')
  if not isinstance(strict, bool):
    raise TypeError(f'{strict=} must be a bool')
  return Packed(fn, strict)
