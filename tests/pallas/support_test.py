"""The table of kernels is that of the documentation, and each one exists."""

import dataclasses
import importlib.util
import inspect
import pathlib
import subprocess
import sys
import types
from unittest import mock

from absl.testing import absltest, parameterized

from lowbit_pallas import _support

_ROOT = pathlib.Path(__file__).resolve().parents[2]
_PAGE = _ROOT / 'docs' / 'kernels.md'
_MATRIX, _OLDER = (
  _ROOT / 'tests' / 'aot' / f'matrix_jax_{version}.md'
  for version in ('0.11.2', '0.10.2')
)


def table() -> str:
  """`KERNELS` as the page shows it."""
  lines = [
    '| kernel | back end | compiles for | interpreted | ran on |',
    '|---|---|---|---|---|',
  ]
  for k in _support.KERNELS:
    lines.append(
      f'| `{k.op}` | `{k.implementation}` | {", ".join(k.targets)} |'
      f' {"yes" if k.interpreted else "no"} |'
      f' {", ".join(k.run_on) or "not run"} |'
    )
  return '\n'.join(lines)


def compiled(matrix=_MATRIX) -> list[tuple[str, str, dict[str, str]]]:
  """Kernel, format, and what a matrix says for every target."""
  lines = matrix.read_text('utf-8').splitlines()
  rows = [
    [v.strip() for v in s.split('|')[1:-1]] for s in lines if s[:1] == '|'
  ]
  header, _, *rows = rows
  return [
    (op, name, dict(zip(header[2:], marks, strict=True)))
    for op, name, *marks in rows
  ]


def states_table() -> str:
  """Formats of every kernel by how far they have been proven where."""
  targets = *_support.TPUS, *_support.GPUS
  grouped = {}
  for (op, name, marks), (*_, older) in zip(
    compiled(), compiled(_OLDER), strict=True
  ):
    states = tuple(
      state(op, t, marks[t] == 'yes', older[t] == 'yes') for t in targets
    )
    grouped.setdefault((op, states), []).append(f'`{name}`')
  lines = [
    f'| kernel | format | {" | ".join(targets)} | XLA |',
    '|' + '---|' * (3 + len(targets)),
  ]
  lines += [
    f'| `{op}` | {", ".join(names)} | {" | ".join(states)} | runs |'
    for (op, states), names in grouped.items()
  ]
  return '\n'.join(lines)


def state(op: str, target: str, newer: bool, older: bool) -> str:
  """runs, interprets, compiles or absent: the furthest that holds; with the
  version of JAX where an older one does not compile it."""
  found = _state(op, target, newer)
  return found if newer == older else f'{found} (JAX 0.11)'


def _state(op: str, target: str, compiles: bool) -> str:
  implementation = 'tpu' if target in _support.TPUS else 'mosaic_gpu'
  kernel = _support.find(op, implementation)
  if kernel is None or target not in kernel.targets or not compiles:
    return 'absent'
  if target in kernel.run_on:
    return 'runs'
  return 'interprets' if kernel.interpreted else 'compiles'


def _parameters(f):
  return inspect.signature(f).parameters


