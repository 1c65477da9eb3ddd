"""Tests of lowbit_jax.training.laws against printed figures and oracles."""

import dataclasses

import numpy as np
import pytest
from absl.testing import absltest, parameterized
from scipy import optimize

from lowbit_jax.training import laws

_LAW = laws.FloatLaw()
_CHANNEL = laws.CHANNEL_BLOCK
_FORMATS = ((1, 1), (2, 1), (3, 2), (4, 3), (2, 3), (5, 2))


def _last_digit(text: str) -> tuple[float, float]:
  """A printed figure and half a unit of its last digit."""
  mantissa, _, exponent = text.partition('e')
  digits = len(mantissa.partition('.')[2])
  return float(text), 0.5 * 10.0 ** (int(exponent or 0) - digits)


class FiguresTest(parameterized.TestCase):
  def _assert_prints(self, value, text: str):
    expected, half = _last_digit(text)
    self.assertLessEqual(abs(float(value) - expected), half * (1 + 1e-9), value)

  @parameterized.parameters(
    (154e6, 50e9, 4, 3, _CHANNEL, '2.9111'),
    (154e6, 50e9, 3, 2, _CHANNEL, '2.9156'),
    (154e6, 50e9, 2, 1, _CHANNEL, '2.9823'),
    (154e6, 50e9, 1, 1, _CHANNEL, '3.2786'),
    (154e6, 50e9, 2, 1, 32, '2.9376'),
    (154e6, 50e9, 1, 1, 32, '3.0502'),
    (1.2e9, 100e9, 4, 3, _CHANNEL, '2.5418'),
    (1.2e9, 100e9, 2, 1, _CHANNEL, '2.6044'),
  )
  def test_loss(self, N, D, E, M, B, expected):
    self._assert_prints(_LAW.loss(N, D, E, M, B), expected)

  def test_unquantized_loss(self):
    self._assert_prints(_LAW.unquantized_loss(154e6, 50e9), '2.9102')
    self._assert_prints(_LAW.unquantized_loss(1.2e9, 100e9), '2.5410')

  @parameterized.parameters(
    (8, 7, 128, '1.73e15'),
    (4, 3, 128, '2.73e13'),
    (2, 1, 128, '3.93e11'),
    (5, 2, 128, '1.94e13'),
    (3, 2, 128, '4.80e12'),
    (2, 3, 128, '4.44e12'),
    (1, 1, 128, '8.1e10'),
    (2, 1, 16, '6.76e11'),
    (2, 1, 32, '5.44e11'),
    (2, 1, 64, '4.56e11'),
    (2, 1, 512, '3.08e11'),
    (2, 1, _CHANNEL, '2.13e11'),
  )
  def test_critical_data(self, E, M, B, expected):
    self._assert_prints(_LAW.critical_data(1e9, E, M, B), expected)

  @parameterized.parameters((4, '1.42'), (6, '2.38'), (8, '3.34'), (16, '7.19'))
  def test_optimal_mantissa(self, bits, expected):
    self._assert_prints(_LAW.optimal_mantissa(bits), expected)

  def test_split_is_that_of_the_paper(self):
    expected = (
      'E1M0 E1M1 E2M1 E2M2 E3M2 E3M3 E4M3 E4M4 E5M4 E5M5 E6M5 E6M6 E7M6 E7M7'
      ' E8M7'
    ).split()
    found = ['E{}M{}'.format(*_LAW.split(bits)) for bits in range(2, 17)]
    self.assertEqual(found, expected)

  @parameterized.parameters(
    (3, '12.09'),
    (4, '61.76'),
    (5, '279.3'),
    (6, '817.8'),
    (8, '4929'),
    (16, '3.568e5'),
  )
  def test_precision_of_the_best_split(self, bits, expected):
    value = _LAW.precision(*_LAW.split(bits)) / _LAW.gamma
    self._assert_prints(value, expected)

  @parameterized.parameters(
    (1e11, '4.27'), (1e12, '5.18'), (1e13, '6.28'), (1e14, '7.62')
  )
  def test_optimal_precision(self, D, expected):
    self._assert_prints(_LAW.optimal_precision(D, 128), expected)

  @parameterized.parameters(
    (1e21, '4.19'), (1e24, '5.01'), (1e27, '5.98'), (1e30, '7.14')
  )
  def test_compute_optimal_precision(self, C, expected):
    self._assert_prints(_LAW.compute_optimal_precision(C, 128), expected)

  def test_constants_of_the_optimum(self):
    self.assertLess(abs(_LAW._gamma_data / 2.24328e-3 - 1), 1e-5)

  def test_block_model_size_of_the_paper(self):
    self.assertEqual(12 * (4 * 512**2 + 3 * 512 * 1536), 40894464)


