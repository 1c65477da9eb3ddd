"""What calibration knows of the activations of a layer."""

import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.sharding import NamedSharding, PartitionSpec

from lowbit_jax import observers
from lowbit_jax._typing import PyTree
from lowbit_jax._walk import Observer, Product, record
from lowbit_jax.transforms import Permutation, Transform

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
    squares = jnp.diagonal(self.moments, axis1=-2, axis2=-1)
    return jnp.sqrt(jnp.maximum(squares, 0))  # below 0 by rounding

  def transformed(self, transform: Transform) -> 'Statistics':
    """Those of activations that took a transform along axis -1.

    What the largest magnitudes become is not known but of a permutation: `amax`
    is then a bound that a normal distribution exceeds once in 10^4, 4 times the
    root mean square.
    """
    moments = transform.apply(self.moments)
    moments = transform.apply(moments.T).T
    moved = self._replace(moments=moments, mean=transform.apply(self.mean))
    if isinstance(transform, Permutation):
      return moved._replace(amax=transform.apply(self.amax))
    return moved._replace(amax=4 * moved.rms)

  def member(self, i: int) -> 'Statistics':
    """Those of one of several members."""
    return jax.tree.map(lambda leaf: leaf[i], self)


class Selected(NamedTuple):
  """An observer of some weights, and of what their activations become.

  Attributes:
    select: regular expression that is searched in the path, None for all.
    rounding: from activations (..., in) to what the weight meets.
  """

  select: str | None = None
  rounding: Callable[[jax.Array], jax.Array] | None = None

  def observe(self, product: Product, *operands: Any) -> PyTree | None:
    if self.select is not None and not re.search(self.select, product.site):
      return None
    if self.rounding is not None and product.weight is not None:
      side = 0 if product.weight == 'rhs' else 1
      rounded = self._rounded(product, side, operands[side])
      operands = *operands[:side], rounded, *operands[side + 1 :]
    return _OBSERVER.observe(product, *operands)

  def merge(self, a: PyTree, b: PyTree) -> PyTree:
    return _OBSERVER.merge(a, b)

  def _rounded(self, product: Product, side: int, x: Any) -> jax.Array:
    """Activations that were rounded along the axis that is contracted."""
    assert self.rounding is not None
    if product.op == 'dot_general':
      contracted = product.params['dimension_numbers'][0][side]
      if len(contracted) != 1:
        raise ValueError(
          f'{product.site!r} contracts {len(contracted)} axes of activations;'
          ' rounding= is for one'
        )
      (axis,) = contracted
    elif product.op == 'ragged_dot':
      axis = 1
    else:
      raise ValueError(
        f'rounding= is not for the {product.op} {product.site!r}'
      )
    return jnp.moveaxis(self.rounding(jnp.moveaxis(x, axis, -1)), -1, axis)


