"""2^x on [0, 1] by Operon, to compare with `examples/evolve.py`.

Operon (Burlacu et al., 2020) evolves trees, fits their constants by
Levenberg-Marquardt as well, and keeps a front of error against length. It
computes in float32, so the constants of its front are fitted again in float64,
to the least squares of the relative error. The factor that every variable of
its trees has is not counted as an operation.

  pip install pyoperon scikit-learn scipy
  python benchmarks/operon.py --seconds=180 --seed=0
"""

import re
import warnings

import numpy as np
from absl import app, flags

_SECONDS = flags.DEFINE_integer('seconds', 180, 'Of the search.')
_SEED = flags.DEFINE_integer('seed', 0, 'Of the search.')

_CONSTANT = re.compile(r'-?\d+\.\d+')


def points(count: int) -> np.ndarray:
  """Chebyshev's extrema on [0, 1]."""
  return (1 - np.cos(np.linspace(0, np.pi, count))) / 2


def front(seconds: int, seed: int) -> list[tuple[int, str]]:
  """(operations, formula of X1) of what Operon finds on one thread."""
  from pyoperon.sklearn import SymbolicRegressor

  regressor = SymbolicRegressor(
    allowed_symbols='add,sub,mul,div,constant,variable',
    objectives=['mse', 'length'],
    optimizer_iterations=20,
    max_length=25,
    generations=10**6,
    max_evaluations=10**9,
    max_time=seconds,
    n_threads=1,
    epsilon=0,
    random_state=seed,
  )
  x = points(64)
  with warnings.catch_warnings():
    warnings.simplefilter('ignore')
    regressor.fit(x[:, None], 2.0**x)
  return [
    (
      sum(not node.IsLeaf for node in member['tree'].Nodes),
      regressor.get_model_string(member['tree'], precision=17),
    )
    for member in regressor.pareto_front_
  ]


def refitted_error(formula: str) -> float:
  """Largest relative error with constants by least squares in float64."""
  from scipy import optimize

  start = [float(c) for c in _CONSTANT.findall(formula)]
  counter = iter(range(len(start)))
  body = _CONSTANT.sub(lambda _: f'c[{next(counter)}]', formula)
  code = compile(body, '<formula>', 'eval')
  x = points(200)

  def residual(c):
    return eval(code, {'c': c, 'X1': x}) / 2.0**x - 1

  fit = optimize.least_squares(
    residual,
    start,
    x_scale=np.maximum(np.abs(start), 1e-3),
    xtol=1e-15,
    ftol=1e-15,
    gtol=1e-15,
    max_nfev=2000,
  )
  return float(np.max(np.abs(fit.fun)))


def main(argv):
  del argv
  print('operations  error')
  best = np.inf
  for operations, formula in sorted(front(_SECONDS.value, _SEED.value)):
    error = refitted_error(formula)
    if error < 0.99 * best:
      best = error
      print(f'{operations:10}  {error:.2e}')


if __name__ == '__main__':
  app.run(main)
