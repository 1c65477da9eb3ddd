"""`record`: what the products of a function see, by site."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import jax

from lowbit_jax._typing import PyTree
from lowbit_jax._walk import _arguments, _trace
from lowbit_jax._walk._products import Call, Product, Unsupported
from lowbit_jax._walk._walker import NONE, State, Use, Walk


class Observer(Protocol):
  """Makes observations of products, and merges those of one site.

  An observation is a tree of arrays, and that of nothing is all zeros:
  `merge(zeros, s)` is `s`. `merge` is associative up to rounding. Both run
  under jit.
  """

  def observe(self, product: Product, *operands: Any) -> PyTree | None:
    """The observation of one product, None where it is not recorded.

    Args:
      product: what is multiplied, and where.
      *operands: lhs and rhs, arrays or what a weight is stored as, and the
        group sizes of a ragged_dot.
    """
    ...

  def merge(self, a: PyTree, b: PyTree) -> PyTree:
    """The observation of what `a` and then `b` observed at one site."""
    ...


def record(
  fn: Callable, observer: Observer, *, argnums: int | Sequence[int] = 0
) -> Callable:
  """A function that also returns what its products see.

  Args:
    fn: as in `packed`; stored weights stay packed.
    observer: such as those of `lowbit_jax.observers`.
    argnums: positions of the arguments that hold weights. Arrays that `fn`
      closes over count as weights as well.

  Returns:
    A function of the arguments of `fn` that returns (result, observations), the
    latter a dict by site: the path of the weight in its argument, such as
    'block_0/up/kernel' (with the name of the argument in front if there are
    several), else the name scopes of the product, its operation and a number.
    The uses of one weight are merged; those that look different, as a table
    that is contracted along its columns and its rows, get '#2' at the end.

    In `scan`, a site whose weight is scanned has an entry for each step on a
    leading axis; all others are merged over the steps. In `shard_map` there is
    one entry for each device. A product that does not run, in a branch of
    `cond` or a loop without steps, leaves zeros.

    The result is that of `packed(fn)`.

  Raises:
    ValueError: if two weights have the same path.

  Examples:
    >>> import jax, jax.numpy as jnp
    >>> import lowbit_jax as lowbit
    >>> def layer(params, x):
    ...   return jax.nn.relu(x @ params['up'])
    >>> observed = lowbit.record(layer, lowbit.observers.absmax)
    >>> y, seen = jax.jit(observed)({'up': jnp.ones((2, 3))}, jnp.ones((4, 2)))
    >>> seen['up'].tolist()
    [1.0, 1.0]
  """
  _arguments.check_function(fn)
  for name in ('observe', 'merge'):
    if not callable(getattr(observer, name, None)):
      raise TypeError(f'{observer=} must have a method {name}, see Observer')
  positions = _arguments.positions(argnums)

  @functools.wraps(fn)
  def recorded(*args: Any, **kwargs: Any) -> tuple[Any, dict[str, PyTree]]:
    traced = _trace.trace(fn, args, kwargs, positions, names_arrays=True)
    out, seen, _ = _trace.evaluate(traced, Recording(observer), State())
    return out, seen

  return recorded


class Recording(Use):
  """Hands operands to an observer; products run as in `packed`."""

  observes = True

  def __init__(self, observer: Observer) -> None:
    self.observer = observer

  def product(self, walk: Walk, call: Call) -> jax.Array:
    observation = self.observer.observe(call.product, *call.contents)
    if observation is not None:
      walk.observe(call.product.site, observation)
    if not call.is_packed:
      return call.plain()
    try:
      return call.packed()
    except Unsupported:
      return call.plain()

  def merge(self, a: PyTree, b: PyTree) -> PyTree:
    return self.observer.merge(a, b)

  def custom(self, walk: Walk, eqn: Any, operands: list, body: Callable) -> Any:
    """What the products inside see; the value is that of the function."""
    _, seen = body(jax.lax.stop_gradient(operands), walk.for_body())
    walk.observe_all(seen)
    return NONE
