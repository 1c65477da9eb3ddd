"""What calibration knows of the activations of a layer."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lowbit_jax import observers
from lowbit_jax._typing import PyTree
from lowbit_jax._walk import record
from lowbit_jax.transforms import Transform

# What is recorded of every product with a weight.
_OBSERVER = observers.several(
  gram=observers.gram, amax=observers.absmax, spread=observers.moments
)
_FIELDS = 'gram', 'amax', 'spread'


class Statistics(NamedTuple):
  """Of activations (tokens, in) of one layer, or of the members of one weight,
  whose axis is in front of the others; float32.

  Attributes:
    seen: (), how many tokens.
    moments: (in, in), mean of x' x over tokens.
    mean: (in,), of x.
    amax: (in,), largest magnitude.
  """

  seen: jax.Array
  moments: jax.Array
  mean: jax.Array
  amax: jax.Array

  @property
  def rms(self) -> jax.Array:
    """(in,), root of the mean square of each channel."""
    return jnp.sqrt(jnp.diagonal(self.moments, axis1=-2, axis2=-1))

  def transformed(self, transform: Transform) -> 'Statistics':
    """Those of activations that took a transform along axis -1.

    What the largest magnitudes become is not known: `amax` is then a bound that
    a normal distribution exceeds once in 10^4, 4 times the root mean square.
    """
    moments = transform.apply(self.moments)
    moments = transform.apply(moments.T).T
    moved = self._replace(moments=moments, mean=transform.apply(self.mean))
    return moved._replace(amax=4 * moved.rms)

  def member(self, i: int) -> 'Statistics':
    """Those of one of several members."""
    return jax.tree.map(lambda leaf: leaf[i], self)


def calibrate(
  fn: Callable,
  params: PyTree,
  batches: Iterable[Any],
  *,
  observed: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
  """Records what the weights of a function meet, batch by batch.

  Memory is that of one batch and of the statistics, (in, in) for each weight.
  Of the order of batches nothing depends but the rounding of float32 sums.
  Batches that are sharded over devices are summed over them.

  Args:
    fn: `fn(params, batch)`, such as the loss or the forward pass of a model.
    params: its parameters, packed ones included.
    batches: pytrees of arrays, of few different shapes: each is compiled for.
      Wrap them in a progress bar for long runs.
    observed: what an earlier call returned for other batches, to go on from.

  Returns:
    By path of the weight what `method` takes. It is a tree of arrays:
    `lowbit_jax.io.save` keeps it for a later run.

  Raises:
    ValueError: without a batch, where no product has a weight, and for
      activations that are not finite, by the path of the weight.
  """
  run = jax.jit(lambda params, batch: record(fn, _OBSERVER)(params, batch)[1])
  found, count = None if observed is None else dict(observed), 0
  for batch in batches:
    count += 1
    seen = run(params, batch)
    found = seen if found is None else _merged(found, seen)
  if not count:
    raise ValueError('batches is empty: calibration needs one at least')
  if not found:
    raise ValueError('fn multiplies no weight that is in params')
  _check_finite(found)
  return found


@jax.jit
def _merged(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, Any]:
  """Observations of two batches; sites of one of them stay as they are."""
  merge = _merge
  return {
    path: merge(a[path], b[path])
    if path in a and path in b
    else (a[path] if path in a else b[path])
    for path in [*a, *(path for path in b if path not in a)]
  }


def _merge(a: PyTree, b: PyTree) -> PyTree:
  """Observations of one site, with a leading axis for each step of a scan."""
  seen = a['gram'].seen
  merge = _OBSERVER.merge
  for _ in range(seen.ndim):
    merge = jax.vmap(merge)
  return merge(a, b)


def _check_finite(observed: Mapping[str, Any]) -> None:
  finite = jax.tree.map(lambda leaf: jnp.isfinite(leaf).all(), dict(observed))
  for path, leaves in jax.device_get(finite).items():
    if not all(jax.tree.leaves(leaves)):
      raise ValueError(
        f'activations that meet {path!r} have NaN or Inf; calibrate with'
        ' batches for which the model is finite'
      )


def of_leaf(observed: Mapping[str, Any], path: str) -> Statistics:
  """The statistics of a weight; layers of a stack have their number behind the
  path.

  Raises:
    ValueError: if there are none.
  """
  base, numbers = path, []
  while base not in observed:
    base, _, last = base.rpartition('/')
    if not last.isdigit() or not base:
      names = ', '.join(list(observed)[:4])
      raise ValueError(
        f'no activations were recorded for {path!r}, but for {names}, ...;'
        ' calibrate a function that uses it'
      )
    numbers.insert(0, int(last))
  leaves = observed[base]
  if not all(name in leaves for name in _FIELDS):
    raise ValueError(f'observed[{base!r}] is not what ptq.calibrate returns')
  for number in numbers:
    leaves = jax.tree.map(lambda leaf, i=number: leaf[i], leaves)
  gram, amax, spread = (leaves[name] for name in _FIELDS)
  rows = jnp.maximum(gram.seen, 1)[..., None, None]
  return Statistics(gram.seen, gram.products / rows, spread.mean, amax)
