"""Timed sizes go before the heuristic, whatever the number of rows."""

import dataclasses
import json
import pathlib
import tempfile
import types
from unittest import mock

import jax
import jax.numpy as jnp
from absl.testing import absltest, parameterized

import lowbit_jax
from lowbit_jax import formats
from lowbit_jax.numerics._codec import blocked
from lowbit_jax.ops import _prepack
from lowbit_pallas import _support, _tuned
from lowbit_pallas.block_matmul import (
  config as block_config,
  mosaic_gpu as block_gpu,
  tpu as block_tpu,
)
from lowbit_pallas.quantize import (
  config as quantize_config,
  mosaic_gpu as quantize_gpu,
  task as quantize_task,
  tpu as quantize_tpu,
)
from lowbit_pallas.softmax import (
  config as softmax_config,
  mosaic_gpu as softmax_gpu,
  tpu as softmax_tpu,
)
from lowbit_pallas.wq_matmul import (
  config as wq_config,
  mosaic_gpu as wq_gpu,
  tpu as wq_tpu,
)

N, K = 512, 1024
ROWS = (1, 2, 3, 7, 8, 16, 17, 64, 300)
INT4, INT8 = (
  blocked(formats.get(n)) for n in ('int4_g128', 'int8_channel')
)  # fmt: skip
MXFP4 = blocked(formats.mxfp4)
TASK = quantize_task.Task(MXFP4, 'floor')
WQ = wq_config.key(N, K, INT4, 'bfloat16', 'post')
BLOCK = block_config.key(N, K, MXFP4, MXFP4, 'nt')
INTEGER = block_config.key(N, K, INT8, INT8, 'nt')
ROW = softmax_config.key(K, 4)
KINDS = {'tpu': 'TPU v5e', 'gpu': 'NVIDIA  H100 (80GB) HBM3'}
IMPLEMENTATIONS = {'tpu': 'tpu', 'gpu': 'mosaic_gpu'}
TABLES = {'tpu': 'tpu_v5e.json', 'gpu': 'nvidia_h100_80gb_hbm3.json'}
QUANTIZE = quantize_config.key(K, 2, TASK)


def abstract(*shape, dtype=jnp.bfloat16):
  return jax.ShapeDtypeStruct(shape, dtype)


def quantized(name, *shape, axis):
  def quantize(x):
    return lowbit_jax.quantize(
      x, formats.get(name), axis=axis, implementation='xla'
    )

  return jax.eval_shape(quantize, abstract(*shape, dtype=jnp.float32))


def weight(implementation):
  q = quantized('int4_g128', K, N, axis=-2)
  return jax.eval_shape(lambda q: _prepack.weight(q, implementation), q)


def product(run, name, mode):
  lhs, rhs = (quantized(name, n, K, axis=-1) for n in (64, N))
  spec = blocked(formats.get(name))
  arrays = lhs.codes, lhs.scale, rhs.codes, rhs.scale
  return jax.eval_shape(lambda *a: run(*a, spec, spec, mode=mode), *arrays)


# Platform, op, key, sizes, the choice for a number of rows, and the kernel.
CASES = {
  'wq_tpu': (
    'tpu', 'wq_matmul', WQ, {'bm': 32, 'bn': 128},
    lambda m: wq_tpu.choose(m, N, K, INT4, jnp.bfloat16),
    lambda: jax.eval_shape(wq_tpu.run, abstract(8, K), weight('tpu')),
  ),
  'wq_gpu': (
    'gpu', 'wq_matmul', WQ, {'bm': 32, 'stages': 3, 'split_k': 2},
    lambda m: wq_gpu.choose(m, N, K, INT4, jnp.bfloat16),
    lambda: jax.eval_shape(wq_gpu.run, abstract(8, K), weight('mosaic_gpu')),
  ),
  'block_tpu': (
    'tpu', 'block_matmul', BLOCK, {'bm': 128, 'bn': 256, 'bk': 256},
    lambda m: block_tpu.choose(m, N, K, MXFP4, MXFP4, 'nt'),
    lambda: product(block_tpu.run, 'mxfp4', 'exact'),
  ),
  'block_gpu': (
    'gpu', 'block_matmul', INTEGER, {'bm': 64, 'bn': 128, 'stages': 2},
    lambda m: block_gpu.choose(
      m, N, K, INT8, INT8, 'nt', bits=8, target='h100'
    ),
    lambda: product(block_gpu.run, 'int8_channel', 'integer'),
  ),
  'softmax_tpu': (
    'tpu', 'softmax', ROW, {'rows': 32, 'columns': 512},
    lambda m: softmax_tpu.choose(m, K, 4),
    lambda: jax.eval_shape(softmax_tpu.run, abstract(8, K, dtype=jnp.float32)),
  ),
  'softmax_gpu': (
    'gpu', 'softmax', ROW, {'slices': 2, 'splits': 2},
    lambda m: softmax_gpu.choose(m, K, 4),
    lambda: jax.eval_shape(softmax_gpu.run, abstract(8, K, dtype=jnp.float32)),
  ),
  'quantize_tpu': (
    'tpu', 'quantize', QUANTIZE, {'bm': 64, 'bn': K, 'rows': 64},
    lambda m: quantize_tpu.choose((m, K), 2, TASK),
    lambda: jax.eval_shape(
      lambda x: quantize_tpu.run(x, TASK), abstract(8, K)
    ),
  ),
  'quantize_gpu': (
    'gpu', 'quantize', QUANTIZE, {'columns': 128},
    lambda m: quantize_gpu.choose((m, K), 2, TASK),
    lambda: jax.eval_shape(
      lambda x: quantize_gpu.run(x, TASK), abstract(8, K)
    ),
  ),
}  # fmt: skip


class TunedTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.root = pathlib.Path(self.enter_context(tempfile.TemporaryDirectory()))
    self.enter_context(mock.patch.object(_tuned, 'ROOT', self.root))
    self.addCleanup(_tuned.read.cache_clear)

  def on(self, platform: str):
    device = types.SimpleNamespace(
      platform=platform, device_kind=KINDS[platform], compute_capability='9.0'
    )
    self.table = TABLES[platform]
    self.enter_context(
      mock.patch.object(
        _support,
        'devices',
        lambda name: [device] if IMPLEMENTATIONS[platform] == name else [],
      )
    )

  def write(self, op: str, text: str) -> pathlib.Path:
    _tuned.read.cache_clear()
    table = self.root / op / 'tuned' / self.table
    table.parent.mkdir(parents=True, exist_ok=True)
    table.write_text(text)
    return table

  @parameterized.named_parameters((k, *v) for k, v in CASES.items())
  def test_an_entry_goes_before_the_heuristic(
    self, platform, op, key, sizes, choose, run
  ):
    del run
    self.on(platform)
    plain = choose(1000)
    self.write(op, json.dumps({key: sizes}))
    chosen = choose(1000)
    self.assertNotEqual(chosen, plain)
    self.assertEqual(chosen, dataclasses.replace(plain, **sizes))
    self.write(op, json.dumps({f'{key} of another': sizes}))
    self.assertEqual(choose(1000), plain)

  @parameterized.named_parameters((k, *v) for k, v in CASES.items())
  def test_what_orders_sums_does_not_depend_on_the_rows(
    self, platform, op, key, sizes, choose, run
  ):
    del run
    self.on(platform)
    self.write(op, json.dumps({key: sizes}))

    def order(config):
      fields = dataclasses.asdict(config)
      return {k: v for k, v in fields.items() if k not in ('bm', 'rows')}

    for rows in ROWS:
      self.assertEqual(order(choose(rows)), order(choose(1000)), rows)
      tall = getattr(choose(rows), 'bm', 0)
      self.assertLessEqual(tall, sizes.get('bm', 0))

  @parameterized.named_parameters((k, *v) for k, v in CASES.items())
  def test_damaged_entries_are_refused_by_name(
    self, platform, op, key, sizes, choose, run
  ):
    self.on(platform)
    name = next(iter(sizes))
    values = [0, -128, 1 << 20, 'large', 128.0]
    if name != 'slices':
      values.append(7)  # of no tile
    for damaged in (
      {**sizes, 'warps': 4},
      *({**sizes, name: v} for v in values),
    ):
      table = self.write(op, json.dumps({key: damaged}))
      with self.assertRaisesRegex(ValueError, 'gpu.py'):
        choose(1000)
      with self.assertRaises(ValueError) as error:
        run()
      self.assertIn(str(table), str(error.exception))
      self.assertIn(repr(key), str(error.exception))

  @parameterized.parameters('{', '[]', '{"key": 3}')
  def test_damaged_tables_are_refused(self, text):
    self.on('tpu')
    table = self.write('softmax', text)
    with self.assertRaisesRegex(ValueError, str(table)):
      softmax_tpu.choose(8, K, 4)

  def test_dispatch_does_not_hide_a_damaged_entry(self):
    self.on('tpu')
    self.write('wq_matmul', json.dumps({WQ: {'bm': 7, 'bn': 128}}))
    x, q = abstract(8, K), quantized('int4_g128', K, N, axis=-2)
    with self.assertRaisesRegex(ValueError, 'Delete the entry'):
      lowbit_jax.select_implementation('dot', x, q, implementation='tpu')

  def test_code_for_another_platform_takes_the_heuristic(self):
    self.on('gpu')
    self.write('softmax', json.dumps({ROW: {'slices': 2, 'splits': 2}}))
    got = softmax_tpu.choose(1000, K, 4)
    self.assertEqual(got, softmax_tpu.heuristic(1000, K, 4))

  def test_operands_have_names_of_their_own(self):
    specs = {blocked(formats.get(name)) for name in formats.names('block')}
    names = {_tuned.operand(spec) for spec in specs}
    self.assertGreaterEqual(len(names), 30)
    self.assertIn('e2m1:4:16:e4m3', names)

  def test_shipped_tables(self):
    package = pathlib.Path(_tuned.__file__).parent
    for table in package.glob('*/tuned/*.json'):
      self.assertIsInstance(_tuned.read(table), dict)


if __name__ == '__main__':
  absltest.main()
