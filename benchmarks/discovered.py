"""Formulas that the search found by time, raced with kernels made by hand.

Both sit in the same reduction of the range. Errors come first, on 2^20 float32
arguments; then both run in turns in one process, and likewise with XLA's
function. The constants of the formulas were found by

  python examples/evolve.py --target=log2 --interval=0.707,1.4143 \\
    --objective=time --bound=2.84 --ops=add,sub,mul,div,fma \\
    --rows=11 --constants=9 --islands=1 --minutes=8
  python examples/evolve.py --target=exp2 --interval=-0.5,0.5 \\
    --objective=time --ops=add,sub,mul,fma \\
    --rows=8 --constants=7 --islands=1 --minutes=8

A search by time gives other formulas on another day.

  python benchmarks/discovered.py
"""

import dataclasses
import functools
import math
from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
from absl import app, flags

import _timing
from lowbit_jax import special
from lowbit_jax.search import certify, polish, timing
from lowbit_pallas.arith import elementary

_ROUNDS = flags.DEFINE_integer('rounds', 40, 'A B B A sequences per run.')

_LOG2 = (
  float.fromhex('0x1.2b4374p+1'),
  float.fromhex('0x1.408f5ap+1'),
  float.fromhex('-0x1.ce786p+0'),
  float.fromhex('-0x1.3d9e5cp-6'),
  float.fromhex('-0x1.2f23c8p+0'),
  float.fromhex('0x1.715478p+0'),
)
_EXP2 = (
  float.fromhex('0x1.f5e40ap-2'),
  float.fromhex('0x1.3b5548p-11'),
  float.fromhex('0x1.adbbd8p-8'),
  float.fromhex('0x1.cfdbbep-5'),
  float.fromhex('0x1.62e42cp-1'),
)


@elementary.log2_split
def found_log2(m):
  """t (c6 + t (c3 + t (c4 m + c5)) / (t (c1 + m) + c2)), t = m - 1."""
  c1, c2, c3, c4, c5, c6 = _LOG2
  t = m - 1.0
  quotient = t / (t * (c1 + m) + c2)
  return t * (quotient * (c3 + t * (c4 * m + c5)) + c6)


@elementary.exp2_split
def found_exp2(r):
  """1 + r (c5 + r u^2), u = c1 + r (c4 + r (c3 + r c2))."""
  c1, c2, c3, c4, c5 = _EXP2
  u = c1 + ((c2 * r + c3) * r + c4) * r
  return 1.0 + ((u * u) * r + c5) * r


def atanh_log2(c, x):
  """The classical s P(s^2), s = (m - 1) / (m + 1), with four constants."""

  def core(m):
    s = (m - 1.0) / (m + 1.0)
    z = s * s
    return s * (((c[3] * z + c[2]) * z + c[1]) * z + c[0])

  return elementary.log2_split(core)(x)


def hand_made_log2() -> Callable:
  """`atanh_log2` with polished constants."""
  start = [2 / math.log(2) / (2 * k + 1) for k in range(4)]
  fit = polish.float32_coefficients(
    atanh_log2, start, np.log2, (0.7071, 1.41422), seed=0
  )
  return functools.partial(atanh_log2, tuple(map(float, fit.constants)))


@dataclasses.dataclass(frozen=True)
class Race:
  """A formula that was found, and what it is compared with."""

  name: str
  found: Callable
  hand_made: Callable
  xla: Callable
  reference: Callable
  interval: tuple[float, float]


def races() -> list[Race]:
  log2 = (jnp.log2, np.log2, (1e-30, 1e30))
  exp2 = (jnp.exp2, np.exp2, (-125.0, 127.0))
  return [
    Race('log2, s P(s^2)', found_log2, hand_made_log2(), *log2),
    Race('log2, special', found_log2, special.log2, *log2),
    Race('exp2, special', found_exp2, special.exp2, *exp2),
  ]


def row(race: Race) -> list[str]:
  """Largest errors, and the speed of what was found over the others'."""
  functions = (race.found, race.hand_made, race.xla)
  errors = [
    certify.tiered(fn, race.reference, race.interval, tier='2^20').max_ulp
    for fn in functions
  ]
  speeds = [
    timing.compare(race.found, base, race.interval, rounds=_ROUNDS.value)
    for base in functions[1:]
  ]
  return [
    race.name,
    *(f'{error:.3f}' for error in errors),
    *map(_timing.speed, speeds),
  ]


def main(argv):
  del argv
  print(f'{_timing.machine()}\n')
  header = ['by hand', 'found: ULP', 'by hand: ULP', 'XLA: ULP']
  header += ['speed over hand', 'over XLA']
  rows = [row(race) for race in races()]
  print(_timing.table('found formulas beside others', header, rows))


if __name__ == '__main__':
  app.run(main)
