"""Every kernel x format x target through the real compilers.

Compiles each kernel of `lowbit_pallas._support` for each of its formats, kinds
and targets, and prints a table of what compiled, without spills on GPUs, and
why the rest is refused. Fails if a compiler does. Needs the extra `aot`; about
ten minutes.

  python -m tests.aot.matrix            prints the table
  python -m tests.aot.matrix --write    writes it to matrix_jax_VERSION.md too
"""

import concurrent.futures
import functools
import itertools
import multiprocessing
import pathlib
import sys
import time
from importlib import metadata
from unittest import SkipTest

from tests.aot import targets  # before JAX starts a backend

import jax  # isort: skip

from lowbit_pallas import _support
from lowbit_pallas.softmax import forms, mosaic_gpu, tpu
from tests.aot import (
  block_matmul_test,
  quantize_test,
  softmax_test,
  wq_matmul_test,
)

YES = 'yes'
_BLOCK_MODES = {
  'fp8_128': 'fp8_128',
  'fp8_128_e5m2': 'fp8_128',
  'int8': 'integer',
  'int4': 'integer',
}


def _spills(out) -> str:
  """The verdict on what `gpu_report` returned; a reason is passed through."""
  if isinstance(out, str):
    return out
  _, report = out
  spilled = report['spill_stores'] + report['spill_loads']
  return f'FAILED: {spilled} bytes of spills' if spilled else YES


def _softmax(target: str, name: str) -> str:
  kind, dtype = name.split()
  on_tpu = target in targets.TPUS
  module = tpu if on_tpu else mosaic_gpu
  # A row in one piece, and one in several.
  for shape, algorithm, masked in (
    ((16, 1024), 'auto', True),
    ((4, 40000), 'pair', False),
  ):
    case = kind, algorithm, masked, dtype, None
    run, arguments = softmax_test._function(module, shape, case)
    if on_tpu:
      targets.compile_for(target, run, *arguments)
      continue
    verdict = _spills(targets.gpu_report(target, run, *arguments))
    if verdict != YES:
      return verdict
  return YES


def _quantize(target: str, name: str) -> str:
  module = quantize_test.tpu
  if target in targets.GPUS:
    module = quantize_test.mosaic_gpu
  out = quantize_test.compiled(target, module, name, {})
  return _spills(out) if target in targets.GPUS else YES


def _wq_matmul(target: str, name: str) -> str:
  shape = 16, 104, 512, 'bfloat16'
  if target in targets.TPUS:
    arguments = wq_matmul_test._arguments(wq_matmul_test.tpu, name, *shape)
    targets.compile_for(target, *arguments)
    return YES
  kernel = wq_matmul_test.mosaic_gpu
  arguments = wq_matmul_test._arguments(kernel, name, *shape)
  return _spills(targets.gpu_report(target, *arguments))


def _block_matmul(target: str, name: str) -> str:
  mode = _BLOCK_MODES.get(name, 'exact')
  if target in targets.TPUS:
    out = block_matmul_test._compile_tpu(target, name, name, 'nt', mode)
    return out or YES
  return _spills(block_matmul_test._gpu(target, name, name, 'nt', mode, 200))


OPS = {
  'softmax': (
    _softmax,
    tuple(
      f'{kind} {dtype}'
      for kind, dtype in itertools.product(forms.KINDS, mosaic_gpu._DTYPES)
    ),
  ),
  'quantize': (_quantize, quantize_test.ALL_FORMATS),
  'wq_matmul': (_wq_matmul, wq_matmul_test.FORMATS),
  'block_matmul': (_block_matmul, tuple(block_matmul_test.ops.FORMATS)),
}


def verdict(target: str, op: str, name: str) -> str:
  """'yes', the reason of a refusal, or 'FAILED' and why."""
  implementation = 'tpu' if target in targets.TPUS else 'mosaic_gpu'
  if target not in _support.find(op, implementation).targets:
    return 'there is no kernel for this device'
  try:
    return OPS[op][0](target, name)
  except (NotImplementedError, SkipTest) as refusal:
    return str(refusal)
  except Exception as error:
    return f'FAILED: {type(error).__name__}: {str(error).splitlines()[:1]}'


def column(target: str) -> dict[tuple[str, str], str]:
  """All verdicts for a target, in a process of its own, or for a GPU in many.

  The CUDA plug-in compiles for the first GPU that its process compiled for, and
  reports the registers of a kernel only where it first meets it.
  """
  keys = [(op, name) for op, (_, names) in OPS.items() for name in names]
  if why := targets.why_not(target):
    return dict.fromkeys(keys, f'FAILED: {why}')
  context = multiprocessing.get_context('spawn')
  tasks = 1 if target in targets.GPUS else None
  with concurrent.futures.ProcessPoolExecutor(
    1, mp_context=context, max_tasks_per_child=tasks
  ) as pool:
    out = pool.map(functools.partial(verdict, target), *zip(*keys, strict=True))
    return dict(zip(keys, out, strict=True))


def table(columns: dict[str, dict[tuple[str, str], str]]) -> str:
  """Markdown; refusals are numbered and spelled out below."""
  reasons: list[str] = []

  def cell(answer: str) -> str:
    if answer == YES:
      return YES
    if answer not in reasons:
      reasons.append(answer)
    return f'({reasons.index(answer) + 1})'

  lines = [
    f'| kernel | format | {" | ".join(columns)} |',
    '|---|---|' + '---|' * len(columns),
  ]
  for key in columns[next(iter(columns))]:
    cells = [cell(answers[key]) for answers in columns.values()]
    lines.append(f'| {key[0]} | {key[1]} | {" | ".join(cells)} |')
  count = sum(
    a == YES for answers in columns.values() for a in answers.values()
  )
  total = sum(map(len, columns.values()))
  lines += ['', f'{count} of {total} compile. The others:', '']
  lines += [f'{i}. {reason}' for i, reason in enumerate(reasons, 1)]
  return '\n'.join(lines) + '\n'


def main(arguments: list[str]) -> None:
  packages = ('jax', 'libtpu', 'jax-cuda13-plugin', 'nvidia-cuda-nvcc')
  versions = ', '.join(f'{p} {metadata.version(p)}' for p in packages)
  title = f'# What compiles, with {versions}, {time.strftime("%Y-%m-%d")}\n\n'
  text = title + table({target: column(target) for target in targets.TARGETS})
  print(text)
  if '--write' in arguments:
    name = f'matrix_jax_{jax.__version__}.md'
    pathlib.Path(__file__).with_name(name).write_text(text)
  if 'FAILED' in text:
    sys.exit(1)


if __name__ == '__main__':
  main(sys.argv[1:])
