"""Trains a small byte-level language model and measures it in many formats.

The model learns the source text of the Python standard library (nothing is
downloaded). Then, for each format, the weights of its linear layers are
quantized and held packed, and the held-out loss of the packed model is
measured. The run prints a table, saves it as CSV, plots the loss gap against
bits per weight, and prints a sample of text from a 4-bit model.

The main job, under five minutes on two cores, under one when trained before:

  python examples/quantize_lm.py

Two minutes from nothing:

  python examples/quantize_lm.py --steps=110 --eval_windows=64 \
    --formats=mxfp8_e4m3,int8_channel,nvfp4,mxfp4,int4_g32,int2_g32

Every block format of the library, and activations in 8 bits as well:

  python examples/quantize_lm.py --formats=all
  python examples/quantize_lm.py --activations=mxfp8_e4m3

Checkpoints go to WORKDIR/checkpoints every --save_every steps. The same
command goes on from the newest one, or reuses a finished one; on one machine
an interrupted run ends in the same bits as an uninterrupted one. Results go to
WORKDIR/table.csv and WORKDIR/plot.png.
"""

import functools
import pathlib
import sys
import time
from collections.abc import Callable, Sequence
from concurrent import futures
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from lowbit_jax import formats, nn
from lowbit_jax.recipe import QuantSpec
from models import byte_lm
from support import (
  command,
  data,
  format_flags,
  loop,
  model_flags,
  report,
  timing,
)
from support.checkpoints import CheckpointError, Checkpoints

_QUANTIZED = rf'({"|".join(byte_lm.LINEAR_LAYERS)})/kernel$'
_THREADS = 2  # that compile
_CHUNK = 16  # formats compiled before the next rows of the table
_FORMATS = (
  'mxint8',
  'mxfp8_e4m3',
  'int8_channel',
  'e4m3fn_channel',
  'mxfp6_e2m3',
  'nvfp4',
  'mxfp4',
  'mxint4',
  'int4_g32',
  'uint4_g32',
  'nf4_g64',
  'int3_g32',
  'int2_g32',
  'ternary_channel',
)

_WORKDIR = flags.DEFINE_string(
  'workdir', 'quantize_lm_out', 'Directory of checkpoints and results.'
)
_CONFIG = model_flags.define()
_SAVE_EVERY = flags.DEFINE_integer(
  'save_every', 40, 'Steps between checkpoints.', lower_bound=1
)
_FORMAT_NAMES = flags.DEFINE_list(
  'formats', list(_FORMATS), 'Weight formats beside float32, or "all".'
)
_ACTIVATIONS = flags.DEFINE_string(
  'activations', '', 'Format of the linear layers\' inputs; "" is float32.'
)
_EVAL_WINDOWS = flags.DEFINE_integer(
  'eval_windows', 96, 'Held-out windows.', lower_bound=2
)
_TIMING_ROUNDS = flags.DEFINE_integer(
  'timing_rounds', 5, 'Timed pairs of float32 and format.', lower_bound=1
)
_SAMPLE_FORMAT = flags.DEFINE_string(
  'sample_format', 'nvfp4', 'Format of the model that writes the sample.'
)
_SAMPLE_BYTES = flags.DEFINE_integer(
  'sample_bytes', 200, 'Length of the sample; 0 for none.', lower_bound=0
)
_PROMPT = flags.DEFINE_string('prompt', 'def ', 'Start of the sample.')
_TEMPERATURE = flags.DEFINE_float(
  'temperature', 0.7, 'Of the sample.', lower_bound=1e-3
)


def _are_formats(names: Sequence[str]) -> bool:
  return list(names) == ['all'] or all(map(format_flags.is_block_format, names))


flags.register_validator('formats', _are_formats)
flags.register_validator('sample_format', format_flags.is_block_format)
flags.register_validator('activations', format_flags.is_block_format)


@functools.cache
def _quantize_block(fmt: formats.BlockFormat) -> Callable[[Any], Any]:
  """One compilation serves all blocks, because their shapes are equal."""
  return jax.jit(lambda block: nn.quantize_params(block, _QUANTIZED, fmt))


def quantize_weights(params: Any, fmt: formats.BlockFormat) -> Any:
  """Returns the parameters with the linear layers' kernels packed."""
  return {
    name: _quantize_block(fmt)(part) if name.startswith('block_') else part
    for name, part in params.items()
  }


def quantized_model(
  config: byte_lm.Config, activations: formats.BlockFormat | None
) -> byte_lm.ByteLM:
  """Returns the model whose linear layers accept packed kernels."""
  spec = None if activations is None else QuantSpec(activations)
  return byte_lm.ByteLM(
    config,
    dot_general=nn.dot_general(lhs=spec),
    promote_dtype=nn.promote_dtype,
  )


def _compile_in_threads(
  prepare: Callable[[str], Any], names: Sequence[str]
) -> dict[str, Any]:
  """Returns `prepare(name)` of each name, showing a progress bar."""
  pool = futures.ThreadPoolExecutor(_THREADS)
  try:
    results = command.progress(
      pool.map(prepare, names),
      desc='compiling',
      total=len(names),
      unit='format',
      leave=False,
    )
    return dict(zip(names, results, strict=True))
  finally:
    pool.shutdown(cancel_futures=True)


