"""Bit-serial table lookup (T-MAC) in jnp.

A code w of B bits is a sum of bit planes, w = sum_i 2^i b_i. With b' = 2 b - 1
in {-1, 1} and an offset z (2^(B-1) for two's complement, else a zero point)

    w - z = 1/2 sum_i 2^i b'_i + (2^B - 1) / 2 - z

so a dot product needs sum_k b'_ik x_k only. For every 4 activations the 16
values of +-x0 +-x1 +-x2 +-x3 are tabulated; 8 suffice, because the complement
of an index changes the sign alone: T[15 - p] = -T[p].
"""

import jax
import jax.numpy as jnp
import numpy as np

GROUP = 4  # activations that share a table
SCALED = 64  # activations that share the scale of int8 tables


def run(
  x: jax.Array,
  codes: jax.Array,
  scale: jax.Array | None,
  zero_point: jax.Array | None = None,
  *,
  bits: int,
  signed: bool,
  int8_tables: bool = False,
) -> jax.Array:
  """x @ ((codes - z) * scale) by lookups, in float32.

  Args:
    x: (m, k) float; k a multiple of 4, of 64 for int8 tables.
    codes: (k, n) uint8, one code of `bits` bits each, not packed.
    scale: (k / g, n) scales, or (1, n) for one per column; None stands for 1.
    zero_point: of the shape of `scale`, for unsigned codes.
    bits: 1 to 8.
    signed: whether codes are two's complement.
    int8_tables: round tables to int8 with one scale per 64 activations. Each
      entry is then off by at most half a step s = max(sum |x|) / 127, and a
      result by at most (k / 4) (s / 2) (2^bits - 1) / 2 times the scale.

  Returns:
    (m, n) float32.
  """
  m, k = x.shape
  unit = SCALED if int8_tables else GROUP
  if k % unit:
    raise ValueError(f'x.shape={x.shape}: k={k} must be a multiple of {unit}')
  if codes.shape[0] != k:
    raise ValueError(f'codes.shape={codes.shape} must be ({k}, n)')
  n = codes.shape[1]
  groups = 1 if scale is None else scale.shape[0]
  if groups == 0 or k % groups or (k // groups) % unit:
    raise ValueError(f'scale.shape={scale.shape} must divide {k=} by {unit}')
  x = x.astype(jnp.float32)
  tables = half_tables(x)
  if int8_tables:
    tables = round_tables(tables)
  offset = codes ^ (1 << (bits - 1)) if signed else codes
  total = jnp.zeros((m, groups, n), jnp.float32)
  for i in range(bits):
    index = plane_index(offset >> i & 1)
    total = total + jnp.float32(2.0 ** (i - 1)) * lookup(tables, index, groups)
  sums = x.reshape(m, groups, k // groups).sum(axis=-1)[..., None]
  rest = jnp.float32((2**bits - 1) / 2 - (2 ** (bits - 1) if signed else 0))
  if zero_point is not None:
    rest = rest - zero_point.astype(jnp.float32)
  total = total + sums * rest
  if scale is not None:
    total = total * scale.astype(jnp.float32)
  return total.sum(axis=1)


def half_tables(x: jax.Array) -> jax.Array:
  """Sums of 4 activations with the signs of p = 0 ... 7, so minus the last.

  Args:
    x: (m, k).

  Returns:
    (m, k / 4, 8); bit j of p set means plus x_j.
  """
  m, k = x.shape
  signs = np.array(
    [[1 if p >> j & 1 else -1 for j in range(GROUP)] for p in range(8)],
    np.float32,
  )
  parts = x.reshape(m, k // GROUP, 1, GROUP) * signs
  return parts.sum(axis=-1)


def round_tables(tables: jax.Array) -> jax.Array:
  """Tables rounded to int8 steps with a scale per 64 activations."""
  m, groups, entries = tables.shape
  shared = tables.reshape(m, -1, SCALED // GROUP, entries)
  step = jnp.max(jnp.abs(shared), axis=(-1, -2), keepdims=True) / 127
  safe = jnp.where(step > 0, step, 1)
  return (jnp.round(shared / safe) * step).reshape(tables.shape)


def plane_index(plane: jax.Array) -> jax.Array:
  """The 4-bit table index of each 4 bits along axis 0: (k / 4, n) int32."""
  k, n = plane.shape
  b = plane.astype(jnp.int32).reshape(k // GROUP, GROUP, n)
  return b[:, 0] | b[:, 1] << 1 | b[:, 2] << 2 | b[:, 3] << 3


def lookup(tables: jax.Array, index: jax.Array, groups: int) -> jax.Array:
  """Sums of table entries: (m, groups, n) from (m, k/4, 8) and (k/4, n)."""
  mirrored = index >= 8
  entry = jnp.where(mirrored, 15 - index, index)
  one_hot = jax.nn.one_hot(entry, 8, dtype=jnp.float32)
  signed = jnp.where(mirrored[..., None], -one_hot, one_hot)
  m, count, entries = tables.shape
  return jnp.einsum(
    'mgcp,gcnp->mgn',
    tables.reshape(m, groups, count // groups, entries),
    signed.reshape(groups, count // groups, -1, entries),
    precision=jax.lax.Precision.HIGHEST,
  )
