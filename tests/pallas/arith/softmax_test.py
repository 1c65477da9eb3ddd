"""Tests of the softmax pair algebra against a longdouble oracle.

Tolerances are those that the docstrings derive, in units of u = 2^-24, with h
the longest chain of additions in the schedule that the test uses.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import absltest, parameterized
from jax import lax
from jax.experimental import pallas as pl

from lowbit_pallas.arith import exponential, softmax as sm
from lowbit_pallas.arith.exponential import Pair

U = 2.0**-24
INF = np.inf
NAN = np.nan
LONG = np.longdouble
LN2 = np.log(LONG(2))
DOMAIN = 22712.0


def _oracle(x, axis=-1):
  """Returns softmax, log softmax and logsumexp in longdouble."""
  x = np.asarray(x, np.float32).astype(LONG)
  top = x.max(axis, keepdims=True)
  total = np.exp(x - top).sum(axis, keepdims=True)
  log_sum = np.log(total) + top
  return np.exp(x - top) / total, x - log_sum, np.squeeze(log_sum, axis)


def _worth(pair):
  """Returns m 2^n / 2^e in longdouble for a common power of two e."""
  n = np.asarray(pair.n).astype(int)
  return np.ldexp(np.asarray(pair.m).astype(LONG), n - n.max())


@jax.jit
def _tree(pair):
  """Sums the last axis by pairwise merges: chains of log2 of its length."""
  while pair.m.shape[-1] > 1:
    rest = sm.identity((*pair.m.shape[:-1], pair.m.shape[-1] % 2))
    even = jax.tree.map(lambda a, b: jnp.concatenate([a, b], -1), pair, rest)
    pair = sm.merge(
      jax.tree.map(lambda a: a[..., 0::2], even),
      jax.tree.map(lambda a: a[..., 1::2], even),
    )
  return jax.tree.map(lambda a: a[..., 0], pair)


@jax.jit
def _pair_forms(x, where=None):
  pair = exponential.exp_pair(x, where)
  total = sm.reduce(pair, -1)
  return (
    sm.normalise(pair, total, where),
    sm.log_normalise(x, total, where),
    sm.logsumexp(total),
  )


@jax.jit
def _online_forms(x, where=None):
  state = sm.online_reduce(x, where)
  return (
    sm.online_normalise(x, state, where),
    sm.online_log_normalise(x, state, where),
    sm.online_logsumexp(state),
  )


# Eager calls would compile every operation on its own.
_exp_pair = jax.jit(exponential.exp_pair)
_ext_exp = jax.jit(exponential.ext_exp)
_scaled_exp = jax.jit(exponential.scaled_exp)
_scaled_exp_near = jax.jit(exponential.scaled_exp_near)
_row_exponent = jax.jit(exponential.row_exponent)
_in_domain = jax.jit(exponential.in_domain, static_argnames='axis')
_is_near = jax.jit(exponential.is_near)
_normalise = jax.jit(sm.normalise)
_merge = jax.jit(sm.merge)
_reduce = jax.jit(sm.reduce, static_argnums=1)
_exp_difference = jax.jit(exponential.exp_difference)
_online_reduce = jax.jit(sm.online_reduce, static_argnames='axis')
_online_merge = jax.jit(sm.online_merge)
_online_normalise = jax.jit(sm.online_normalise)
_online_logsumexp = jax.jit(sm.online_logsumexp)
_jax_softmax = jax.jit(jax.nn.softmax)
_jax_logsumexp = jax.jit(jax.nn.logsumexp, static_argnums=1)

FORMS = {'pair': _pair_forms, 'online': _online_forms}


def _rows(name, shape=(16, 128)):
  rng = np.random.default_rng(sum(map(ord, name)))
  draw = {
    'normal': lambda: rng.normal(size=shape),
    'wide': lambda: 5 * rng.normal(size=shape),
    'uniform50': lambda: rng.uniform(-50, 50, shape),
    'uniform1000': lambda: rng.uniform(-1000, 1000, shape),
    'offset': lambda: 1e4 + 3 * rng.normal(size=shape),
    'domain_edge': lambda: DOMAIN - 10 * rng.random(shape),
    'constant': lambda: np.full(shape, 3.25),
    'one_hot': lambda: 80.0 * np.eye(*shape),
    'increasing': lambda: np.broadcast_to(np.arange(shape[-1]) * 0.7, shape),
    'tiny': lambda: rng.normal(size=shape) * 1e-40,
    'zeros': lambda: np.where(rng.random(shape) < 0.5, -0.0, 0.0),
  }
  return draw[name]().astype(np.float32)


ROWS = (
  'normal',
  'wide',
  'uniform50',
  'uniform1000',
  'offset',
  'domain_edge',
  'constant',
  'one_hot',
  'increasing',
  'tiny',
  'zeros',
)


class ExtExpTest(parameterized.TestCase):
  def test_worked_values(self):
    x = np.array([1000, 1000.5, -1000, 999, 1, -1, 100], np.float32)
    m, n = exponential.ext_exp(x)  # without jit
    np.testing.assert_array_equal(n, [1443, 1443, -1443, 1441, 1, -1, 144])
    expected = [
      0.80946511,
      1.33458257,
      1.23538363,
      1.19114232,
      1.35914099,
      0.73575896,
      1.20539331,
    ]
    np.testing.assert_allclose(m, expected, rtol=2 * U)

  def test_zero_is_exact(self):
    m, n = _ext_exp(np.float32([0.0, -0.0]))
    np.testing.assert_array_equal(m, [1, 1])
    np.testing.assert_array_equal(n, [0, 0])

  @parameterized.parameters(1.0, 88.0, 1e4, DOMAIN)
  def test_error_is_below_the_bound(self, limit):
    self.check_error(limit, _ext_exp)

  @parameterized.parameters(1.0, 88.0, 1e4, DOMAIN)
  @pytest.mark.slow
  def test_error_is_below_the_bound_without_jit(self, limit):
    self.check_error(limit, exponential.ext_exp)

  def check_error(self, limit, ext_exp):
    rng = np.random.default_rng(1)
    x = rng.uniform(-limit, limit, 200_000).astype(np.float32)
    k = np.arange(-int(limit), int(limit) + 1, max(1, int(limit) // 999))
    ties = ((k + 0.5) * float(LN2)).astype(np.float32)
    x = np.concatenate([x, ties[np.abs(ties) <= limit], [limit, -limit]])
    x = np.resize(x.astype(np.float32), 203_000)  # one program for all limits
    m, n = ext_exp(x)
    exact = np.exp(x.astype(LONG) - np.asarray(n).astype(LONG) * LN2)
    error = np.abs(np.asarray(m).astype(LONG) / exact - 1)
    self.assertLessEqual(float(error.max()) / U, 3.4)
    self.assertLessEqual(np.abs(n).max(), 2**15)
    self.assertBetween(np.min(m), 0.706, 1)
    self.assertBetween(np.max(m), 1, 1.416)

  def test_parts_of_ln2(self):
    parts = [LONG(p) for p in exponential.LN2]
    self.assertLess(abs(float(sum(parts) - LN2)), 1.2e-16)
    for part in exponential.LN2[:2]:
      numerator, _ = abs(part).as_integer_ratio()
      self.assertLess(numerator, 2**9)
    for part in (*exponential.LN2, *exponential._EXP):
      self.assertEqual(np.float32(part), part)


class ExactFactorTest(absltest.TestCase):
  def test_every_exponent(self):
    d = np.arange(-126, 128)
    factor = jax.jit(exponential.exact_factor)(d.astype(np.float32))
    np.testing.assert_array_equal(factor, np.ldexp(np.float32(1), d))

  def test_clamps(self):
    d = np.float32([-127.0, -3e38, -6e37, 128.0, 3e38])
    factor = exponential.exact_factor(d)
    np.testing.assert_array_equal(factor, [0, 0, 0, 2.0**127, 2.0**127])


class GuardTest(absltest.TestCase):
  def test_table(self):
    beyond = np.nextafter(np.float32(DOMAIN), np.float32(INF))
    x = np.array([-INF, INF, NAN, beyond, -beyond, 3e38], np.float32)
    m, n = _exp_pair(x)
    np.testing.assert_array_equal(m, [0, INF, NAN, NAN, NAN, NAN])
    np.testing.assert_array_equal(
      n, np.array([-3e38, 3e38, -3e38, -3e38, -3e38, -3e38], np.float32)
    )

  def test_masked_entries_are_zero_whatever_they_hold(self):
    x = np.array([1.0, INF, NAN, 1e30, -INF], np.float32)
    pair = _exp_pair(x, np.zeros(5, bool))
    for got, want in zip(pair, sm.identity((5,)), strict=True):
      np.testing.assert_array_equal(got, want)

  def test_domain(self):
    edge = np.float32(DOMAIN)
    beyond = np.nextafter(edge, np.float32(INF))
    x = np.array([[edge, NAN, -INF], [-edge, INF, 0], [0, -beyond, 0]])
    np.testing.assert_array_equal(
      _in_domain(x.astype(np.float32), axis=-1), [True, True, False]
    )
    where = np.array([[True, True, True]] * 2 + [[True, False, True]])
    self.assertTrue(_in_domain(x.astype(np.float32), where))
    self.assertTrue(np.isfinite(_exp_pair(np.array([edge, -edge])).m).all())


class ScaledExpTest(parameterized.TestCase):
  """exp(x) 2^-E of rows whose maximum is known."""

  def _errors(self, f, x):
    n = _row_exponent(np.max(x))
    terms = np.asarray(f(x, n)).astype(LONG)
    exact = np.exp(x.astype(LONG) - LONG(n) * LN2)
    small = exact < LONG(2) ** -125
    self.assertLessEqual(
      float(np.abs(terms - exact)[small].max(initial=0)), 2.0**-126
    )
    return float(np.abs(terms[~small] / exact[~small] - 1).max()) / U

  @parameterized.parameters(1.0, 88.0, 1e4, DOMAIN)
  def test_error_is_below_the_bound(self, limit):
    x = np.random.default_rng(1).uniform(-limit, limit, 100_000)
    self.assertLessEqual(self._errors(_scaled_exp, np.float32(x)), 3.4)

  @parameterized.parameters(-350.0, -86.0, -1.0, 0.0, 264.0)
  def test_near_error_is_below_the_bound(self, low):
    x = np.random.default_rng(2).uniform(low, low + 86, 100_000)
    x = np.float32(np.append(x, [low, low + 86]))
    self.assertTrue(_is_near(x.max(), x.min()))
    self.assertLessEqual(self._errors(_scaled_exp_near, x), 3.4)

  def test_is_near(self):
    for top, low in (
      (350.5, 300.0), (-300.0, -350.5), (50.0, -40.0), (INF, 0.0),
      (0.0, -INF), (NAN, 0.0), (0.0, NAN), (-INF, INF), (-INF, -INF),
    ):  # fmt: skip
      self.assertFalse(_is_near(np.float32(top), np.float32(low)))

  def test_special_entries(self):
    x = np.array([-INF, INF, NAN, 3e4, -3e4, 1.0], np.float32)
    for top in (1.0, INF):
      terms = np.asarray(_scaled_exp(x, _row_exponent(np.float32(top))))
      np.testing.assert_array_equal(terms[:5], [0, INF, NAN, NAN, NAN])
      self.assertEqual(terms[5] > 1, top == 1.0)

  def test_row_exponent(self):
    top = np.array([1000, -INF, NAN, INF, 3e4, -3e4], np.float32)
    np.testing.assert_array_equal(
      _row_exponent(top), np.float32([1442, -3e38, 3e38, 3e38, 3e38, 3e38])
    )


class MergeTest(parameterized.TestCase):
  def _pairs(self, seed, size=2000, spread=40):
    rng = np.random.default_rng(seed)
    m = rng.uniform(0.7, 3.0, size).astype(np.float32)
    n = rng.integers(-spread, spread, size).astype(np.float32)
    return Pair(m, n)

  def _assert_same(self, a, b):
    for got, want in zip(a, b, strict=True):
      np.testing.assert_array_equal(got, want)

  def test_identity_is_exact(self):
    a = self._pairs(0)
    zero = sm.identity((2000,))
    self._assert_same(_merge(a, zero), a)
    self._assert_same(_merge(zero, a), a)
    self._assert_same(_merge(zero, zero), zero)

  def test_commutes_bit_for_bit(self):
    a, b = self._pairs(1), self._pairs(2)
    self._assert_same(_merge(a, b), _merge(b, a))

  def test_associates_within_the_rounding_of_the_additions(self):
    a, b, c = (self._pairs(seed) for seed in (3, 4, 5))
    left = _merge(_merge(a, b), c)
    right = _merge(a, _merge(b, c))
    np.testing.assert_array_equal(left.n, right.n)
    error = np.abs(np.asarray(left.m) / np.asarray(right.m, LONG) - 1)
    self.assertLessEqual(float(error.max()) / U, 4.01)
    self.assertGreater(float(error.max()), 0)

  def test_small_integers_add_exactly_in_any_grouping(self):
    rng = np.random.default_rng(6)
    m = rng.integers(1, 16, (64, 8)).astype(np.float32)
    n = rng.integers(-8, 8, (64, 8)).astype(np.float32)
    exact = (m.astype(int) << (n + 8).astype(int)).sum(-1)
    columns = [Pair(m[:, i], n[:, i]) for i in range(8)]
    for order in itertools.islice(
      itertools.permutations(range(8)), 0, 40320, 5000
    ):
      total = functools.reduce(_merge, [columns[i] for i in order])
      got = np.ldexp(np.asarray(total.m), np.asarray(total.n).astype(int) + 8)
      np.testing.assert_array_equal(got, exact)
    total = _reduce(Pair(m, n), -1)
    got = np.ldexp(np.asarray(total.m), np.asarray(total.n).astype(int) + 8)
    np.testing.assert_array_equal(got, exact)

  @parameterized.parameters(1, 24, 100, 126)
  def test_rescaling_is_exact(self, shift):
    a = self._pairs(7)
    zero = Pair(np.zeros_like(a.m), a.n + np.float32(shift))
    moved = _merge(a, zero)
    np.testing.assert_array_equal(moved.n, a.n + shift)
    keep = np.asarray(a.m) >= 1  # stays normal at 2^-126
    np.testing.assert_array_equal(
      np.asarray(moved.m)[keep], np.ldexp(np.asarray(a.m), -shift)[keep]
    )

  def test_terms_far_below_are_dropped(self):
    a = Pair(np.float32(1.5), np.float32(30000))
    b = Pair(np.float32(1.25), np.float32(-30000))
    self._assert_same(_merge(a, b), a)

  def test_nan_and_infinity_stick(self):
    one, inf, nan, zero, beyond = range(5)
    pairs = _exp_pair(np.float32([1, INF, NAN, -INF, 1e9]))
    pairs = [np.asarray(v) for v in pairs]
    left, right = (Pair(*(v[i] for v in pairs)) for i in np.indices((5, 5)))
    m = np.asarray(_merge(left, right).m)
    for bad in (nan, beyond):
      self.assertTrue(np.isnan(m[bad]).all() and np.isnan(m[:, bad]).all())
    for other in (one, zero, inf):
      self.assertEqual((m[inf, other], m[other, inf]), (INF, INF))
    self.assertTrue(np.isfinite(m[np.ix_([one, zero], [one, zero])]).all())

  def test_reduce_matches_merges(self):
    pair = Pair(*(np.reshape(v, (8, 1000)) for v in self._pairs(8, 8000)))
    total = _reduce(pair, -1)
    exact = _worth(pair).sum(-1)
    n = np.asarray(total.n).astype(int) - int(np.max(pair.n))
    error = np.abs(np.ldexp(np.asarray(total.m).astype(LONG), n) / exact - 1)
    self.assertLessEqual(float(error.max()) / U, 999)
    tree = _tree(pair)
    n = np.asarray(tree.n).astype(int) - int(np.max(pair.n))
    error = np.abs(np.ldexp(np.asarray(tree.m).astype(LONG), n) / exact - 1)
    self.assertLessEqual(float(error.max()) / U, 10)

  @parameterized.parameters(0, 1, -1)
  def test_reduce_along_any_axis(self, axis):
    pair = Pair(*(np.reshape(v, (10, 20, 10)) for v in self._pairs(9)))
    total = _reduce(pair, axis)
    moved = Pair(*(np.moveaxis(v, axis, 0) for v in pair))
    exact = _worth(moved).sum(0)
    n = np.asarray(total.n).astype(int) - int(np.max(pair.n))
    got = np.ldexp(np.asarray(total.m).astype(LONG), n)
    np.testing.assert_allclose(
      got.astype(float), exact.astype(float), rtol=20 * U
    )


class SoftmaxTest(parameterized.TestCase):
  @parameterized.product(rows=ROWS, form=('pair', 'online'))
  def test_against_longdouble(self, rows, form):
    x = _rows(rows)
    y, log_y, log_sum = (np.asarray(v).astype(LONG) for v in FORMS[form](x))
    want, log_want, log_sum_want = _oracle(x)
    h = x.shape[-1] - 1
    normal = want > 2.0**-120
    error = np.abs(y - want)
    bound = (8 if form == 'pair' else 10) + h
    self.assertLessEqual(float((error[normal] / want[normal]).max()) / U, bound)
    self.assertLessEqual(float(error[~normal].max(initial=0)), 2.0**-126)
    self.assertLessEqual(float(np.abs(y.sum(-1) - 1).max()) / U, bound)
    log_error = np.abs(log_y - log_want) / (5 + h + 6 * np.abs(log_want))
    self.assertLessEqual(float(log_error.max()) / U, 1)
    log_error = np.abs(log_sum - log_sum_want)
    log_error = log_error / (4 + h + 4 * np.abs(log_sum_want))
    self.assertLessEqual(float(log_error.max()) / U, 1)

  @parameterized.parameters(*ROWS)
  def test_short_chains_are_uniformly_accurate(self, rows):
    x = _rows(rows, (8, 1000))
    pair = _exp_pair(x)
    y = np.asarray(_normalise(pair, _tree(pair))).astype(LONG)
    want = _oracle(x)[0]
    normal = want > 2.0**-120
    error = (np.abs(y - want)[normal] / want[normal]).max()
    self.assertLessEqual(float(error) / U, 9 + 10)

  def test_worked_row(self):
    x = np.array([1000, 1000.5, -1000, 999], np.float32)
    pair = _exp_pair(x)
    total = _reduce(pair, -1)
    self.assertEqual(total.n, 1443)
    np.testing.assert_allclose(total.m, 2.44183326, rtol=2 * U)
    y = _normalise(pair, total)
    np.testing.assert_allclose(
      y, [0.33149892, 0.54654944, 0, 0.12195165], rtol=4 * U
    )

  def test_split_rows_merge(self):
    self.check_split('pair', 37)

  @parameterized.parameters(('online', 37), ('pair', 1), ('online', 1))
  @pytest.mark.slow
  def test_more_split_rows_merge(self, form, split):
    self.check_split(form, split)

  def check_split(self, form, split):
    x = _rows('uniform50')
    where = np.random.default_rng(5).random(x.shape) < 0.8

    def merged(x, where):
      left, right = (
        (x[:, :split], where[:, :split]),
        (x[:, split:], where[:, split:]),
      )
      if form == 'pair':
        parts = [_reduce(_exp_pair(*part), -1) for part in (left, right)]
        return sm.normalise(_exp_pair(x, where), _merge(*parts), where)
      parts = [_online_reduce(*part) for part in (left, right)]
      return sm.online_normalise(x, _online_merge(*parts), where)

    y = jax.jit(merged)(x, where)
    want = _oracle(np.where(where, x, -INF))[0].astype(float)
    # Of the form, whose chains are no longer, and of one merge.
    bound = {'pair': 8, 'online': 10 + 5}[form] + 127
    np.testing.assert_allclose(y, want, rtol=bound * U, atol=2.0**-126)

  @parameterized.parameters(('pair', 0), ('online', -2))
  def test_other_axes(self, form, axis):
    self.check_axis(form, axis)

  @parameterized.parameters(
    ('online', 0), ('pair', 1), ('online', 1), ('pair', -2)
  )
  @pytest.mark.slow
  def test_more_other_axes(self, form, axis):
    self.check_axis(form, axis)

  def check_axis(self, form, axis):
    x = _rows('wide', (6, 7, 8))

    @jax.jit
    def softmax(x):
      if form == 'online':
        return (
          sm.online_normalise(x, _online_reduce(x, axis=axis), axis=axis),
        )
      pair = _exp_pair(x)
      total = _reduce(pair, axis)
      kept = Pair(*(jnp.expand_dims(v, axis) for v in total))
      return sm.normalise(pair, total, axis=axis), sm.normalise(pair, kept)

    y, *same = softmax(x)
    for other in same:
      np.testing.assert_array_equal(y, other)
    np.testing.assert_allclose(
      y, _oracle(x, axis)[0].astype(float), rtol=17 * U
    )

  def test_a_row_alone_has_the_same_bits(self):
    self.check_row_alone('pair')

  @pytest.mark.slow
  def test_a_row_alone_has_the_same_bits_online(self):
    self.check_row_alone('online')

  def check_row_alone(self, form):
    x = _rows('wide')
    whole = FORMS[form](x)[0]
    for i in range(5):
      np.testing.assert_array_equal(FORMS[form](x[i : i + 1])[0][0], whole[i])

  @parameterized.parameters('pair', 'online')
  @pytest.mark.slow
  def test_batching_is_bitwise_neutral(self, form):
    x = _rows('wide', (5, 33))
    whole = FORMS[form](x)[0]
    for i in range(5):
      np.testing.assert_array_equal(FORMS[form](x[i : i + 1])[0][0], whole[i])
    np.testing.assert_array_equal(jax.vmap(FORMS[form])(x)[0], whole)

  @parameterized.parameters(('pair', jnp.bfloat16), ('online', jnp.float16))
  def test_narrow_inputs_are_widened_first(self, form, dtype):
    self.check_narrow(form, dtype)

  @parameterized.parameters(('pair', jnp.float16), ('online', jnp.bfloat16))
  @pytest.mark.slow
  def test_more_narrow_inputs_are_widened_first(self, form, dtype):
    self.check_narrow(form, dtype)

  def check_narrow(self, form, dtype):
    x = _rows('wide').astype(dtype)
    for got, want in zip(
      FORMS[form](x), FORMS[form](x.astype(np.float32)), strict=True
    ):
      self.assertEqual(got.dtype, jnp.float32)
      np.testing.assert_array_equal(got, want)


class EdgeTest(parameterized.TestCase):
  """The contract on bad input, row by row and for both forms."""

  @parameterized.product(
    form=('pair', 'online'),
    case=(
      ('some_dead', [0.0, -INF, 0.0], None, [0.5, 0, 0.5]),
      ('all_dead', [-INF, -INF, -INF], None, [NAN, NAN, NAN]),
      ('nan', [0.0, NAN, -INF], None, [NAN, NAN, NAN]),
      ('inf', [0.0, INF, 1.0], None, [NAN, NAN, NAN]),
      ('both_inf', [-INF, INF, INF], None, [NAN, NAN, NAN]),
      ('inf_and_nan', [NAN, INF, 1.0], None, [NAN, NAN, NAN]),
      ('masked', [0.0, 5.0, 0.0], [1, 0, 1], [0.5, 0, 0.5]),
      ('masked_nan', [0.0, NAN, 0.0], [1, 0, 1], [0.5, 0, 0.5]),
      ('masked_inf', [0.0, INF, 0.0], [1, 0, 1], [0.5, 0, 0.5]),
      ('all_masked', [1.0, 2.0, NAN], [0, 0, 0], [0, 0, 0]),
      ('live_all_dead', [-INF, 2.0, -INF], [1, 0, 1], [NAN, 0, NAN]),
      ('live_nan', [NAN, 2.0, 1.0], [1, 0, 1], [NAN, 0, NAN]),
      ('single', [7.0, -INF, -INF], None, [1, 0, 0]),
    ),
  )
  def test_row(self, form, case):
    name, x, where, want = case
    x = np.array([x, np.zeros_like(x)], np.float32)
    where = None if where is None else np.array([where] * 2, bool)
    y, log_y, log_sum = FORMS[form](x, where)
    np.testing.assert_allclose(y[0], np.array(want, np.float32), rtol=9 * U)
    with np.errstate(divide='ignore'):
      log_want = np.log(np.array(want))
    np.testing.assert_allclose(log_y[0], log_want, rtol=9 * U, atol=9 * U)
    live = np.ones(x.shape[1]) if where is None else where[0]
    even = live / max(live.sum(), 1)
    np.testing.assert_allclose(y[1], even, rtol=9 * U)
    parity = _jax_logsumexp(x, -1, where=where)
    np.testing.assert_allclose(log_sum, parity, rtol=9 * U, err_msg=name)
    parity = _jax_softmax(x, where=where)
    np.testing.assert_allclose(y, parity, rtol=9 * U, err_msg=name)

  @parameterized.parameters('pair', 'online')
  def test_no_columns(self, form):
    y, log_y, log_sum = FORMS[form](np.zeros((3, 0), np.float32))
    self.assertEqual((y.shape, log_y.shape), ((3, 0), (3, 0)))
    np.testing.assert_array_equal(log_sum, [-INF] * 3)

  def test_pair_form_refuses_beyond_its_domain(self):
    x = np.array([[3e4, 0.0], [0.0, 1.0]], np.float32)
    for got in _pair_forms(x):
      np.testing.assert_array_equal(
        np.isnan(got).any(tuple(range(1, got.ndim))), [1, 0]
      )

  def test_online_form_has_no_domain(self):
    x = np.array(
      [[3.4e38, -3.4e38, 3.4e38], [-3e38, -3e38, -3.3e38], [6e4, 6e4, 5e4]],
      np.float32,
    )
    y, _, log_sum = _online_forms(x)
    np.testing.assert_array_equal(
      y, [[0.5, 0, 0.5], [0.5, 0.5, 0], [0.5, 0.5, 0]]
    )
    np.testing.assert_allclose(log_sum, x[:, 0], rtol=2e-5)


class OnlineTest(parameterized.TestCase):
  @parameterized.parameters(0.5, 1e3, 1e6, 1e30)
  def test_difference_is_accurate_for_large_arguments(self, scale):
    rng = np.random.default_rng(11)
    a = rng.uniform(-scale, scale, 100_000).astype(np.float32)
    x = np.minimum(a - rng.uniform(0, 90, a.shape), a).astype(np.float32)
    got = np.asarray(_exp_difference(x, a)).astype(LONG)
    want = np.exp(x.astype(LONG) - a.astype(LONG))
    normal = want > 2.0**-120
    error = np.abs(got - want)
    self.assertLessEqual(float((error / want)[normal].max()) / U, 4)
    self.assertLessEqual(float(error[~normal].max(initial=0)), 2.0**-126)

  def test_difference_at_the_ends(self):
    x = np.array([-INF, -INF, INF, 5.0, -3.4e38, 0.0, 0.0], np.float32)
    a = np.array([-INF, 0.0, INF, 5.0, 3.4e38, 128.0, 1e30], np.float32)
    np.testing.assert_array_equal(_exp_difference(x, a), [1, 0, 1, 1, 0, 0, 0])

  def test_merge_laws(self):
    rng = np.random.default_rng(12)
    a, b, c = (
      sm.Peak(*rng.uniform(1, 90, (2, 3000)).astype(np.float32))
      for _ in range(3)
    )
    for got, want in zip(_online_merge(a, b), _online_merge(b, a), strict=True):
      np.testing.assert_array_equal(got, want)
    for got, want in zip(
      _online_merge(a, sm.online_identity((3000,))), a, strict=True
    ):
      np.testing.assert_array_equal(got, want)
    left = _online_merge(_online_merge(a, b), c)
    right = _online_merge(a, _online_merge(b, c))
    np.testing.assert_array_equal(left.peak, right.peak)
    np.testing.assert_allclose(left.total, right.total, rtol=24 * U)

  def test_rising_blocks_stay_in_the_budget(self):
    x = np.linspace(-20, 20, 256, dtype=np.float32).reshape(1, 256)
    state = sm.online_identity((1,))
    for block in np.split(x, 16, axis=-1):
      state = _online_merge(state, _online_reduce(block))
    y = np.asarray(_online_normalise(x, state)).astype(LONG)
    want = _oracle(x)[0]
    error = float((np.abs(y - want) / want).max()) / U
    self.assertLessEqual(error, 10 + (15 + 16) + 5 * 15)

  def test_nan_and_infinity_stick(self):
    one, inf, nan, zero = range(4)
    x = np.array([[1], [INF], [NAN], [-INF]], np.float32)
    states = [np.asarray(v) for v in _online_reduce(x)]
    left, right = (sm.Peak(*(v[i] for v in states)) for i in np.indices((4, 4)))
    merged = _online_merge(left, right)
    total, log_sum = map(np.asarray, (merged.total, _online_logsumexp(merged)))
    self.assertTrue(
      np.isnan(total[nan]).all() and np.isnan(total[:, nan]).all()
    )
    for other in (one, inf, zero):
      self.assertEqual((log_sum[inf, other], log_sum[other, inf]), (INF, INF))
    self.assertEqual((total[one, zero], total[one, one]), (1, 2))


def _pair_block(x):
  where = lax.broadcasted_iota(jnp.int32, x.shape, 1) < 100
  pair = exponential.exp_pair(x, where)
  total = sm.merge(sm.reduce(pair, 1), sm.reduce(pair, 1))
  return sm.normalise(pair, total, where) + sm.log_normalise(x, total, where)


def _online_block(x):
  where = lax.broadcasted_iota(jnp.int32, x.shape, 1) < 100
  state = sm.online_reduce(x, where)
  state = sm.online_merge(state, state)
  y = sm.online_normalise(x, state, where)
  return y + sm.online_log_normalise(x, state, where)


class LoweringTest(parameterized.TestCase):
  """The block functions lower inside Pallas kernels, on any machine."""

  SHAPE = jax.ShapeDtypeStruct((64, 128), jnp.float32)

  @parameterized.parameters(_pair_block, _online_block)
  def test_tpu(self, block):
    def body(x_ref, o_ref):
      o_ref[...] = block(x_ref[...])

    kernel = pl.pallas_call(body, out_shape=self.SHAPE)
    exported = jax.export.export(jax.jit(kernel), platforms=['tpu'])(self.SHAPE)
    self.assertIn('tpu_custom_call', exported.mlir_module())

  def test_gpu(self):
    self.check_gpu(_pair_block)

  @pytest.mark.slow
  def test_gpu_online(self):
    self.check_gpu(_online_block)

  def check_gpu(self, block):
    from jax.experimental.pallas import mosaic_gpu as plgpu

    def body(x_ref, o_ref, tile_ref, barrier):
      plgpu.copy_gmem_to_smem(x_ref, tile_ref, barrier)
      plgpu.barrier_wait(barrier)
      x = plgpu.layout_cast(tile_ref[...], plgpu.Layout.WGMMA)
      o_ref[...] = block(x)

    tiled = (plgpu.TilingTransform((8, 32)), plgpu.SwizzleTransform(128))
    semantics = plgpu.LoweringSemantics.Warpgroup
    kernel = plgpu.kernel(
      body,
      out_type=self.SHAPE,
      scratch_types=[
        plgpu.SMEM(self.SHAPE.shape, jnp.float32, transforms=tiled),
        plgpu.Barrier(),
      ],
      compiler_params=plgpu.CompilerParams(lowering_semantics=semantics),
    )
    exported = jax.export.export(jax.jit(kernel), platforms=['cuda'])(
      self.SHAPE
    )
    self.assertIn('mosaic_gpu', exported.mlir_module())


if __name__ == '__main__':
  absltest.main()
