"""The public API under settings of JAX: nothing changes but what is documented.

Every case is a function of an activation (16, 64) and a weight (64, 32). Most
settings are decided when a function is traced, so most tests trace and compile
nothing: a program that is equal to the plain one has equal results.
"""

import functools
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import absltest, parameterized
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import lowbit_jax
from lowbit_jax import formats, numerics, ops, special, transforms
from lowbit_jax.special import von_mises_fisher
from lowbit_jax.training import optimizers, recipes, scaling
from tests import compilation, kinds

ROWS, K, COLUMNS = 16, 64, 32
Case = Callable[[jax.Array, jax.Array], object]


def _key() -> jax.Array:
  return jax.random.key(1)


def _weight(w, fmt):
  return lowbit_jax.quantize(w, fmt, axis=(-2, -1) if fmt.is_tile else -2)


def _round_trip(fmt, x, w):
  q = lowbit_jax.quantize(x, fmt)
  return q, q.T, lowbit_jax.dequantize(q)


def _product(fmt, x, w):
  """Value and gradient, for many rows and for few."""

  def f(x):
    return jnp.sum(lowbit_jax.dot(x, _weight(w, fmt)))

  few = jnp.max(x.reshape(4, -1, K), 0)
  return jax.value_and_grad(f)(x), lowbit_jax.dot(few, _weight(w, fmt))


def _unscaled(element, x, w):
  if element.bits > 8:
    return x
  return lowbit_jax.round_to(x, element)


def _rule(fmt, rule, x, w):
  return lowbit_jax.quantize(x, fmt, scale_rule=rule)


def _stochastic(x, w):
  key = _key()
  return lowbit_jax.quantize(x, formats.nvfp4, rounding='stochastic', key=key)


def _dithered(x, w):
  key, fmt = _key(), formats.int4_g32
  q = lowbit_jax.quantize(x, fmt, rounding='dithered', key=key)
  return lowbit_jax.dequantize(q, dither=numerics.dither(key, x.shape))


def _straight_through(x, fmt, backward):
  def f(x):
    return jnp.sum(x * lowbit_jax.fake_quant(x, fmt, backward=backward))

  return jax.value_and_grad(f)(x)


def _clipped(x, w):
  return _straight_through(x, formats.uint4_g32, 'clipped')


def _absmax(x, w):
  return _straight_through(x, formats.mxfp4, 'absmax')


def _learned_step(x, w):
  def f(x, scale):
    y = lowbit_jax.fake_quant_with(x, scale, formats.int4_g32, backward='lsq')
    return jnp.sum(y)

  scale = jnp.ones((ROWS, K // 32), jnp.float32)
  return jax.value_and_grad(f, (0, 1))(x, scale)


def _held_scales(x, w):
  shape = ROWS, K // 32
  zero = np.full(shape, 3, np.int32)
  return lowbit_jax.quantize_with(
    x, np.ones(shape, np.float32), formats.uint4_g32, zero_point=zero
  )


def _updated(x, w):
  q = lowbit_jax.quantize(2 * x, formats.nvfp4)
  return ops.update_slice(q, x, (jnp.int32(0), 0))


def _looked_up(x, w):
  order = transforms.Permutation(np.arange(K)[::-1].copy())
  q, ids = lowbit_jax.quantize(x, formats.nvfp4), np.array([[1, -1], [9, 0]])
  return ops.take(q, ids), ops.take(ops.Transformed(q, order, -1), ids[0])


def _integer_product(x, w):
  fmt = formats.int8_channel
  return lowbit_jax.dot(lowbit_jax.quantize(x, fmt), _weight(w, fmt))


def _general_product(x, w):
  q = lowbit_jax.quantize(w.T, formats.mxfp4)
  dims = (((1,), (1,)), ((), ()))
  return lowbit_jax.dot_general(x, q, dims, precision='highest')


def _mixed_dtypes(x, w):
  return lowbit_jax.dot(x.astype(jnp.bfloat16), _weight(w, formats.mxfp4))


def _einsum(x, w):
  return lowbit_jax.einsum('bk,kn->nb', x, _weight(w, formats.mxfp4))


def _left_weight(x, w):
  q = lowbit_jax.quantize(w.T, formats.mxfp4)
  f = lambda x: lowbit_jax.dot(q, x.T)
  return f(x), jax.grad(lambda x: jnp.sum(f(x)))(x)


def _prepacked(x, w):
  weight = _weight(w, formats.mxfp4)
  return lowbit_jax.dot(x, lowbit_jax.prepack(weight, implementation='tpu'))


def _ragged(x, w):
  experts = lowbit_jax.quantize(jnp.stack([w, -w]), formats.mxfp4, axis=-2)
  return lowbit_jax.ragged_dot(x, experts, np.array([1, 3], np.int32))


def _behind_transforms(x, w):
  order = transforms.Permutation(np.arange(K)[::-1].copy())
  q = ops.Transformed(_weight(order.apply_dual(w), formats.mxfp4), order, -2)
  gradient = jax.grad(lambda x: jnp.sum(lowbit_jax.dot(x, q)))(x)
  rotation = transforms.random_hadamard(_key(), K, 32)
  experts = lowbit_jax.quantize(jnp.stack([w, -w]), formats.mxfp4, axis=-2)
  stack = ops.Transformed(experts, rotation, -2)
  y = lowbit_jax.ragged_dot(x, stack, np.array([1, 3], np.int32))
  members = jax.tree.map(lambda *leaves: jnp.stack(leaves), q, q)
  each = lowbit_jax.ragged_dot(x, members, np.array([1, 3], np.int32))
  return gradient, y, each, lowbit_jax.dequantize(q), stack.mT


def _beside_factors(x, w):
  a, b = jnp.ones((K, 1, 2), x.dtype), jnp.ones((1, COLUMNS, 2), x.dtype)
  q = ops.LowRank(_weight(w, formats.mxfp4), a, b, 0.5)

  def total(a):
    rows = x.astype(jnp.bfloat16)
    return jnp.sum(lowbit_jax.dot(rows, ops.LowRank(q.weight, a, b)))

  experts = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), q)
  y = lowbit_jax.ragged_dot(x, experts, np.array([1, 3], np.int32))
  return jax.grad(total)(a), y, lowbit_jax.dequantize(q), q.mT


