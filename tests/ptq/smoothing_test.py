"""Ranges that move into weights: against float64, and what they are for."""

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

import lowbit_jax as lowbit
from lowbit_jax import formats, ptq, transforms
from lowbit_jax.ptq import _statistics
from lowbit_jax.recipe import QuantSpec
from tests.ptq import blocks, language_models, problems

_DOWN = {'up/kernel': ('down/kernel',)}


def smoothed(params=None, followers=blocks.FOLLOWERS, **options):
  params = blocks.params() if params is None else params
  return ptq.smooth(
    params,
    blocks.observed(params),
    followers,
    **{'head_size': blocks.HEAD_SIZE} | options,
  )


def statistics(observed, name):
  return jax.tree.map(
    lambda leaf: np.asarray(leaf, np.float64),
    _statistics.of_leaf(observed, f'blocks/{name}/kernel'),
  )


def normalized(a, b, strength=0.5):
  """The scale of 'rms', of sums of squares."""
  s = a ** (strength / 2) / b ** ((1 - strength) / 2)
  return np.clip(s / np.exp(np.log(s).mean(-1, keepdims=True)), 1 / 64, 64)


def by_kv_head(x):
  """Sums of the inputs of `out` over heads that share a value."""
  groups = blocks.HEADS // blocks.KV_HEADS
  heads = x.reshape(-1, blocks.KV_HEADS, groups, blocks.HEAD_SIZE)
  return heads.sum(2).reshape(len(x), -1)


class ScalesTest(parameterized.TestCase):
  @parameterized.parameters(0.3, 0.5, 1.0)
  def test_against_float64(self, strength):
    """Folded in the order of the recipe: down, out, then the norm."""
    params = blocks.params()
    observed = blocks.observed(params)
    got, _ = smoothed(params, strength=strength)
    w = {
      name: np.asarray(params[f'blocks/{name}/kernel'], np.float64)
      for name in ('value', 'out', 'gate', 'up', 'down')
    }
    square = lambda name: statistics(observed, name).rms ** 2
    s = normalized(square('down'), (w['down'] ** 2).sum(-1), strength)
    w['up'], w['down'] = w['up'] / s[:, None], w['down'] * s[..., None]
    s = normalized(
      by_kv_head(square('out')), by_kv_head((w['out'] ** 2).sum(-1)), strength
    )
    heads = s.reshape(-1, blocks.KV_HEADS, 1, blocks.HEAD_SIZE)
    heads = heads.repeat(2, 2).reshape(len(s), -1)
    w['value'], w['out'] = w['value'] / s[:, None], w['out'] * heads[..., None]
    rows = sum((w[name] ** 2).sum(-1) for name in ('value', 'gate', 'up'))
    s = normalized(square('up'), rows, strength)
    norm = np.asarray(params['blocks/norm/scale'], np.float64) / s
    np.testing.assert_allclose(got['blocks/norm/scale'], norm, rtol=1e-5)
    for name, value in w.items():
      if name in ('value', 'gate', 'up'):
        value = value * s[..., None]
      kernel = got[f'blocks/{name}/kernel']
      np.testing.assert_allclose(kernel, value, rtol=1e-5, err_msg=name)

  @parameterized.parameters(0.5, 0.75)
  def test_those_of_smooth_quant(self, strength):
    params = blocks.params()
    amax = statistics(blocks.observed(params), 'down').amax
    got, _ = smoothed(params, _DOWN, strength=strength, statistic='amax')
    kernel = params['blocks/down/kernel']
    for i in range(blocks.BLOCKS):
      want = transforms.smooth_quant(
        jnp.float32(amax[i]), abs(kernel[i]).max(-1), strength=strength
      ).apply_dual(kernel[i])
      np.testing.assert_allclose(got['blocks/down/kernel'][i], want, rtol=1e-5)

  @parameterized.parameters('rms', 'amax')
  def test_both_ranges_become_alike(self, statistic):
    """At strength .5: those of activations and of weights, up to a factor."""
    got, observed = smoothed(followers=_DOWN, statistic=statistic)
    kernel, seen = got['blocks/down/kernel'], statistics(observed, 'down')
    if statistic == 'amax':
      ratio = seen.amax / abs(kernel).max(-1)
    else:
      ratio = seen.rms / np.linalg.norm(kernel, axis=-1)
      ratio /= ratio.mean(-1, keepdims=True)
    np.testing.assert_allclose(ratio, 1, rtol=1e-4)

  def test_channels_without_activations_or_weights_stay(self):
    params = blocks.params()
    up, down = (f'blocks/{name}/kernel' for name in ('up', 'down'))
    params[up] = params[up].at[:, :, 3].set(0)
    params['blocks/up/bias'] = params['blocks/up/bias'].at[:, 3].set(0)
    params[down] = params[down].at[:, 5].set(0)
    for statistic in ('rms', 'amax'):
      got, _ = smoothed(params, _DOWN, statistic=statistic)
      np.testing.assert_array_equal(got[down][:, 3], params[down][:, 3])
      np.testing.assert_array_equal(got[up][..., 5], params[up][..., 5])

  def test_scales_are_at_most_64(self):
    params = blocks.params()
    up, down = (f'blocks/{name}/kernel' for name in ('up', 'down'))
    params[up] = params[up].at[..., 3].multiply(1e8)
    got, _ = smoothed(params, _DOWN)
    ratio = np.asarray(got[down] / params[down])
    np.testing.assert_allclose(ratio[:, 3], 64, rtol=1e-5)
    self.assertLessEqual(ratio.max(), 64 * (1 + 1e-5))