def _held_out_batches(
  corpus: data.Corpus, config: byte_lm.Config, count: int
) -> list[jax.Array]:
  """Returns batches of one size; the last one is filled with repetitions."""
  windows = data.held_out_windows(corpus, config.context, count)
  size = min(config.batch, count)
  parts = -(-count // size)
  filled = windows[np.arange(parts * size) % count]
  return [jnp.asarray(part) for part in np.split(filled, parts)]


def evaluate(
  config: byte_lm.Config,
  params: Any,
  corpus: data.Corpus,
  names: Sequence[str],
  activations: formats.BlockFormat | None,
  eval_windows: int,
  timing_rounds: int,
) -> list[report.Row]:
  """Measures float32 and each format, printing the table row by row.

  Args:
    config: of the model.
    params: float32 parameters.
    corpus: whose held-out part is read.
    names: of weight formats.
    activations: format of the linear layers' inputs, or None.
    eval_windows: held-out windows.
    timing_rounds: timed pairs of float32 and format.

  Returns:
    The rows, float32 first.
  """
  batches = _held_out_batches(corpus, config, eval_windows)
  plain = byte_lm.make_loss(byte_lm.ByteLM(config))
  loss = byte_lm.make_loss(quantized_model(config, activations))

  def prepare(name):
    if name == 'float32':
      return plain.lower(params, batches[0]).compile(), params
    packed = quantize_weights(params, formats.get(name))
    return loss.lower(packed, batches[0]).compile(), packed

  def row(name, candidate):
    losses, seconds, relative_time = timing.measure(
      baseline, candidate, batches, timing_rounds
    )
    losses = losses[:eval_windows].astype(np.float64)
    difference = losses - references.setdefault('float32', losses)
    kernels = byte_lm.linear_kernels(candidate[1]).values()
    size = sum(kernel.nbytes for kernel in kernels)
    return report.Row(
      format=name,
      bytes=size,
      bits_per_weight=8 * size / sum(kernel.size for kernel in kernels),
      loss=float(losses.mean()),
      difference=float(difference.mean()),
      standard_error=float(difference.std(ddof=1) / eval_windows**0.5),
      microseconds_per_byte=1e6 * seconds / (batches[0].size - len(batches[0])),
      relative_time=1.0 if candidate is baseline else relative_time,
    )

  names = list(dict.fromkeys(('float32', *names)))
  baseline, references, rows = None, {}, []
  for start in range(0, len(names), _CHUNK):
    chunk = _compile_in_threads(prepare, names[start : start + _CHUNK])
    if not rows:
      print(report.HEADER)
    for name, candidate in chunk.items():
      baseline = baseline or candidate
      rows.append(row(name, candidate))
      print(report.format_row(rows[-1]), flush=True)
  return rows


def _printable(text: bytes) -> str:
  decoded = text.decode('utf-8', errors='replace')
  return ''.join(
    letter if letter.isprintable() or letter == '\n' else '\N{MIDDLE DOT}'
    for letter in decoded
  )


def _save_results(
  rows: list[report.Row], title: str, workdir: pathlib.Path
) -> None:
  table, plot = workdir / 'table.csv', workdir / 'plot.png'
  report.write_csv(table, rows)
  if not report.can_plot():
    print(f'saved {table}; no plot, because matplotlib is not installed')
  else:
    report.write_plot(plot, rows, title)
    print(f'saved {table} and {plot}')


def _print_sample(
  config: byte_lm.Config,
  params: Any,
  activations: formats.BlockFormat | None,
) -> None:
  name = _SAMPLE_FORMAT.value
  text = byte_lm.sample(
    quantized_model(config, activations),
    quantize_weights(params, formats.get(name)),
    _PROMPT.value.encode(),
    _SAMPLE_BYTES.value,
    _TEMPERATURE.value,
    config.seed,
  )
  print(f'sample of the {name} model:')
  for line in (_PROMPT.value + _printable(text)).split('\n'):
    print(f'  | {line}')


def _print_kept(
  checkpoints: Checkpoints, directory: pathlib.Path, steps: int
) -> None:
  saved = checkpoints.steps()
  if saved:
    kept = f'step {saved[-1]} of {steps} is kept in {directory}; '
    kept += 'the same command goes on from there'
  else:
    kept = 'no checkpoint had been written yet'
  print(f'\ninterrupted: {kept}', file=sys.stderr)


def run(config: byte_lm.Config, workdir: pathlib.Path) -> None:
  """Trains, measures, saves and samples."""
  started = time.perf_counter()
  corpus = data.load_corpus()
  print(
    f'corpus: {corpus.files} files of the standard library, '
    f'{len(corpus.train) / 1e6:.2f} MB to learn and '
    f'{len(corpus.held_out) / 1e6:.2f} MB held out, digest {corpus.digest}',
    flush=True,
  )
  directory = workdir / 'checkpoints'
  checkpoints = Checkpoints(directory, loop.identity(config, corpus))
  inputs = _ACTIVATIONS.value
  activations = formats.get(inputs) if inputs else None
  names = _FORMAT_NAMES.value
  names = formats.names('block') if names == ['all'] else names
  try:
    params = loop.train(config, corpus, checkpoints, _SAVE_EVERY.value)
    rows = evaluate(
      config,
      params,
      corpus,
      names,
      activations,
      _EVAL_WINDOWS.value,
      _TIMING_ROUNDS.value,
    )
    title = (
      f'Byte-level LM after {config.steps} steps: float32 loss '
      f'{rows[0].loss:.3f} nats per byte, {inputs or "float32"} activations'
    )
    _save_results(rows, title, workdir)
    if _SAMPLE_BYTES.value:
      _print_sample(config, params, activations)
  except KeyboardInterrupt:
    _print_kept(checkpoints, directory, config.steps)
    raise
  finally:
    checkpoints.close()
  print(f'total time {time.perf_counter() - started:.0f} s')


def work() -> None:
  config = _CONFIG()
  with command.own_directory(_WORKDIR.value) as workdir:
    run(config, workdir)


def main(argv: Sequence[str]) -> int:
  return command.main(argv, work, (byte_lm.ConfigError, CheckpointError))


if __name__ == '__main__':
  app.run(main)