def _spanned(x, w):
  heads = w.reshape(4, -1, COLUMNS)
  q = lowbit_jax.quantize(heads, formats.mxfp4, axis=(0, 1))
  x = x.reshape(ROWS, *heads.shape[:2])
  return lowbit_jax.einsum('bhs,hso->bo', x, q), lowbit_jax.dequantize(q)


def _training_product(recipe, x, w):
  def f(x, w):
    return jnp.sum(lowbit_jax.qdot(x, w, recipe, key=_key()) ** 2)

  return jax.value_and_grad(f, (0, 1))(x, w)


def _held_tensor_scales(x, w):
  recipe = recipes.get('fp8_delayed')
  y, state = scaling.qdot(x, w, recipe, scaling.init_dot(recipe))
  return y, scaling.advance(state)


def _softmax(kind, x, w):
  f = getattr(lowbit_jax, kind)

  def total(x, temperature):
    return jnp.sum(f(x, where=x > -1, temperature=temperature) * 2)

  y = f(x, algorithm='online', temperature=2.0), f(x, 0)
  return y, jax.grad(total, (0, 1))(x, jnp.float32(2))


def _elementary(name, x, w):
  f = getattr(special, name)
  x = jnp.abs(x) + 0.5
  return f(x), jax.grad(lambda x: jnp.sum(f(x)))(x)


def _bessel(name, x, w):
  f, x = getattr(special, name), jnp.abs(x) + 0.5
  return f(3, x), jax.grad(lambda x: jnp.sum(f(jnp.float32(30), x)))(x)


def _sphere(x, w):
  x = x / jnp.linalg.norm(x, axis=1, keepdims=True)
  mean, kappa = von_mises_fisher.fit(x)
  sample = von_mises_fisher.sample(_key(), mean, jnp.float32(9), (4,))
  return kappa, sample, von_mises_fisher.log_prob(x, mean, jnp.float32(9))


def _by_addition(x, w):
  y = ops.lmul(x, x), ops.lmul_dot(x, w)
  return y, jax.grad(lambda x: jnp.sum(ops.lmul_dot(x, w)))(x)


def _attention(x, w):
  q = jnp.stack([x, x])[..., None, :]
  return ops.lmul_attention(q, q, q, is_causal=True)


def _decode_attention(x, w):
  q, cache = x[:, None, None], jnp.stack([x, -x])[:, :, None, None]
  step = lambda q: ops.decode_attention(q, cache, cache, 1, layer=1, window=3)
  return step(q), jax.grad(lambda q: jnp.sum(step(q)))(q)