class FunctionTest(parameterized.TestCase):
  @parameterized.product(statistic=('rms', 'amax'), strength=(0.0, 0.5, 1.0))
  def test_outputs_and_statistics(self, statistic, strength):
    """Outputs stay, and statistics are those of another calibration."""
    params, x = blocks.params(), blocks.activations()
    got, observed = smoothed(statistic=statistic, strength=strength)
    out = blocks.apply(got, x)
    self.assertLess(blocks.relative(out, blocks.apply(params, x)), 1e-5)
    again = blocks.observed(got)
    self.assertEqual(observed.keys(), again.keys())
    for path in observed:
      jax.tree.map(
        lambda a, b: np.testing.assert_allclose(
          a, b, rtol=1e-4, atol=2e-6 * abs(b).max()
        ),
        observed[path],
        again[path],
      )

  @parameterized.named_parameters(
    ('plain', {'biases': ('query', 'key', 'value', 'up')}),
    ('experts', {'experts': 4, 'chosen': 2}),
  )
  def test_llama(self, options):
    model, params = language_models.logits(language_models.llamas(**options))
    x = language_models.tokens()
    observed = ptq.calibrate(model, params, [x])
    got, _ = ptq.smooth(
      params,
      observed,
      language_models.OF_LLAMA,
      head_size=language_models.HEAD_SIZE,
    )
    self.assertEqual(jax.tree.structure(got), jax.tree.structure(params))
    self.assertLess(blocks.relative(model(got, x), model(params, x)), 1e-5)

  def test_experts_share_what_stands_before_them(self):
    """As one kernel with the outputs of all, for what all of them saw."""
    source = np.random.default_rng(0)
    w = jnp.float32(source.standard_normal((3, 16, 8)))
    x = jnp.float32(source.standard_normal((40, 16))) * jnp.arange(1, 17)
    sizes = jnp.array([30, 0, 10])
    norm = {'norm/scale': jnp.ones(16)}
    followers = {'norm/scale': ('up/kernel',)}

    def of_experts(params, x):
      return jax.lax.ragged_dot(
        x * params['norm/scale'], params['up/kernel'], sizes
      )

    def of_one(params, x):
      return x * params['norm/scale'] @ params['up/kernel']

    scales = []
    for model, kernel in (
      (of_experts, w),
      (of_one, jnp.concatenate(list(w), -1)),
    ):
      params = norm | {'up/kernel': kernel}
      observed = ptq.calibrate(model, params, [x])
      got, _ = ptq.smooth(params, observed, followers)
      scales.append(got['norm/scale'])
      self.assertLess(blocks.relative(model(got, x), model(params, x)), 1e-5)
    np.testing.assert_allclose(*scales, rtol=1e-5)

  def test_errors_of_four_bits_become_less(self):
    """Of a product in MXFP4: inputs have outliers, with smaller weights."""
    source = np.random.default_rng(0)
    outliers = np.where(np.arange(128) % 16, 1, 30)
    x = jnp.float32(source.standard_normal((512, 128)))
    kernel = source.standard_normal((128, 64)) / outliers[:, None] ** 0.5
    params = {
      'norm/scale': jnp.float32(outliers),
      'up/kernel': jnp.float32(kernel),
    }

    def model(params, x):
      return x * params['norm/scale'] @ params['up/kernel']

    def error(params):
      operands = x * params['norm/scale'], params['up/kernel']
      rounded = [
        jnp.asarray(lowbit.quantize(a, formats.mxfp4, axis=axis))
        for a, axis in zip(operands, (-1, -2), strict=True)
      ]
      want = np.asarray(operands[0] @ operands[1])
      return ((rounded[0] @ rounded[1] - want) ** 2).sum() / (want**2).sum()

    observed = ptq.calibrate(model, params, [x])
    before, followers = error(params), {'norm/scale': ('up/kernel',)}
    for statistic in ('rms', 'amax'):
      got, _ = ptq.smooth(params, observed, followers, statistic=statistic)
      self.assertLess(error(got), 0.2 * before)


