"""Tests of the measure of error, the sweep and the certificates.

The oracle for the error is exact: fractions for the unit, functions that are
bit operations for the sweep, and kernels with a planted fault for the whole.
"""

import dataclasses
import functools
import json
import math
import os
import pathlib
import re
import tempfile
from unittest import mock

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest
from absl.testing import absltest, parameterized
from jax import lax

from lowbit_jax.search import certify

INF = np.inf
NAN = np.nan
_F = np.float32
_MAGIC = _F(1.5 * 2**23)
# Minimax for 2^r on [-1/2, 1/2] with c_0 = 1, rounded to float32.
_EXP2 = [
  '0x1p+0',
  '0x1.62e430p-1',
  '0x1.ebfbdep-3',
  '0x1.c6af76p-5',
  '0x1.3b2cf4p-7',
  '0x1.5efbfep-10',
  '0x1.41f500p-13',
]
_LN2_HIGH, _LN2_LOW = _F(0.693359375), _F(-2.12194440e-4)
_PROVENANCE = certify.Provenance(
  command='python make.py', seed=7, wrapper='2^n'
)


# Sweeps are of little work here: the default chunk would cost more than they.
_CHUNK = mock.patch.object(certify, 'CHUNK', 2**18)


def setUpModule():
  _CHUNK.start()


def tearDownModule():
  _CHUNK.stop()


def _exp2(x, *, fence=True):
  z = x + _MAGIC
  if fence:
    z = lax.reduce_precision(z, 8, 23)
  r = x - (z - _MAGIC)
  p = jnp.full_like(x, _F(float.fromhex(_EXP2[-1])))
  for c in reversed(_EXP2[:-1]):
    p = p * r + _F(float.fromhex(c))
  bits = lax.bitcast_convert_type(z, jnp.int32)
  return p * lax.bitcast_convert_type((bits + 127) << 23, jnp.float32)


def _exp(x, *, low=_LN2_LOW):
  z = lax.reduce_precision(x * _F(1 / math.log(2)) + _MAGIC, 8, 23)
  n = z - _MAGIC
  r = (x - n * _LN2_HIGH) - n * low
  p = jnp.full_like(x, _F(1 / 5040))
  for k in range(6, -1, -1):
    p = p * r + _F(1 / math.factorial(k))
  bits = lax.bitcast_convert_type(z, jnp.int32)
  return p * lax.bitcast_convert_type((bits + 127) << 23, jnp.float32)


def _bits(x):
  return lax.bitcast_convert_type(x, jnp.int32)


def _next(x):
  """The number one unit further from zero."""
  return lax.bitcast_convert_type(_bits(x) + 1, jnp.float32)


def _identity(x):
  return x


def _planted(x, at, by=40):
  """x but for one input, whose result is off by some units."""
  y = lax.bitcast_convert_type(_bits(x) + by, jnp.float32)
  return jnp.where(x == _F(at), y, x)


def _certify(fn=_exp2, **changes):
  arguments = {
    'name': 'exp2',
    'reference': np.exp2,
    'exact': lambda x: mpmath.mpf(2) ** x,
    'interval': (-20, 20),
    'tier': '2^16',
    'provenance': _PROVENANCE,
  }
  return certify.certify(fn, **{**arguments, **changes})


_certificate = functools.cache(_certify)


