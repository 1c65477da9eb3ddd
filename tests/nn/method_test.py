"""quantize_params and nnx.quantize with a method of one's own."""

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest
from flax import nnx as flax_nnx

import lowbit_jax as lowbit
from lowbit_jax import formats, nn, testing

FMT = formats.mxfp4


def _rand(*shape):
  return np.random.default_rng(sum(shape)).standard_normal(shape, np.float32)


def _halves(path, w, fmt, axis):
  """Scales of half the size: another result than that of `quantize`."""
  del path
  scale = lowbit.quantize(w, fmt, axis=axis).scale
  return lowbit.quantize_with(w, scale - 1, fmt, axis=axis)


class MethodTest(absltest.TestCase):
  def test_its_result_is_stored(self):
    w, seen = _rand(64, 8), []

    def method(path, w, fmt, axis):
      seen.append((path, w.shape, fmt, axis))
      return _halves(path, w, fmt, axis)

    params = {'Dense_0': {'kernel': w}, 'norm': {'scale': _rand(64)}}
    q = nn.quantize_params(params, None, FMT, method=method)
    self.assertEqual(seen, [('Dense_0/kernel', (64, 8), FMT, -2)])
    testing.assert_trees_bits_equal(
      q['Dense_0']['kernel'], _halves('', w, FMT, -2)
    )
    np.testing.assert_array_equal(q['norm']['scale'], params['norm']['scale'])

  def test_stacked_layers_come_one_by_one(self):
    w, seen = _rand(2, 3, 64, 8), []

    def method(path, w, fmt, axis):
      seen.append((path, w.shape))
      return _halves(path, w, fmt, axis)

    q = nn.quantize_params(
      {'layers': {'conv': {'kernel': w[0]}}}, None, FMT, stacked='^layers/',
      method=method,
    )['layers']['conv']['kernel']  # fmt: skip
    self.assertEqual(
      seen, [(f'layers/conv/kernel/{i}', (64, 8)) for i in range(3)]
    )
    want = jax.vmap(lambda w: _halves('', w, FMT, -2))(w[0])
    testing.assert_trees_bits_equal(q, want)

  def test_modules_of_nnx(self):
    model = flax_nnx.Linear(64, 8, rngs=flax_nnx.Rngs(0))
    w = model.kernel.get_raw_value()
    nn.nnx.quantize(model, None, FMT, method=_halves)
    testing.assert_trees_bits_equal(
      model.kernel.get_raw_value(), _halves('', w, FMT, -2)
    )

  def test_results_that_do_not_stand_for_the_leaf_are_refused(self):
    params = {'kernel': _rand(64, 8)}

    def quantize(method, **options):
      return nn.quantize_params(params, None, FMT, method=method, **options)

    with self.assertRaisesRegex(TypeError, "ndarray for 'kernel'"):
      quantize(lambda path, w, fmt, axis: w)
    with self.assertRaisesRegex(ValueError, 'both must agree'):
      quantize(lambda path, w, fmt, axis: lowbit.quantize(w[:32], fmt, axis=0))
    with self.assertRaisesRegex(ValueError, 'both must agree'):
      quantize(
        lambda path, w, fmt, axis: lowbit.quantize(
          w.astype(jnp.bfloat16), fmt, axis=0
        )
      )
    with self.assertRaisesRegex(ValueError, "scale_rule='mse'.*method"):
      quantize(_halves, scale_rule='mse')


if __name__ == '__main__':
  absltest.main()
