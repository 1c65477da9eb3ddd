"""Blocks that are rounded anew, against every choice there is."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import absltest, parameterized

import lowbit_jax as lowbit
from lowbit_jax import formats, ptq
from lowbit_jax.formats import BlockFormat
from lowbit_jax.ptq import _gptq, _refinement, _scales
from tests.ptq import problems

_INTEGERS = BlockFormat('integers', formats.get('int3'), (4,), formats.float32)


def _error(weight, q, moments) -> np.ndarray:
  """Of each output, in float64."""
  difference = np.asarray(lowbit.dequantize(q), np.float64) - weight
  return np.einsum('io,ij,jo->o', difference, moments, difference)


class RefineTest(parameterized.TestCase):
  @parameterized.parameters('mxfp4', 'nvfp4', 'uint4_g32')
  def test_error_of_no_output_grows(self, name):
    self.check_errors(name)

  @parameterized.parameters(*problems.FORMATS)
  @pytest.mark.slow
  def test_errors_of_more_formats(self, name):
    self.check_errors(name)

  def check_errors(self, name):
    layer = ptq.gptq()(problems.layer(name))
    moments = _gptq.damped(np.asarray(layer.statistics.moments), 0.01)
    before, after = (
      _error(layer.weight, q, moments)
      for q in (layer.rounded(), ptq.refine()(layer).rounded())
    )
    self.assertTrue((after <= before * (1 + 1e-4)).all())
    self.assertLess(after.sum(), 0.98 * before.sum())

  @parameterized.parameters('nvfp4', 'int4_g128', 'mxfp4', 'uint4_g32')
  def test_of_uncorrelated_inputs_it_is_a_search_for_scales(self, name):
    layer = problems.layer(name)
    eye = jnp.eye(problems.INPUTS)
    layer = layer._replace(statistics=layer.statistics._replace(moments=eye))
    shares = _refinement.FRACTIONS
    if layer.fmt.has_exponent_scale:
      shares = _refinement.NEIGHBOURS
    got = ptq.refine(damping=0)(layer).rounded()
    want = ptq.search_scales(fractions=shares)(layer).rounded()
    np.testing.assert_allclose(
      lowbit.dequantize(got), lowbit.dequantize(want), rtol=1e-6
    )

  def test_against_all_choices_of_a_block(self):
    """Four weights of seven levels in five scales, for each of 64 outputs."""
    random = np.random.default_rng(0)
    w = jnp.asarray(random.standard_normal((4, 64)), jnp.float32)
    mixed = random.standard_normal((4, 4))
    moments = mixed @ mixed.T + 0.3 * np.eye(4)
    like = lowbit.quantize(w, _INTEGERS, axis=-2)
    shares = _refinement.FRACTIONS
    got = _refinement.refined(
      w, like, jnp.asarray(moments, jnp.float32), shares, 2
    )
    levels = np.array([*itertools.product(range(-3, 4), repeat=4)]).T
    best = np.full(64, np.inf)
    for share in shares:
      q = _scales.with_shares(w, like, share)
      for column, scale in enumerate(np.asarray(q.scale[0], np.float64)):
        difference = levels * scale - np.asarray(w, np.float64)[:, [column]]
        errors = np.einsum('ic,ij,jc->c', difference, moments, difference)
        best[column] = min(best[column], errors.min())
    found, nearest = _error(w, got, moments), _error(w, like, moments)
    self.assertTrue((found >= best * (1 - 1e-5)).all())
    self.assertGreater(np.isclose(found, best, rtol=1e-4).mean(), 0.9)
    self.assertLess(found.sum(), 1.02 * best.sum())
    self.assertLess(found.sum(), 0.75 * nearest.sum())

  def test_scales_that_are_quantized_stay(self):
    layer = ptq.gptq()(problems.layer('q4_k'))
    made = ptq.refine()(layer).rounded()
    np.testing.assert_array_equal(made.scale.codes, layer.rounded().scale.codes)

  def test_wrong_calls(self):
    for arguments, why in (
      ({'sweeps': 0}, 'sweeps=0'),
      ({'damping': -1}, 'damping=-1'),
      ({'fractions': (0.5, 1)}, 'begin with 1'),
    ):
      with self.assertRaisesRegex(ValueError, why):
        ptq.refine(**arguments)


if __name__ == '__main__':
  absltest.main()
