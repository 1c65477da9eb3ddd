"""Products of kernels for CPUs: their values, and what cannot change them.

The oracle is the float64 product of the dequantized operands, and the bound
that of `products`. Most tests call kernels without XLA, see `frames`, so that
a kernel is compiled once for all shapes.
"""

import functools
import itertools
import math
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import absltest, parameterized
from jax.sharding import PartitionSpec as P

import lowbit_jax as lowbit
from lowbit_jax import QArray, formats, qarray
from lowbit_jax.cpu import _compiler, _matmul
from lowbit_jax.formats import BlockFormat
from lowbit_jax.ops import _dot_cpu_floats
from tests import kinds
from tests.cpu import frames
from tests.ops import products

_LAYOUTS = ('kn', 'nk')
# Formats that are decoded or scaled in different ways, of 1 to 8 bits.
_IN_COLUMNS = ('sign_g128_float16', 'int3_g32', 'nvfp4', 'mxfp6_e3m2')
_IN_ROWS = (
  *('quaternary_g64_float16', 'uint4_g32', 'iq4_nl', 'q5_k', 'mxfp6_e2m3'),
  *('int7_g32', 'mxfp8_e5m2'),
)
_PAIRS = (
  *((name, 'kn') for name in _IN_COLUMNS),
  *((name, 'nk') for name in _IN_ROWS),
)
_ALONG_K = [
  name for name in kinds.block_formats() if not formats.get(name).is_tile
]
_M = (1, 2, 3, 5, 7, 97, 200)
_N = 200


def _formats(names):
  """Arguments of tests: formats in both layouts."""
  return tuple(itertools.product(names, _LAYOUTS))


def _matrix(name, k: int, n: int, layout: str = 'kn', seed: int = 1) -> QArray:
  """A matrix (k, n) in blocks along k, or its transpose."""
  if layout == 'kn':
    return products.make(name, k, n, axis=-2, seed=seed)
  return products.make(name, n, k, axis=-1, seed=seed)


def _spec(layout: str) -> str:
  return f'mk,{layout}->mn'


def _unit(name: str) -> int:
  """Elements of whole blocks, bytes and vectors."""
  fmt = formats.get(name)
  return math.lcm(fmt.block[0] or 1, 8)


def _run(kind, arrays, target=None, pool=None) -> np.ndarray:
  """What a kernel makes of `frames.operands`."""
  out = frames.result(kind, arrays[0], arrays[2])
  address = _matmul.kernel(kind, target or _compiler.host())
  frames.call(address, arrays, [out], pool)
  return out[0]


def _part(kind, arrays, m=None, columns=slice(None)):
  """The same product of fewer rows and columns."""
  x, index, *leaves = arrays
  at = (slice(None), columns) if kind.layout == 'nk' else (..., columns)
  leaves = [np.ascontiguousarray(leaf[at]) for leaf in leaves]
  return [np.ascontiguousarray(x[:, :m]), index, *leaves]


class _AloneTest(parameterized.TestCase):
  """As in a process with one device."""

  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    # Traces do not know how many devices there are said to be.
    jax.clear_caches()
    cls.addClassCleanup(jax.clear_caches)
    cls.enterClassContext(products.one_device())