def _views(x, w):
  q = lowbit_jax.quantize(x, formats.mxfp4)
  stack = lowbit_jax.quantize(jnp.stack([x, x]), formats.nvfp4)
  return q.mT, q.reshape(1, ROWS, K), stack[0], stack[jnp.array([1, 1])]


def _parts(x, w):
  q = lowbit_jax.quantize(x, formats.mxfp4)
  return q[2:5], q[:, 32:], q[jnp.array([3, 1])], q[jnp.int32(2)]


def _transforms(x, w):
  order = np.arange(K)[::-1]
  maps = (
    transforms.random_hadamard(_key(), K, 32),
    transforms.Permutation(order),
    transforms.smooth_quant(jnp.max(jnp.abs(x), 0), jnp.max(jnp.abs(w), 1)),
    transforms.BlockAffine(2 * np.eye(32, dtype=np.float32)),
  )
  return [(t.inverse(t.apply(x)), t.apply_dual(w)) for t in maps]


def _rotated(x, w):
  rotation = transforms.Hadamard(32)
  return lowbit_jax.quantize(x, formats.mxfp4, rotation=rotation)


def _optimizer(make, x, w):
  grads = {'dense': {'kernel': w, 'bias': jnp.sum(w, 0)}}
  tx = make()
  state = tx.init(grads)
  for _ in range(2):
    updates, state = tx.update(grads, state, grads)
  return updates, state


def _polar(x, w):
  both = ('gaussian', 'columns')
  draw = functools.partial(optimizers.randomized_polar, w, _key(), rank=4)
  return optimizers.newton_schulz(w), [draw(sketch=s) for s in both]


OPTIMIZERS = {
  'adamw': lambda: optimizers.adamw(0.1, min_size=1),
  'adamw_4bit': lambda: optimizers.adamw_4bit(0.1, min_size=1),
  'muon': lambda: optimizers.muon(0.1, momentum='lin8', min_size=1),
  'stable_spam': lambda: optimizers.stable_spam(0.1),
  'ef_sign': optimizers.ef_sign,
  'q_ema': optimizers.q_ema,
  'qsgd': lambda: optimizers.qsgd(4),
  'dynamic_loss_scale': lambda: optimizers.dynamic_loss_scale(
    optimizers.adamw(0.1)
  ),
}
ELEMENTARY = (
  'cos', 'erf', 'exp', 'exp2', 'gelu', 'log2', 'sigmoid', 'sin', 'softplus',
  'tanh',
)  # fmt: skip
PRODUCTS = ('mxfp4',)
# Formats and recipes that differ in kind.
SOME = ('mxfp4', 'nvfp4', 'uint4_g32', 'nf4_g64', 'int8_tensor', 'mxfp4_32x32')
SOME_RECIPES = ('nvfp4',)


def _named(f, names, find=formats.get) -> dict[str, Case]:
  name = f.__name__.strip('_')
  return {f'{name}_{n}': functools.partial(f, find(n)) for n in names}


def _same(name: str) -> str:
  return name


CASES: dict[str, Case] = {
  **_named(_round_trip, SOME),
  **_named(_product, PRODUCTS),
  **_named(_training_product, SOME_RECIPES, recipes.get),
  **_named(_softmax, ('softmax',), _same),
  **_named(_elementary, ('sin',), _same),
  **_named(_optimizer, ('muon',), OPTIMIZERS.get),
  **{
    f.__name__.strip('_'): f
    for f in (
      _stochastic, _dithered, _clipped, _absmax, _learned_step, _held_scales,
      _updated, _integer_product, _general_product, _mixed_dtypes, _einsum,
      _held_tensor_scales, _sphere, _by_addition, _views, _transforms,
      _rotated, _polar, _prepacked, _ragged, _spanned,
      _behind_transforms, _looked_up, _left_weight, _beside_factors,
      _decode_attention,
    )
  },
}  # fmt: skip
MORE_CASES: dict[str, Case] = {
  **_named(_round_trip, formats.names('block')),
  **_named(_product, kinds.block_formats()),
  **_named(_training_product, recipes.names(), recipes.get),
  **_named(_softmax, ('softmax', 'log_softmax', 'logsumexp'), _same),
  **_named(_elementary, ELEMENTARY, _same),
  **_named(_bessel, ('log_iv', 'log_kv'), _same),
  **_named(_optimizer, OPTIMIZERS, OPTIMIZERS.get),
  **_named(_unscaled, formats.names('element')),
  **{
    f'rule_{n}_{rule}': functools.partial(_rule, formats.get(n), rule)
    for n in kinds.block_formats()
    for rule in numerics.scale_rules(formats.get(n))
  },
  'attention': _attention,
  'parts': _parts,
}
# What is traced once more, where devices hold parts of the operands.
SHARDED = (
  'round_trip_mxfp4', 'round_trip_int8_tensor', 'round_trip_mxfp4_32x32',
  'product_mxfp4', 'integer_product', 'softmax_softmax', 'clipped',
  'learned_step', 'held_scales', 'general_product', 'by_addition', 'transforms',
  'polar', 'prepacked', 'ragged', 'spanned', 'behind_transforms',
  'looked_up', 'left_weight', 'beside_factors', 'decode_attention',
)  # fmt: skip
# JAX itself refuses to take parts of an axis that is split explicitly.
NOT_SHARDED = ('parts', 'views', 'sphere')
# What runs in many programs where the caller does not compile.
EAGER = (
  *CASES, *(n for n in MORE_CASES if n.startswith(('elementary', 'optimizer'))),
)  # fmt: skip
OPERANDS = (
  jax.ShapeDtypeStruct((ROWS, K), jnp.float32),
  jax.ShapeDtypeStruct((K, COLUMNS), jnp.float32),
)


