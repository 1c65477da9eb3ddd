"""Accuracy and speed of `special` beside the functions of XLA.

Errors are measured first, on 2^20 float32 arguments of the certified interval,
and a function that exceeds its tier stops the run. Then both run in turns in
one process: 512 dependent applications to 2^14 elements, and 8 to 2^20.

  python benchmarks/special.py --function=exp2
"""

from absl import app, flags

import _timing
from lowbit_jax import special
from lowbit_jax.search import adopted, certify, timing

_FUNCTION = flags.DEFINE_multi_enum(
  'function', list(adopted.FUNCTIONS), list(adopted.FUNCTIONS), 'Which.'
)
_INTERVAL = flags.DEFINE_list(
  'interval', None, 'LO,HI of the arguments that are timed.'
)
_ROUNDS = flags.DEFINE_integer('rounds', 40, 'A B B A sequences per run.')


def row(name: str) -> list[str]:
  """Largest errors of ours and of XLA, and ratios of speed."""
  entry = adopted.FUNCTIONS[name]
  errors = [
    certify.tiered(fn, entry.reference, entry.interval, tier='2^20').max_ulp
    for fn in (entry.function, entry.base)
  ]
  if errors[0] > special.MAX_ULP[name]:
    raise SystemExit(f'{name} has an error of {errors[0]:.3f} ULP')
  interval = tuple(map(float, _INTERVAL.value or entry.timed))
  cached, large = (
    timing.compare(
      entry.function,
      entry.base,
      interval,
      size=size,
      applications=applications,
      rounds=_ROUNDS.value,
    )
    for size, applications in ((2**14, 512), (2**20, 8))
  )
  return [
    name,
    f'{errors[0]:.3f}',
    f'{errors[1]:.4g}',
    *(_timing.speed(comparison) for comparison in (cached, large)),
    f'{min(r.nanoseconds for r in cached.repeats):.2f}',
    f'{min(r.base_nanoseconds for r in cached.repeats):.2f}',
  ]


def main(argv):
  del argv
  print(f'{_timing.machine()}\n')
  header = ['function', 'ULP', 'ULP of XLA', 'speed, 2^14', 'speed, 2^20']
  header += ['ns', 'ns of XLA']
  rows = [row(name) for name in _FUNCTION.value]
  print(_timing.table('elementary functions beside XLA', header, rows))


if __name__ == '__main__':
  app.run(main)
