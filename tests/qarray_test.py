"""QArray as a JAX citizen: a pytree that looks like an array.

Numbers are the business of qarray_oracle_test; here are structure, transforms,
sharding, attributes, indexing, padding and invariants.
"""

import os

os.environ.setdefault('JAX_PLATFORMS', 'cpu')
if 'host_platform_device_count' not in os.environ.get('XLA_FLAGS', ''):
  os.environ['XLA_FLAGS'] = (
    os.environ.get('XLA_FLAGS', '')
    + ' --xla_force_host_platform_device_count=8'
  )

import dataclasses  # noqa: E402
import functools  # noqa: E402
import itertools  # noqa: E402
import subprocess  # noqa: E402
import sys  # noqa: E402

import jax  # noqa: E402
import jax.export  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402
from absl.testing import absltest, parameterized  # noqa: E402
from jax.sharding import (
  NamedSharding,  # noqa: E402
  PartitionSpec as P,  # noqa: E402
)

import lowbit_jax  # noqa: E402
from lowbit_jax import QArray, _decoders, formats, numerics, qarray  # noqa: E402

BLOCK_FORMATS = formats.names('block')
# One format of each kind of leaf, block and packing.
KINDS = (
  'mxfp6_e2m3', 'mxfp4', 'mxfp4_32x32', 'nvfp4', 'nvfp4_16x16',
  'nf4_g64', 'int3_g32', 'uint4_g32', 'int8_channel', 'e4m3fn_tensor',
  'ternary_channel', 'fp8_128x128', 'bfp5_g16',
)  # fmt: skip
# One format of each set of leaves: enough where codes do not matter.
FEW = ('mxfp6_e2m3', 'nvfp4', 'uint4_g32', 'e4m3fn_tensor', 'mxfp4_32x32')
MORE = tuple(n for n in KINDS if n not in FEW)
# One with each leaf, and tiles: enough where whole arrays are quantized.
LEAST = ('nvfp4', 'uint4_g32', 'mxfp4_32x32')
LEAVES = ('codes', 'scale', 'tensor_scale', 'zero_point')


@functools.cache
def data(*shape, seed: int = 0) -> np.ndarray:
  """Bell-shaped float32 with a few octaves between rows."""
  x = np.random.RandomState(seed).randn(*shape)
  rows = np.arange(shape[0]).reshape(-1, *[1] * (len(shape) - 1)) % 4
  return (x * 4.0**rows).astype(np.float32)


@functools.partial(jax.jit, static_argnames=('fmt', 'axis'))
def quantize(x, fmt, axis=None) -> QArray:
  return lowbit_jax.quantize(x, fmt, axis=axis)


@jax.jit
def dequantize(q: QArray) -> jax.Array:
  return lowbit_jax.dequantize(q)


@functools.cache
def quantized(name: str, *shape) -> QArray:
  """What `quantize` makes of `data`, with NumPy leaves."""
  q = quantize(data(*shape), formats.get(name))
  return jax.tree.map(np.asarray, q)


@functools.cache
def stacked(name: str) -> tuple[np.ndarray, QArray]:
  """Three arrays of different sizes, and each of them quantized."""
  fmt = formats.get(name)
  x = np.stack([data(3, 40, seed=i) * 5**i for i in range(3)])
  stack = jax.jit(jax.vmap(lambda x: lowbit_jax.quantize(x, fmt)))(x)
  return x, jax.tree.map(np.asarray, stack)


@functools.cache
def make(name: str, *shape, axis=None, seed: int = 0) -> QArray:
  """A valid QArray of random NumPy leaves: making it compiles nothing."""
  q = abstract(name, *shape, axis=axis)
  random = np.random.RandomState(seed)
  leaves = {'codes': random.randint(0, 256, q.codes.shape)}
  if q.scale is not None and q.scale.dtype == np.uint8:
    near_one = np.flatnonzero(abs(q.fmt.scale.values() - 2) < 2)
    leaves['scale'] = random.choice(near_one, q.scale.shape)
  elif q.scale is not None:
    leaves['scale'] = random.uniform(0.1, 10, q.scale.shape)
  if q.tensor_scale is not None:
    leaves['tensor_scale'] = 2.0 ** random.randint(-3, 4, q.tensor_scale.shape)
  if q.zero_point is not None:
    codes = 2**q.fmt.element.bits
    leaves['zero_point'] = random.randint(0, codes, q.zero_point.shape)
  return qarray.replace(
    q, **{k: v.astype(getattr(q, k).dtype) for k, v in leaves.items()}
  )


def on_device(q: QArray) -> QArray:
  return jax.tree.map(jnp.array, q)


