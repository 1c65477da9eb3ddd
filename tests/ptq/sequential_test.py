"""Block after block, against a loop that takes every step by hand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

import lowbit_jax as lowbit
from lowbit_jax import formats, nn, ptq
from tests.ptq import problems

_WIDTH, _HIDDEN, _BLOCKS = 64, 128, 3
_STAGES = 'up', 'down'


def block(params, x):
  """Linear layers keep their activations in float."""
  h = jax.nn.relu(lowbit.dot(x, params['up']['kernel']))
  return x + lowbit.dot(h, params['down']['kernel'])


def blocks():
  made = []
  for i in range(_BLOCKS):
    up = problems.weights(_WIDTH, _HIDDEN, 2 * i) / 8
    down = problems.weights(_HIDDEN, _WIDTH, 2 * i + 1) / 16
    made.append({'up': {'kernel': up}, 'down': {'kernel': down}})
  return made


def quantize(fmt, step, params, select, observed):
  return nn.quantize_params(
    params, select, fmt, method=ptq.method(step, observed)
  )


class SequentialTest(parameterized.TestCase):
  def test_by_hand(self):
    x = [problems.activations(_WIDTH, 256, seed) for seed in range(2)]
    step = functools.partial(quantize, formats.mxfp4, ptq.gptq())
    made = list(ptq.sequential(block, blocks(), x, step, _STAGES))
    for own, got in zip(blocks(), made, strict=True):
      for stage in _STAGES:
        observed = ptq.calibrate(block, own, x, select=stage)
        self.assertEqual(list(observed), [f'{stage}/kernel'])
        own = step(own, stage, observed)
      jax.tree.map(np.testing.assert_array_equal, got, own)
      x = [block(own, part) for part in x]

  def test_outputs_change_less_than_on_the_float_model(self):
    """The claim: later layers make up for the errors of earlier ones."""
    x = problems.activations(_WIDTH, 2048)
    step = functools.partial(quantize, formats.get('int3_g32'), ptq.gptq())
    made = list(ptq.sequential(block, blocks(), [x], step, _STAGES))
    apart, meets = [], x
    for own in blocks():
      observed = ptq.calibrate(block, own, [meets])
      apart.append(step(own, 'kernel', observed))
      meets = block(own, meets)

    def error(params):
      got = x
      for own in params:
        got = block(own, got)
      return float(jnp.sum((got - meets) ** 2))

    self.assertLess(error(made), 0.95 * error(apart))

  def test_rounding(self):
    """Statistics are those of what the weight will meet."""
    rotation = lowbit.transforms.Hadamard(32)

    def rounding(x):
      rotated = lowbit.fake_quant(rotation.apply(x), formats.mxfp4, axis=-1)
      return rotation.inverse(rotated)

    x, own = problems.activations(_WIDTH, 256), blocks()[0]
    observed = ptq.calibrate(block, own, [x], select='up', rounding=rounding)
    seen = ptq._statistics.of_leaf(observed, 'up/kernel')
    rounded = np.asarray(rounding(x), np.float64)
    np.testing.assert_allclose(
      seen.moments, rounded.T @ rounded / len(x), rtol=0, atol=1e-5
    )
    rotated = seen.transformed(rotation)
    met = lowbit.fake_quant(rotation.apply(x), formats.mxfp4, axis=-1)
    met = np.asarray(met, np.float64)
    np.testing.assert_allclose(
      rotated.moments, met.T @ met / len(x), rtol=0, atol=1e-5
    )

  def test_rounding_of_the_rows_of_experts(self):
    w = jnp.stack([problems.weights(64, 8, seed) for seed in range(2)])
    x, sizes = problems.activations(64, 40), jnp.array([30, 10])
    model = lambda params, x: jax.lax.ragged_dot(x, params['experts'], sizes)
    rounding = lambda x: lowbit.fake_quant(x, formats.mxfp4, axis=-1)
    observed = ptq.calibrate(model, {'experts': w}, [x], rounding=rounding)
    plain = ptq.calibrate(model, {'experts': w}, [rounding(x)])
    jax.tree.map(np.testing.assert_array_equal, observed, plain)

  def test_wrong_calls(self):
    step = functools.partial(quantize, formats.mxfp4, ptq.gptq())
    x = problems.activations(_WIDTH, 8)
    for inputs, stages, why in (
      ([], _STAGES, 'inputs is empty'),
      ([x], (), 'stages is empty'),
      ([x], ('side',), 'multiplies no weight'),
    ):
      with self.assertRaisesRegex(ValueError, why):
        list(ptq.sequential(block, blocks(), inputs, step, stages))


if __name__ == '__main__':
  absltest.main()