class UlpTest(parameterized.TestCase):
  def test_unit(self):
    rng = np.random.default_rng(0)
    exponents = np.arange(-200, 128)
    values = np.concatenate(
      [
        np.ldexp(1.0, exponents),
        np.nextafter(np.ldexp(1.0, exponents), 0),
        np.ldexp(rng.uniform(1, 2, len(exponents)), exponents),
        [0.0, 5e-324, 1e-310],
      ]
    )
    for v in np.concatenate([values, -values]):
      power = -126
      while abs(v) >= 2.0 ** (power + 1):  # exactly
        power += 1
      self.assertEqual(certify.ulp32(v), 2.0 ** (power - 23), v)

  @parameterized.parameters(
    (1.0, 1.0, 0),
    (1.0, 1 - 2.0**-24, 1),  # units are those of the true value
    (1 - 2.0**-24, 1.0, 0.5),
    (0.0, 2.0**-127, 0),  # flushed
    (-0.0, 2.0**-127, 0),
    (2.0**-126, 2.0**-127, 2**22),
    (0.0, 2.0**-126, 2**23),  # nothing to flush
    (2.0**-149, 0.0, 1),
    (INF, 2.0**128 * (1 - 2.0**-25), 0.5),
    (INF, 2.0**128 * (1 - 2.0**-24), 1),
    (-INF, 2.0**127, INF),
    (INF, 1e39, 0),
    (INF, INF, 0),
    (-INF, 1e39, INF),
    (float(np.finfo(_F).max), 1e39, INF),
    (NAN, 1.0, INF),
    (NAN, INF, INF),
    (1.0, NAN, INF),
    (NAN, NAN, 0),
  )
  def test_error(self, y, f, expected):
    # Next to an ordinary value, so that rare rules disturb no common one.
    y, f = np.array([y, 3.0], _F), np.array([f, 3.0 + 2.0**-23])
    error = certify.ulp_error(y, f)
    if expected == INF and y[0] == -INF:
      expected = 2.0**128 * 1.5 / 2.0**104 if f[0] < 2.0**128 else INF
    np.testing.assert_array_equal(error, [expected, 0.5])


class PositionsTest(parameterized.TestCase):
  def test_are_all_normal_numbers_in_order(self):
    x = certify.from_position(np.arange(-1000, 1001))
    self.assertEqual(x[1000].view(np.int32), 0)
    positive = x[1001:]
    np.testing.assert_array_equal(x[:1000], -positive[::-1])
    self.assertEqual(positive[0], np.finfo(_F).tiny)
    np.testing.assert_array_equal(
      positive[1:], np.nextafter(positive[:-1], _F(INF))
    )

  @parameterized.parameters(
    (1.0, 2.0, 2**23 + 1),
    (-2.0, -1.0, 2**23 + 1),
    (0.0, 2.0**-125, 2**23 + 2),
    (-np.finfo(_F).max, np.finfo(_F).max, 2 * 254 * 2**23 + 1),
  )
  def test_ends(self, lo, hi, count):
    first, last = certify.positions((lo, hi))
    self.assertEqual(last - first + 1, count)
    ends = certify.from_position([first, last])
    np.testing.assert_array_equal(ends, np.array([lo, hi], _F))

  @parameterized.parameters((1, 0), (0, INF), (NAN, 1), (0, 1e39))
  def test_refuses(self, lo, hi):
    with np.errstate(over='ignore'):
      with self.assertRaisesRegex(ValueError, 'interval=.*finite'):
        certify.positions((lo, hi))

  def test_refuses_subnormal_ends(self):
    with self.assertRaisesRegex(ValueError, 'end it at 0'):
      certify.positions((1e-40, 1))