class ScaleInputsTest(parameterized.TestCase):
  @parameterized.parameters(0.3, 0.5, 1.0)
  def test_against_float64(self, strength):
    layer = problems.layer('nvfp4')
    made = ptq.scale_inputs(strength=strength)(layer)
    x = np.asarray(problems.activations(), np.float64)
    w = np.asarray(layer.weight, np.float64)
    s = normalized((x**2).mean(0), (w**2).sum(1), strength)
    (transform,) = made.transforms
    np.testing.assert_allclose(transform.scale, s, rtol=1e-4)
    np.testing.assert_allclose(made.weight, w * s[:, None], rtol=1e-4)

  def test_errors_of_activations_and_weights_become_less(self):
    layer = problems.layer('mxfp4')
    x = problems.activations()
    x *= jnp.exp(jax.random.normal(jax.random.key(0), (x.shape[1],)))

    def error(step):
      params = problems.params(layer.weight)
      observed = ptq.calibrate(problems.model, params, [x])
      (path,) = observed
      seen = _statistics.of_leaf(observed, path)
      stored = step(layer._replace(statistics=seen)).stored()
      spec = QuantSpec(formats.mxfp4, scale_rule='mse')
      product = lowbit.nn.dot_general(lhs=spec)
      got, want = product(x, stored, (((1,), (0,)), ((), ()))), x @ layer.weight
      return float(jnp.sum((got - want) ** 2) / jnp.sum(want**2))

    plain = error(ptq.rtn('mse'))
    scaled = error(ptq.chain(ptq.scale_inputs(), ptq.rtn('mse')))
    self.assertLess(scaled, 0.7 * plain)

  def test_wrong_calls(self):
    with self.assertRaisesRegex(ValueError, 'strength=-1'):
      ptq.scale_inputs(strength=-1)
    layer = problems.layer('nvfp4')._replace(statistics=None)
    self.assertIs(ptq.scale_inputs()(layer), layer)


class WrongCallsTest(absltest.TestCase):
  def test_arguments(self):
    for message, options in (
      ('strength=1.5', {'strength': 1.5}),
      ("statistic='mean'", {'statistic': 'mean'}),
      ('folds nothing', {'followers': {'a/kernel': ('b/kernel',)}}),
      ('head_size=None', {'head_size': None}),
    ):
      with self.assertRaisesRegex(ValueError, message):
        smoothed(**options)

  def test_statistics(self):
    params = blocks.params()
    observed = blocks.observed(params)
    one = {
      path: jax.tree.map(lambda leaf: leaf[0], seen)
      for path, seen in observed.items()
    }
    with self.assertRaisesRegex(ValueError, 'scans over the layers'):
      ptq.smooth(params, one, _DOWN)
    del observed['blocks/down/kernel']
    with self.assertRaisesRegex(ValueError, "no activations .*'blocks/down/k"):
      ptq.smooth(params, observed, _DOWN)


if __name__ == '__main__':
  absltest.main()