class OptimaTest(parameterized.TestCase):
  """Closed forms against numerical minimization of the loss itself."""

  def _best_split_loss(self, N, D, P, B):
    M = _LAW.optimal_mantissa(P)
    return _LAW.loss(N, D, P - 1 - M, M, B)

  def test_critical_data_minimizes_the_loss(self):
    for E, M in _FORMATS:
      found = optimize.minimize_scalar(
        lambda log_D: _LAW.loss(1e9, np.exp(log_D), E, M, 128),  # noqa: B023
        bracket=(20, 30),
        tol=1e-10,
      ).x
      closed = np.log(_LAW.critical_data(1e9, E, M, 128))
      # A minimum is located to about the square root of the precision.
      self.assertLess(abs(found - closed), 1e-5)

  @parameterized.parameters((4.2,), (6.0,), (8.0,))
  def test_mantissa_maximizes_the_precision(self, P):
    found = optimize.minimize_scalar(
      lambda M: -_LAW.precision(P - 1 - M, M), bounds=(0, P - 1)
    ).x
    # The default xatol is 1e-5.
    self.assertLess(abs(found - float(_LAW.optimal_mantissa(P))), 1e-4)

  @parameterized.parameters((1e22, 1e11), (1e22, 1e13), (1e25, 1e13))
  def test_optimal_precision_minimizes_at_fixed_data(self, C, D):
    def loss(P):
      return self._best_split_loss(C / (6 / 16 * P * D), D, P, 64)

    found = optimize.minimize_scalar(loss, bounds=(2.1, 20)).x
    closed = float(_LAW.optimal_precision(D, 64))
    self.assertLess(abs(found / closed - 1), 1e-4)

  @parameterized.parameters((1e21,), (1e27,))
  def test_compute_optimal_precision_minimizes_jointly(self, C):
    def loss(x):
      P, log_D = x
      D = np.exp(log_D)
      return self._best_split_loss(C / (6 / 16 * P * D), D, P, 64)

    found = optimize.minimize(
      loss,
      [5.0, 26.0],
      method='Nelder-Mead',
      options={'xatol': 1e-9, 'fatol': 1e-15, 'maxiter': 4000},
    ).x[0]
    closed = float(_LAW.compute_optimal_precision(C, 64))
    self.assertLess(abs(found / closed - 1), 1e-4)

  def test_arguments_broadcast(self):
    N, D = np.array([[1e8], [1e9]]), np.array([1e10, 1e11, 1e12])
    table = _LAW.loss(N, D, 2, 1, 32)
    self.assertEqual(table.shape, (2, 3))
    self.assertEqual(table[1, 2], _LAW.loss(1e9, 1e12, 2, 1, 32))

  def test_gap_has_the_signs_of_the_law(self):
    gap = _LAW.gap(1e8, 1e10, 3, 2, 32)
    self.assertGreater(_LAW.gap(1e8, 2e10, 3, 2, 32), gap)
    self.assertGreater(_LAW.gap(1e8, 1e10, 3, 2, 64), gap)
    self.assertLess(_LAW.gap(2e8, 1e10, 3, 2, 32), gap)
    self.assertLess(_LAW.gap(1e8, 1e10, 4, 2, 32), gap)
    self.assertLess(_LAW.gap(1e8, 1e10, 3, 3, 32), gap)


def _design() -> list[tuple[float, ...]]:
  """240 settings: 4 N, 5 D, 6 formats, 2 B."""
  return [
    (N, D, E, M, B)
    for N in (41e6, 85e6, 154e6, 679e6)
    for D in (10e9, 20e9, 30e9, 50e9, 100e9)
    for E, M in _FORMATS
    for B in (32, 512)
  ]


