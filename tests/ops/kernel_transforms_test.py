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
from jax.sharding import Mesh, PartitionSpec as P

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


@functools.cache
def weight():
  """To be called outside of transformations first."""
  make = functools.partial(lowbit_jax.quantize, fmt=formats.mxfp4, axis=-2)
  return jax.jit(make)(data(K, 8, seed=1))


def operations(implementation: str) -> dict:
  """Functions of (rows, K) to a tuple of arrays with these rows."""
  call = functools.partial(functools.partial, implementation=implementation)
  dot, quantize = call(lowbit_jax.dot), call(lowbit_jax.quantize)
  return {
    'dot': lambda x: (dot(x, weight()),),
    'softmax': lambda x: (call(lowbit_jax.softmax)(x),),
    'quantize': lambda x: tuple(jax.tree.leaves(quantize(x, formats.mxfp4))),
  }


EAGER = operations('tpu')
OPS = {name: jax.jit(f) for name, f in EAGER.items()}


def digest() -> str:
  """Of the bits of all operations."""
  weight()
  with interpreted():
    leaves = [leaf for f in OPS.values() for leaf in f(data(ROWS, K))]
  return hashlib.sha256(
    b''.join(np.asarray(v).tobytes() for v in leaves)
  ).hexdigest()


class TransformsTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    weight()
    self.enter_context(interpreted())

  def assert_same(self, got, want):
    for a, b in zip(got, want, strict=True):
      np.testing.assert_array_equal(a, b)

  def test_vmap_scan_and_donation_keep_bits(self):
    self.check_transforms('dot')

  @parameterized.parameters('softmax', 'quantize')
  @pytest.mark.slow
  def test_vmap_scan_and_donation_of_more_operations_keep_bits(self, name):
    self.check_transforms(name)

  def check_transforms(self, name):
    f, x = OPS[name], data(STEPS, ROWS, K)
    want = [np.stack(v) for v in zip(*map(f, x), strict=True)]
    _, scanned = jax.lax.scan(lambda c, x: (c, f(x)), 0, x)
    self.assert_same(scanned, want)
    donated = jax.jit(lambda x: (jax.vmap(f)(x), -x), donate_argnums=0)
    self.assert_same(donated(jnp.asarray(x))[0], want)

  def check_shards(self, name):
    f, x = OPS[name], data(8 * ROWS, K)
    mesh = Mesh(np.array(jax.devices()[:8]), ('rows',))
    spec = P('rows')
    sharded = jax.shard_map(
      f, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False
    )
    parts = map(f, np.split(x, 8))
    want = [np.concatenate(v) for v in zip(*parts, strict=True)]
    self.assert_same(jax.jit(sharded)(x), want)

  def test_shards_keep_bits(self):
    self.check_shards('dot')

  @parameterized.parameters('softmax', 'quantize')
  @pytest.mark.slow
  def test_shards_of_more_operations_keep_bits(self, name):
    self.check_shards(name)

  def check_rows(self, name, sizes, most: int):
    f, x = OPS[name], data(most, K)
    whole = [np.asarray(v) for v in f(x)]
    for m in sizes:
      self.assert_same(f(x[:m]), [v[:m] for v in whole])
    order = np.random.RandomState(0).permutation(most)
    self.assert_same(f(x[order]), [v[order] for v in whole])
    huge = x.copy()
    huge[most // 2 :] = 1e4
    self.assert_same(
      [np.asarray(v)[: most // 2] for v in f(huge)],
      [v[: most // 2] for v in whole],
    )
    self.assert_same(EAGER[name](x), whole)

  def test_rows_keep_bits_among_others(self):
    self.check_rows('dot', (1,), ROWS)

  @pytest.mark.slow
  def test_rows_of_softmax_keep_bits_among_others(self):
    self.check_rows('softmax', (1,), ROWS)

  @parameterized.parameters(*OPS)
  @pytest.mark.slow
  def test_any_number_of_rows(self, name):
    self.check_rows(name, (1, 2, 3, 7, 8, 16, 17, 64), 300)
    x = data(ROWS, K)
    padded = OPS[name](np.concatenate([x, np.full((9, K), 1e4, np.float32)]))
    self.assert_same([np.asarray(v)[:ROWS] for v in padded], OPS[name](x))

  def derivatives(self, name, implementation, remat):
    """A gradient, that of a remat if asked for, and a forward derivative."""
    f = operations(implementation)[name]

    def loss(f, x):
      return jnp.sum(jnp.sin(f(x)[0]))

    @jax.jit
    def all_of(x, t):
      plain = jax.grad(functools.partial(loss, f))(x)
      again = functools.partial(loss, jax.checkpoint(f))
      return (
        plain,
        jax.grad(again)(x) if remat else plain,
        jax.jvp(f, (x,), (t,)),
      )

    return all_of(data(ROWS, K), data(ROWS, K, seed=2))

  def check_derivatives(self, name, remat):
    got, want = (self.derivatives(name, i, remat) for i in ('tpu', 'xla'))
    np.testing.assert_allclose(got[1], got[0], atol=1e-6)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
      np.testing.assert_allclose(a, b, atol=1e-4)

  @pytest.mark.slow
  def test_derivatives(self):
    self.check_derivatives('dot', True)

  @parameterized.parameters(False, True)
  @pytest.mark.slow
  def test_derivatives_of_softmax(self, remat):
    self.check_derivatives('softmax', remat)


class ProcessTest(absltest.TestCase):
  @pytest.mark.slow
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
