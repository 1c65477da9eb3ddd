"""TPU kernels in interpret mode under the transformations of JAX.

Bits are those of plain calls: a row does not know what it is computed with.
"""

import contextlib
import functools
import hashlib
import os
import pathlib
import subprocess
import sys
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import absltest, parameterized
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

import lowbit_jax
from lowbit_jax import formats
from lowbit_pallas.quantize import tpu as quantize
from lowbit_pallas.softmax import tpu as softmax
from lowbit_pallas.wq_matmul import tpu as wq_matmul

_ROOT = pathlib.Path(__file__).resolve().parents[2]
STEPS, ROWS, K = 2, 8, 64


@contextlib.contextmanager
def interpreted():
  """Kernels run in the plain interpreter, which needs no callbacks."""
  with contextlib.ExitStack() as stack:
    for module in (quantize, softmax, wq_matmul):
      run = functools.partial(module.run, interpret=True)
      stack.enter_context(mock.patch.object(module, 'run', run))
    yield


def data(*shape, seed: int = 0) -> np.ndarray:
  return np.random.RandomState(seed).randn(*shape).astype(np.float32)


def weight():
  return lowbit_jax.quantize(data(K, 8, seed=1), formats.mxfp4, axis=-2)


def operations(implementation: str) -> dict:
  """Functions of (rows, K) to a tuple of arrays with these rows."""
  call = functools.partial(functools.partial, implementation=implementation)
  dot, quantize = call(lowbit_jax.dot), call(lowbit_jax.quantize)
  return {
    'dot': lambda x: (dot(x, weight()),),
    'softmax': lambda x: (call(lowbit_jax.softmax)(x),),
    'quantize': lambda x: tuple(jax.tree.leaves(quantize(x, formats.mxfp4))),
  }


OPS = operations('tpu')
SMOOTH = 'dot', 'softmax'


def digest() -> str:
  """Of the bits of all operations."""
  with interpreted():
    leaves = [leaf for f in OPS.values() for leaf in f(data(ROWS, K))]
  return hashlib.sha256(
    b''.join(np.asarray(v).tobytes() for v in leaves)
  ).hexdigest()


class TransformsTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.enter_context(interpreted())

  def assert_same(self, got, want):
    for a, b in zip(got, want, strict=True):
      np.testing.assert_array_equal(a, b)

  @parameterized.parameters(*OPS)
  def test_vmap_scan_and_donation_keep_bits(self, name):
    f, x = OPS[name], data(STEPS, ROWS, K)
    want = [jnp.stack(v) for v in zip(*map(f, x), strict=True)]
    _, scanned = jax.lax.scan(lambda c, x: (c, f(x)), 0, x)
    self.assert_same(scanned, want)
    donated = jax.jit(lambda x: (jax.vmap(f)(x), -x), donate_argnums=0)
    self.assert_same(donated(jnp.asarray(x))[0], want)

  @parameterized.parameters(*OPS)
  def test_shards_keep_bits(self, name):
    f, x = OPS[name], data(8 * ROWS, K)
    mesh = Mesh(np.array(jax.devices()[:8]), ('rows',))
    spec = P('rows')
    sharded = jax.shard_map(
      f, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False
    )
    parts = map(f, np.split(x, 8))
    want = [jnp.concatenate(v) for v in zip(*parts, strict=True)]
    self.assert_same(jax.jit(sharded)(x), want)

  def check_rows(self, name, sizes, most: int):
    f, x = OPS[name], data(most, K)
    whole = f(x)
    for m in sizes:
      self.assert_same(f(x[:m]), [v[:m] for v in whole])
    order = np.random.RandomState(0).permutation(most)
    self.assert_same(f(x[order]), [v[order] for v in whole])
    padded = np.concatenate([x, np.full((9, K), 1e4, np.float32)])
    self.assert_same([v[:most] for v in f(padded)], whole)
    self.assert_same(f(x), whole)

  @parameterized.parameters(*SMOOTH)
  def test_rows_keep_bits_among_others(self, name):
    self.check_rows(name, (1,), ROWS)

  @parameterized.parameters(*OPS)
  @pytest.mark.slow
  def test_any_number_of_rows(self, name):
    self.check_rows(name, (1, 2, 3, 7, 8, 16, 17, 64), 300)

  @parameterized.parameters(*SMOOTH)
  def test_derivatives(self, name):
    x, t = data(ROWS, K), data(ROWS, K, seed=2)

    def loss(f, x):
      return jnp.sum(jnp.sin(f(x)[0]))

    f, g = OPS[name], operations('xla')[name]

    @functools.partial(jax.jit, static_argnums=0)
    def derivatives(f, x, t):
      plain = jax.grad(functools.partial(loss, f))(x)
      remat = jax.grad(functools.partial(loss, jax.checkpoint(f)))(x)
      return plain, remat, jax.jvp(f, (x,), (t,))

    got, want = (derivatives(h, x, t) for h in (f, g))
    np.testing.assert_allclose(got[1], got[0], atol=1e-6)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
      np.testing.assert_allclose(a, b, atol=1e-4)


class ProcessTest(absltest.TestCase):
  def test_another_process_has_the_same_bits(self):
    environment = {
      **os.environ,
      'PYTHONHASHSEED': '7',
      'PYTHONPATH': os.pathsep.join(map(str, (_ROOT, _ROOT / 'pallas'))),
    }
    module = 'tests.ops.kernel_transforms_test'
    code = f'from {module} import digest; print(digest())'
    process = subprocess.run(
      [sys.executable, '-c', code],
      env=environment,
      cwd=_ROOT,
      capture_output=True,
      text=True,
    )
    self.assertEqual(process.stdout.strip(), digest(), process.stderr)


if __name__ == '__main__':
  absltest.main()
