"""Tests of what is measured and raced in a search by time, not of the times."""

import dataclasses
import math
from unittest import mock

import jax.numpy as jnp
import numpy as np
from absl.testing import absltest

from lowbit_jax.search import (
  archive as archives,
  certify,
  program,
  speed,
  targets,
)

_EXP2 = dataclasses.replace(targets.get('exp2'), interval=(-0.5, 0.5))


def _horner(degree):
  """2^x by its Taylor polynomial, in multiply-adds."""
  (fma,) = program.op_codes(['fma'])
  constants = [math.log(2) ** k / math.factorial(k) for k in range(degree + 1)]
  rows, value = [], degree + 1
  for k in range(degree, 0, -1):
    rows.append((fma, value, 0, k))
    value = degree + 1 + len(rows)
  return program.Program(tuple(rows), tuple(constants))


class SpeedTest(absltest.TestCase):
  def test_finalists_are_of_the_front_and_within_the_bound(self):
    coarse, fine, slower = (_horner(n) for n in (4, 6, 7))
    archive = archives.insert(
      {},
      [
        archives.Entry(coarse, 4.0, 3.0),  # truncated: 30 ULP, not 3
        archives.Entry(fine, 6.0, 0.9),
        archives.Entry(slower, 7.0, 0.95),
      ],
    )
    with mock.patch.object(certify, 'CHUNK', 2**13):  # a tier's worth
      finalists = speed.finalists(
        _EXP2, archive, jnp.exp2, np.exp2, (-0.5, 0.5), tier='2^12', rounds=1
      )
    self.assertEqual([f.program.rows for f in finalists], [fine.rows])
    self.assertLess(finalists[0].max_ulp, 1)

  def test_measures_what_is_within_the_bound_and_not_known(self):
    samples = targets.samples(
      dataclasses.replace(_EXP2, weight='ulp32'), points=40, dense=100
    )
    beyond, known, new, left = (
      archives.Entry(_horner(n), float(n), error)
      for n, error in ((3, 99.0), (7, 0.9), (8, 0.8), (9, 0.8))
    )
    keys = [program.structure_hash(e.program.rows) for e in (known, new)]
    entries, times = speed.measure(
      [beyond, left, new, known], samples, {keys[0]: 5.5}, bound=1.0, count=1
    )
    self.assertEqual(entries[0], beyond)
    self.assertEqual(set(times), set(keys))
    self.assertEqual([e.cost for e in entries[1:]], [times[k] for k in keys])
    self.assertEqual(times[keys[0]], 5.5)
    self.assertGreater(times[keys[1]], 0)
    for entry in entries[1:]:
      self.assertLess(entry.error, 1)  # of the compiled core


if __name__ == '__main__':
  absltest.main()