def _traced(case: Case, *operands):
  return jax.make_jaxpr(case, return_shape=True)(*operands)


def _avals(tree) -> list:
  return [(x.shape, x.dtype) for x in jax.tree.leaves(tree)]


def _arrays(jaxpr) -> Iterator:
  """The types of all intermediate arrays of a program."""
  for equation in jaxpr.eqns:
    yield from (v.aval for v in equation.outvars if v.aval.shape)
    for parameter in jax.tree.leaves(
      equation.params, is_leaf=lambda p: hasattr(p, 'jaxpr')
    ):
      inner = getattr(parameter, 'jaxpr', parameter)
      if hasattr(inner, 'eqns'):
        yield from _arrays(inner)


def _promotes(case: Case) -> str:
  """The promotion of dtypes that a case can live with: optax mixes them where
  it corrects the bias of moments."""
  of_optax = getattr(case, 'func', None) is _optimizer
  return 'standard' if of_optax else 'strict'


class TracedTest(parameterized.TestCase):
  """Strict promotion and 64-bit types, which all change one trace."""

  @parameterized.named_parameters(CASES.items())
  def test_strict_and_wide(self, case):
    self.check(case)

  @parameterized.named_parameters(MORE_CASES.items())
  @pytest.mark.slow
  def test_more_strict_and_wide(self, case):
    self.check(case)
    plain = str(_traced(case, *OPERANDS)[0])
    with (
      jax.numpy_rank_promotion('raise'),
      jax.numpy_dtype_promotion(_promotes(case)),
    ):
      self.assertEqual(str(_traced(case, *OPERANDS)[0]), plain)

  def check(self, case):
    with (
      jax.enable_x64(True),
      jax.numpy_rank_promotion('raise'),
      jax.numpy_dtype_promotion(_promotes(case)),
    ):
      program, out = _traced(case, *OPERANDS)
    wide = [a for a in _arrays(program.jaxpr) if a.dtype == jnp.float64]
    self.assertEmpty(wide)
    self.assertNotIn(jnp.float64, [dtype for _, dtype in _avals(out)])

  def test_float64_is_refused(self):
    with jax.enable_x64(True):
      x, w = (jnp.ones(x.shape, jnp.float64) for x in OPERANDS)
      q = jax.eval_shape(lambda w: _weight(w, formats.mxfp4), OPERANDS[1])
      recipe = recipes.get('mxfp8')
      for f in (
        lambda: lowbit_jax.quantize(x, formats.mxfp4),
        lambda: lowbit_jax.quantize_with(x, 1.0, formats.int8_tensor),
        lambda: lowbit_jax.fake_quant(x, formats.mxfp4),
        lambda: lowbit_jax.round_to(x, formats.e2m1),
        lambda: jax.eval_shape(lambda q: lowbit_jax.dot(x, q), q),
        lambda: lowbit_jax.qdot(x, w, recipe),
        lambda: lowbit_jax.softmax(x),
        lambda: special.tanh(x),
        lambda: ops.lmul(x, x),
        lambda: ops.decode_attention(*[x[None, :, None]] * 3, 1),
      ):
        with self.assertRaisesRegex(TypeError, 'float64.*(cast|astype)'):
          f()