class SupportTest(parameterized.TestCase):
  def test_page_shows_the_table(self):
    self.assertIn(table(), _PAGE.read_text('utf-8'), f'\n{table()}')

  def test_page_shows_the_states(self):
    text = states_table()
    self.assertIn(text, _PAGE.read_text('utf-8'), f'\n{text}')

  def test_the_matrix_is_that_of_the_table(self):
    marks = [(op, t, m) for op, _, row in compiled() for t, m in row.items()]
    for k in _support.KERNELS:
      known = _support.TPUS if k.implementation == 'tpu' else _support.GPUS
      some = {t for op, t, m in marks if op == k.op and m == 'yes'}
      self.assertEqual(some & set(known), set(k.targets))
    self.assertEqual({op for op, *_ in marks}, {k.op for k in _support.KERNELS})
    for matrix in (_MATRIX, _OLDER):
      self.assertNotIn('FAILED', matrix.read_text('utf-8'))

  @parameterized.parameters(*_support.KERNELS)
  def test_module(self, op, implementation, targets, interpreted, run_on):
    del interpreted, run_on
    name = f'lowbit_pallas.{op}.{implementation}'
    self.assertIsNotNone(importlib.util.find_spec(name))
    known = _support.TPUS if implementation == 'tpu' else _support.GPUS
    self.assertNotEmpty(targets)
    self.assertContainsSubset(targets, known)

  @parameterized.parameters(*((k,) for k in _support.KERNELS))
  def test_kernels_speak_one_dialect(self, kernel):
    module, config = kernel.load(), kernel.load_config()
    for name in ('Config', 'choose', 'heuristic'):
      self.assertIs(getattr(module, name), getattr(config, name), name)
    arguments = [
      list(inspect.signature(f).parameters)
      for f in (config.choose, config.heuristic)
    ]
    self.assertEqual(*arguments)
    self.assertEqual(next(iter(_parameters(config.why_not))), 'config')
    for f in (module.why_not, module.run):
      self.assertIsNone(_parameters(f)['config'].default, f)

  @parameterized.parameters(*((k,) for k in _support.KERNELS))
  def test_sizes_are_static_arguments(self, kernel):
    config = kernel.load_config().Config
    count = len(dataclasses.fields(config))
    one, same = config(*range(count)), config(*range(count))
    self.assertEqual({one, same}, {one})
    self.assertNotEqual(one, config(*range(1, count + 1)))

  def test_sizes_are_known_without_the_back_ends(self):
    code = """
import sys
from lowbit_pallas import _support
for kernel in _support.KERNELS:
  kernel.load_config()
print([m for m in sys.modules if m.startswith('jax.experimental.pallas')])
"""
    run = subprocess.run(
      [sys.executable, '-c', code], capture_output=True, text=True, check=True
    )
    self.assertEqual(run.stdout.strip(), '[]')

  def test_entries_are_unique(self):
    pairs = [(k.op, k.implementation) for k in _support.KERNELS]
    self.assertLen(set(pairs), len(pairs))

  @parameterized.parameters(
    ('tpu', 'TPU v5 lite', None, 'v5e'),
    ('tpu', 'TPU v6 lite', None, 'v6e'),
    ('tpu', 'TPU v2', None, None),
    ('gpu', 'NVIDIA H100 80GB HBM3', '9.0', 'h100'),
    ('gpu', 'NVIDIA A100', '8.0', None),
  )
  def test_devices(self, platform, kind, capability, want):
    device = types.SimpleNamespace(platform=platform, device_kind=kind)
    if capability is not None:
      device.compute_capability = capability
    self.assertEqual(_support.target_of(device), want)

  def test_what_is_not_proven_must_be_named(self):
    device = types.SimpleNamespace(
      platform='gpu', device_kind='NVIDIA H100', compute_capability='9.0'
    )
    with mock.patch.object(_support, 'devices', lambda name: [device]):
      self.assertIn('name it', _support.why_unproven('mosaic_gpu'))
      ran = [k._replace(run_on=('h100',)) for k in _support.KERNELS]
      with mock.patch.object(_support, 'KERNELS', ran):
        self.assertIsNone(_support.why_unproven('mosaic_gpu'))

  def test_the_cpu_has_no_kernels_but_code_for_others_can_be_made(self):
    self.assertEqual(_support.platform(), 'cpu')
    for name, platform in _support.PLATFORMS.items():
      self.assertIsNone(_support.device_of(name))
      self.assertIn('cpu', _support.why_elsewhere(name, 'cpu'))
      self.assertIsNone(_support.why_elsewhere(name, platform))
    self.assertIsNone(_support.why_elsewhere('xla', 'cpu'))
    for kernel in _support.KERNELS:
      self.assertIsNone(_support.why_not(kernel.op, kernel.implementation))
    self.assertIn('no tpu kernel', _support.why_not('unknown', 'tpu'))

  def test_platforms(self):
    self.assertEqual(_support.platform('gpu'), 'cuda')
    self.assertEqual(_support.platform('tpu'), 'tpu')
    with self.assertRaisesRegex(ValueError, "'xpu' is not one of"):
      _support.platform('xpu')


if __name__ == '__main__':
  absltest.main()
