"""Rows to take a softmax of, its exact value, and the distance to it."""

import numpy as np

U = 2.0**-24
LONG = np.longdouble

# Rounding of the result, in relative terms.
ROUNDING = {'float32': 0.0, 'bfloat16': 2.0**-8, 'float16': 2.0**-11}

NAMES = (
  'normal',
  'wide',
  'uniform50',
  'uniform1000',
  'offset',
  'constant',
  'one_hot',
  'increasing',
  'tiny',
  'zeros',
  'beyond',
  'huge',
)


def draw(name: str, shape) -> np.ndarray:
  """A float32 matrix of one of the distributions in `NAMES`."""
  rng = np.random.default_rng(sum(map(ord, name)) + shape[-1])
  columns = shape[-1]
  make = {
    'normal': lambda: rng.normal(size=shape),
    'wide': lambda: 5 * rng.normal(size=shape),
    'uniform50': lambda: rng.uniform(-50, 50, shape),
    'uniform1000': lambda: rng.uniform(-1000, 1000, shape),
    'offset': lambda: 1e4 + 3 * rng.normal(size=shape),
    'constant': lambda: np.full(shape, 3.25),
    'one_hot': lambda: np.broadcast_to(80.0 * (np.arange(columns) == 1), shape),
    'increasing': lambda: np.broadcast_to(np.arange(columns) * 0.7, shape),
    'tiny': lambda: rng.normal(size=shape) * 1e-40,
    'zeros': lambda: np.where(rng.random(shape) < 0.5, -0.0, 0.0),
    # Beyond the domain of the pair form.
    'beyond': lambda: 22800 + 3 * rng.normal(size=shape),
    'huge': lambda: rng.normal(size=shape) * 1e30,
  }
  return make[name]().astype(np.float32)


def exact(kind: str, x, where=None) -> np.ndarray:
  """softmax, log_softmax or logsumexp in longdouble; rows with live finite
  entries only."""
  x = np.asarray(x).astype(LONG)
  if where is not None:
    x = np.where(where, x, -np.inf)
  top = x.max(-1, keepdims=True)
  total = np.exp(x - top).sum(-1, keepdims=True)
  if kind == 'softmax':
    return np.exp(x - top) / total
  if kind == 'log_softmax':
    return x - top - np.log(total)
  return (top + np.log(total))[..., 0]


def units(y, want) -> float:
  """Largest relative error of a softmax in units of u above 2^-120; infinite
  if smaller values are off by more than 2^-126 or anything is NaN."""
  y = np.asarray(y).astype(LONG)
  small = want <= 2.0**-120
  if not np.all(np.abs(y - want)[small] <= 2.0**-126):
    return float('inf')
  if np.isnan(y).any():
    return float('inf')
  error = np.abs(y - want)[~small] / want[~small]
  return float(error.max(initial=0.0)) / U
