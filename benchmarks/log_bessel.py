"""What log I and log K cost, relative to SciPy's ive and kve.

50 000 points in float64; results are checked against SciPy first where it does
not underflow. SciPy computes a scaled function and no logarithm, on one thread.

  python benchmarks/log_bessel.py
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from scipy import special

import _timing
from lowbit_jax.special import log_iv, log_kv

_ROUNDS = flags.DEFINE_integer('rounds', 7, 'Timed calls of each candidate.')
_POINTS = 50_000
# (lowest v, highest v, lowest x, highest x), uniform.
_RANGES = {
  'v < 12, x < 2': (0, 12, 1e-3, 2),
  'v < 12, 2 < x < 25': (0, 12, 2, 25),
  'v < 50, x < 100': (0, 50, 0.01, 100),
  'v < 80, x < 600': (0, 80, 0.01, 600),
}
_PAIRS = {
  'log I': (log_iv, special.ive, 1),
  'log K': (log_kv, special.kve, -1),
}


def check(ours, theirs, sign: int, v, x) -> None:
  """Within 1e-12 of max(1, |log|)."""
  with np.errstate(divide='ignore'):
    want = np.log(theirs(v, x)) + sign * x
  usable = np.isfinite(want)
  error = np.abs(np.asarray(ours(v, x)) - want) / np.maximum(1, np.abs(want))
  assert error[usable].max() < 1e-12, error[usable].max()


def main(argv):
  del argv
  print(f'{_timing.machine()}, scipy\n')
  rng, rows = np.random.default_rng(0), []
  with jax.enable_x64(True):
    for name, (v0, v1, x0, x1) in _RANGES.items():
      v, x = rng.uniform(v0, v1, _POINTS), rng.uniform(x0, x1, _POINTS)
      arrays = jnp.asarray(v), jnp.asarray(x)
      for function, (ours, theirs, sign) in _PAIRS.items():
        check(ours, theirs, sign, v, x)
        base, ratio = _timing.compare(
          functools.partial(theirs, v, x),
          {name: functools.partial(jax.jit(ours), *arrays)},
          rounds=_ROUNDS.value,
        )
        scale = 1e6 / _POINTS
        rows.append([
          function,
          name,
          f'{ratio.cpu:.2f}',
          f'{base.milliseconds * scale:.0f}',
          f'{ratio.milliseconds * scale:.0f}',
        ])  # fmt: skip
  header = ['function', 'range', 'CPU ratio', 'SciPy ns', 'ns (wall)']
  print(_timing.table('logarithms of Bessel functions', header, rows))


if __name__ == '__main__':
  app.run(main)