class SweepTest(parameterized.TestCase):
  @parameterized.parameters(
    (1, 2, 1),
    (1, 1, 1),
    (-1, 1, 4095),
    (0.9, 1.1, 61),
  )
  def test_counts(self, lo, hi, stride):
    first, last = certify.positions((lo, hi))
    result = certify.sweep(_next, _identity, lo, hi, stride=stride)
    self.assertEqual(result.n_inputs, len(range(first, last + 1, stride)))
    self.assertEqual(result.mean_ulp, 1)
    self.assertEqual(result.max_ulp, 1)
    self.assertEqual(result.n_gt_1ulp, 0)
    self.assertEqual(result.misrounded, 1)
    self.assertLen(result.worst, min(1000, result.n_inputs))

  def test_finds_single_inputs(self):
    # In the first and the last place, and in a chunk that is not full.
    for at in (1.0, 1.25, 1.1875 + 2.0**-23):
      result = certify.sweep(lambda x: _planted(x, at), _identity, 1, 1.25)
      self.assertEqual((result.max_ulp, result.argmax), (40, at))
      self.assertEqual(result.n_gt_1ulp, 1)
      self.assertEqual(result.mean_ulp, 40 / (2**21 + 1))
      self.assertEqual(result.worst[0], _F(at))

  def test_worst_inputs_come_first(self):
    # The error of input number k is k mod 4096 units, over several blocks.
    first = int(np.array(1, _F).view(np.int32))
    fn = lambda x: lax.bitcast_convert_type(
      _bits(x) + ((_bits(x) - first) & 4095), jnp.float32
    )
    result = certify.sweep(fn, _identity, 1, 1.25)
    count = 2**21 + 1
    self.assertEqual(result.n_inputs, count)
    self.assertEqual(result.max_ulp, 4095)
    self.assertEqual(result.n_gt_1ulp, count - 1 - 2 * 512)
    k = np.array(result.worst).view(np.int32) - first
    self.assertLen(k, 1000)
    # 512 inputs have 4095, and the other 488 come from 512 that have 4094.
    np.testing.assert_array_equal(k & 4095, np.repeat([4095, 4094], [512, 488]))
    self.assertLen(set(k), 1000)
    np.testing.assert_array_equal(
      result.results.view(np.int32) - first, k + (k & 4095)
    )

  def test_flushed_results_are_exact(self):
    scale = 2.0**-126
    fn = lambda x: x * _F(scale)
    result = certify.sweep(fn, lambda x: x * scale, 0.5, 2, stride=1001)
    self.assertEqual(result.max_ulp, 0)

  def test_stops_after_a_failure(self):
    calls = []

    def reference(x):
      calls.append(len(x))
      return x

    result = certify.sweep(_next, reference, 1, 8, bound=0.9)
    self.assertEqual(result.n_inputs, certify.CHUNK)
    self.assertEqual(sum(calls), certify.CHUNK)

  def test_refuses(self):
    with self.assertRaisesRegex(ValueError, 'stride=0'):
      certify.sweep(_identity, _identity, 0, 1, stride=0)
    with self.assertRaisesRegex(TypeError, 'float32'):
      certify.sweep(lambda x: x.astype(jnp.bfloat16), _identity, 0, 1)
    with self.assertRaisesRegex(TypeError, 'float32'):
      certify.sweep(lambda x: x[:3], _identity, 0, 1)


