"""The TPU softmax kernel, interpreted with races detected.

Interpreted arithmetic is that of XLA:CPU, which fuses multiply-add, so the
bounds are 8 + h (pair) and 10 + h + 5 per merge (online) in units of
u = 2^-24. What is not random, masks and special values, must agree exactly with
the reference.
"""

import contextlib
import functools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import absltest, parameterized
from jax.experimental import pallas as pl

from lowbit_pallas.arith import exponential
from lowbit_pallas.softmax import forms, reference, tpu
from tests.pallas import races
from tests.pallas.softmax import rows

NARROW = tpu.Config(8, 128)
CASES = (
  # Ragged blocks in both directions; several chunks to a block, and rows beyond
  # a whole one.
  ('ragged_online', (9, 300), NARROW, 'online', 'float32', 'increasing'),
  (
    'chunks',
    (17, 1300),
    tpu.Config(16, 1408),
    'pair',
    'bfloat16',
    'wide',
  ),
)
SLOW_CASES = (
  ('one_block', (3, 5), None, 'pair', 'float32', 'wide'),
  ('ragged', (13, 300), NARROW, 'pair', 'float32', 'offset'),
  ('chunks', (3, 1300), None, 'pair', 'bfloat16', 'wide'),
  ('half', (3, 129), None, 'online', 'float16', 'wide'),
) + tuple(
  (f'{name}_{algorithm}_{i}', shape, block, algorithm, dtype, name)
  for name in ('wide', 'uniform1000', 'increasing', 'one_hot')
  for algorithm in forms.ALGORITHMS
  for i, (shape, block, dtype) in enumerate(
    (
      ((9, 129), None, 'float32'),
      ((17, 700), tpu.Config(16, 256), 'bfloat16'),
      ((5, 1000), None, 'float16'),
      ((9, 5000), tpu.Config(8, 2048), 'float32'),
    )
  )
)


@functools.cache
def _compiled(**options):
  return jax.jit(functools.partial(tpu.run, interpret=races.TPU, **options))


def _run(x, where=None, **options):
  return np.asarray(_compiled(**options)(x, where))


def _run_traced_anew(x, where=None, **options):
  """With whatever is patched."""
  return np.asarray(_compiled.__wrapped__(**options)(x, where))


@functools.cache
def _reference(kind):
  return jax.jit(functools.partial(reference.run, kind=kind))