def _thinned() -> list[tuple[float, ...]]:
  """80 of these settings."""
  order = np.random.default_rng(0).permutation(240)[:80]
  return [_design()[i] for i in order]


def _measure(design, noise: float, seed: int) -> list[laws.Record]:
  generator = np.random.default_rng(seed)
  factors = np.exp(noise * generator.standard_normal(len(design)))
  return [
    laws.Record(*setting, float(_LAW.loss(*setting)) * factor)
    for setting, factor in zip(design, factors, strict=True)
  ]


class FitTest(parameterized.TestCase):
  def test_jacobian_is_the_derivative(self):
    table = laws._table(_measure(_design()[::17], 0.0, 0))
    theta = laws._theta(_LAW)
    step = 1e-6
    for i in range(len(theta)):
      shift = np.zeros_like(theta)
      shift[i] = step
      difference = laws._log_loss(theta + shift, table)
      difference = difference - laws._log_loss(theta - shift, table)
      # Truncation step^2 times third derivatives up to (alpha log N)^3 ~ 1e3
      # and rounding 1e-16 / step.
      np.testing.assert_allclose(
        laws._jacobian(theta, table)[:, i], difference / (2 * step), atol=2e-8
      )

  def test_exact_data_give_the_constants_back(self):
    found = laws.fit(_measure(_design(), 0.0, 0), starts=6, huber=1e-3)
    self.assertLess(found.rms, 1e-6)
    for field in dataclasses.fields(laws.FloatLaw):
      ratio = getattr(found.law, field.name) / getattr(_LAW, field.name)
      self.assertLess(abs(ratio - 1), 0.02, field.name)

  def test_predictions_are_right_to_the_noise_level(self):
    noise = 0.002
    design = _design()
    found = laws.fit(_measure(design, noise, 1), starts=6)
    N, D, E, M, B = np.array(design).T
    error = np.log(found.law.loss(N, D, E, M, B) / _LAW.loss(N, D, E, M, B))
    # Eight constants take up 8 / 240 of the noise's square.
    self.assertLess(np.sqrt(np.mean(error**2)), 2 * noise * np.sqrt(8 / 240))
    self.assertLess(abs(found.rms / noise - 1), 0.15)
    held_out = _LAW.loss(1.2e9, 100e9, 4, 3, 128)
    predicted = found.law.loss(1.2e9, 100e9, 4, 3, 128)
    self.assertLess(abs(np.log(predicted / held_out)), 5 * noise)

  def test_same_seed_same_bits(self):
    records = _measure(_design()[::6], 0.002, 2)
    self.assertEqual(
      laws.fit(records, starts=3, seed=4).law,
      laws.fit(records, starts=3, seed=4).law,
    )

  def test_starts_from_laws(self):
    records = _measure(_design()[::6], 0.0, 2)
    found = laws.fit(records, starts=[_LAW])
    self.assertLess(abs(found.law.alpha / _LAW.alpha - 1), 1e-6)

  def test_outliers_move_the_huber_fit_less(self):
    records = _measure(_design(), 1e-3, 3)
    records[5] = records[5]._replace(loss=2 * records[5].loss)
    errors = []
    for huber in (1e-3, 10.0):
      law = laws.fit(records, starts=[_LAW], huber=huber).law
      predicted = law.loss(154e6, 30e9, 2, 1, 32)
      errors.append(abs(np.log(predicted / _LAW.loss(154e6, 30e9, 2, 1, 32))))
    self.assertLess(errors[0], 1e-3)
    self.assertGreater(errors[1], 3 * errors[0])

  def test_resamples_spread_as_the_linear_fit_says(self):
    noise, design = 0.002, _thinned()
    records = _measure(design, noise, 10)
    found = laws.fit(records, starts=[_LAW], huber=4e-3)
    samples = laws.bootstrap(records, found, resamples=24, seed=0)
    # One noise level over the inverse of J^T J, seen in two settings.
    jacobian = laws._jacobian(laws._theta(_LAW), laws._table(records))
    settings = (154e6, 50e9, 2, 1, 32), (1.2e9, 100e9, 4, 3, 128)
    ends = [laws.Record(*s, float(_LAW.loss(*s))) for s in settings]
    slopes = laws._jacobian(laws._theta(_LAW), laws._table(4 * ends))[:2]
    spread = noise * np.linalg.norm(slopes @ np.linalg.pinv(jacobian), axis=1)
    for setting, expected in zip(settings, spread, strict=True):
      logs = np.log([law.loss(*setting) for law in samples])
      # The deviation of 24 samples is off by 15 % of itself, that of the noise
      # of 80 records by 8 %: 2.5 deviations.
      self.assertBetween(np.std(logs) / expected, 0.6, 1.4)

  @pytest.mark.slow
  def test_intervals_cover(self):
    # 24 resamples cost some of the .9: at .85, fewer than 8 of 12 happen with
    # probability .02, at the 59 % of half the width with .6.
    trials, least = 12, 8
    targets = {
      'loss': lambda law: law.loss(154e6, 50e9, 2, 1, 32),
      'extrapolated': lambda law: law.loss(1.2e9, 100e9, 4, 3, 128),
      'alpha': lambda law: law.alpha,
      'beta': lambda law: law.beta,
    }
    design = _thinned()
    covered = dict.fromkeys(targets, 0)
    for trial in range(trials):
      records = _measure(design, 0.002, 10 + trial)
      found = laws.fit(records, starts=[_LAW], huber=4e-3)
      samples = laws.bootstrap(records, found, resamples=24, seed=trial)
      for name, quantity in targets.items():
        low, high = laws.interval(samples, quantity, level=0.9)
        covered[name] += int(low <= quantity(_LAW) <= high)
    for name, count in covered.items():
      self.assertGreaterEqual(count, least, (name, covered))
    self.assertLess(sum(covered.values()), trials * len(targets))

  def test_interval_of_known_values(self):
    samples = [dataclasses.replace(_LAW, nu=v) for v in np.linspace(1, 3, 201)]
    low, high = laws.interval(samples, lambda law: law.nu, level=0.9)
    self.assertAlmostEqual(float(low), 1.1)
    self.assertAlmostEqual(float(high), 2.9)


