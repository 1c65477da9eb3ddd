"""exponential: exp(x) of float32 within 2^-23, against float64."""

import ctypes
import functools
import math

import numpy as np
import pytest
from absl.testing import absltest, parameterized

pytest.importorskip('llvmlite')

from lowbit_jax.cpu._code import (  # noqa: E402
  ENTRY,
  F32,
  I64,
  F32x8,
  Module,
  load,
  loop,
  result,
  store,
)
from lowbit_jax.cpu._compiler import compiled, generic, host  # noqa: E402
from lowbit_jax.cpu._exponential import (  # noqa: E402
  ERROR,
  LEAST,
  MOST,
  exponential,
)

_TARGETS = {'host': host, 'generic': generic}


@functools.cache
def function(kind, target):
  """A function of the addresses of x and of the result, and a count."""
  module = Module('exponential')
  with module.function(ENTRY, [I64, I64, I64], I64) as (x, out, count):
    with loop(count) as i:
      offset = i * kind.nbytes
      store(exponential(load(x + offset, kind)), out + offset)
    result(0)
  arguments = [ctypes.c_int64] * 3
  return ctypes.CFUNCTYPE(ctypes.c_int64, *arguments)(compiled(module, target))


def exp(x: np.ndarray, kind=F32x8, target=None) -> np.ndarray:
  x = np.ascontiguousarray(x, np.float32)
  out = np.empty_like(x)
  run = function(kind, target or host())
  run(x.ctypes.data, out.ctypes.data, x.size // kind.lanes)
  return out


def dense() -> np.ndarray:
  """Each 101st float32 whose exponential is a normal number."""
  bits = np.arange(0, 1 << 32, 101, dtype=np.uint64).astype(np.uint32)
  x = bits.view(np.float32)
  x = x[(x >= np.float32(LEAST)) & (x <= np.float32(MOST))]
  return x[: x.size // 8 * 8]


class ExponentialTest(parameterized.TestCase):
  @parameterized.parameters(*_TARGETS)
  def test_is_within_its_error(self, target):
    x = dense() if target == 'host' else dense()[::999]
    x = x[: x.size // 8 * 8]
    want = np.exp(x.astype(np.float64))
    got = exp(x, target=_TARGETS[target]())
    error = np.abs(got - want) / want
    self.assertLessEqual(error.max(), ERROR, x[error.argmax()])

  def test_does_not_decrease_beyond_its_error(self):
    x = np.sort(dense())
    y = exp(x).astype(np.float64)
    self.assertTrue((y[1:] >= y[:-1] * (1 - 2 * ERROR)).all())

  @parameterized.parameters(*_TARGETS)
  def test_special_values(self, target):
    least, most = np.float32(LEAST), np.float32(MOST)
    beyond = (
      np.nextafter(least, np.float32(-100)),
      np.nextafter(most, np.float32(100)),
    )
    x = np.float32(
      [np.nan, -np.nan, -np.inf, np.inf, -3e38, 3e38, *beyond]
      + [0.0, -0.0, 1e-40, -1e-40, -87.5, -104, 88.75, 1e4]
    )
    want = [np.nan, np.nan, 0, np.inf, 0, np.inf, 0, np.inf]
    want += [1, 1, 1, 1, 0, 0, np.inf, np.inf]
    got = exp(x, target=_TARGETS[target]())
    np.testing.assert_array_equal(got, np.float32(want))
    self.assertFalse(np.signbit(got[got == 0]).any())

  def test_every_nan_gives_nan(self):
    payloads = np.r_[1 : 1 << 22 : 101, (1 << 22) : (1 << 23) : 101]
    for sign in (0, 1 << 31):
      x = (payloads + 0x7F800000 + sign).astype(np.uint32).view(np.float32)
      x = x[: x.size // 8 * 8]
      self.assertTrue(np.isnan(exp(x)).all())

  def test_ends_of_the_normal_numbers(self):
    tiny, huge = 2.0**-126, float(np.finfo(np.float32).max)
    least, most = np.float32(LEAST), np.float32(MOST)
    self.assertGreaterEqual(math.exp(least), tiny)
    self.assertLess(math.exp(np.nextafter(least, np.float32(-100))), tiny)
    self.assertLessEqual(math.exp(most), huge)
    self.assertGreater(math.exp(np.nextafter(most, np.float32(100))), huge)
    self.assertGreaterEqual(exp(np.full(8, least))[0], tiny)
    self.assertLessEqual(exp(np.full(8, most))[0], huge)

  def test_of_a_scalar_is_that_of_a_lane(self):
    x = dense()[::9973]
    x = x[: x.size // 8 * 8]
    np.testing.assert_array_equal(exp(x, F32), exp(x))


if __name__ == '__main__':
  absltest.main()
