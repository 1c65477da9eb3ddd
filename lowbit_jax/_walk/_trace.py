"""A function as a jaxpr in which dense stand-ins replace stored operands."""

import contextlib
import inspect
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lowbit_jax._tree import leaf_name
from lowbit_jax._walk import _control, _named, _views
from lowbit_jax._walk._named import Named
from lowbit_jax._walk._report import Report, Row
from lowbit_jax._walk._walker import State, Trace, Use, Walk

_RULES = _control, _views  # they register themselves


class Traced(NamedTuple):
  """A traced call of a function.

  Attributes:
    fn: the function.
    jaxpr: the program, of `values`.
    values: arrays, and Named for stored operands and for weights.
    structure: of what the function returns.
  """

  fn: Callable
  jaxpr: Any
  values: list[Any]
  structure: Any


def trace(
  fn: Callable,
  args: tuple,
  kwargs: Mapping[str, Any],
  argnums: Sequence[int],
  names_arrays: bool,
) -> Traced:
  """Traces fn(*args, **kwargs).

  Args:
    fn: any function that `jax.jit` takes.
    args: its positional arguments; leaves that are not arrays stay as they are.
    kwargs: its keyword arguments.
    argnums: positions of the arguments that hold weights: paths of their leaves
      are sites.
    names_arrays: whether their float arrays are weights too.
  """
  is_leaf = _named.is_stored
  leaves, structure = jax.tree.flatten((args, dict(kwargs)), is_leaf=is_leaf)
  names = _sites(fn, args, kwargs, argnums)
  values: dict[int, Any] = {}
  for i, (x, (site, is_weight)) in enumerate(zip(leaves, names, strict=True)):
    if is_leaf(x):
      values[i] = Named(x, site)
    elif hasattr(x, 'dtype') and hasattr(x, 'shape'):
      counts = names_arrays and is_weight and _is_float(x)
      values[i] = Named(x, site) if counts else x

  def of_arrays(*arrays):
    whole = list(leaves)
    for i, x in zip(values, arrays, strict=True):
      whole[i] = x
    args, kwargs = jax.tree.unflatten(structure, whole)
    return fn(*args, **kwargs)

  stand_ins = _stand_ins(values.values())
  call = Traced(fn, None, list(values.values()), None)
  with _leaks_explained(call):
    make = jax.make_jaxpr(of_arrays, return_shape=True)
    jaxpr, shapes = make(*stand_ins)
  return call._replace(jaxpr=jaxpr, structure=jax.tree.structure(shapes))


@contextlib.contextmanager
def _leaks_explained(call: Traced) -> Iterator[None]:
  """Says what a stand-in is that a function kept, and what to do instead."""
  try:
    yield
  except jax.errors.UnexpectedTracerError as error:
    sites = [x.site for x in call.values if isinstance(x, Named)]
    name = getattr(call.fn, '__name__', type(call.fn).__name__)
    error.add_note(
      f'While {name} was traced, stand-ins took the place of its weights'
      f' {sites}. It may not keep them, nor what it computes of them, outside'
      ' of itself: let it return what is needed later.'
    )
    raise


def evaluate(traced: Traced, use: Use, state: State) -> tuple[Any, dict, Trace]:
  """What the function returns, what products observed, and what was noted."""
  trace = Trace()
  walk = Walk(use, trace, state)
  with _leaks_explained(traced):
    results = walk.run(traced.jaxpr, traced.values)
  arrays = [walk.dense(None, x, 'the function returns it') for x in results]
  return jax.tree.unflatten(traced.structure, arrays), walk.seen, trace


def shapes(
  run: Callable, args: tuple, kwargs: Mapping[str, Any]
) -> tuple[dict[str, Any], Report]:
  """Runs nothing: the shapes of observations, and what is noted on the way.

  Args:
    run: of the arguments, returns what `evaluate` does.
    args: positional arguments; `jax.ShapeDtypeStruct` leaves will do.
    kwargs: keyword arguments.
  """
  leaves, structure = jax.tree.flatten((args, dict(kwargs)))
  is_array = [hasattr(x, 'dtype') and hasattr(x, 'shape') for x in leaves]
  found: dict[Any, Row] = {}

  def noted(arrays):
    arrays = iter(arrays)
    whole = [
      next(arrays) if known else x
      for known, x in zip(is_array, leaves, strict=True)
    ]
    args, kwargs = jax.tree.unflatten(structure, whole)
    _, seen, trace = run(*args, **kwargs)
    found.update(trace.rows)
    return seen

  seen = jax.eval_shape(noted, list(itertools.compress(leaves, is_array)))
  return seen, Report(list(found.values()))


def _sites(
  fn: Callable, args: tuple, kwargs: Mapping[str, Any], argnums: Sequence[int]
) -> list[tuple[str, bool]]:
  """The site of each leaf, and whether its argument holds weights."""
  parameters = _parameters(fn)
  out, owners = [], {}

  def add(argument, tree, name, prefix, is_weight):
    found = jax.tree_util.tree_leaves_with_path(tree, is_leaf=_named.is_stored)
    for path, leaf in found:
      inner = leaf_name(path)
      site = '/'.join(filter(None, [prefix, inner])) or name
      out.append((site, is_weight))
      _check_once(owners, site, (argument, jax.tree_util.keystr(path)), leaf)

  for i, tree in enumerate(args):
    name = parameters[i] if i < len(parameters) else str(i)
    is_weight = i in argnums
    # One argument with weights needs no name of its own in front.
    prefix = '' if is_weight and len(argnums) == 1 else name
    add(i, tree, name, prefix, is_weight)
  for key in sorted(kwargs):
    add(key, kwargs[key], key, key, False)
  return out


def _check_once(owners: dict, site: str, owner: tuple, leaf: Any) -> None:
  if not _named.is_stored(leaf) and not _is_float(leaf):
    return
  before = owners.setdefault(site, owner)
  if before != owner:
    raise ValueError(
      f'two weights have the site {site!r}: {before[1]} of argument {before[0]}'
      f' and {owner[1]} of argument {owner[0]}; rename a key, so that their'
      ' paths differ'
    )


def _parameters(fn: Callable) -> list[str]:
  """Names of the positional parameters of a function, as far as known."""
  try:
    parameters = inspect.signature(fn).parameters.values()
  except (TypeError, ValueError):
    return []
  kinds = (
    inspect.Parameter.POSITIONAL_ONLY,
    inspect.Parameter.POSITIONAL_OR_KEYWORD,
  )
  return [p.name for p in parameters if p.kind in kinds]


def _is_float(x: Any) -> bool:
  dtype = getattr(x, 'dtype', None)
  return dtype is not None and jnp.issubdtype(dtype, jnp.floating)


def _stand_ins(values: Iterable[Any]) -> list[Any]:
  """Type, shape and sharding of the dense array that each value stands for."""
  known: dict[Any, Any] = {}  # most layers are alike
  out = []
  for x in values:
    if not _named.is_packed(x):
      out.append(jax.typeof(x.content if isinstance(x, Named) else x))
      continue
    leaves, structure = jax.tree.flatten(x.content)
    types = tuple(map(jax.typeof, leaves))
    if not any(map(_has_place, types)):
      out.append(_named.shape_of(x))
      continue
    if (structure, types) not in known:
      (aval,) = jax.make_jaxpr(_named.decoded)(x.content).out_avals
      known[structure, types] = aval
    out.append(known[structure, types])
  return out


def _has_place(aval: Any) -> bool:
  """Whether a type says where on a mesh the array is."""
  mesh = aval.sharding.mesh
  return bool(mesh.explicit_axes or mesh.manual_axes)
