"""Functions that state their derivative, and keep it.

Where JAX splits the body of a loop to differentiate it, it drops the rule of a
`jax.custom_jvp` inside, and differentiates what is left once more: the function
itself. Of a rounding that is another derivative, of a kernel or of a product
under a rule for vmap it is none. To JAX a function of this module is a
primitive, which only the rules below look into.
"""

import functools
import inspect
import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.extend.core as jex
from jax.interpreters import ad, batching, mlir

# The name of the primitive in a jaxpr.
NAME = 'stated_jvp'


class custom_jvp:
  """`jax.custom_jvp`, of which no transformation drops the rule.

  The function takes no tracers but its arguments, and the rule returns tangents
  that are arrays.

  Args:
    function: of trees of arrays, to one.
    nondiff_argnums: arguments that are neither, with which the rule begins.
  """

  def __init__(
    self, function: Callable, nondiff_argnums: Sequence[int] = ()
  ) -> None:
    functools.update_wrapper(self, function)
    self._function, self._static = function, tuple(nondiff_argnums)
    self._signature = inspect.signature(function)

  def defjvp(self, rule: Callable, symbolic_zeros: bool = False) -> Callable:
    """Sets the rule, which is as in `jax.custom_jvp.defjvp`."""
    self._rule, self._symbolic_zeros = rule, symbolic_zeros
    return rule

  def __call__(self, *args: Any, **kwargs: Any) -> Any:
    args = self._signature.bind(*args, **kwargs).args
    static = [args[i] for i in self._static]
    moving = [i for i in range(len(args)) if i not in self._static]
    leaves, structure = jax.tree.flatten([args[i] for i in moving])

    def function(*leaves):
      whole = list(args)
      for i, x in zip(moving, structure.unflatten(leaves), strict=True):
        whole[i] = x
      return self._function(*whole)

    tangent = _symbol if self._symbolic_zeros else ad.instantiate_zeros

    def rule(primals, tangents):
      groups = primals, map(tangent, tangents)
      groups = (tuple(structure.unflatten(group)) for group in groups)
      return tuple(map(jax.tree.leaves, self._rule(*static, *groups)))

    return _bind(function, rule, leaves)


def _bind(function: Callable, rule: Callable, leaves: Sequence[Any]) -> Any:
  jaxpr, out = jax.make_jaxpr(function, return_shape=True)(*leaves)
  results = _call.bind(*leaves, jaxpr=jaxpr, rule=rule)
  return jax.tree.structure(out).unflatten(results)


# Operands are the leaves of the arguments, and `jaxpr` is of them. `rule` takes
# lists of primals and tangents, `ad.Zero` among them, and gives such lists.
_call = jex.Primitive(NAME)
_call.multiple_results = True


@_call.def_impl
def _run(*operands, jaxpr, rule):
  del rule
  return jex.jaxpr_as_fun(jaxpr)(*operands)


@_call.def_effectful_abstract_eval
def _shapes(*operands, jaxpr, rule):
  del operands, rule
  return jaxpr.out_avals, jaxpr.effects


def _jvp(primals, tangents, *, jaxpr, rule):
  del jaxpr
  return rule(primals, tangents)


def _transpose(cotangents, *operands, jaxpr, rule):
  """Of a function that is linear in some operands, so its own derivative."""
  del jaxpr
  free = [ad.is_undefined_primal(x) for x in operands]
  avals = [x.aval for x in itertools.compress(operands, free)]
  zeros = [ad.instantiate_zeros(ad.Zero(aval)) for aval in avals]

  def derivative(*moves):
    primals = _filled(operands, free, zeros)
    return rule(primals, _filled(map(_zero, primals), free, moves))[1]

  cotangents = list(map(ad.instantiate_zeros, cotangents))
  out = jax.linear_transpose(derivative, *zeros)(cotangents)
  return _filled([None] * len(free), free, out)


def _batch(operands, axes, *, jaxpr, rule):
  pairs = zip(operands, axes, strict=True)
  size = next(x.shape[axis] for x, axis in pairs if axis is not None)

  def batched_rule(primals, tangents):
    moving = [type(t) is not ad.Zero for t in tangents]

    def member(primals, moves):
      return rule(primals, _filled(map(_zero, primals), moving, moves))

    chosen = (list(itertools.compress(x, moving)) for x in (axes, tangents))
    in_axes, moves = chosen
    run = jax.vmap(member, (list(axes), in_axes), axis_size=size)
    return run(list(primals), moves)

  function = jax.vmap(jex.jaxpr_as_fun(jaxpr), tuple(axes), axis_size=size)
  out = _bind(function, batched_rule, operands)
  return out, [0] * len(out)


def _filled(items: Iterable, places: list[bool], others: Iterable) -> list:
  """The items, and others in the places that are marked."""
  others = iter(others)
  pairs = zip(items, places, strict=True)
  return [next(others) if here else x for x, here in pairs]


def _zero(x):
  """The tangent of what stands still."""
  return ad.Zero(jax.typeof(x).to_tangent_aval())


def _symbol(tangent):
  if type(tangent) is not ad.Zero:
    return tangent
  return jax.custom_derivatives.SymbolicZero(tangent.aval)


ad.primitive_jvps[_call] = _jvp
ad.primitive_transposes[_call] = _transpose
batching.primitive_batchers[_call] = _batch
mlir.register_lowering(_call, mlir.lower_fun(_run, multiple_results=True))