def _chain(columns: int) -> int:
  """Slices of a chunk, merges of chunks and lanes."""
  slices = -(-columns // 128)
  return min(slices, 16) + slices + 128


def _error(y, x, where=None):
  return rows.units(y, rows.exact('softmax', x, where))


class Softmax(parameterized.TestCase):
  def check(self, shape, block, algorithm, dtype, name):
    x = rows.draw(name, shape).astype(jnp.dtype(dtype))
    y = _run(x, algorithm=algorithm, config=block, out_dtype=jnp.float32)
    want = rows.exact('softmax', x)
    bound = {'pair': 8, 'online': 10, 'auto': 8}[algorithm] + _chain(shape[1])
    bound += 5 * -(-shape[1] // 128) if algorithm == 'online' else 0
    self.assertLessEqual(rows.units(y, want), min(bound, 32))


@pytest.mark.slow
class MatrixTest(Softmax):
  @parameterized.named_parameters(*SLOW_CASES)
  def test_softmax(self, *case):
    self.check(*case)


class TpuTest(Softmax):
  @parameterized.named_parameters(*CASES)
  def test_softmax(self, *case):
    self.check(*case)

  def test_special_rows_under_a_mask(self):
    self.check_special_rows_under_a_mask('log_softmax')

  @parameterized.parameters('softmax', 'logsumexp')
  @pytest.mark.slow
  def test_more_special_rows_under_a_mask(self, kind):
    self.check_special_rows_under_a_mask(kind)

  def check_special_rows_under_a_mask(self, kind):
    x = rows.draw('wide', (8, 300))
    where = np.random.default_rng(0).random(x.shape) < 0.7
    where[0] = False
    x[1, ~where[1]] = np.nan
    where[2, 7], x[2, 7] = True, np.inf
    where[3, 290], x[3, 290] = True, np.nan
    x[4] = -np.inf
    x[5, ::2] = -np.inf
    y = _run(
      x,
      where,
      kind=kind,
      config=tpu.Config(32, 128),
      algorithm='pair',
    )
    want = np.asarray(_reference(kind)(x, where))
    for special in (np.isnan, np.isposinf, np.isneginf, lambda v: v == 0.0):
      np.testing.assert_array_equal(special(y), special(want))
    finite = np.isfinite(want)
    np.testing.assert_allclose(y[finite], want[finite], rtol=32 * rows.U)

  def test_auto_decides_row_by_row(self):
    x = rows.draw('wide', (8, 128))
    x[2] = rows.draw('beyond', (1, 128))
    x[4, 7], x[5, 120], x[6] = np.nan, np.inf, -np.inf
    y, pair = _run(x), _run(x, algorithm='pair')
    bad = np.isin(np.arange(8), (4, 5, 6))
    np.testing.assert_array_equal(np.isnan(y), np.tile(bad[:, None], 128))
    bad[2] = True
    np.testing.assert_array_equal(np.isnan(pair), np.tile(bad[:, None], 128))
    others = np.arange(8) != 2
    np.testing.assert_array_equal(y[others], pair[others])
    self.assertLessEqual(_error(y[2:3], x[2:3]), 32)

  @pytest.mark.slow
  def test_auto_is_online_beyond_the_domain(self):
    x = rows.draw('wide', (9, 150))
    x[2] = rows.draw('beyond', (1, 150))
    np.testing.assert_array_equal(_run(x)[2], _run(x, algorithm='online')[2])

  def test_guards_are_left_out_where_entries_are_near(self):
    seen = []
    is_near = exponential.is_near

    def look(top, low):
      answer = is_near(top, low)
      jax.debug.callback(lambda v: seen.append(bool(v)), answer)
      return answer

    run = _compiled.__wrapped__(algorithm='pair', config=tpu.Config(8, 256))
    with mock.patch.object(exponential, 'is_near', look):
      for name, near in (
        ('wide', True),
        ('one_hot', True),
        # Beyond |x| <= 350, and entries that lie too far apart.
        ('offset', False),
        ('uniform50', False),
      ):
        with self.subTest(name=name):
          x = rows.draw(name, (8, 256))
          y = run(x)
          jax.effects_barrier()
          self.assertEqual(seen, [near])
          self.assertLessEqual(_error(y, x), 24)
          seen.clear()

  @pytest.mark.slow
  def test_rows_beyond_a_whole_block(self):
    x = rows.draw('wide', (9, 256))
    y = tpu.run(
      x, interpret=races.TPU, algorithm='pair', config=tpu.Config(8, 256)
    )
    self.assertLessEqual(_error(y, x), 24)

  @parameterized.parameters('nan', 'inf', 'all_dead', 'dead')
  def test_special_rows_in_a_whole_block(self, name):
    self.check_special_rows_in_a_whole_block(name, ('logsumexp',))

  @parameterized.parameters('nan', 'inf', 'all_dead', 'dead')
  @pytest.mark.slow
  def test_more_special_rows_in_a_whole_block(self, name):
    self.check_special_rows_in_a_whole_block(name, ('softmax', 'log_softmax'))

  def check_special_rows_in_a_whole_block(self, name, kinds):
    x = rows.draw('wide', (8, 128))
    if name == 'all_dead':
      x[3] = -np.inf
    else:
      x[3, 5] = {'nan': np.nan, 'inf': np.inf, 'dead': -np.inf}[name]
    for kind in kinds:
      y = _run(x, algorithm='pair', kind=kind)
      want = np.asarray(_reference(kind)(x))
      for special in (np.isnan, np.isposinf, np.isneginf):
        np.testing.assert_array_equal(special(y), special(want), err_msg=kind)

  def test_rows_do_not_see_each_other(self):
    x = rows.draw('wide', (8, 128))
    whole = _run(x, algorithm='pair')
    np.testing.assert_array_equal(_run(x[::-1], algorithm='pair'), whole[::-1])
    others = ~np.isin(np.arange(8), (3, 4))
    x[others] = np.nan
    part = _run(x, algorithm='pair')
    np.testing.assert_array_equal(part[3:5], whole[3:5])

  @pytest.mark.slow
  def test_rows_do_not_see_how_many_they_are(self):
    x = rows.draw('wide', (9, 150))
    whole = _run(x, algorithm='pair')
    part = _run(x[3:5], algorithm='pair')
    np.testing.assert_array_equal(whole[3:5], part)

  def test_half_precision_rounds_once_and_is_scaled_exactly(self):
    x = rows.draw('wide', (8, 128)).astype(jnp.bfloat16)
    y = _run(x, scale=0.5, algorithm='pair')
    wide = _run(x.astype(np.float32) / 2, algorithm='pair')
    np.testing.assert_array_equal(y, wide.astype(y.dtype))

  @pytest.mark.slow
  def test_scale(self):
    x = rows.draw('wide', (3, 140))
    y = _run(x, scale=0.5, algorithm='pair')
    self.assertLessEqual(_error(y, x * np.float32(0.5)), 32)

  def test_refusals(self):
    for x, words in (
      (jax.ShapeDtypeStruct((3,), 'float32'), r'x.shape=\(3,\)'),
      (jax.ShapeDtypeStruct((0, 3), 'float32'), 'empty'),
      (jax.ShapeDtypeStruct((2, 3), 'int32'), 'x.dtype=int32'),
    ):
      self.assertRegex(str(tpu.why_not(x)), words)
    x = jax.ShapeDtypeStruct((8, 128), 'bfloat16')
    self.assertIn('multiple of 16', tpu.why_not(x, config=tpu.Config(8, 128)))
    with self.assertRaisesRegex(NotImplementedError, 'x.dtype=int32'):
      tpu.run(jnp.ones((2, 3), jnp.int32))


class MutationTest(parameterized.TestCase):
  """Faults that the checks above must see."""

  def _error_with(self, patch, where=None, columns=128):
    x = rows.draw('wide', (3, 300))
    with patch:
      block = tpu.Config(32, columns)
      y = _run_traced_anew(x, where, algorithm='pair', config=block)
    return _error(y, x, where)

  @pytest.mark.slow
  def test_nothing_is_wrong(self):
    where = np.tile(np.arange(300) % 3 > 0, (3, 1))
    self.assertLess(self._error_with(contextlib.nullcontext(), where), 32)

  @pytest.mark.slow
  def test_last_column_block_dropped(self):
    sum_block = tpu._sum_block

    def dropped(source, scratch, j, static):
      pl.when(j < 2)(lambda: sum_block(source, scratch, j, static))

    patch = mock.patch.object(tpu, '_sum_block', dropped)
    self.assertGreater(self._error_with(patch), 1e3)

  @pytest.mark.slow
  def test_rescale_skipped(self):
    def merge(a, b):
      return exponential.Pair(a.m + b.m, jnp.maximum(a.n, b.n))

    faulty = forms.PAIR._replace(merge=merge)
    patch = mock.patch.object(forms, 'PAIR', faulty)
    self.assertGreater(self._error_with(patch), 1e3)

  @parameterized.named_parameters(
    ('columns_not_visited', '_over_chunks'),
    ('half_of_what_rows_need', '_to_lanes'),
    ('stored_with_an_error', '_store'),
  )
  @pytest.mark.slow
  def test_whole_rows(self, name):
    faults = {
      '_over_chunks': lambda f: (
        lambda body, init, scratch, static: f(
          body, init, scratch, static._replace(chunk=static.chunk * 3)
        )
      ),
      '_to_lanes': lambda f: lambda v: f(0.5 * v),
      '_store': lambda f: lambda v, *a: f(jnp.abs(v) + 1e-3, *a),
    }
    patch = mock.patch.object(tpu, name, faults[name](getattr(tpu, name)))
    self.assertGreater(self._error_with(patch, columns=384), 1e3)

  @pytest.mark.slow
  def test_whole_rows_without_a_fault(self):
    error = self._error_with(contextlib.nullcontext(), columns=384)
    self.assertLess(error, 24)

  @pytest.mark.slow
  def test_mask_forgotten(self):
    load = tpu._load

    def unmasked(*args):
      return load(*args)[0], None

    where = np.tile(np.arange(300) % 3 > 0, (3, 1))
    patch = mock.patch.object(tpu, '_load', unmasked)
    self.assertGreater(self._error_with(patch, where), 1e3)


if __name__ == '__main__':
  absltest.main()