class ErrorsTest(parameterized.TestCase):
  def test_arguments_out_of_range_are_named(self):
    with self.assertRaisesRegex(ValueError, 'N must be positive'):
      _LAW.loss(0, 1e9, 2, 1, 32)
    with self.assertRaisesRegex(ValueError, 'E must be at least 0'):
      _LAW.loss(1e9, 1e9, -1, 1, 32)
    with self.assertRaisesRegex(ValueError, 'B must be at least 1'):
      _LAW.gap(1e9, 1e9, 2, 1, 0.5)
    with self.assertRaisesRegex(ValueError, 'B=1'):
      _LAW.critical_data(1e9, 2, 1, 1)
    with self.assertRaisesRegex(ValueError, 'bits=1 '):
      _LAW.split(1)
    with self.assertRaisesRegex(ValueError, 'beta=-1'):
      laws.FloatLaw(beta=-1)

  def test_unusable_records_are_refused(self):
    records = _measure(_design()[:9], 0.0, 0)
    with self.assertRaisesRegex(ValueError, 'has 7 entries'):
      laws.fit(records[:7])
    with self.assertRaisesRegex(ValueError, 'loss must be positive'):
      laws.fit([*records, records[0]._replace(loss=float('nan'))])
    with self.assertRaisesRegex(ValueError, 'huber=0'):
      laws.fit(records, huber=0)
    with self.assertRaisesRegex(ValueError, 'starts is empty'):
      laws.fit(records, starts=[])
    found = laws.fit(_measure(_design()[::6], 0.0, 2), starts=[_LAW])
    with self.assertRaisesRegex(ValueError, 'records of the fit'):
      laws.bootstrap(records[:8], found, seed=0)
    with self.assertRaisesRegex(ValueError, 'level=1'):
      laws.interval([_LAW], lambda law: law.nu, level=1)


if __name__ == '__main__':
  absltest.main()
