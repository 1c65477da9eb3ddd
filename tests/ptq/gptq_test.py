"""GPTQ against the loop of its paper, in float64."""

import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

import lowbit_jax as lowbit
from lowbit_jax import formats, ptq
from lowbit_jax.formats import BlockFormat
from lowbit_jax.ptq import _gptq, _grid
from tests.ptq import problems

_INTEGERS = BlockFormat('integers', formats.int4, (0,), formats.float32)


def by_the_paper(w, moments, damping, order, nearest):
  """Rounds row after row by the inverse of H, as arXiv:2210.17323 has it.

  `nearest(k, row)` are the numbers that row k of the weight may become.
  """
  w, h = np.array(w, np.float64)[order], np.array(moments)[np.ix_(order, order)]
  h = h + damping * np.diag(h).mean() * np.eye(len(h))
  upper = np.linalg.cholesky(np.linalg.inv(h)).T
  out = np.empty_like(w)
  for k in range(len(w)):
    out[k] = nearest(order[k], w[k])
    error = (w[k] - out[k]) / upper[k, k]
    w[k:] -= np.outer(upper[k, k:], error)
  back = np.empty_like(out)
  back[order] = out
  return back


class GptqTest(parameterized.TestCase):
  def test_by_hand(self):
    """H = [[2, 1], [1, 2]], w = [.6, .6] to integers: [1, 0], not [1, 1]."""
    moments = np.array([[2.0, 1.0], [1.0, 2.0]])
    w = jnp.full((2, 1), 0.6)
    like = lowbit.quantize_with(w, jnp.ones((1, 1)), _INTEGERS, axis=-2)
    factor = _gptq.feedback(moments, 0)
    np.testing.assert_allclose(factor, [[0, 0.5], [0, 0]])
    q = _gptq.round_with_feedback(w, like, factor, np.arange(2))
    np.testing.assert_array_equal(lowbit.dequantize(q), [[1], [0]])
    difference = np.array([[0.4], [-0.6]])
    self.assertAlmostEqual(
      float((difference.T @ moments @ difference)[0, 0]), 0.56
    )

  @parameterized.product(
    name=('mxfp4', 'uint4_g32', 'int4_g128', 'q4_k'), ordered=(False, True)
  )
  def test_against_the_paper(self, name, ordered):
    layer = problems.layer(name, w=problems.weights(outputs=12))
    like, moments = layer.rounded(), np.asarray(layer.statistics.moments)
    grid = _grid.grid(like)
    size = _grid.block_size(like.fmt, problems.INPUTS)

    def nearest(k, row):
      rows = grid.rows(jnp.int32(k // size))
      return np.asarray(rows.nearest(jnp.float32(row), like.fmt.element))

    order = _gptq._order(moments) if ordered else np.arange(problems.INPUTS)
    want = by_the_paper(layer.weight, moments, 0.01, order, nearest)
    got = ptq.gptq(ordered=ordered)(layer).rounded()
    got = np.asarray(lowbit.dequantize(got))
    # Rows before the first one that lies next to a tie agree; a different one
    # changes all that follow.
    agree = np.isclose(got, want, rtol=1e-5, atol=1e-7).mean()
    self.assertGreater(agree, 0.98)
    error = lambda q: ptq.relative_error(
      layer.weight, _grid.with_values(jnp.float32(q), like), moments
    )
    self.assertAlmostEqual(error(got) / error(want), 1, delta=0.01)

  def test_feedback_is_that_of_the_inverse(self):
    moments = np.asarray(problems.layer('mxfp4').statistics.moments, np.float64)
    h = moments + 0.01 * np.diag(moments).mean() * np.eye(len(moments))
    upper = np.linalg.cholesky(np.linalg.inv(h)).T
    # Both factors say the same: (I + F)^-1 is U with ones on its diagonal.
    unit = upper / np.diag(upper)[:, None]
    own = np.eye(len(h)) + _gptq.feedback(moments, 0.01)
    np.testing.assert_allclose(own @ unit, np.eye(len(h)), atol=2e-5)

  @parameterized.parameters(*problems.FORMATS)
  def test_of_uncorrelated_inputs_it_is_the_nearest(self, name):
    layer = problems.layer(name)
    eye = jnp.eye(problems.INPUTS)
    layer = layer._replace(statistics=layer.statistics._replace(moments=eye))
    np.testing.assert_array_equal(
      lowbit.dequantize(ptq.gptq()(layer).rounded()),
      lowbit.dequantize(layer.rounded()),
    )

  def test_inputs_in_another_order(self):
    """Of one scale for each output the order says nothing: errors agree."""
    x, w = problems.activations(64), problems.weights(64)
    order = np.random.default_rng(0).permutation(64)
    one, other = (
      ptq.gptq()(problems.layer('int8_channel', *both)).error()
      for both in ((x, w), (x[:, order], w[order]))
    )
    self.assertAlmostEqual(one / other, 1, delta=1e-3)

  def test_larger_error_of_weights_and_smaller_one_of_outputs(self):
    """The claim of the paper."""
    layer = problems.layer('mxfp4')
    nearest, made = layer.rounded(), ptq.gptq()(layer).rounded()
    of_weights = [ptq.relative_error(layer.weight, q) for q in (nearest, made)]
    self.assertGreater(of_weights[1], of_weights[0])
    self.assertLess(ptq.gptq()(layer).error(), 0.6 * layer.error())

  def test_inputs_without_activations(self):
    x = problems.activations(64).at[:, 5].set(0)
    made = ptq.gptq()(problems.layer('mxfp4', x, problems.weights(64)))
    self.assertTrue(np.isfinite(lowbit.dequantize(made.rounded())).all())

  def test_wrong_calls(self):
    with self.assertRaisesRegex(ValueError, 'damping=-1'):
      ptq.gptq(-1)
    x = problems.activations(64, 8)  # fewer tokens than inputs
    layer = problems.layer('mxfp4', x, problems.weights(64))
    with self.assertRaisesRegex(ValueError, "'up/kernel' are singular"):
      ptq.gptq(0, ordered=False)(layer)
    self.assertLess(ptq.gptq()(layer).error(), layer.error())


if __name__ == '__main__':
  absltest.main()
