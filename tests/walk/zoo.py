"""What tests of whole models ask of each of them."""

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import parameterized

import lowbit_jax as lowbit
from lowbit_jax._tree import path_name
from lowbit_jax.formats import BlockFormat
from lowbit_jax.ops import _dot_xla
from lowbit_jax.recipe import QuantSpec
from tests.compilation import quick_jit
from tests.ops import products


@dataclasses.dataclass(frozen=True)
class Model:
  """A function of a tree of float weights and of other arguments.

  Attributes:
    fn: (params, *args) -> array.
    params: random float32 weights.
    args: the other arguments.
    weights: block axis, by regular expressions that are found in the paths of
      the weights that are stored.
    fmt: of them, or by the same expressions.
    decoded: why uses of weights decode them, by site.
    alone: weights that no product meets as they are, as a regular expression.
    terms: of the longest sum.
  """

  fn: Callable
  params: Any
  args: tuple
  weights: Mapping[str, int | tuple[int, ...]]
  fmt: BlockFormat | Mapping[str, BlockFormat] = lowbit.formats.mxfp4
  decoded: Mapping[str, str] = dataclasses.field(default_factory=dict)
  alone: str = '$^'
  terms: int = 256

  def stored(self) -> Any:
    """The tree with stored weights."""

    def store(path, w):
      for pattern, axis in self.weights.items():
        if re.search(pattern, path_name(path)):
          return lowbit.quantize(w, self.format_of(path_name(path)), axis=axis)
      return w

    make = lambda tree: jax.tree_util.tree_map_with_path(store, tree)
    return quick_jit(make)(self.params)

  def format_of(self, site: str) -> BlockFormat:
    """That of a weight which is stored."""
    if isinstance(self.fmt, BlockFormat):
      return self.fmt
    return next(f for k, f in self.fmt.items() if re.search(k, site))

  def sites(self) -> set[str]:
    """Paths of the weights that are stored."""
    leaves = jax.tree_util.tree_leaves_with_path(self.stored(), is_leaf=is_q)
    names = {path_name(path) for path, leaf in leaves if is_q(leaf)}
    return {name.removesuffix('/value') for name in names}


def is_q(x: object) -> bool:
  return isinstance(x, lowbit.QArray)


def dense(tree: Any) -> Any:
  """The tree with arrays in place of stored weights."""
  decode = lambda x: lowbit.dequantize(x) if is_q(x) else x
  return jax.tree.map(decode, tree, is_leaf=is_q)


def random_like(shapes: Any, seed: int = 0) -> Any:
  """Normal numbers whose products keep the size of what they multiply; what
  has one axis, as biases and scales, is about 1."""
  random = np.random.RandomState(seed)

  def leaf(s):
    x = random.standard_normal(s.shape).astype(np.float32)
    return x / s.shape[-2] ** 0.5 if len(s.shape) > 1 else 1 + x / 8

  return jax.tree.map(leaf, shapes)


def temporary_bytes(compiled: Any) -> int:
  return compiled.memory_analysis().temp_size_in_bytes


class Count:
  """Counts the products of each weight."""

  def observe(self, product, *operands):
    return jnp.int32(1) if product.weight else None

  def merge(self, a, b):
    return a + b


class ModelTest(parameterized.TestCase):
  """Laws of `packed`, `record` and `with_policy` for any model.

  As on one device, with tiles that are small, as the weights are.
  """

  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    small = {'TILE_FEW_ROWS': 32, 'TILE_MANY_ROWS': 32, 'OUTPUTS': 16}
    cls.enterClassContext(mock.patch.multiple(_dot_xla, **small))
    cls.enterClassContext(products.one_device())
    cls.addClassCleanup(jax.clear_caches)
    jax.clear_caches()

  def check(self, model: Model) -> None:
    q = model.stored()
    decoded = quick_jit(dense)(q)
    want, bound = self.expected(model, decoded)
    run = quick_jit(lowbit.packed(model.fn)).lower(q, *model.args).compile()
    np.testing.assert_allclose(run(q, *model.args), want, rtol=0, atol=bound)
    self.check_report(model, q)
    self.check_record(model, q)
    if not model.decoded:
      self.check_memory(model, q, run)

  def expected(self, model: Model, decoded: Any) -> tuple[np.ndarray, float]:
    """The result for decoded weights, and how far rounding may take it.

    A float32 sum of n products is an exact one of weights that are off by at
    most n 2^-24 of themselves. What that does to the result, the function says.
    """
    random = np.random.RandomState(1)

    def off(w):
      if w.ndim < 2:
        return w
      signs = random.choice([-1, 1], w.shape).astype(np.float32)
      return w * (1 + model.terms * 2.0**-24 * signs)

    run = quick_jit(model.fn)
    want = np.asarray(run(decoded, *model.args))
    moved = run(jax.tree.map(off, decoded), *model.args)
    bound = float(np.max(np.abs(moved - want)))
    # Such a bound tells decoded weights from others.
    self.assertLess(0, bound)
    self.assertLess(bound, 1e-2 * np.max(np.abs(want)))
    return want, bound

  def check_report(self, model: Model, q: Any) -> None:
    """Every weight is used, and decoded only where that is expected."""
    report = lowbit.packed(model.fn).report(q, *model.args)
    self.assertEqual({row.site for row in report}, model.sites(), report)
    reasons = {row.site: row.how for row in report if row.decoded}
    self.assertEqual(set(reasons), set(model.decoded), report)
    for site, reason in model.decoded.items():
      self.assertRegex(reasons[site], reason)
    strict = lowbit.packed(model.fn, strict=True)
    if model.decoded:
      with self.assertRaisesRegex(TypeError, 'would decode all of it'):
        jax.eval_shape(strict, q, *model.args)
    else:
      jax.eval_shape(strict, q, *model.args)

  def check_memory(self, model: Model, q: Any, run: Any) -> None:
    """No float32 copy of the largest weight, or stack of weights, is made."""
    leaves = jax.tree.leaves(q, is_leaf=is_q)
    largest = max(4 * leaf.size for leaf in leaves if is_q(leaf))
    unpacked = lambda q, *args: model.fn(dense(q), *args)
    whole = quick_jit(unpacked).lower(q, *model.args).compile()
    self.assertLess(temporary_bytes(run), largest / 2)
    self.assertGreater(temporary_bytes(whole), largest)

  def check_record(self, model: Model, q: Any) -> None:
    """Products of stored weights are found by the same sites as of arrays."""
    record = lowbit.record(model.fn, Count())
    _, packed = jax.eval_shape(record, q, *model.args)
    _, plain = jax.eval_shape(record, model.params, *model.args)
    self.assertEqual(packed, plain)
    alone = {site for site in model.sites() if re.search(model.alone, site)}
    self.assertContainsSubset(model.sites() - alone, packed)
    self.assertNoCommonElements(packed, alone)

  def check_policy(self, model: Model) -> None:
    """Weights that a policy fake-quantizes are those that are decoded."""
    sites = model.sites()

    def policy(product):
      site = product.site
      return QuantSpec(model.format_of(site)) if site in sites else None

    run = quick_jit(lowbit.with_policy(model.fn, policy))
    got = run(model.params, *model.args)
    want, bound = self.expected(model, quick_jit(dense)(model.stored()))
    np.testing.assert_allclose(got, want, rtol=0, atol=bound)