class ShardedTest(parameterized.TestCase):
  """Operands that are split over axes of each type."""

  @parameterized.named_parameters((n, CASES[n]) for n in SHARDED)
  def test_explicit_axes(self, case):
    self.check_explicit(case, (P('d', 't'), P('t', 'd')))

  @parameterized.named_parameters(
    (n, c)
    for n, c in (CASES | MORE_CASES).items()
    if n not in NOT_SHARDED and not n.startswith('rule')
  )
  @pytest.mark.slow
  def test_more_explicit_axes(self, case):
    for specs in (
      (P('d'), P('d')), (P(None, 't'), P(None, 't')), (P('t', 'd'), P()),
      (P(('d', 't')), P(None, ('d', 't'))),
    ):  # fmt: skip
      self.check_explicit(case, specs)

  def check_explicit(self, case, specs):
    mesh = _mesh(AxisType.Explicit)
    with jax.set_mesh(mesh):
      operands = (
        x.update(sharding=NamedSharding(mesh, spec))
        for x, spec in zip(OPERANDS, specs, strict=True)
      )
      _traced(case, *operands)


def _mesh(kind: AxisType) -> jax.sharding.Mesh:
  return jax.make_mesh((4, 2), ('d', 't'), axis_types=(kind, kind))


def _program(x, w):
  """Results by the rows of x, exact for small integers."""

  def f(x):
    y = lowbit_jax.fake_quant(x, formats.uint4_g32, backward='clipped')
    return jnp.sum(3 * y)

  return (
    lowbit_jax.quantize(x, formats.mxfp4),
    lowbit_jax.dot(x, w),
    jax.grad(f)(x),
  )


class ValuesTest(parameterized.TestCase):
  """The same bits under every setting, of one program."""

  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    random = np.random.RandomState(0)
    cls.operands = cls.x, w = tuple(
      random.randint(-4, 5, x.shape).astype(x.dtype) for x in OPERANDS
    )
    cls.w = jax.jit(lambda w: _weight(w, formats.mxfp4))(w)
    cls.plain = compilation.quick_jit(_program)(cls.x, cls.w)

  def check(self, out):
    for a, b in zip(*map(jax.tree.leaves, (out, self.plain)), strict=True):
      self.assertEqual(a.dtype, b.dtype)
      np.testing.assert_array_equal(a, b)

  def test_x64(self):
    with jax.enable_x64(True):
      self.check(compilation.quick_jit(_program)(self.x, self.w))

  def test_debug_nans(self):
    with jax.debug_nans(True):
      self.check(compilation.quick_jit(_program)(self.x, self.w))

  @parameterized.named_parameters(
    (n, c) for n, c in (CASES | MORE_CASES).items() if n in EAGER
  )
  @pytest.mark.slow
  def test_debug_nans_operation_by_operation(self, case):
    with jax.debug_nans(True):
      case(*(jnp.asarray(x) for x in self.operands))

  def test_explicit_axes(self):
    self.check_mesh(AxisType.Explicit, None, P('t', 'd'))

  @parameterized.parameters(
    (AxisType.Auto, 'd', P('t')),
    (AxisType.Explicit, 'd', P(None, 't')),
    (AxisType.Explicit, ('d', 't'), P()),
  )
  @pytest.mark.slow
  def test_more_axes(self, kind, rows, spec):
    self.check_mesh(kind, rows, spec)

  def check_mesh(self, kind, rows, spec):
    mesh = _mesh(kind)
    with jax.set_mesh(mesh):
      places = lowbit_jax.shardings(self.w, NamedSharding(mesh, spec))
      w = jax.device_put(self.w, places)
      x = jax.device_put(self.x, NamedSharding(mesh, P(rows)))
      q, y, dx = out = compilation.quick_jit(_program)(x, w)
    self.check(out)
    if kind == AxisType.Explicit:
      columns = (*spec, None, None)[1]
      self.assertEqual(y.sharding.spec, P(rows, columns))
      for leaf in (q.codes, q.scale, dx):
        self.assertEqual(leaf.sharding.spec, P(rows, None))

  def test_manual_axes(self):
    mesh = _mesh(AxisType.Auto)
    f = jax.shard_map(
      _program, mesh=mesh, in_specs=(P('d'), P()), out_specs=P('d')
    )
    self.check(compilation.quick_jit(f)(self.x, self.w))


if __name__ == '__main__':
  absltest.main()
