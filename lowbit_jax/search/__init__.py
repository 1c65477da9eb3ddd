"""Formulas for functions of one variable: programs, their constants, proofs.

`program` has straight-line programs as values, `targets` the functions they
are to be. `evolve` searches: `variation` makes new programs, `fit` finds the
constants of many at once, `archive` keeps the best, `islands` exchanges them
between processes, `speed` measures their time. `polish` finds the last digits
of constants, `certify` the error of a compiled function over every float32
input, `emit` its source code in Python and C, `timing` which of two compiled
functions is faster. `adopted` is the record of what `special` took over.
"""

from lowbit_jax import _lazy

__getattr__, __dir__ = _lazy.submodules(
  __name__,
  (
    'adopted',
    'archive',
    'certify',
    'emit',
    'evolve',
    'fit',
    'islands',
    'polish',
    'program',
    'speed',
    'targets',
    'timing',
    'variation',
  ),
)