def calibrate(
  fn: Callable,
  params: PyTree,
  batches: Iterable[Any],
  *,
  select: str | None = None,
  rounding: Callable[[jax.Array], jax.Array] | None = None,
  observed: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
  """Records what the weights of a function meet, batch by batch.

  Memory is that of one batch and of the statistics, (in, in) for each weight.
  Of the order of batches nothing depends but the rounding of float32 sums.
  Batches that are sharded over devices are summed over them, those of other
  processes included: all of them make the same calls, and see the same sums.

  Args:
    fn: `fn(params, batch)`, such as the loss or the forward pass of a model.
    params: its parameters, packed ones included.
    batches: pytrees of arrays, of few different shapes: each is compiled for.
      Wrap them in a progress bar for long runs.
    select: regular expression that is searched in the paths of weights; None
      for all of them.
    rounding: from activations (..., in) of a layer to what its weight will
      meet, where they will be quantized too; it does not change what `fn`
      computes.
    observed: what an earlier call returned for other batches, to go on from.

  Returns:
    By path of the weight what `method` takes. It is a tree of arrays:
    `lowbit_jax.io.save` keeps it for a later run.

  Raises:
    ValueError: without a batch, where no product has a weight, and for
      activations that are not finite, by the path of the weight.
  """
  run = recorder(fn, Selected(select, rounding))
  return observe(run, params, batches, observed)


def recorder(fn: Callable, observer: Observer) -> Callable:
  """A compiled function of parameters and a batch that returns observations."""
  observed = record(fn, observer)
  return jax.jit(lambda params, batch: observed(params, batch)[1])


def observe(
  run: Callable,
  params: PyTree,
  batches: Iterable[Any],
  observed: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
  """What a recorder sees of some batches, see `calibrate`."""
  found, count = None if observed is None else dict(observed), 0
  for batch in batches:
    count += 1
    seen = run(params, batch)
    found = seen if found is None else _merged(found, seen)
  if not count:
    raise ValueError('batches is empty: calibration needs one at least')
  if not found:
    raise ValueError('fn multiplies no weight that is in params and selected')
  _check_finite(found)
  return found


@jax.jit
def _merged(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, Any]:
  """Observations of two batches; sites of one of them stay as they are."""
  both = {path: _merge(a[path], b[path]) for path in a if path in b}
  return {**a, **b, **both}


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
  if leaves['gram'].seen.ndim < len(numbers):
    raise ValueError(
      f'what the layers of {base!r} meet was recorded for all of them'
      ' together; calibrate a function that scans over the stack itself, or go'
      ' through its blocks by ptq.sequential'
    )
  for number in numbers:
    leaves = jax.tree.map(lambda leaf, i=number: leaf[i], leaves)
  gram, amax, spread = (jax.tree.map(_whole, leaves[name]) for name in _FIELDS)
  rows = jnp.maximum(gram.seen, 1)[..., None, None]
  return Statistics(gram.seen, gram.products / rows, spread.mean, amax)


def _whole(x: Any) -> Any:
  """The same array; on each device, where it is split over processes.

  NumPy cannot read what other processes hold.
  """
  if isinstance(x, Tracer) or not isinstance(x, jax.Array):
    return x
  if x.is_fully_addressable or x.is_fully_replicated:
    return x
  assert isinstance(x.sharding, NamedSharding)  # as all that jit returns
  return jax.device_put(x, NamedSharding(x.sharding.mesh, PartitionSpec()))


def of_kernel(
  observed: Mapping[str, Any], path: str, shape: tuple[int, ...]
) -> Statistics:
  """The statistics of a kernel (*stack, in, out), with the axes of its stack.

  Raises:
    ValueError: if there are none, or not for each member of the stack.
  """
  found, want = of_leaf(observed, path), shape[:-1]
  got = found.mean.shape
  if math.prod(got) != math.prod(want) or got[-1] != want[-1]:
    raise ValueError(
      f'activations of shape {got} were recorded for {path!r} of shape'
      f' {shape}; calibrate a function that scans over the layers of a stack,'
      ' so that each has its own'
    )
  stack, inputs = want[:-1], want[-1]
  return Statistics(
    found.seen.reshape(stack),
    found.moments.reshape(*stack, inputs, inputs),
    found.mean.reshape(want),
    found.amax.reshape(want),
  )


def divided(leaves: Mapping[str, Any], scale: jax.Array) -> dict[str, Any]:
  """What is recorded of activations that are divided by a scale.

  Args:
    leaves: an entry of what `calibrate` returns.
    scale: positive, of the shape of `amax` or of as many numbers.
  """
  scale = scale.reshape(leaves['amax'].shape)
  gram, spread = leaves['gram'], leaves['spread']
  products = gram.products / (scale[..., :, None] * scale[..., None, :])
  return {
    **leaves,
    'gram': gram._replace(products=products),
    'amax': leaves['amax'] / scale,
    'spread': spread._replace(
      mean=spread.mean / scale, squares=spread.squares / scale**2
    ),
  }