class TiersTest(parameterized.TestCase):
  def test_grow_and_end_with_the_first_failure(self):
    sizes = []
    at = certify.from_position(certify.positions((1, 1))[0] + 1)[()]
    for tier in certify.TIERS:
      # Number 1 of the interval is met by the tier that leaves nothing out.
      result = certify.tiered(
        lambda x: _planted(x, at), _identity, (1, 4), tier=tier, bound=1
      )
      sizes.append(result.n_inputs)
      self.assertEqual(result.max_ulp > 1, tier == 'all', tier)
    self.assertEqual(sizes[:4], sorted(sizes[:4]))
    for size, least in zip(sizes, (2**12, 2**16, 2**20), strict=False):
      self.assertBetween(size, least, 1.3 * least)
    self.assertEqual(sizes[3], sizes[2])  # every 61st would be fewer
    self.assertEqual(sizes[4], certify.CHUNK)  # its first chunk fails

  def test_cheap_tiers_spare_the_dear_ones(self):
    result = certify.tiered(_next, _identity, (1, 4), tier='all', bound=0.5)
    self.assertLess(result.n_inputs, 2**13)

  def test_small_intervals_are_swept_once(self):
    calls = []

    def reference(x):
      calls.append(len(x))
      return x

    certify.tiered(_next, reference, (1, 1 + 2.0**-20), tier='all')
    self.assertEqual(calls, [9])

  def test_every_61st(self):
    result = certify.tiered(_next, _identity, (1, 2**8), tier='stride61')
    self.assertEqual(result.n_inputs, 2**26 // 61 + 1)

  def test_unknown(self):
    with self.assertRaisesRegex(ValueError, "tier='most'"):
      certify.tiered(_identity, _identity, (0, 1), tier='most')


class CertificateTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    directory = tempfile.TemporaryDirectory()
    self.addCleanup(directory.cleanup)
    self.path = pathlib.Path(directory.name, 'exp2.json')

  def test_content(self):
    certificate = _certify(edges=((-0.0, 1.0), (NAN, NAN)))
    self.assertBetween(certificate.max_ulp, 0.5, 1)
    x = float.fromhex(certificate.argmax)
    y = float(jax.jit(_exp2)(np.full(64, x, _F))[0])
    with mpmath.workdps(60):
      true = mpmath.mpf(2) ** mpmath.mpf(x)
      error = abs(true - y) / certify.ulp32(float(true)).item()
    self.assertEqual(certificate.max_ulp, float(error))
    self.assertEqual(certificate.n_gt_1ulp, 0)
    self.assertEqual(certificate.n_exact, 1000)
    self.assertEqual(certificate.environment, certify.Environment.current())
    self.assertEqual(certificate.interval, ((-20.0).hex(), (20.0).hex()))
    self.assertEqual(
      certificate.edges, (((-0.0).hex(), (1.0).hex()), ('nan', 'nan'))
    )

  def test_is_reproducible(self):
    self.assertEqual(_certify().to_json(), _certificate().to_json())

  def test_records_the_core(self):
    class Program:
      rows = ((0, 0, 1, 0), (2, 2, 2, 0))
      constants = (0.1,)

    content = json.loads(_certify(program=Program()).to_json())
    self.assertEqual(
      content['program'],
      {'rows': [[0, 0, 1, 0], [2, 2, 2, 0]], 'constants': [(0.1).hex()]},
    )

  def test_round_trip(self):
    certificate = _certify(edges=((NAN, NAN),))
    certificate = dataclasses.replace(certificate, timing={'speedup': 1.5})
    certificate.save(self.path)
    self.assertEqual(certify.Certificate.load(self.path), certificate)
    self.assertEqual(os.listdir(self.path.parent), ['exp2.json'])
    with self.assertRaisesRegex(FileExistsError, 'overwrite=True'):
      certificate.save(self.path)
    certificate.save(self.path, overwrite=True)

  @parameterized.parameters(
    (lambda text: text[:-20],),
    (lambda text: text.replace('"max_ulp": 0.', '"max_ulp": 0.1'),),
    (lambda text: text.replace('python make.py', 'python fake.py'),),
    (lambda text: text.replace('content_hash', 'hash'),),
    (lambda text: '[1, 2]',),
    (lambda text: '',),
  )
  def test_damage_is_noticed(self, damage):
    text = _certificate().to_json()
    self.assertNotEqual(damage(text), text)
    self.path.write_text(damage(text))
    with self.assertRaisesRegex(ValueError, 'exp2.json.*damaged'):
      certify.Certificate.load(self.path)

  @parameterized.parameters(
    (lambda c: c.pop('tier'),),
    (lambda c: c.update(extra=1),),
    (lambda c: c['environment'].pop('jax'),),
  )
  def test_other_fields_are_noticed(self, change):
    content = json.loads(_certificate().to_json())
    content.pop('content_hash')
    change(content)
    content['content_hash'] = certify._content_hash(content)
    with self.assertRaisesRegex(ValueError, 'damaged'):
      certify.Certificate.from_json(json.dumps(content))

  def test_a_failed_save_leaves_nothing(self):
    broken = dataclasses.replace(_certificate(), timing={'speedup': object()})
    with self.assertRaises(TypeError):
      broken.save(self.path)
    self.assertEmpty(os.listdir(self.path.parent))


class RefutedTest(parameterized.TestCase):
  """Faults that a certificate must not survive."""

  def test_rounding_without_a_fence(self):
    if jax.default_backend() != 'cpu':
      self.skipTest('XLA deletes the rounding on CPU')
    # Correct as it stands in the source, as NumPy can tell.
    z = np.arange(-20, 20, 0.25, dtype=_F) + _MAGIC
    self.assertGreater(np.ptp(z - _MAGIC), 39)
    with self.assertRaisesRegex(certify.Refuted, 'ULP at .* bound of 1'):
      _certify(lambda x: _exp2(x, fence=False))

  @parameterized.parameters((_LN2_LOW, True), (_F(0), False))
  def test_dropped_term_of_the_reduction(self, low, holds):
    certify_exp = lambda: _certify(
      lambda x: _exp(x, low=low),
      name='exp',
      reference=np.exp,
      exact=mpmath.exp,
      bound=2.0,
    )
    if holds:
      self.assertLess(certify_exp().max_ulp, 2)
    else:
      with self.assertRaisesRegex(certify.Refuted, 'exp has an error'):
        certify_exp()

  def test_one_wrong_coefficient(self):
    wrong = lambda x: _exp2(x) * _F(1 + 2.0**-22)
    with self.assertRaisesRegex(certify.Refuted, 'ULP at'):
      _certify(wrong)

  def test_single_input(self):
    at = 1.25 + 7 * 2.0**-23
    arguments = {
      'name': 'x',
      'reference': _identity,
      'exact': _identity,
      'interval': (1, 2),
    }
    fn = lambda x: _planted(x, at)
    with self.assertRaisesRegex(certify.Refuted, re.escape(at.hex())):
      _certify(fn, **arguments, tier='all')

  @parameterized.parameters(
    ((-0.0, 0.0),), ((INF, 1.0),), ((NAN, 0.0),), ((2.5, NAN),)
  )
  def test_edges(self, edge):
    with self.assertRaisesRegex(certify.Refuted, 'must be'):
      _certify(
        _identity, reference=_identity, exact=_identity, edges=((1, 1), edge)
      )

  def test_reference_that_is_wrong(self):
    with self.assertRaisesRegex(ValueError, 'reference.*must agree'):
      _certify(reference=lambda x: np.exp2(x) * (1 + 2.0**-40))


class CheckTest(parameterized.TestCase):
  def test_holds(self):
    certificate = _certificate()
    result = certify.check(certificate, _exp2, np.exp2)
    self.assertLessEqual(result.max_ulp, certificate.max_ulp + 2.0**-20)

  def test_notices_growth_and_says_what_changed(self):
    certificate = _certificate()
    worse = lambda x: _exp2(x) * _F(1 + 2.0**-23)
    with self.assertRaisesRegex(certify.Refuted, 'the optimised HLO'):
      certify.check(certificate, worse, np.exp2)
    environment = dataclasses.replace(certificate.environment, jaxlib='0.0.1')
    certificate = dataclasses.replace(
      certificate, environment=environment, max_ulp=0.6
    )
    with self.assertRaisesRegex(certify.Refuted, 'jaxlib 0.0.1 -> '):
      certify.check(certificate, _exp2, np.exp2)

  def test_notices_edges(self):
    certificate = _certify(edges=((-0.0, 1.0),))
    certificate = dataclasses.replace(
      certificate, edges=(('-0x0.0p+0', '0x1p+1'),)
    )
    with self.assertRaisesRegex(certify.Refuted, 'must be 2'):
      certify.check(certificate, _exp2, np.exp2)

  def test_fingerprint_sees_the_computation_alone(self):
    def other_name(argument):
      return _exp2(argument)

    first, second, third = (
      certify.fingerprint(certify.compile_chunk(fn))
      for fn in (_exp2, other_name, _exp)
    )
    self.assertEqual(first, second)
    self.assertNotEqual(first, third)


@pytest.mark.slow
class ExhaustiveTest(absltest.TestCase):
  def test_exp2_over_its_normal_results(self):
    certificate = _certify(interval=(-125.9, 127.49), tier='all', bound=1)
    self.assertGreater(certificate.n_inputs, 2e9)


if __name__ == '__main__':
  absltest.main()
