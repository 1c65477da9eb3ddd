"""Laws of every method: what it stores is of the format, and no worse."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import absltest, parameterized

import lowbit_jax as lowbit
from lowbit_jax import formats, nn, ptq
from tests.ptq import problems

STEPS = {
  'rtn': ptq.rtn(),
  'search_scales': ptq.search_scales(),
  'importance': ptq.search_scales(weighted=True),
  'clip': ptq.clip(99),
  'adaround': ptq.adaround(steps=200, learning_rate=0.05),
  'awq': ptq.awq(),
  'gptq': ptq.gptq(),
  'refine': ptq.chain(ptq.gptq(), ptq.refine(sweeps=1)),
  'gptq in order': ptq.gptq(ordered=False),
  'hadamard': ptq.hadamard(32),
  'duquant': ptq.duquant(steps=16, key=jax.random.key(0)),
  'scale_inputs': ptq.scale_inputs(),
  'permute': ptq.permute(),
  'permute by ratios': ptq.permute('ratios'),
  'mr_gptq': ptq.chain(ptq.hadamard(32), ptq.search_scales(), ptq.gptq()),
}
# Those that may be worse than rounding to the nearest for activations that no
# method has seen the like of.
_NOT_ALWAYS_BETTER = (
  *('search_scales', 'clip', 'hadamard', 'duquant', 'scale_inputs'),
  *('permute', 'permute by ratios'),
)


class MethodsTest(parameterized.TestCase):
  @parameterized.product(name=tuple(STEPS), fmt=('mxfp4', 'nvfp4', 'uint4_g32'))
  def test_error_is_at_most_that_of_the_nearest(self, name, fmt):
    self.check_error(name, fmt)

  @parameterized.product(name=tuple(STEPS), fmt=problems.FORMATS)
  @pytest.mark.slow
  def test_errors_of_more_formats(self, name, fmt):
    self.check_error(name, fmt)

  def check_error(self, name, fmt):
    layer = problems.layer(fmt)
    made = STEPS[name](layer)
    self.assertEqual(made.rounded().fmt, layer.rounded().fmt)
    x = problems.activations()
    error = problems.output_error(x, layer.weight, made.stored())
    if name not in _NOT_ALWAYS_BETTER:
      nearest = problems.output_error(x, layer.weight, layer.rounded())
      self.assertLessEqual(error, nearest * (1 + 1e-6))
    np.testing.assert_allclose(made.error(), error, rtol=1e-3)

  @parameterized.parameters(*STEPS)
  def test_same_bits_again(self, name):
    first, second = (
      STEPS[name](problems.layer('nvfp4')).rounded() for _ in range(2)
    )
    jax.tree.map(np.testing.assert_array_equal, first, second)

  @parameterized.parameters(*STEPS)
  def test_layers_without_statistics(self, name):
    """They fall back to what needs none."""
    layer = problems.layer('mxfp4')._replace(statistics=None)
    made = STEPS[name](layer)
    self.assertTrue(np.isfinite(jnp.asarray(made.stored())).all())

  @parameterized.product(name=tuple(STEPS), dtype=(jnp.float32, jnp.bfloat16))
  def test_in_a_tree(self, name, dtype):
    """The stored weight multiplies like any other, in the dtype of the leaf."""
    w, x = problems.weights().astype(dtype), problems.activations()
    observed = ptq.calibrate(problems.model, problems.params(w), [x])
    seen = []
    method = ptq.method(STEPS[name], observed, seen.append)
    made = nn.quantize_params(
      problems.params(w), None, formats.mxfp4, method=method
    )['up']['kernel']
    self.assertEqual((made.shape, made.dtype), (w.shape, w.dtype))
    got = lowbit.dot(x, made)
    want = x @ jnp.asarray(made.astype(jnp.float32))
    np.testing.assert_allclose(got, want, atol=1e-4 * abs(want).max())
    self.assertEqual(seen[0].path, problems.PATH)

  @parameterized.parameters(*STEPS)
  def test_inputs_that_no_block_divides(self, name):
    """Where the transform can, a padded block rounds as others do."""
    if name in ('hadamard', 'duquant', 'mr_gptq'):
      return
    w = problems.weights(inputs=80)
    layer = problems.layer('mxfp4', problems.activations(80), w)
    made = STEPS[name](layer).rounded()
    self.assertEqual(made.shape, w.shape)
    self.assertLess(STEPS[name](layer).error(), 0.05)


class TreesTest(parameterized.TestCase):
  def test_weights_of_experts(self):
    """One matrix after the other, and one that saw no token is rounded to the
    nearest."""
    w = jnp.stack([problems.weights(64, 8, seed) for seed in range(3)])
    x = problems.activations(64, 40)
    sizes = jnp.array([30, 0, 10])
    model = lambda params, x: jax.lax.ragged_dot(x, params['experts'], sizes)
    observed = ptq.calibrate(model, {'experts': w}, [x])
    seen = []
    made = nn.quantize_params(
      {'experts': w},
      'experts',
      formats.mxfp4,
      axis=-2,
      method=ptq.method(ptq.gptq(), observed, seen.append),
    )['experts']
    self.assertEqual(
      [layer.path for layer in seen], [f'experts/{i}' for i in range(3)]
    )
    self.assertEqual(
      [layer.statistics is None for layer in seen], [False, True, False]
    )
    nearest = lowbit.quantize(w, formats.mxfp4, axis=-2)
    np.testing.assert_array_equal(made.codes[1], nearest.codes[1])
    self.assertTrue((made.codes[0] != nearest.codes[0]).any())

  def test_layers_of_a_scan(self):
    w = jnp.stack([problems.weights(64, 64, seed) / 8 for seed in range(3)])
    x = problems.activations(64, 512)

    def model(params, x):
      return jax.lax.scan(lambda x, w: (x @ w, None), x, params['kernel'])[0]

    observed = ptq.calibrate(model, {'kernel': w}, [x[:256], x[256:]])
    step = ptq.gptq()
    made = nn.quantize_params(
      {'kernel': w},
      None,
      formats.nvfp4,
      stacked='kernel',
      method=ptq.method(step, observed),
    )['kernel']
    for i in range(3):
      alone = step(problems.layer('nvfp4', x, w[i])).rounded()
      np.testing.assert_array_equal(made[i].codes, alone.codes)
      x = x @ w[i]

  def test_a_table_by_its_columns(self):
    """Blocks along the last axis of an embedding that is the head."""
    w, x = problems.weights(64, 40).T, problems.activations(64, 512)
    model = lambda params, x: x @ params['embedding'].T
    observed = ptq.calibrate(model, {'embedding': w}, [x])
    for step in (ptq.gptq(), STEPS['mr_gptq']):
      made = nn.quantize_params(
        {'embedding': w},
        'embedding',
        formats.mxfp4,
        axis=-1,
        method=ptq.method(step, observed),
      )['embedding']
      layer = problems.layer('mxfp4', x, w.T)
      np.testing.assert_array_equal(
        jnp.asarray(made).T, jnp.asarray(step(layer).stored())
      )

  def test_several_axes_that_are_contracted(self):
    """(heads, size, out): activations meet all heads at once."""
    w = problems.weights(96, 24).reshape(3, 32, 24)
    x = problems.activations(96, 512)
    model = lambda params, x: jnp.einsum(
      'thd,hdo->to', x.reshape(-1, 3, 32), params['kernel']
    )
    observed = ptq.calibrate(model, {'kernel': w}, [x])
    made = nn.quantize_params(
      {'kernel': w},
      None,
      formats.mxfp4,
      axis=-2,
      method=ptq.method(ptq.gptq(), observed),
    )['kernel']
    want = ptq.gptq()(problems.layer('mxfp4', x, w.reshape(96, 24))).rounded()
    np.testing.assert_array_equal(
      jnp.asarray(made).reshape(96, 24), jnp.asarray(want)
    )


class CalibrationTest(parameterized.TestCase):
  def test_against_float64(self):
    x = problems.activations()
    layer = problems.layer('mxfp4', x)
    exact = np.asarray(x, np.float64)
    seen = layer.statistics
    self.assertEqual(float(seen.seen), len(x))
    moments = exact.T @ exact / len(x)
    # Sums of n products in float32 are within n u of those of magnitudes.
    bound = len(x) * 2.0**-24 * (abs(exact).T @ abs(exact)) / len(x)
    self.assertTrue((abs(seen.moments - moments) <= bound).all())
    np.testing.assert_allclose(seen.mean, exact.mean(0), atol=1e-5)
    np.testing.assert_array_equal(seen.amax, abs(x).max(0))

  def test_holds_as_much_however_many_batches(self):
    inputs, tokens = 37, 53  # shapes that no other array has
    w, counts = problems.weights(inputs, 5), []

    def batches():
      for seed in range(6):
        shapes = [x.shape for x in jax.live_arrays()]
        seen = ((inputs, inputs), (tokens, inputs))
        counts.append([shapes.count(shape) for shape in seen])
        yield jnp.asarray(np.full((tokens, inputs), seed, np.float32))

    observed = ptq.calibrate(problems.model, problems.params(w), batches())
    self.assertLen(observed, 1)
    # The sum and that of the last batch, and the last batch itself.
    self.assertTrue((np.array(counts) <= [2, 1]).all(), counts)

  def test_batches_in_any_order_and_with_a_break(self):
    w, x = problems.weights(), problems.activations()
    parts = [x[:512], x[512:600], x[600:]]
    run = lambda batches, before=None: ptq.calibrate(
      problems.model, problems.params(w), batches, observed=before
    )
    whole, parted = run([x]), run(parts)
    backwards, resumed = run(parts[::-1]), run(parts[1:], run(parts[:1]))
    jax.tree.map(np.testing.assert_array_equal, parted, resumed)
    for other in (parted, backwards):
      jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6 * abs(a).max()),
        whole,
        other,
      )

  def test_wrong_calls(self):
    w, x = problems.weights(), problems.activations()
    params = problems.params(w)
    with self.assertRaisesRegex(ValueError, 'batches is empty'):
      ptq.calibrate(problems.model, params, [])
    with self.assertRaisesRegex(ValueError, 'multiplies no weight'):
      ptq.calibrate(lambda params, x: x, params, [x])
    with self.assertRaisesRegex(ValueError, "'up/kernel' have NaN or Inf"):
      ptq.calibrate(problems.model, params, [x.at[3, 4].set(jnp.nan)])
    observed = ptq.calibrate(problems.model, params, [x])
    method = ptq.method(ptq.gptq(), observed)
    with self.assertRaisesRegex(ValueError, "no activations .* 'down'"):
      method('down', w, formats.mxfp4, -2)
    with self.assertRaisesRegex(ValueError, 'for all of them together'):
      method('up/kernel/3', w, formats.mxfp4, -2)
    with self.assertRaisesRegex(ValueError, 'one axis'):
      method('up/kernel', w, formats.get('fp8_128x128'), (-2, -1))
    with self.assertRaisesRegex(ValueError, 'do not fit a weight'):
      method('up/kernel', w[:100], formats.mxfp4, -2)
    with self.assertRaisesRegex(TypeError, 'is no step'):
      ptq.chain(ptq.gptq(), None)
    with self.assertRaisesRegex(TypeError, 'select=3'):
      ptq.masked(ptq.gptq(), 3)


class CombinationTest(absltest.TestCase):
  def test_masked(self):
    step = ptq.masked(ptq.gptq(), 'up')
    layer = problems.layer('mxfp4')
    self.assertIsNotNone(step(layer).quantized)
    self.assertIsNone(step(layer._replace(path='down/kernel')).quantized)
    step = ptq.masked(ptq.gptq(), lambda path: path.endswith('3'))
    self.assertIsNone(step(layer).quantized)

  def test_chain(self):
    layer = problems.layer('mxfp4')
    one = ptq.chain(ptq.search_scales(), ptq.gptq())(layer)
    other = ptq.gptq()(ptq.search_scales()(layer))
    np.testing.assert_array_equal(one.rounded().codes, other.rounded().codes)


if __name__ == '__main__':
  absltest.main()
