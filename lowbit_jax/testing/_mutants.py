"""Implementations with one planted fault each: what a suite must reject."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from lowbit_jax import numerics, ops, qarray
from lowbit_jax._quantize import check_format
from lowbit_jax.formats import BlockFormat, FloatFormat
from lowbit_jax.numerics import _scaling
from lowbit_jax.qarray import QArray
from lowbit_pallas.arith.codec import RANDOM_BITS


def quantizer_mutants(fmt: BlockFormat) -> dict[str, Callable]:
  """Faulty quantizers `x -> QArray` by name; those that make sense for `fmt`.

  Examples:
    >>> import lowbit_jax as lowbit
    >>> sorted(quantizer_mutants(lowbit.formats.nvfp4))[:3]
    ['bfloat16_input', 'doubled_scale', 'dropped_tensor_scale']
  """
  fmt = check_format(fmt)

  def faithful(x) -> QArray:
    return ops.quantize(x, fmt)

  def with_scales_of(x, y, double: bool = False) -> QArray:
    """y, quantized with the scales of x."""
    q = faithful(x)
    scale, tensor_scale = q.scale, q.tensor_scale
    if double:
      if scale is not None:
        scale = _doubled(scale, fmt)
      elif tensor_scale is not None:
        tensor_scale = 2 * tensor_scale
    return ops.quantize_with(
      y,
      scale,
      fmt,
      tensor_scale=tensor_scale,
      zero_point=q.zero_point,
      minimum=q.minimum,
    )

  mutants = {
    'toward_zero': lambda x: ops.quantize(x, fmt, rounding='toward_zero'),
    'ties_away': lambda x: with_scales_of(
      x, x * jnp.asarray(1 + jnp.finfo(x.dtype).eps, x.dtype)
    ),
    'doubled_scale': lambda x: with_scales_of(x, x, double=True),
    'nan_to_zero': lambda x: faithful(jnp.nan_to_num(x, posinf=0, neginf=0)),
    'forgotten_tail': lambda x: faithful(x.at[:, -1:].set(0)),
    'bfloat16_input': lambda x: faithful(
      x.astype(jnp.bfloat16).astype(x.dtype)
    ),
  }
  if fmt.scale is not None:
    mutants['wrong_group'] = lambda x: wrong_group(faithful(x))
    mutants['spread_poison'] = lambda x: faithful(
      jnp.where(jnp.all(jnp.isfinite(x)), x, jnp.nan)
    )
  if fmt.element.bits == 4:
    mutants['swapped_nibbles'] = lambda x: swapped_nibbles(faithful(x))
  if fmt.tensor_scale:
    mutants['dropped_tensor_scale'] = lambda x: dropped_tensor_scale(
      faithful(x)
    )
  if isinstance(fmt.element, FloatFormat) and fmt.element.special != 'fnuz':
    mutants['lost_negative_zero'] = lambda x: faithful(
      jnp.where(x == 0, jnp.zeros_like(x), x)
    )
  return mutants


def stochastic_mutants(fmt: BlockFormat) -> dict[str, Callable]:
  """Faulty stochastic quantizers `(x, key) -> QArray | array` by name."""
  fmt = check_format(fmt)

  def draw(x, key, random_bits=RANDOM_BITS) -> QArray:
    return ops.quantize(
      x, fmt, rounding='stochastic', key=key, random_bits=random_bits
    )

  def shared_rows(x, key):
    """All rows with the noise of the first."""
    return jax.vmap(lambda row: ops.dequantize(draw(row, key)))(x)

  def shared_columns(x, key):
    """All columns with the noise of the first; scales are about one."""

    def column(v):
      return numerics.round_to(v, fmt.element, rounding='stochastic', key=key)

    return jax.vmap(column, in_axes=1, out_axes=1)(x)

  mutants = {
    'nearest': lambda x, key: ops.quantize(x, fmt),
    'toward_zero': lambda x, key: ops.quantize(x, fmt, rounding='toward_zero'),
    'ignored_key': lambda x, key: draw(x, jnp.zeros(2, jnp.uint32)),
    'one_random_bit': lambda x, key: draw(x, key, 1),
    'fresh_noise_each_call': _fresh(draw),
  }
  if not fmt.is_tile:
    mutants['shared_rows'] = shared_rows
    mutants['shared_columns'] = shared_columns
  return mutants


def dot_mutants(fmt: BlockFormat) -> dict[str, Callable]:
  """Faulty products `(x, q) -> array` by name; those that fit `fmt`."""
  fmt = check_format(fmt)

  def dense(q) -> jax.Array:
    return ops.dequantize(q, jnp.float32)

  def without_last_row(x, q):
    x = dense(x) if isinstance(x, QArray) else x
    return jnp.dot(x[:, :-1], dense(q)[:-1])

  def bfloat16_sum(x, q):
    x = dense(x) if isinstance(x, QArray) else x
    return jnp.dot(
      x.astype(jnp.bfloat16),
      dense(q).astype(jnp.bfloat16),
      preferred_element_type=jnp.float32,
    )

  mutants = {
    'last_row_forgotten': without_last_row,
    'bfloat16_operands': bfloat16_sum,
    'poison_ignored': lambda x, q: jnp.nan_to_num(ops.dot(x, q)),
    'transposed_result': lambda x, q: ops.dot(x, q).T,
  }
  if fmt.scale is not None:
    mutants['wrong_group'] = lambda x, q: ops.dot(x, wrong_group(q))
  if fmt.element.bits == 4:
    mutants['swapped_nibbles'] = lambda x, q: ops.dot(x, swapped_nibbles(q))
  if fmt.tensor_scale:
    mutants['dropped_tensor_scale'] = lambda x, q: ops.dot(
      x, dropped_tensor_scale(q)
    )
  return mutants


def swapped_nibbles(q: QArray) -> QArray:
  """The two codes of each byte exchanged."""
  return qarray.replace(q, codes=(q.codes << 4) | (q.codes >> 4))


def dropped_tensor_scale(q: QArray) -> QArray:
  """A tensor scale of one."""
  ones = jnp.ones_like(q.tensor_scale)  # pyright: ignore[reportArgumentType]
  return qarray.replace(q, tensor_scale=ones)


def wrong_group(q: QArray) -> QArray:
  """Every block with the scale of its neighbour."""

  def rolled(leaf):
    return jnp.roll(leaf.ravel(), 1).reshape(leaf.shape)

  return qarray.replace(q, scale=jax.tree.map(rolled, q.scale))


def _doubled(scale, fmt: BlockFormat):
  """Twice the scale, where it is finite."""
  if fmt.scale is None or not _scaling.is_coded(fmt.scale):
    return 2 * scale
  if fmt.has_exponent_scale:
    return jnp.where(scale < 254, scale + 1, scale)
  step = 1 << fmt.scale.mantissa_bits
  return jnp.where(scale < fmt.scale.code_max - step, scale + step, scale // 2)


def _fresh(draw) -> Callable:
  calls = iter(range(1 << 30))

  def fresh(x, key):
    del key
    return draw(x, jnp.asarray([next(calls), 0], np.uint32))

  return fresh
