"""Products of float32 with packed matrices, by kernels for CPUs."""

import functools

import jax
import jax.numpy as jnp
from jax.core import ShapedArray

from lowbit_jax._member import Member
from lowbit_jax._typing import Precision
from lowbit_jax.cpu import _primitive
from lowbit_jax.ops import _dot_cpu_matrices as matrices, _dot_xla
from lowbit_jax.qarray import QArray


def product(
  x: jax.Array,
  q: QArray,
  precision: Precision,
  member: Member | None = None,
) -> jax.Array:
  """x (m, k) times a matrix (k, n) or (n, k), float32.

  Args:
    x: float32 (m, k).
    q: the matrix.
    precision: as in `lax.dot_general`.
    member: where q lies in a stack, None for one that lies by itself.
  """
  from lowbit_jax.cpu._weights import LANES

  kind = matrices.kind_of(q)
  x = jnp.pad(x, ((0, 0), (0, q.pad[0])))
  if kind.order > 1:
    m, k = x.shape
    groups = x.reshape(m, -1, LANES, kind.order)
    x = groups.swapaxes(-1, -2).reshape(m, k)
  how = {'kind': kind, 'precision': precision}
  return matrices.with_stack(
    functools.partial(_multiply.bind, x[None], **how), q, member
  )


def _shape(x, index, codes, *leaves, kind, precision):
  del index, leaves, precision
  return ShapedArray(matrices.shape_of_product(kind, x, codes), jnp.float32)


def _by_xla(x, *arrays, kind, precision):
  multiply = functools.partial(_dot_xla.product, precision=precision)
  return matrices.by_xla(multiply, kind, x, *arrays)


def _by_kernel(x, index, *leaves, kind, precision):
  del precision
  from lowbit_jax.cpu import _matmul as kernels

  shape = matrices.shape_of_product(kind, x, leaves[0])
  out = jax.ShapeDtypeStruct(shape, jnp.float32)
  return jax.ffi.ffi_call(kernels.target_name(kind), out)(x, index, *leaves)


# Products of x (batch, m, k) with the members `index` (batch,) of a stack.
_multiply = _primitive.primitive(
  'lowbit_matmul',
  _shape,
  _by_xla,
  _by_kernel,
  lambda *args, **how: matrices.batched(_multiply, 1, *args, **how),
)
