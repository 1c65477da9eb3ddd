"""update_slice against quantizing the parts by themselves."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import absltest, parameterized

import lowbit_jax
from lowbit_jax import formats, ops, qarray


def data(*shape, seed: int = 0) -> np.ndarray:
  x = np.random.RandomState(seed).standard_normal(shape)
  return x.astype(np.float32)


update_slice = jax.jit(ops.update_slice, static_argnums=2)
update_rows = jax.jit(lambda q, x, row: ops.update_slice(q, x, (row, 0)))


class UpdateSliceTest(parameterized.TestCase):
  def check(self, name):
    fmt = formats.get(name)
    rows = fmt.block[0] if fmt.is_tile else 2
    old, new = data(96, 64), 50 * data(rows, 64, seed=1)
    start = 32
    q = lowbit_jax.quantize(old, fmt)
    if fmt.is_tile:
      got = update_slice(q, new, (start, 0))
    else:
      got = update_rows(q, new, start)
    self.assertIs(qarray.validate(got), got)
    # Other rows keep their bits, the new ones are those of x under the held
    # tensor scale.
    want = np.array(lowbit_jax.dequantize(q))
    part = lowbit_jax.quantize(new, fmt, tensor_scale=q.tensor_scale)
    want[start : start + rows] = lowbit_jax.dequantize(part)
    np.testing.assert_array_equal(lowbit_jax.dequantize(got), want)

  @parameterized.parameters('nvfp4', 'uint4_g32', 'mxfp4_32x32')
  def test_changes_the_part_alone(self, name):
    self.check(name)

  @parameterized.parameters('int8_channel', 'e4m3fn_tensor')
  @pytest.mark.slow
  def test_changes_the_part_alone_in_more_formats(self, name):
    self.check(name)

  def test_a_whole_block_of_the_block_axis(self):
    q = lowbit_jax.quantize(data(4, 64), formats.nvfp4)
    x = data(4, 16, seed=2)
    got = lowbit_jax.dequantize(update_slice(q, x, (0, 48)))
    part = lowbit_jax.quantize(x, q.fmt, tensor_scale=q.tensor_scale)
    np.testing.assert_array_equal(got[:, 48:], lowbit_jax.dequantize(part))
    np.testing.assert_array_equal(got[:, :48], lowbit_jax.dequantize(q)[:, :48])

  def test_a_stack_is_mapped(self):
    stack = jax.vmap(lambda x: ops.quantize(x, formats.nvfp4))(data(3, 4, 64))
    x = data(3, 1, 64, seed=3)
    got = jax.jit(jax.vmap(lambda q, x: ops.update_slice(q, x, (1, 0))))(
      stack, x
    )
    one = update_slice(stack[2], x[2], (1, 0))
    np.testing.assert_array_equal(
      lowbit_jax.dequantize(got[2]), lowbit_jax.dequantize(one)
    )

  def test_refusals_name_the_remedy(self):
    q = jax.eval_shape(
      lambda x: ops.quantize(x, formats.mxfp4), jnp.zeros((4, 96))
    )
    rows = jax.eval_shape(
      lambda x: ops.quantize(x, formats.get('int8_channel')), jnp.zeros((4, 96))
    )
    stack = jax.eval_shape(
      jax.vmap(lambda x: ops.quantize(x, formats.nvfp4)), jnp.zeros((3, 4, 96))
    )
    for given, shape, start, error, message in (
      (np.zeros((4, 96)), (1, 96), (0, 0), TypeError, 'QArray'),
      (q, (96,), (0, 0), ValueError, 'rank'),
      (q, (5, 96), (0, 0), ValueError, 'fit'),
      (q, (1, 96), (0,), ValueError, 'each axis'),
      (q, (1, 32), (0, 16), ValueError, 'multiples of 32'),
      (q, (1, 16), (0, 32), ValueError, 'multiples of 32'),
      (q, (1, 32), (0, 96), ValueError, 'multiples of 32'),
      (q, (1, 32), (0, jnp.int32(0)), TypeError, 'must be an int'),
      (rows, (1, 32), (0, 0), ValueError, 'multiples of 96'),
      (stack, (3, 1, 96), (0, 0, 0), ValueError, 'vmap'),
    ):
      with self.subTest(message), self.assertRaisesRegex(error, message):
        jax.eval_shape(
          lambda q, x, start=start: ops.update_slice(q, x, start),
          given,
          jax.ShapeDtypeStruct(shape, jnp.float32),
        )


if __name__ == '__main__':
  absltest.main()
