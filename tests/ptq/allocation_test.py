"""Formats of layers within bits, against all choices."""

import itertools

import numpy as np
from absl.testing import absltest, parameterized

from lowbit_jax import formats, ptq

CHOICES = formats.mxfp4, formats.nvfp4, formats.mxfp8_e4m3


def problem(seed):
  rng = np.random.default_rng(seed)
  paths = [f'layer_{k}' for k in range(6)]
  sizes = {path: int(64 * rng.integers(1, 9)) for path in paths}
  losses = {}
  for path in paths:
    falling = np.sort(rng.exponential(size=len(CHOICES)))[::-1] * 1e-3
    losses[path] = dict(zip(CHOICES, falling.tolist(), strict=True))
  return losses, sizes


class AllocateTest(parameterized.TestCase):
  @parameterized.product(seed=tuple(range(5)), bits=(4.25, 5.0, 6.3, 8.25))
  def test_is_best_of_all_choices(self, seed, bits):
    losses, sizes = problem(seed)
    whole = sum(sizes.values())
    found = ptq.allocate(losses, sizes, bits)
    self.assertEqual(list(found), list(losses))

    def loss(choice):
      return sum(losses[p][f] for p, f in choice.items())

    def average(choice):
      held = sum(sizes[p] * f.bits_per_element for p, f in choice.items())
      return held / whole

    every = (
      dict(zip(losses, own, strict=True))
      for own in itertools.product(CHOICES, repeat=len(losses))
    )
    best = min(loss(own) for own in every if average(own) <= bits * (1 + 1e-9))
    self.assertLessEqual(average(found), bits * (1 + 1e-9))
    self.assertAlmostEqual(loss(found), best, delta=1e-9)

  def test_layers_may_have_formats_of_their_own(self):
    losses = {
      'a': {formats.mxfp8_e4m3: 0.5},
      'b': {formats.mxfp4: 0.2, formats.mxfp8_e4m3: 0.0},
    }
    found = ptq.allocate(losses, {'a': 64, 'b': 64}, 7.0)
    self.assertEqual(found, {'a': formats.mxfp8_e4m3, 'b': formats.mxfp4})

  @parameterized.parameters(
    ({}, {}, 8, 'losses is empty'),
    ({'a': {}}, {'a': 1}, 8, "'a' needs a format"),
    ({'a': {formats.mxfp4: 0.1}}, {}, 8, 'positive size'),
    ({'a': {formats.mxfp4: 0.1}}, {'a': 0}, 8, 'positive size'),
    ({'a': {formats.mxfp4: float('nan')}}, {'a': 1}, 8, 'finite number'),
    ({'a': {'mxfp4': 0.1}}, {'a': 1}, 8, 'block format'),
    ({'a': {formats.mxfp4: 0.1}}, {'a': 1}, 4, 'bits=4 are too few.*4.25'),
    ({'a': {formats.mxfp4: 0.1}}, {'a': 1}, float('nan'), 'too few'),
  )
  def test_refuses(self, losses, sizes, bits, message):
    with self.assertRaisesRegex(ValueError, message):
      ptq.allocate(losses, sizes, bits)


if __name__ == '__main__':
  absltest.main()
