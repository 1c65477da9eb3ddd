"""Formulas for functions of one variable: programs, their constants, proofs.

- `adopted`: How the functions of `special` got their constants and
  certificates.
- `archive`: The results of a search: the best programs at every cost.
- `certify`: The error of a compiled float32 function over every input of an
  interval.
- `emit`: Source code of a program, in Python for JAX and in C99.
- `evolve`: Evolution of programs: `init` a state, `step` it, look at its
  archive.
- `fit`: Constants of many programs at once: Levenberg-Marquardt, then Lawson.
- `islands`: Exchange of good programs between searches that run side by side.
- `polish`: The last digits of a formula: minimax constants, and their float32
  values.
- `program`: Straight-line programs of one variable, as values.
- `speed`: Time as the objective: the bound first, then the speed of compiled
  code.
- `targets`: Targets of a search: functions of one variable, and their core
  problems.
- `timing`: Which of two functions of one variable is faster once compiled.
- `variation`: New programs from old ones: edits of the graph of values.
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