def values(q: QArray) -> np.ndarray:
  """`dequantize` in NumPy, from the invariants of the module alone."""
  bits, axis = q.fmt.element.bits, q.axes[0]
  codes = np.moveaxis(np.asarray(q.codes), axis, -1)
  stream = np.unpackbits(codes, axis=-1, bitorder='little')
  stream = stream.reshape(*codes.shape[:-1], codes.shape[-1] * 8 // bits, bits)
  codes = np.moveaxis(stream @ (1 << np.arange(bits)), -1, axis)
  out = q.fmt.element.values()[codes].astype(np.float32)

  def spread(leaf):
    for axis, block in zip(q.axes, q.fmt.block, strict=True):
      leaf = np.repeat(leaf, block or out.shape[axis], axis)
    return leaf

  if q.zero_point is not None:
    out = out - spread(np.asarray(q.zero_point)).astype(np.float32)
  if q.scale is not None:
    scale = np.asarray(q.scale)
    if scale.dtype == np.uint8:
      scale = q.fmt.scale.values()[scale]
    out = out * spread(scale.astype(np.float32))
  if q.tensor_scale is not None:
    out = out * np.asarray(q.tensor_scale)
  for axis, pad in zip(q.axes, q.pad, strict=True):
    out = np.moveaxis(
      np.moveaxis(out, axis, 0)[: out.shape[axis] - pad], 0, axis
    )
  return out


def spec(*shape, dtype=jnp.float32):
  return jax.ShapeDtypeStruct(shape, dtype)


@functools.cache
def abstract(name: str, *shape, axis=None) -> QArray:
  """A QArray of shapes only."""
  fmt = formats.get(name)
  return jax.eval_shape(
    lambda x: lowbit_jax.quantize(x, fmt, axis=axis), spec(*shape)
  )


def assert_same(a: QArray, b: QArray):
  """Equal leaves, dtypes and static fields."""
  assert jax.tree.structure(a) == jax.tree.structure(b), (a, b)
  for name in LEAVES:
    x, y = getattr(a, name), getattr(b, name)
    if x is not None:
      np.testing.assert_array_equal(np.asarray(x), np.asarray(y), err_msg=name)
      assert x.dtype == y.dtype, name


def mesh(n: int = 8, name: str = 'd') -> jax.sharding.Mesh:
  return jax.make_mesh(
    (n,), (name,), (jax.sharding.AxisType.Auto,), devices=jax.devices()[:n]
  )


class PytreeTest(parameterized.TestCase):
  @parameterized.parameters(*FEW)
  def test_leaves_are_what_the_format_has(self, name):
    self._leaves_are_what_the_format_has(name)

  @parameterized.parameters(*MORE)
  @pytest.mark.slow
  def test_leaves_are_what_the_format_has_of_more_formats(self, name):
    self._leaves_are_what_the_format_has(name)

  def _leaves_are_what_the_format_has(self, name):
    fmt = formats.get(name)
    q = abstract(name, 7, 100)
    has = dict(
      codes=True,
      scale=fmt.scale is not None,
      tensor_scale=fmt.tensor_scale,
      zero_point=fmt.zero_point,
    )
    for leaf, there in has.items():
      self.assertEqual(getattr(q, leaf) is not None, there, leaf)
    self.assertLen(jax.tree.leaves(q), sum(has.values()))
    self.assertTrue(all(leaf.ndim == 2 for leaf in jax.tree.leaves(q)))
    self.assertEqual(q.codes.dtype, jnp.uint8)
    if fmt.scale is not None:
      coded = fmt.scale.bits <= 8
      self.assertEqual(q.scale.dtype, jnp.uint8 if coded else jnp.float32)

  def test_flatten_names_its_leaves_and_rebuilds(self):
    q = make('nvfp4', 4, 32)
    paths, treedef = jax.tree_util.tree_flatten_with_path(q)
    self.assertEqual(
      [jax.tree_util.keystr(path) for path, _ in paths],
      ['.codes', '.scale', '.tensor_scale'],
    )
    again = jax.tree.unflatten(treedef, [leaf for _, leaf in paths])
    assert_same(again, q)
    self.assertTrue(qarray.is_qarray(again))

  def test_static_fields_are_the_structure(self):
    q = make('int4_g32', 4, 32)
    structure = jax.tree.structure(q)
    same = make('int4_g32', 8, 64)
    self.assertEqual(jax.tree.structure(same), structure)
    self.assertEqual(hash(jax.tree.structure(same)), hash(structure))
    for other in (
      make('int4_g64', 4, 64),
      make('int4_g32', 32, 4, axis=-2),
      make('int4_g32', 4, 31),
      q.astype(jnp.bfloat16),
    ):
      self.assertNotEqual(jax.tree.structure(other), structure)

  def test_unflatten_takes_placeholders(self):
    q = make('nvfp4', 2, 32)
    structure = jax.tree.structure(q)
    for filler in (object(), None, 0, 'leaf'):
      again = jax.tree.unflatten(structure, [filler] * structure.num_leaves)
      self.assertIs(again.codes, filler)
      self.assertIn('nvfp4', repr(again))
    self.assertEqual(jax.tree.map(lambda leaf: leaf.shape, q).codes, (2, 16))

  @parameterized.parameters(*FEW)
  def test_tree_map_identity(self, name):
    self._tree_map_identity(name)

  @parameterized.parameters(*MORE)
  @pytest.mark.slow
  def test_tree_map_identity_of_more_formats(self, name):
    self._tree_map_identity(name)

  def _tree_map_identity(self, name):
    q = make(name, 3, 40)
    assert_same(jax.tree.map(lambda leaf: leaf, q), q)

  def test_like_an_array_it_is_no_static_argument(self):
    q = make('mxfp4', 2, 32)
    self.assertIn(q, [q])
    self.assertNotIn(q, [make('mxfp4', 2, 32, seed=1)])
    with self.assertRaisesRegex(TypeError, 'shape=.2, 32.*static_argnums'):
      hash(q)
    with self.assertRaisesRegex(ValueError, 'static_argnums'):
      jax.jit(jnp.asarray, static_argnums=0)(q)

  def test_a_program_shows_what_it_decodes(self):
    q = make('mxfp4', 2, 32)
    equations = jax.make_jaxpr(lambda x: x + q.astype(jnp.bfloat16))(1.0).eqns
    found = [
      _decoders.DECODERS.get(eqn.params.get('name')) for eqn in equations
    ]
    (decoder,) = filter(None, found)
    self.assertEqual(
      decoder.structure, jax.tree.structure(q.astype('bfloat16'))
    )
    self.assertEqual(decoder.dtype, jnp.bfloat16)

  def test_names_of_decoders_do_not_depend_on_their_order(self):
    code = (
      'import jax.numpy as jnp; from lowbit_jax import _decoders, formats,'
      ' quantize\n'
      'for name in {}: quantize(jnp.ones((2, 32)), formats.get(name)) + 0\n'
      'print(*sorted(_decoders.DECODERS))'
    )
    outputs = [
      subprocess.run(
        [sys.executable, '-c', code.format(names)],
        capture_output=True,
        check=True,
      ).stdout
      for names in (['mxfp4', 'nvfp4'], ['nvfp4', 'mxfp4'])
    ]
    self.assertEqual(*outputs)
    self.assertLen(outputs[0].split(), 2)

  def test_fields_are_frozen(self):
    q = make('mxfp4', 2, 32)
    with self.assertRaises(dataclasses.FrozenInstanceError):
      q.axis = -2


class TransformTest(parameterized.TestCase):
  def test_jit_traces_once_per_structure(self):
    traces = []

    @jax.jit
    def f(q):
      traces.append(q.shape)
      return lowbit_jax.dequantize(q)

    a, b = make('mxfp4', 2, 64), make('mxfp4', 2, 64, seed=1)
    np.testing.assert_array_equal(f(a), values(a))
    np.testing.assert_array_equal(f(b), values(b))
    self.assertEqual(traces, [(2, 64)])
    f(make('mxfp4', 2, 63))
    self.assertEqual(traces, [(2, 64), (2, 63)])

  def assert_vmap_stacks_and_equals_a_loop(self, name):
    fmt = formats.get(name)
    x, stack = stacked(name)
    self.assertEqual(stack.shape, (3, 3, 40))
    self.assertEqual(stack.axis, (-2, -1) if fmt.is_tile else -1)
    self.assertTrue(all(leaf.ndim == 3 for leaf in jax.tree.leaves(stack)))
    dense = np.asarray(jax.jit(jax.vmap(lowbit_jax.dequantize))(stack))
    for i in range(3):
      one = quantize(x[i], fmt)
      assert_same(jax.tree.map(lambda leaf: leaf[i], stack), one)  # noqa: B023
      np.testing.assert_array_equal(dense[i], values(one))
    np.testing.assert_array_equal(dense, values(stack))

  @parameterized.parameters('nvfp4', 'mxfp4_32x32')
  def test_vmap_stacks_and_equals_a_loop(self, name):
    self.assert_vmap_stacks_and_equals_a_loop(name)

  @parameterized.parameters(
    'uint4_g32', 'mxfp6_e2m3', 'int8_channel', 'e4m3fn_tensor',
    'ternary_channel',
  )  # fmt: skip
  @pytest.mark.slow
  def test_vmap_of_more_formats(self, name):
    self.assert_vmap_stacks_and_equals_a_loop(name)

  @pytest.mark.slow
  def test_vmap_of_a_product_with_a_stack(self):
    x, w = data(3, 2, 40), data(3, 40, 4)
    stack = jax.jit(
      jax.vmap(lambda w: lowbit_jax.quantize(w, formats.mxfp4, axis=0))
    )(w)
    got = jax.jit(jax.vmap(lambda x, q: x @ lowbit_jax.dequantize(q)))(x, stack)
    np.testing.assert_allclose(got, x @ values(stack), rtol=1e-4, atol=1e-3)

  @parameterized.parameters(('nvfp4',))
  def test_scan_over_stacked_layers(self, name):
    self._scan_over_stacked_layers(name)

  @parameterized.parameters(('uint4_g32',))
  @pytest.mark.slow
  def test_scan_over_stacked_layers_of_more_formats(self, name):
    self._scan_over_stacked_layers(name)

  def _scan_over_stacked_layers(self, name):
    fmt = formats.get(name)
    w = data(3, 32, 32) / 64
    stack = jax.jit(jax.vmap(lambda w: lowbit_jax.quantize(w, fmt, axis=-2)))(w)
    stack = jax.tree.map(np.asarray, stack)
    x = data(2, 32, seed=1)

    @jax.jit
    def apply(x, stack):
      def layer(x, q):
        assert q.shape == (32, 32) and q.axis == -2
        return x @ lowbit_jax.dequantize(q), q

      return jax.lax.scan(layer, x, stack)

    out, back = apply(x, stack)
    assert_same(back, stack)
    want = x
    for i in range(3):
      want = want @ values(stack[i])
    scale = abs(want).max()
    np.testing.assert_allclose(out, want, rtol=1e-5, atol=1e-5 * scale)

  def test_carry_of_scan_and_while_loop(self):
    q = make('nvfp4', 2, 32)
    out, _ = jax.lax.scan(lambda q, _: (q, None), q, length=2)
    assert_same(out, q)
    _, out = jax.lax.while_loop(
      lambda s: s[0] < 2, lambda s: (s[0] + 1, s[1]), (0, q)
    )
    assert_same(out, q)

  def test_cond_returns_one_of_two(self):
    a, b = make('mxfp4', 2, 32), make('mxfp4', 2, 32, seed=1)
    pick = jax.jit(lambda p: jax.lax.cond(p, lambda: a, lambda: b))
    assert_same(pick(True), a)
    assert_same(pick(False), b)

  @pytest.mark.slow
  def test_remat(self):
    q = make('nvfp4', 4, 32)
    x = jnp.asarray(data(2, 4, seed=1))

    def loss(x, q):
      return jnp.sum(jnp.sin(x @ lowbit_jax.dequantize(q)))

    got = jax.jit(jax.grad(jax.checkpoint(loss)))(x, q)
    want = jax.jit(jax.grad(loss))(x, q)
    np.testing.assert_allclose(got, want, rtol=1e-6)

  @parameterized.parameters('nvfp4', 'uint4_g32')
  def test_donation_frees_every_leaf(self, name):
    q = on_device(make(name, 4, 64))
    dense = values(q)
    kept = jax.tree.leaves(q)
    step = jax.jit(
      lambda q: jax.tree.map(lambda leaf: leaf + 0, q), donate_argnums=0
    )
    out = step(q)
    self.assertTrue(all(leaf.is_deleted() for leaf in kept))
    np.testing.assert_array_equal(values(out), dense)

  @parameterized.parameters(*FEW)
  def test_eval_shape_says_what_quantize_makes(self, name):
    self._eval_shape_says_what_quantize_makes(name)

  @parameterized.parameters(*(n for n in BLOCK_FORMATS if n not in FEW))
  @pytest.mark.slow
  def test_eval_shape_says_what_quantize_makes_of_more_formats(self, name):
    self._eval_shape_says_what_quantize_makes(name)

  def _eval_shape_says_what_quantize_makes(self, name):
    fmt = formats.get(name)
    q = abstract(name, 3, 100, 130)
    self.assertEqual(q.shape, (3, 100, 130))
    self.assertEqual(q.dtype, np.float32)
    self.assertIsInstance(q.codes, jax.ShapeDtypeStruct)
    packed = q.axes[0]
    padded = (100, 130)[packed + 2] + q.pad[0]
    self.assertEqual(q.codes.shape[packed] * 8, padded * fmt.element.bits)
    qarray.validate(q)
    out = jax.eval_shape(lowbit_jax.dequantize, q)
    self.assertEqual((out.shape, out.dtype), ((3, 100, 130), np.float32))

  def test_eval_shape_equals_reality(self):
    self._eval_shape_equals_reality(LEAST)

  @pytest.mark.slow
  def test_eval_shape_equals_reality_in_more_formats(self):
    self._eval_shape_equals_reality(n for n in KINDS if n not in LEAST)

  def _eval_shape_equals_reality(self, names):
    for name in names:
      q, shapes = quantized(name, 3, 40), abstract(name, 3, 40)
      self.assertEqual(jax.tree.structure(q), jax.tree.structure(shapes))
      self.assertEqual(
        [(a.shape, a.dtype) for a in jax.tree.leaves(q)],
        [(a.shape, a.dtype) for a in jax.tree.leaves(shapes)],
      )
      self.assertEqual(q.nbytes, shapes.nbytes)


class GradientTest(parameterized.TestCase):
  def test_jax_refuses_grad_with_respect_to_codes(self):
    params = {'w': on_device(make('mxfp4', 4, 32)), 'b': jnp.ones(32)}

    def loss(params):
      return jnp.sum(lowbit_jax.dequantize(params['w']) + params['b'])

    with self.assertRaisesRegex(TypeError, 'uint8'):
      jax.grad(loss)(params)

  def test_allow_int_gives_float0_and_never_narrow_dtypes(self):
    params = {'w': make('int4_g32', 4, 32), 'b': np.ones(32, np.float32)}
    x = data(2, 4, seed=1)

    def loss(params):
      return jnp.sum(x @ lowbit_jax.dequantize(params['w']) + params['b'])

    grads = jax.jit(jax.grad(loss, allow_int=True))(params)
    self.assertEqual(grads['w'].codes.dtype, jax.dtypes.float0)
    self.assertEqual(grads['w'].scale.dtype, jnp.float32)
    self.assertEqual(grads['w'].shape, (4, 32))
    np.testing.assert_array_equal(grads['b'], 2.0)
    elements = jax.jit(qarray.element_values)(params['w'])
    want = (x.sum(0)[:, None] * np.asarray(elements)).sum(-1)
    scale = np.asarray(grads['w'].scale)
    np.testing.assert_allclose(scale[:, 0], want, rtol=1e-5)

  @pytest.mark.slow
  def test_frozen_weights_are_closed_over(self):
    frozen = on_device(make('mxfp4', 4, 32))
    grad = jax.jit(
      jax.grad(lambda b: jnp.sum(lowbit_jax.dequantize(frozen) * b))
    )
    np.testing.assert_allclose(grad(jnp.ones(32)), values(frozen).sum(0), 1e-6)

  def test_grad_of_the_values_of_a_coded_scale_is_float0(self):
    q = on_device(make('mxfp4', 2, 32))
    grads = jax.eval_shape(
      jax.grad(lambda q: jnp.sum(lowbit_jax.dequantize(q)), allow_int=True), q
    )
    self.assertEqual(grads.scale.dtype, jax.dtypes.float0)

  def test_quantize_has_no_gradient_and_says_so_by_zero(self):
    grad = jax.jit(
      jax.grad(
        lambda x: jnp.sum(
          lowbit_jax.dequantize(lowbit_jax.quantize(x, formats.get('int4_g32')))
        )
      )
    )(jnp.asarray(data(2, 32)))
    np.testing.assert_array_equal(grad, np.zeros((2, 32)))


class ShardingTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.assertLen(jax.devices(), 8)
    self.mesh = mesh()

  def put(self, q: QArray, *partition) -> QArray:
    """Shards all leaves, those of size 1 along sharded axes replicated."""

    def place(leaf):
      if leaf.size == 1:
        return jax.device_put(leaf, NamedSharding(self.mesh, P()))
      return jax.device_put(leaf, NamedSharding(self.mesh, P(*partition)))

    return jax.tree.map(place, q)

  @parameterized.parameters((P('d', None),), (P(None, 'd'),), (P(),))
  def test_device_put_takes_one_sharding_for_all_leaves(self, partition):
    q = make('mxfp4', 8, 256)
    sharding = NamedSharding(self.mesh, partition)
    put = jax.device_put(q, sharding)
    assert_same(put, q)
    self.assertEqual(put.sharding, sharding)
    for leaf in jax.tree.leaves(put):
      self.assertTrue(leaf.sharding.is_equivalent_to(sharding, leaf.ndim))
    np.testing.assert_array_equal(values(put), values(q))

  @parameterized.parameters('mxfp4', 'nvfp4', 'uint4_g32', 'mxfp6_e3m2')
  def test_shards_of_whole_blocks_are_qarrays(self, name):
    q = make(name, 2, 256)
    put = self.put(q, None, 'd')
    dense = values(q)
    for i in range(8):
      shard = jax.tree.map(lambda leaf: leaf.addressable_shards[i].data, put)  # noqa: B023
      self.assertEqual(shard.shape, (2, 32))
      qarray.validate(shard)
      at = slice(32 * i, 32 * i + 32)
      np.testing.assert_array_equal(values(shard), dense[:, at])

  @parameterized.parameters(('nvfp4',))
  def test_quantize_of_a_sharded_array(self, name):
    self._quantize_of_a_sharded_array(name)

  @parameterized.parameters('mxfp4', 'int8_channel', 'mxfp4_32x32')
  @pytest.mark.slow
  def test_quantize_of_a_sharded_array_of_more_formats(self, name):
    self._quantize_of_a_sharded_array(name)

  def _quantize_of_a_sharded_array(self, name):
    fmt = formats.get(name)
    x = data(32, 256)
    put = jax.device_put(x, NamedSharding(self.mesh, P(None, 'd')))
    assert_same(quantize(put, fmt), quantize(x, fmt))

  @parameterized.parameters(('uint4_g32',))
  def test_shard_map_sees_its_own_shape(self, name):
    self._shard_map_sees_its_own_shape(name)

  @parameterized.parameters('mxfp4', 'int3_g32')
  @pytest.mark.slow
  def test_shard_map_sees_its_own_shape_of_more_formats(self, name):
    self._shard_map_sees_its_own_shape(name)

  def _shard_map_sees_its_own_shape(self, name):
    fmt = formats.get(name)
    x = data(8, 256)

    @jax.jit
    @functools.partial(
      jax.shard_map, mesh=self.mesh, in_specs=P('d'), out_specs=P('d')
    )
    def f(x):
      q = lowbit_jax.quantize(x, fmt)
      assert q.shape == (1, 256)
      return q

    q = f(x)
    assert_same(q, quantize(x, fmt))

    @jax.jit
    @functools.partial(
      jax.shard_map,
      mesh=self.mesh,
      in_specs=P(None, 'd'),
      out_specs=P(None, 'd'),
    )
    def g(q):
      assert q.shape == (8, 32) and q.pad == (0,)
      return lowbit_jax.dequantize(q)

    np.testing.assert_array_equal(g(q), values(q))

  def collective(self, body, q, in_specs, out_specs):
    f = jax.shard_map(
      body,
      mesh=self.mesh,
      in_specs=in_specs,
      out_specs=out_specs,
      check_vma=False,
    )
    return jax.jit(f)(q)

  @parameterized.parameters('mxfp6_e2m3', 'uint4_g32')
  def test_all_gather_along_the_block_axis(self, name):
    self._all_gather_along_the_block_axis(name)

  @parameterized.parameters('mxfp4', 'int8_g32')
  @pytest.mark.slow
  def test_all_gather_along_the_block_axis_of_more_formats(self, name):
    self._all_gather_along_the_block_axis(name)

  def _all_gather_along_the_block_axis(self, name):
    q = make(name, 2, 256)
    gathered = self.collective(
      lambda q: jax.tree.map(
        lambda leaf: jax.lax.all_gather(leaf, 'd', axis=1, tiled=True), q
      ),
      q,
      P(None, 'd'),
      P(),
    )
    assert_same(gathered, q)

  @parameterized.parameters(('nf4_g64',))
  def test_ppermute_rotates_rows(self, name):
    self._ppermute_rotates_rows(name)

  @parameterized.parameters(('mxfp4',))
  @pytest.mark.slow
  def test_ppermute_rotates_rows_of_more_formats(self, name):
    self._ppermute_rotates_rows(name)

  def _ppermute_rotates_rows(self, name):
    q = make(name, 8, 64)
    ring = [(i, (i + 1) % 8) for i in range(8)]
    rotated = self.collective(
      lambda q: jax.tree.map(lambda leaf: jax.lax.ppermute(leaf, 'd', ring), q),
      q,
      P('d'),
      P('d'),
    )
    np.testing.assert_array_equal(
      values(rotated), np.roll(values(q), 1, axis=0)
    )

  @parameterized.parameters('mxfp4', 'uint4_g32')
  @pytest.mark.slow
  def test_all_to_all_moves_the_sharding_to_blocks(self, name):
    q = make(name, 8, 256)

    def body(q):
      assert q.shape == (1, 256)
      q = jax.tree.map(
        lambda leaf: jax.lax.all_to_all(
          leaf, 'd', split_axis=1, concat_axis=0, tiled=True
        ),
        q,
      )
      assert q.shape == (8, 32)
      return lowbit_jax.dequantize(q)

    out = self.collective(body, q, P('d'), P(None, 'd'))
    np.testing.assert_array_equal(out, values(q))

  @pytest.mark.slow
  def test_psum_of_dequantized_shards(self):
    q = make('nvfp4', 8, 32)
    specs = jax.tree.map(lambda leaf: P('d') if leaf.shape[0] > 1 else P(), q)
    out = self.collective(
      lambda q: jax.lax.psum(lowbit_jax.dequantize(q), 'd'), q, (specs,), P()
    )
    np.testing.assert_allclose(out[0], values(q).sum(0), rtol=1e-5)


class DequantizeTest(parameterized.TestCase):
  @parameterized.parameters(*FEW, 'nf4_g64', 'int3_g32')
  def test_equals_the_definition(self, name):
    self._equals_the_definition(make(name, 3, 40))

  @parameterized.parameters(*KINDS)
  @pytest.mark.slow
  def test_equals_the_definition_on_quantized_numbers(self, name):
    self._equals_the_definition(quantized(name, 3, 40))

  def _equals_the_definition(self, q):
    got = np.asarray(dequantize(q))
    self.assertEqual((got.shape, got.dtype), ((3, 40), np.float32))
    np.testing.assert_array_equal(got, values(q))
    self.assertGreater(np.unique(got).size, 3)


class AttributeTest(parameterized.TestCase):
  @parameterized.parameters(*itertools.product(FEW, ((7, 100), (3, 100, 130))))
  def test_shape_and_friends(self, name, shape):
    self._shape_and_friends(name, shape)

  @parameterized.parameters(*itertools.product(MORE, ((7, 100), (3, 100, 130))))
  @pytest.mark.slow
  def test_shape_and_friends_of_more_formats(self, name, shape):
    self._shape_and_friends(name, shape)

  def _shape_and_friends(self, name, shape):
    q = abstract(name, *shape)
    self.assertEqual(q.shape, shape)
    self.assertEqual(q.ndim, len(shape))
    self.assertEqual(q.size, np.prod(shape))
    self.assertEqual(q.dtype, np.dtype(np.float32))
    self.assertIsInstance(q.dtype, np.dtype)
    self.assertLen(q, shape[0])

  @parameterized.parameters(jnp.float16, jnp.bfloat16, jnp.float32)
  def test_dtype_is_that_of_the_input(self, dtype):
    q = jax.eval_shape(
      lambda x: lowbit_jax.quantize(x, formats.mxfp4), spec(2, 32, dtype=dtype)
    )
    self.assertEqual(q.dtype, dtype)
    wide = functools.partial(lowbit_jax.dequantize, dtype=jnp.float32)
    self.assertEqual(jax.eval_shape(lowbit_jax.dequantize, q).dtype, dtype)
    self.assertEqual(jax.eval_shape(wide, q).dtype, jnp.float32)

  @pytest.mark.slow
  def test_dtype_of_results_is_that_of_the_input(self):
    for dtype in (jnp.float16, jnp.bfloat16, jnp.float32):
      q = quantize(data(2, 32).astype(dtype), formats.mxfp4)
      self.assertEqual(q.dtype, dtype)
      self.assertEqual(dequantize(q).dtype, dtype)
      self.assertEqual(lowbit_jax.dequantize(q, jnp.float32).dtype, jnp.float32)

  @parameterized.parameters(
    ('mxfp4', 4096 * 4096 // 2 + 4096 * 4096 // 32, 8_912_896),
    ('nvfp4', 4096 * 4096 // 2 + 4096 * 4096 // 16 + 4, 9_437_188),
    ('mxfp8_e4m3', 4096 * 4096 + 4096 * 128, 17_301_504),
    ('mxfp6_e2m3', 4096 * 4096 * 6 // 8 + 4096 * 128, 13_107_200),
    ('mxfp4_32x32', 4096 * 4096 // 2 + 128 * 128, 8_404_992),
    ('int3_g64', 4096 * 4096 * 3 // 8 + 4096 * 64 * 4, 7_340_032),
    ('uint4_g128', 4096 * 4096 // 2 + 4096 * 32 * 5, 9_043_968),
    ('int8_channel', 4096 * 4096 + 4096 * 4, 16_793_600),
    ('int8_tensor', 4096 * 4096 + 4, 16_777_220),
  )
  def test_nbytes_of_a_large_array(self, name, derived, literal):
    q = abstract(name, 4096, 4096)
    self.assertEqual(derived, literal)
    self.assertEqual(q.nbytes, literal)
    self.assertEqual(q.bits_per_element, 8 * literal / 4096**2)

  @parameterized.parameters(*FEW)
  def test_nbytes_is_what_the_device_holds(self, name):
    self._nbytes_is_what_the_device_holds(name)

  @parameterized.parameters(*MORE)
  @pytest.mark.slow
  def test_nbytes_is_what_the_device_holds_of_more_formats(self, name):
    self._nbytes_is_what_the_device_holds(name)

  def _nbytes_is_what_the_device_holds(self, name):
    q = on_device(make(name, 3, 40))
    held = sum(
      shard.data.on_device_size_in_bytes()
      for leaf in jax.tree.leaves(q)
      for shard in leaf.addressable_shards
    )
    self.assertEqual(q.nbytes, held)
    self.assertEqual(q.nbytes, sum(a.nbytes for a in jax.tree.leaves(q)))
    self.assertAlmostEqual(q.bits_per_element, 8 * held / 120)

  def test_bits_per_element_of_whole_blocks_is_that_of_the_format(self):
    for name in ('mxfp4', 'mxint8', 'fp8_1x128', 'uint4_g64', 'mxfp6_e3m2'):
      q = abstract(name, 8, 256)
      self.assertEqual(q.bits_per_element, q.fmt.bits_per_element, name)

  @parameterized.parameters('uint4_g32', 'mxfp4_32x32')
  def test_transpose_is_the_transposed_array(self, name):
    self._transpose_is_the_transposed_array(name)

  @parameterized.parameters('mxfp6_e2m3', 'nvfp4', 'e4m3fn_tensor', *MORE)
  @pytest.mark.slow
  def test_transpose_is_the_transposed_array_of_more_formats(self, name):
    self._transpose_is_the_transposed_array(name)

  def _transpose_is_the_transposed_array(self, name):
    q = make(name, 3, 40)
    dense = values(q)
    for turned in (q.T, q.mT):
      self.assertEqual(turned.shape, (40, 3))
      self.assertEqual(turned.axis, (-1, -2) if q.fmt.is_tile else -2)
      qarray.validate(turned)
      np.testing.assert_array_equal(values(turned), dense.T)
    assert_same(q.T.T, q)
    assert_same(q.mT.mT, q)

  @parameterized.parameters('nvfp4', 'mxfp4_32x32')
  def test_transpose_of_three_axes(self, name):
    q = make(name, 2, 3, 32)
    dense = values(q)
    self.assertEqual(q.mT.shape, (2, 32, 3))
    np.testing.assert_array_equal(values(q.mT), np.swapaxes(dense, 1, 2))
    self.assertEqual(q.T.shape, (32, 3, 2))
    self.assertEqual(q.T.axis, (-2, -3) if q.fmt.is_tile else -3)
    np.testing.assert_array_equal(values(q.T), dense.T)

  def test_mT_needs_two_axes(self):
    q = make('mxfp4', 64)
    with self.assertRaisesRegex(ValueError, r'2 axes.*\(64,\)'):
      _ = q.mT
    np.testing.assert_array_equal(values(q.T), values(q))

  def test_sharding_is_that_of_the_codes(self):
    q = on_device(make('mxfp4', 2, 32))
    self.assertEqual(q.sharding, q.codes.sharding)

  def test_array_protocols(self):
    q = on_device(make('nvfp4', 3, 40))
    want = values(q)
    got = np.asarray(q)
    self.assertEqual(got.dtype, np.float32)
    np.testing.assert_array_equal(got, want)
    np.testing.assert_array_equal(np.asarray(q, np.float64), want)
    np.testing.assert_array_equal(np.array(q, copy=True), want)
    np.testing.assert_array_equal(jnp.asarray(q), want)
    np.testing.assert_array_equal(jnp.sin(q), np.asarray(jnp.sin(want)))
    np.testing.assert_array_equal(np.sum(np.asarray(q)), want.sum())
    bf16 = q.astype(jnp.bfloat16)
    self.assertEqual(np.asarray(bf16).dtype, jnp.bfloat16)
    self.assertEqual(jnp.asarray(bf16).dtype, jnp.bfloat16)

  def test_matmul_operator(self):
    q, x = make('mxfp4', 3, 40), jnp.asarray(data(2, 3, seed=1))
    dense = values(q).astype(np.float64)
    left, right = x @ q, q @ jnp.asarray(data(40, 2, seed=2))
    self.assertEqual((left.shape, right.shape), ((2, 40), (3, 2)))
    np.testing.assert_allclose(
      left, np.asarray(x, np.float64) @ dense, 1e-5, 1e-4
    )
    np.testing.assert_allclose(right, dense @ data(40, 2, seed=2), 1e-5, 1e-4)

  def test_operators_are_those_of_the_dense_value(self):
    # Small integers, so that sums are exact in any order.
    q, x = quantize(np.round(data(4, 32)), formats.mxfp4), np.round(data(32, 4))
    dense = jnp.asarray(values(q))

    # NumPy arrays stay NumPy arrays under jit: they must leave it to q.
    @jax.jit
    def results(q, traced):
      return (
        (x @ q, q @ x, x.T + q, q - x.T, 2 * q, q**2, -q, abs(q), q > 0),
        (x @ dense, dense @ x, x.T + dense, dense - x.T, 2 * dense, dense**2)
        + (-dense, abs(dense), dense > 0),
        (q + q, q.T @ traced, dense + dense, dense.T @ traced),
      )

    got, want, mixed = results(q, x.T)
    for a, b in zip((*got, *mixed[:2]), (*want, *mixed[2:]), strict=True):
      np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(np.abs(q), abs(values(q)))

  def test_astype_changes_the_logical_dtype_only(self):
    q = make('mxfp4', 2, 32)
    half = q.astype('bfloat16')
    self.assertIs(half.codes, q.codes)
    self.assertEqual(half.dtype, jnp.bfloat16)
    np.testing.assert_array_equal(
      dequantize(half), values(q).astype(jnp.bfloat16)
    )

  def test_block_until_ready_returns_the_array(self):
    q = on_device(make('nvfp4', 2, 32))
    assert_same(q.block_until_ready(), q)
    assert_same(jax.block_until_ready(q), q)

  def test_len_and_iteration_end(self):
    for name in ('mxfp4', 'nvfp4', 'uint4_g32', 'e4m3fn_tensor'):
      q = make(name, 5, 40)
      rows = list(q)
      self.assertLen(rows, 5)
      dense = values(q)
      for row, want in zip(rows, dense, strict=True):
        self.assertEqual(row.shape, (40,))
        np.testing.assert_array_equal(values(row), want)
    a, b = make('mxfp4', 2, 32)
    self.assertEqual((a.shape, b.shape), ((32,), (32,)))

  def test_iteration_over_a_block_axis_is_refused(self):
    with self.assertRaisesRegex(IndexError, 'dequantize'):
      list(make('mxfp4', 32))

  @parameterized.product(name=FEW, shape=((3, 100, 130), (12, 4096, 16384)))
  def test_repr_is_short(self, name, shape):
    self._repr_is_short(name, shape)

  @parameterized.parameters(
    *((name, (3, 100, 130)) for name in BLOCK_FORMATS if name not in FEW),
    *((name, (12, 4096, 16384)) for name in MORE),
  )
  @pytest.mark.slow
  def test_repr_is_short_in_more_formats(self, name, shape):
    self._repr_is_short(name, shape)

  def _repr_is_short(self, name, shape):
    text = repr(abstract(name, *shape))
    self.assertLess(len(text), 190)
    for part in (name, str(shape), 'float32', 'bits/element'):
      self.assertIn(part, text)

  def test_repr_of_a_known_array(self):
    self.assertEqual(
      repr(make('mxfp4', 2, 64)),
      'QArray(mxfp4, shape=(2, 64), dtype=float32, axis=-1,'
      ' 4.25 bits/element, 68 bytes)',
    )

  def test_repr_of_a_tracer_does_not_raise(self):
    texts = []
    jax.jit(lambda q: texts.append(repr(q)))(make('mxfp4', 2, 32))
    self.assertIn('(2, 32)', texts[0])


INDICES = (
  ...,
  0,
  -1,
  2,
  np.int64(1),
  slice(None),
  slice(1, 3),
  slice(None, None, 2),
  slice(None, None, -1),
  (Ellipsis, slice(None)),
  (Ellipsis, slice(0, 64)),
  (Ellipsis, slice(64, None)),
  (Ellipsis, slice(64, 128)),
  (Ellipsis, slice(-72, None)),
  (Ellipsis, slice(0, 0)),
  (0, Ellipsis, slice(64, None)),
  (0, 1),
  (0, slice(1, None)),
  (slice(None), 2),
  (slice(None), slice(0, 2), slice(0, 128)),
  (1, 2, slice(0, 64)),
  np.array([2, 0]),
  (slice(None), np.array([0, 0, 2])),
  np.array([[0, 1], [2, 0]]),
  (0, np.array([0, 3])),
  (0, np.array([[0, 3], [1, 1]])),
  (np.array([0, 2]), np.array([1, 3])),
  (np.array([[0], [2]]), np.array([1, 3]), slice(0, 64)),
)


class IndexTest(parameterized.TestCase):
  @parameterized.parameters(
    'mxfp4', 'nvfp4', 'uint4_g32', 'int3_g64', 'e4m3fn_tensor'
  )
  def test_equals_indexing_of_the_values(self, name):
    q = make(name, 3, 4, 136)
    dense = values(q)
    for index in INDICES:
      with self.subTest(str(index)):
        got = q[index]
        self.assertIsInstance(got, QArray)
        self.assertEqual(got.shape, dense[index].shape)
        np.testing.assert_array_equal(values(got), dense[index])
        self.assertLen({leaf.ndim for leaf in jax.tree.leaves(got)}, 1)

  def test_ellipsis_and_full_slices_return_the_array_itself(self):
    q = make('mxfp4', 3, 40)
    for index in (Ellipsis, slice(None), (slice(None), Ellipsis)):
      self.assertIs(q[index], q)

  @parameterized.parameters('mxfp4', 'nvfp4', 'uint4_g32')
  def test_axes_behind_the_block_axis(self, name):
    q = make(name, 3, 70, 4, axis=1)
    dense = values(q)
    self.assertEqual(q.axis, -2)
    for index, axis in (
      ((slice(None), slice(None), 1), -1),
      ((0, slice(None), 1), -1),
      ((0,), -2),
      ((Ellipsis, slice(1, 3)), -2),
      ((slice(None), slice(32, None), slice(None, None, 2)), -2),
      ((Ellipsis, np.array([[0, 1], [2, 3]])), -3),
      # A slice between them: NumPy puts the axes of the arrays in front.
      ((0, slice(None), np.array([1, 3])), -1),
      ((np.array([[0], [2]]), slice(None), np.array([1, 3])), -1),
      ((np.array([0, 2]), slice(32, None), 0), -1),
    ):
      with self.subTest(str(index)):
        got = q[index]
        self.assertEqual(got.axis, axis)
        np.testing.assert_array_equal(values(got), dense[index])

  def test_tiles(self):
    q = make('mxfp4_32x32', 2, 70, 100)
    dense = values(q)
    for index in (
      1,
      (0, slice(0, 32)),
      (slice(None), slice(32, None), slice(64, None)),
      (slice(None), slice(None), slice(32, 96)),
    ):
      got = q[index]
      self.assertEqual(got.axis, (-2, -1))
      np.testing.assert_array_equal(values(got), dense[index])
    with self.assertRaisesRegex(IndexError, 'multiples of 32'):
      _ = q[:, :, 8:]

  def test_whole_axis_blocks_slice_at_whole_bytes(self):
    q = make('int4_channel', 3, 41)
    dense = values(q)
    np.testing.assert_array_equal(values(q[:, 2:8]), dense[:, 2:8])
    with self.assertRaisesRegex(IndexError, 'multiples of 2'):
      _ = q[:, 3:]

  def test_refusals_name_the_remedy(self):
    q = make('mxfp4', 3, 100)
    for index, message in (
      ((0, 5), 'picks single elements'),
      ((slice(None), slice(16, 48)), 'multiples of 32'),
      ((slice(None), slice(0, 50)), 'multiples of 32'),
      ((slice(None), slice(None, None, 2)), '0:100:2'),
      ((slice(None), slice(None, None, -1)), 'dequantize'),
      ((slice(None), np.array([0, 1])), 'dequantize'),
      (3, 'out of bounds'),
      (-4, 'out of bounds'),
      ((0, Ellipsis, 0, 0), '3 indices'),
      (None, 'reshape'),
      (np.array([True, False, True]), 'flatnonzero'),
      (True, 'flatnonzero'),
      ([0, 1], 'array of integers'),
      ('0', 'array of integers'),
      (np.array([0.0]), 'array of integers'),
    ):
      with self.subTest(str(index)):
        with self.assertRaisesRegex(IndexError, message):
          _ = q[index]

  @parameterized.parameters(('nvfp4',))
  def test_stacks_keep_each_tensor_scale(self, name):
    self._stacks_keep_each_tensor_scale(name)

  @parameterized.parameters('mxfp4', 'int8_tensor', 'uint4_g32')
  @pytest.mark.slow
  def test_stacks_of_more_formats(self, name):
    self._stacks_keep_each_tensor_scale(name)

  def _stacks_keep_each_tensor_scale(self, name):
    _, stack = stacked(name)
    dense = values(stack)
    for index in (
      0,
      2,
      -1,
      slice(1, None),
      np.array([2, 0]),
      (2, 1),
      (slice(None), 1),
      (slice(1, 3), slice(0, 1)),
    ):
      with self.subTest(str(index)):
        np.testing.assert_array_equal(values(stack[index]), dense[index])
    for got, want in zip(stack, dense, strict=True):
      np.testing.assert_array_equal(values(got), want)

  def test_traced_index(self):
    q = make('nvfp4', 3, 40)
    dense = values(q)
    rows = jax.jit(lambda q, i: q[i])
    for i in range(3):
      np.testing.assert_array_equal(values(rows(q, i)), dense[i])
    ids = np.array([2, 0, 1, 2])
    np.testing.assert_array_equal(values(rows(q, ids)), dense[ids])


class ReshapeTest(parameterized.TestCase):
  @parameterized.parameters(
    ('mxfp4', (4, 6, 96), (24, 96)),
    ('mxfp4', (4, 6, 96), (2, 2, 6, 96)),
    ('mxfp4', (4, 6, 96), (-1, 96)),
    ('mxfp4', (4, 6, 96), (4, 6, 3, 32)),
    ('mxfp4', (4, 6, 96), (4, 18, 32)),
    ('mxfp4', (4, 6, 96), (12, 192)),
    ('nvfp4', (4, 6, 96), (24, 96)),
    ('nvfp4', (4, 6, 96), (4, 6, 6, 16)),
    ('uint4_g32', (4, 6, 96), (24, 3, 32)),
    ('int3_g32', (4, 6, 100), (24, 100)),
    ('int8_channel', (4, 6, 10), (24, 10)),
    ('e4m3fn_tensor', (4, 6, 10), (24, 10)),
    ('mxfp4', (1, 32), (1, 1, 32)),
  )
  def test_keeps_the_numbers(self, name, shape, new):
    q = make(name, *shape)
    got = q.reshape(*new)
    want = values(q).reshape(new)
    self.assertEqual(got.shape, want.shape)
    qarray.validate(got)
    np.testing.assert_array_equal(values(got), want)
    assert_same(q.reshape(new), got)

  def test_axes_behind_the_block_axis_stay(self):
    q = make('mxfp4', 2, 3, 64, 5, axis=-2)
    got = q.reshape(6, 64, 5)
    self.assertEqual(got.axis, -2)
    dense = values(q)
    np.testing.assert_array_equal(values(got), dense.reshape(6, 64, 5))
    np.testing.assert_array_equal(
      values(q.reshape(2, 3, 2, 32, 5)),
      dense.reshape(2, 3, 2, 32, 5),
    )
    with self.assertRaisesRegex(ValueError, 'dequantize first'):
      q.reshape(2, 3, 320)

  @parameterized.parameters(
    ('mxfp4', (4, 96), (8, 48)),
    ('mxfp4', (4, 96), (2, 4, 12, 4)),
    ('mxfp4', (4, 100), (8, 50)),
    ('mxfp4', (4, 96), (384,) * 2),
    ('mxfp4', (4, 96), (5, -1)),
    ('int8_channel', (4, 10), (8, 5)),
    ('mxfp4_32x32', (64, 64), (2, 32, 2, 32)),
  )
  def test_refuses_to_break_blocks(self, name, shape, new):
    q = make(name, *shape)
    with self.assertRaisesRegex(ValueError, 'dequantize first'):
      q.reshape(*new)

  def test_a_stack_with_tensor_scales_says_what_to_do(self):
    x = data(3, 4, 32)
    stack = jax.eval_shape(
      jax.vmap(lambda x: lowbit_jax.quantize(x, formats.nvfp4)), x
    )
    for new in ((3, 2, 2, 32), (12, 32)):
      with self.assertRaisesRegex(ValueError, '3 tensor scales.*members'):
        stack.reshape(new)


class PaddingTest(parameterized.TestCase):
  def assert_shapes_come_back(self, name, more=False):
    fmt = formats.get(name)
    if fmt.is_tile:
      cases = [((7, 100), (-2, -1)), ((2, 7, 33), (0, 2)), ((0, 5), None)]
    else:
      cases = [((7, 100), -1), ((7, 100), 0), ((33,), 0), ((5, 0), -1)]
    if more:
      tiles = [((7, 100), (-1, -2)), ((1, 1), None), ((32, 0), None)]
      lines = [((1,), -1), ((2, 3, 5), 1), ((0, 5), -1), ((0,), -1)]
      cases += tiles if fmt.is_tile else lines
    for shape, axis in cases:
      with self.subTest(f'{shape} {axis}'):
        q = abstract(name, *shape, axis=axis)
        self.assertEqual(q.shape, shape)
        self.assertEqual(q.size, np.prod(shape))
        self.assertTrue(all(a < 0 for a in q.axes))
        qarray.validate(q)
        out = jax.eval_shape(lowbit_jax.dequantize, q)
        self.assertEqual(out.shape, shape)

  @parameterized.parameters(*FEW)
  def test_shapes_come_back_for_every_axis(self, name):
    self.assert_shapes_come_back(name)

  @parameterized.parameters(*BLOCK_FORMATS)
  @pytest.mark.slow
  def test_shapes_come_back_in_all_formats(self, name):
    self.assert_shapes_come_back(name, more=name in KINDS)

  def assert_padding_is_zeros(self, name):
    fmt = formats.get(name)
    if fmt.scale_rule == 'absmean':
      return  # its mean is over logical elements: see qarray_oracle_test
    x = data(3, 40)
    q = quantize(x, fmt)
    pads = [(0, 0), (0, 0)]
    for axis, pad in zip(q.axes, q.pad, strict=True):
      pads[axis] = (0, pad)
    whole = quantize(np.pad(x, pads), fmt)
    self.assertEqual(whole.pad, (0,) * len(q.pad))
    for leaf in LEAVES:
      a, b = getattr(q, leaf), getattr(whole, leaf)
      if a is not None:
        np.testing.assert_array_equal(a, b, err_msg=leaf)
    got = values(q)
    self.assertEqual(got.shape, (3, 40))
    np.testing.assert_array_equal(got, values(whole)[:3, :40])

  @parameterized.parameters('mxfp4_32x32', 'uint4_g32')
  def test_padding_is_zeros_that_nobody_sees(self, name):
    self.assert_padding_is_zeros(name)

  @parameterized.parameters(*KINDS)
  @pytest.mark.slow
  def test_padding_is_zeros_in_more_formats(self, name):
    self.assert_padding_is_zeros(name)

  @parameterized.parameters(('nvfp4',))
  def test_other_axes_are_the_transposed_result(self, name):
    self._other_axes_are_the_transposed_result(name)

  @parameterized.parameters(
    'mxfp6_e2m3', 'int3_g32', 'uint4_g32', 'e4m3fn_tensor'
  )
  @pytest.mark.slow
  def test_other_axes_in_more_formats(self, name):
    self._other_axes_are_the_transposed_result(name)

  def _other_axes_are_the_transposed_result(self, name):
    fmt = formats.get(name)
    x = data(3, 40).T
    q = quantize(x, fmt, 0)
    self.assertEqual(q.axis, -2)
    assert_same(q, quantize(x.T, fmt).T)

  @parameterized.parameters(('nvfp4', 2**-1))
  def test_the_error_of_a_padded_array_is_small(self, name, bound):
    self._error_of_a_padded_array_is_small(name, bound)

  @parameterized.parameters(
    ('mxfp8_e4m3', 2**-3), ('mxint8', 2**-5), ('int8_channel', 2**-6)
  )
  @pytest.mark.slow
  def test_the_error_of_more_padded_arrays_is_small(self, name, bound):
    self._error_of_a_padded_array_is_small(name, bound)

  def _error_of_a_padded_array_is_small(self, name, bound):
    x = data(3, 40)
    error = abs(values(quantize(x, formats.get(name))) - x)
    amax = abs(x).max(axis=1, keepdims=True)
    self.assertLess((error / amax).max(), bound, name)

  @parameterized.parameters('nvfp4', 'uint4_g32', 'ternary_tensor')
  def test_empty_arrays(self, name):
    self._empty_arrays(name)

  @parameterized.parameters('mxfp4', 'int8_channel', 'e4m3fn_tensor')
  @pytest.mark.slow
  def test_empty_arrays_of_more_formats(self, name):
    self._empty_arrays(name)

  def _empty_arrays(self, name):
    fmt = formats.get(name)
    for shape in ((0, 32), (3, 0)):
      q = quantize(np.zeros(shape, np.float32), fmt)
      self.assertEqual(q.shape, shape)
      self.assertEqual(dequantize(q).shape, shape)
      self.assertEqual(q.bits_per_element, 0.0)
      self.assertIn('(', repr(q))


class FromCodesTest(parameterized.TestCase):
  @parameterized.parameters('nvfp4', 'uint4_g32', 'int3_g64', 'mxfp4_32x32')
  def test_gives_back_what_quantize_made(self, name):
    self.check(name)

  @parameterized.parameters(
    'mxfp6_e2m3', 'e4m3fn_tensor', 'mxint4', 'nf4_g64', 'int8_channel'
  )
  @pytest.mark.slow
  def test_gives_back_more_formats(self, name):
    self.check(name)

  def check(self, name):
    q = make(name, 64, 72)
    element, (axis, *_) = q.fmt.element, q.axes
    codes = qarray.unpadded(
      numerics.unpack(q.codes, element.bits, axis), q.axes, q.pad
    )
    leaves = {n: getattr(q, n) for n in LEAVES if n != 'codes'}
    same = functools.partial(QArray.from_codes, fmt=q.fmt, axis=q.axis)
    got = same(codes, **leaves)
    self.assertEqual(jax.tree.structure(got), jax.tree.structure(q))
    np.testing.assert_array_equal(values(got), values(q))
    if isinstance(element, formats.IntFormat) and element.signed:
      signed = np.asarray(numerics.decode(codes, element)) / element.step
      got = same(signed.astype(np.int8), **leaves)
      np.testing.assert_array_equal(values(got), values(q))

  def test_refuses_what_does_not_fit(self):
    int4, ones = formats.int4_g32, np.ones((2, 1), np.float32)
    for codes, scale, fmt, kwargs, error, message in (
      (np.full((2, 32), 8, np.int8), ones, int4, {}, ValueError, '-8 ... 7'),
      (np.full((2, 32), 16, np.uint8), ones, int4, {}, ValueError, '0 ... 15'),
      (np.ones((2, 32)), ones, int4, {}, TypeError, 'float64'),
      (np.ones((2, 32), int), ones[:1], int4, {}, ValueError, 'scale.shape'),
      (np.ones((2, 32), int), None, int4, {}, ValueError, 'scale of'),
      (np.ones((2, 32), int), ones, 'int4', {}, TypeError, "fmt='int4'"),
      (np.ones((2, 32), int), ones, formats.mxfp4, {}, TypeError, 'uint8'),
      (np.ones((2, 32), int), ones, int4, dict(axis=2), ValueError, 'axis=2'),
    ):
      with self.subTest(message), self.assertRaisesRegex(error, message):
        QArray.from_codes(codes, scale, fmt, **kwargs)


class ValidateTest(parameterized.TestCase):
  @parameterized.parameters(*LEAST)
  def test_accepts_what_quantize_makes(self, name):
    self._accepts_what_quantize_makes(name)

  @parameterized.parameters(*(n for n in KINDS if n not in LEAST))
  @pytest.mark.slow
  def test_accepts_what_quantize_makes_in_more_formats(self, name):
    self._accepts_what_quantize_makes(name)

  def _accepts_what_quantize_makes(self, name):
    for q in (quantized(name, 3, 40), make(name, 3, 40)):
      self.assertIs(qarray.validate(q), q)

  @parameterized.named_parameters(
    (
      'codes_dtype',
      'mxfp4',
      dict(codes=jnp.zeros((2, 32), jnp.int8)),
      TypeError,
      'int8.*uint8',
    ),
    (
      'scale_missing',
      'mxfp4',
      dict(scale=None),
      ValueError,
      'scale of a mxfp4 array must be given',
    ),
    (
      'scale_extra',
      'e4m3fn_tensor',
      dict(scale=jnp.ones((2, 1))),
      ValueError,
      'scale of a e4m3fn_tensor array must be None',
    ),
    (
      'tensor_scale_extra',
      'mxfp4',
      dict(tensor_scale=jnp.ones((1, 1))),
      ValueError,
      'tensor_scale of a mxfp4 array must be None',
    ),
    (
      'tensor_scale_missing',
      'nvfp4',
      dict(tensor_scale=None),
      ValueError,
      'tensor_scale of a nvfp4 array must be given',
    ),
    (
      'zero_point_missing',
      'uint4_g32',
      dict(zero_point=None),
      ValueError,
      'zero_point of a uint4_g32 array must be given',
    ),
    ('rank', 'nvfp4', dict(tensor_scale=jnp.float32(1)), ValueError, 'rank'),
    (
      'scale_shape',
      'mxfp4',
      dict(scale=jnp.zeros((2, 1), jnp.uint8)),
      ValueError,
      r'\(2, 1\) must be \(2, 2\)',
    ),
    (
      'scale_dtype',
      'mxfp4',
      dict(scale=jnp.ones((2, 2))),
      TypeError,
      'float32 must be uint8',
    ),
    (
      'float_scale_dtype',
      'int4_g32',
      dict(scale=jnp.ones((2, 2), jnp.uint8)),
      TypeError,
      'uint8 must be float32',
    ),
    (
      'zero_point_shape',
      'uint4_g32',
      dict(zero_point=jnp.zeros((2, 1), jnp.uint8)),
      ValueError,
      'zero_point',
    ),
    (
      'zero_point_dtype',
      'uint4_g32',
      dict(zero_point=jnp.zeros((2, 2))),
      TypeError,
      'zero_point',
    ),
    (
      'tensor_scale_dtype',
      'nvfp4',
      dict(tensor_scale=jnp.ones((1, 1), jnp.bfloat16)),
      TypeError,
      'tensor_scale',
    ),
    (
      'tensor_scale_shape',
      'nvfp4',
      dict(tensor_scale=jnp.ones((1, 4))),
      ValueError,
      'tensor_scale',
    ),
    (
      'codes_of_broken_blocks',
      'mxfp4',
      dict(
        codes=jnp.zeros((2, 20), jnp.uint8), scale=jnp.zeros((2, 1), jnp.uint8)
      ),
      ValueError,
      'codes',
    ),
  )
  def test_refuses(self, name, changes, error, message):
    q = qarray.replace(make(name, 2, 64), **changes)
    with self.assertRaisesRegex(error, message):
      qarray.validate(q)


class ExportTest(parameterized.TestCase):
  @parameterized.parameters('nvfp4', 'mxfp4_32x32')
  def test_a_serialized_function_takes_and_returns_qarrays(self, name):
    self._a_serialized_function_takes_and_returns_qarrays(name)

  @parameterized.parameters('mxfp4', 'uint4_g32')
  @pytest.mark.slow
  def test_a_serialized_function_of_more_formats(self, name):
    self._a_serialized_function_takes_and_returns_qarrays(name)

  def _a_serialized_function_takes_and_returns_qarrays(self, name):
    q = make(name, 3, 40)

    def f(q):
      return lowbit_jax.dequantize(q), q.T

    exported = jax.export.export(jax.jit(f))(q)
    again = jax.export.deserialize(exported.serialize())
    dense, turned = again.call(q)
    np.testing.assert_array_equal(dense, values(q))
    assert_same(turned, q.T)

  def test_a_format_of_ones_own_needs_no_registry(self):
    fmt = formats.grouped(formats.get('e3m0'), 24, formats.bfloat16)
    self.assertNotIn(fmt.name, formats.names())
    q = quantize(data(2, 48), fmt)
    exported = jax.export.export(jax.jit(lambda q: q))(q)
    again = jax.export.deserialize(exported.serialize())
    assert_same(again.call(q), q)


if __name__ == '__main__':
  absltest.main()