class ValuesTest(_AloneTest):
  def check(self, name, layout, target=None):
    """Two blocks, some with padding, and several tiles and chunks."""
    unit, fmt = _unit(name), formats.get(name)
    padded = 333
    if not fmt.block[0]:  # without padding k is whole groups of bytes
      unit, padded = 64, 384
    for k in (2 * unit, padded, 1200 // unit * unit):
      q, x = _matrix(name, k, _N, layout), products.data(max(_M), k)
      got = frames.product(x, q, target)
      products.assert_product(got, _spec(layout), x, q)

  @parameterized.parameters(*_PAIRS)
  def test_products(self, name, layout):
    self.check(name, layout)

  @parameterized.parameters(
    *_formats(
      [name for name in kinds.block_formats() if not formats.get(name).is_tile]
    )
  )
  @pytest.mark.slow
  def test_products_of_every_format(self, name, layout):
    self.check(name, layout)

  @parameterized.parameters(('uint4_g32', 'kn'), ('q4_k', 'nk'))
  def test_one_block(self, name, layout):
    """It has one scale for a column, and another kernel."""
    q, x = _matrix(name, 32, _N, layout), products.data(7, 32)
    got = frames.product(x, q)
    products.assert_product(got, _spec(layout), x, q)

  @parameterized.parameters(
    *(('int4', 8, 'float16', 'kn'), ('int4', 40, 'bfloat16', 'nk')),
    *(('e4m3fnuz', 1032, 'bfloat16', 'kn'), ('e2m1', 24, 'e8m0', 'nk')),
    *(('uint6', 136, 'float16', 'nk'), ('e3m2', 256, 'ue5m3', 'kn')),
  )
  def test_blocks_and_scales(self, element, block, scale, layout):
    q = _custom(_with_scales(element, block, scale), 3 * block, 40, layout)
    x = products.data(7, 3 * block)
    products.assert_product(frames.product(x, q), _spec(layout), x, q)

  @parameterized.parameters(('int3_g32', 'kn'), ('mxfp6_e2m3', 'nk'))
  def test_no_bit_depends_on_other_rows_and_columns(self, name, layout):
    x, q = products.data(max(_M), 333), _matrix(name, 333, _N, layout)
    kind, arrays = frames.operands(x, q)
    whole = _run(kind, arrays)
    for m in _M:
      got = _run(kind, _part(kind, arrays, m))
      np.testing.assert_array_equal(got, whole[:m], f'{m=}')
    least = 8 if layout == 'kn' else 1
    for first in (0, 5):
      for n in (*range(least, 25), 64, 71, 130):
        columns = slice(first, first + n)
        for m in (1, 7):
          got = _run(kind, _part(kind, arrays, m, columns))
          message = f'{first=} {n=} {m=}'
          np.testing.assert_array_equal(got, whole[:m, columns], message)

  def test_no_bit_depends_on_threads(self):
    x, q = products.data(7, 640), _matrix('int3_g32', 640, 1100)
    alone = frames.product(x, q)
    for threads in (2, 5):
      with frames.pool_of(threads) as pool:
        got = frames.product(x, q, pool=pool)
      self.assertEqual(pool.scheduled, threads - 1)
      np.testing.assert_array_equal(got, alone)

  @parameterized.parameters(
    ('int3_g32', 'kn'), ('mxfp6_e2m3', 'nk'), ('iq4_nl', 'nk')
  )
  def test_a_processor_without_extensions_gives_the_same_bits(
    self, name, layout
  ):
    x, q = products.data(7, 352), _matrix(name, 352, 40, layout)
    got = frames.product(x, q, _compiler.generic())
    np.testing.assert_array_equal(got, frames.product(x, q))

  @parameterized.parameters(*_formats(_ALONG_K))
  @pytest.mark.slow
  def test_every_format_without_extensions(self, name, layout):
    self.check(name, layout, _compiler.generic())


def _with_scales(element: str, block: int = 32, scale: str = 'float32'):
  scale = getattr(formats, scale)
  return BlockFormat('custom', formats.get(element), (block,), scale)


def _custom(fmt: BlockFormat, k: int, n: int, layout: str) -> QArray:
  """A random matrix of a format that has no name."""
  shape, axis = ((k, n), -2) if layout == 'kn' else ((n, k), -1)
  with mock.patch.object(formats, 'get', lambda name: fmt):
    return products.make.__wrapped__(fmt.name, *shape, axis=axis)


class CodesTest(_AloneTest):
  """A row of zeros and a one picks a row of weights."""

  def check(self, fmt: BlockFormat, layout: str, target=None):
    """Every code at every place has the value that `dequantize` gives.

    But for the sign of zero, since a sum begins with a positive one.
    """
    bits = fmt.element.bits
    n, unit = max(8, 1 << bits), math.lcm(fmt.block[0] or 1, 8)
    k = max(2 * unit, 16)
    q = _custom(fmt, k, n, layout)
    q = qarray.replace(q, scale=np.full(q.scale.shape, 1.25, np.float32))
    base = products.codes_of(q)
    every = np.arange(n) % (1 << bits)
    along = 0 if layout == 'kn' else 1
    dequantize = jax.jit(lowbit.dequantize)
    for place in (*range(17), k - 1) if k > 17 else range(k):
      codes = base.copy()
      codes[(slice(None),) * along + (place,)] = every
      row = qarray.replace(q, codes=products.pack(codes, bits, along))
      want = np.take(np.asarray(dequantize(row)), place, along)
      for m in (1, 3):
        x = np.zeros((m, k), np.float32)
        x[:, place] = 1
        got = frames.product(x, row, target)
        np.testing.assert_array_equal(got, np.tile(want, (m, 1)))

  @parameterized.parameters(
    *(('e5m2', 'kn'), ('e4m3fn', 'nk'), ('e5m2fnuz', 'nk'), ('e5m2fn', 'nk')),
    *(('e4m3', 'nk'), ('e2m1ieee', 'nk'), ('uint5', 'nk'), ('int2', 'nk')),
    *(('nf4', 'nk'), ('e6m1', 'nk'), ('e8m0', 'nk')),
  )
  def test_codes(self, element, layout):
    self.check(_with_scales(element), layout)

  @parameterized.product(name=('mxfp4', 'mxint8'), layout=_LAYOUTS)
  def test_scales(self, name, layout):
    """But those that are, times the step of elements, no normal float32: XLA
    has its threads take them as zero."""
    # Products with larger ones overflow.
    codes = np.arange(250, dtype=np.uint8)
    along = 0 if layout == 'kn' else 1
    q = _matrix(name, 64, codes.size, layout)
    scale = np.broadcast_to(np.expand_dims(codes, along), q.scale.shape)
    q = qarray.replace(q, scale=np.ascontiguousarray(scale))
    x = np.zeros((1, 64), np.float32)
    x[0, 3] = 1
    got = lowbit.einsum(_spec(layout), x, q, implementation='cpu')[0]
    want = np.take(np.asarray(lowbit.dequantize(q)), 3, along)
    step = {'mxfp4': 0.5, 'mxint8': 2.0**-6}[name]
    is_normal = q.fmt.scale.values()[codes] * step >= 2.0**-126
    np.testing.assert_array_equal(got, np.where(is_normal, want, 0))
    self.assertEqual(np.sum(~is_normal), {'mxfp4': 2, 'mxint8': 7}[name])

  @parameterized.parameters(*formats.names('element'))
  @pytest.mark.slow
  def test_every_element(self, name):
    element = formats.get(name)
    if element.bits > 8:
      self.skipTest('it has no packed codes')
    fmt = _with_scales(name)
    for layout in _LAYOUTS:
      for target in (None, _compiler.generic()):
        self.check(fmt, layout, target)


class ProgramsTest(_AloneTest):
  """Kernels in programs of JAX, beside the products of XLA."""

  def operands(self, layout='kn', m=3, k=64, n=40, seed=1):
    q = _matrix('int4_g32', k, n, layout, seed)
    return products.data(m, k, seed=seed), q

  def both(self, f, *operands, terms=64):
    """`f(product)` of both implementations, within the bound of a sum."""
    got, want = (
      jax.jit(f(functools.partial(lowbit.dot, implementation=name)))(*operands)
      for name in ('cpu', 'xla')
    )
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(
        a, b, rtol=0, atol=float(2 * (terms + 8) * products.U * _size(b))
      ),
      got,
      want,
    )
    return got

  @parameterized.parameters(
    'uint4_g32_min_float16', 'nf4_g64', 'q4_k', 'nvfp4', 'int4_tensor'
  )
  def test_products_by_name(self, name):
    for layout in _LAYOUTS:
      for k, m in ((256, 1), (208, 4)):
        x, q = products.data(m, k), _matrix(name, k, 44, layout)
        got = lowbit.einsum(_spec(layout), x, q, implementation='cpu')
        products.assert_product(got, _spec(layout), x, q)

  @parameterized.parameters('nvfp4_16x16', 'mxfp4_32x32', 'fp8_128x128')
  def test_tiles(self, name):
    size = formats.get(name).block[1]
    x, q = products.data(3, 150), products.make(name, 150, 2 * size)
    got = lowbit.dot(x, q, implementation='cpu')
    products.assert_product(got, 'mk,kn->mn', x, q)

  def test_tiles_of_rows(self):
    w = products.data(32, 64)
    q = lowbit.quantize(w, formats.nvfp4_16x16, axis=(-1, -2))
    x = products.data(3, 64)
    got = lowbit.einsum('mk,nk->mn', x, q, implementation='cpu')
    want = np.asarray(lowbit.dequantize(q))
    products.assert_product(got, 'mk,nk->mn', x, want, extra=2 * products.U)

  def test_refusals_say_why(self):
    x, q = self.operands(n=7)
    with self.assertRaisesRegex(NotImplementedError, 'n=7 is less than 8'):
      lowbit.dot(x, q, implementation='cpu')
    q = products.make('int8_channel', 12, 44, axis=-1)
    with self.assertRaisesRegex(NotImplementedError, 'no multiples of 8'):
      lowbit.einsum('mk,nk->mn', products.data(3, 44), q, implementation='cpu')
    q = products.make('fp8_128x128', 128, 100)
    with self.assertRaisesRegex(NotImplementedError, 'not contracted'):
      lowbit.dot(products.data(3, 128), q, implementation='cpu')

  def test_other_dtypes(self):
    x, q = self.operands()
    for dtype in (jnp.bfloat16, jnp.float16):
      low = jnp.asarray(x, dtype)
      got = lowbit.dot(
        low, q, implementation='cpu', preferred_element_type=jnp.float32
      )
      products.assert_product(got, 'mk,kn->mn', np.asarray(low, np.float32), q)
      rounded = lowbit.dot(low, q, implementation='cpu')
      self.assertEqual(rounded.dtype, jnp.promote_types(dtype, q.dtype))

  def test_nan_and_inf_stay_in_their_rows(self):
    for layout in _LAYOUTS:
      x, q = self.operands(layout)
      for value in (np.nan, np.inf, -np.inf):
        for m in (1, 3):
          bad = x[:m].copy()
          bad[0, 5] = value
          got, want = (
            lowbit.einsum(_spec(layout), bad, q, implementation=name)
            for name in ('cpu', 'xla')
          )
          # Of finite results the bits differ; of others the kind may not.
          np.testing.assert_array_equal(_kind_of(got), _kind_of(want))
          self.assertFalse(np.isfinite(got[0]).any())
          self.assertTrue(np.isfinite(got[1:]).all())

  def test_vmap(self):
    x, q = self.operands()
    xs, qs = np.stack([x, x + 1]), products.stacked(q, self.operands(seed=2)[1])
    self.both(lambda dot: jax.vmap(dot, (0, None)), xs, q)
    self.both(lambda dot: jax.vmap(dot, (None, 0)), x, qs)
    got = self.both(jax.vmap, xs, qs)
    # Members of a batch have the bits that they have alone.
    for i in range(2):
      alone = lowbit.dot(xs[i], qs[i], implementation='cpu')
      np.testing.assert_array_equal(got[i], alone)
    twice = lambda dot: jax.vmap(jax.vmap(dot, (None, 0)), (0, None))
    self.both(twice, xs, qs)
    self.both(
      lambda dot: jax.vmap(jax.vmap(dot)),
      xs[None],
      jax.tree.map(lambda leaf: leaf[None], qs),
    )

  def test_members_of_a_stack(self):
    """A number outside of the stack is that of the nearest matrix."""
    x, q = self.operands()
    kind, (x, _, *leaves) = frames.operands(x, q)
    others = frames.operands(*self.operands(seed=2))[1][2:]
    stack = [np.concatenate(pair) for pair in zip(leaves, others, strict=True)]
    apart = [
      _run(kind, [x, np.zeros(1, np.int32), *member])
      for member in (leaves, others)
    ]
    numbers = np.array([1, 0, -5, 7, -(2**31), 2**31 - 1], np.int32)
    want = [apart[i] for i in (1, 0, 0, 1, 0, 1)]

    def product(i, x, stack):
      how = {'kind': kind, 'precision': None}
      return _dot_cpu_floats._multiply.bind(x, i[None], *stack, **how)[0]

    one = [jax.jit(product)(i, x, stack) for i in numbers]
    np.testing.assert_array_equal(one, want)
    several = jax.jit(jax.vmap(product, (0, None, None)))(numbers, x, stack)
    np.testing.assert_array_equal(several, want)
    # The stacks of a batch follow each other, and none is read for another.
    twice = [np.stack([leaf, leaf[::-1]]) for leaf in stack]
    got = jax.jit(jax.vmap(product, (None, None, 0)))(numbers[3], x, twice)
    np.testing.assert_array_equal(got, [want[3], apart[0]])
    xla = jax.jit(
      lambda i: _dot_cpu_floats._by_xla(
        x, i[None], *stack, kind=kind, precision=None
      )
    )
    for i, own in zip(numbers, want, strict=True):
      np.testing.assert_allclose(xla(i)[0], own, rtol=0, atol=1e-4 * _size(own))

  def test_loops(self):
    x, q = self.operands(k=64, n=64)

    def scanned(dot):
      step = lambda x, _: (jnp.tanh(dot(x, q)), None)
      return lambda x: jax.lax.scan(step, x, None, length=3)[0]

    def repeated(dot):
      def body(state):
        return state[0] + 1, jnp.tanh(dot(state[1], q))

      return lambda x: jax.lax.while_loop(lambda s: s[0] < 3, body, (0, x))[1]

    # An error of each step grows by at most the sum of a column in the next.
    growth = np.abs(products.dense(q)).sum(0).max()
    terms = 72 * (1 + growth + growth**2)
    scan = self.both(scanned, x, terms=terms)
    loop = self.both(repeated, x, terms=terms)
    np.testing.assert_array_equal(scan, loop)

  def test_derivatives(self):
    x, q = self.operands()

    def loss(dot):
      def of(x, scale):
        return jnp.sum(dot(x, qarray.replace(q, scale=scale)) ** 2) / 2

      return of

    terms = 64 * 40 * 3
    scale = q.scale
    gradient = lambda dot: jax.grad(loss(dot), (0, 1))
    plain = self.both(gradient, x, scale, terms=terms)
    kept = self.both(
      lambda dot: jax.grad(jax.checkpoint(loss(dot)), (0, 1)),
      x,
      scale,
      terms=terms,
    )
    jax.tree.map(np.testing.assert_array_equal, kept, plain)
    self.both(lambda dot: lambda x: jax.jvp(lambda x: dot(x, q), (x,), (x,)), x)

  def test_64_bit_types_change_nothing(self):
    x, q = self.operands()
    xs = np.stack([x, x])
    product = functools.partial(lowbit.dot, implementation='cpu')
    f = jax.vmap(product, (0, None))
    want = jax.jit(f)(xs, q)
    with jax.enable_x64(True):
      jax.tree.map(
        np.testing.assert_array_equal,
        (
          jax.jit(f)(xs, q),
          jax.jit(jax.vmap(product))(xs, products.stacked(q, q)),
        ),
        (want, want),
      )

  def test_exported_programs_know_no_kernel(self):
    x, q = self.operands()
    f = lambda x: lowbit.dot(x, q, implementation='cpu')
    exported = jax.export.export(jax.jit(f))(x)
    self.assertNotIn('lowbit_jax.wq_matmul', exported.mlir_module())
    self.assertIn('lowbit_jax.wq_matmul', jax.jit(f).lower(x).as_text())
    again = jax.export.deserialize(exported.serialize())
    products.assert_product(again.call(x), 'mk,kn->mn', x, q)

  def test_devices_each_run_a_kernel(self):
    x, q = self.operands(m=8, n=64)
    auto = (jax.sharding.AxisType.Auto,) * 2
    mesh = jax.make_mesh((2, 4), ('rows', 'columns'), axis_types=auto)
    specs = jax.tree.map(lambda leaf: P(None, 'columns'), q)
    f = jax.shard_map(
      functools.partial(lowbit.dot, implementation='cpu'),
      mesh=mesh,
      in_specs=(P('rows'), specs),
      out_specs=P('rows', 'columns'),
    )
    got = jax.jit(f)(x, q)
    np.testing.assert_array_equal(got, lowbit.dot(x, q, implementation='cpu'))


def _size(a) -> float:
  return max(1.0, float(np.abs(a).max(initial=0)))


def _kind_of(a) -> np.ndarray:
  """0 for finite numbers, 1 and -1 for Inf, 2 for NaN."""
  a = np.asarray(a)
  return np.where(np.isnan(a), 2, np.where(np.isinf(a), np.sign(a), 0))


if __name__ == '__main__':
  absltest.main()
