"""Measures a language model in many formats, beside its float original.

The model is SmolLM2-135M-Instruct, fetched on the first run (98 MB), or any of
the LLaMA family in a GGUF file or in a Hugging Face folder. Its linear layers
are quantized to each format and multiplied packed, with float activations, and
with activations that are quantized too:

  python examples/evaluate.py
  python examples/evaluate.py --weights=mxfp4,nvfp4 --activations=none,same
  python examples/evaluate.py --model=FOLDER --text=FILE --windows=8

Each window of the text, of 1024 tokens or as many as the model sees, is read on
its own, without a token that begins it. The table says how much the loss grows
over that of the float model on the same tokens, with its standard error over
tokens; how far the distributions of the next token are from those of the float
model (KL, in nats); and how often both find the same token most likely.

Results go to OUT/evaluate.csv and OUT/evaluate.png. Those of each format and
window are kept in OUT/runs as they are made: the same command goes on from
there, and more formats or windows cost only what is new.
"""

import functools
import hashlib
import itertools
import math
import pathlib
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from absl import app, flags
from flax import nnx

from lowbit_jax import formats
from models import llama_config
from support import (
  command,
  language_models,
  quality,
  report,
  runs,
  smollm2,
  variants,
  weights,
)
from support.checkpoints import CheckpointError

_TEXT_FILE = pathlib.Path(__file__).parent / 'data' / 'tom_sawyer.txt'
_FORMATS = (
  'int8_channel',
  'mxfp8_e4m3',
  'uint4_g32',
  'int4_g32',
  'nvfp4',
  'mxfp4',
)

_MODEL = flags.DEFINE_string(
  'model', '', 'GGUF file or folder; "" fetches SmolLM2-135M-Instruct.'
)
_TEXT = flags.DEFINE_string(
  'text', str(_TEXT_FILE), 'UTF-8 file; the default has two windows.'
)
_WINDOWS = flags.DEFINE_integer(
  'windows', 1, 'Windows of the text.', lower_bound=1
)
_WEIGHTS = flags.DEFINE_list(
  'weights', list(_FORMATS), 'Formats of the linear layers; "none" is float.'
)
_ACTIVATIONS = flags.DEFINE_list(
  'activations',
  ['none'],
  'Formats of their inputs; "none" is float, "same" that of the weights.',
)
_HEAD = flags.DEFINE_bool('head', False, 'Quantize the head too.')
_METHOD = flags.DEFINE_enum(
  'method', 'rtn', ['rtn'], 'How weights are rounded: to the nearest.'
)
_OUT = flags.DEFINE_string('out', 'evaluate_out', 'Directory of results.')


def _are_formats(names: Sequence[str], words: Sequence[str]) -> bool:
  for name in names:
    if name in words:
      continue
    try:
      fmt = formats.get(name)
    except ValueError as error:
      raise flags.ValidationError(str(error)) from error
    if not isinstance(fmt, formats.BlockFormat):
      raise flags.ValidationError(
        f'{name} is an element format; name a block format such as mxfp4'
      )
  return True


flags.register_validator('weights', lambda v: _are_formats(v, ['none']))
flags.register_validator(
  'activations', lambda v: _are_formats(v, ['none', 'same'])
)


class Pair(NamedTuple):
  """Formats by name, 'none' for float."""

  weights: str
  activations: str


_FLOAT = Pair('none', 'none')


class Row(NamedTuple):
  """One line of the table.

  Attributes:
    weights: format of the linear layers.
    activations: format of their inputs.
    method: how weights were rounded.
    cache: format of keys and values.
    bits: that a quantized weight takes, scales included.
    bytes: of all parameters.
    nll, delta, stderr, kl, top1, tokens_per_second: as in `quality.Gap`.
  """

  weights: str
  activations: str
  method: str
  cache: str
  bits: float
  bytes: int
  nll: float
  delta: float
  stderr: float
  kl: float
  top1: float
  tokens_per_second: float


_HEADER = (
  f'{"weights":<14} {"activations":<14} {"bits":>6} {"MB":>7} {"nll":>8} '
  f'{"over float":>19} {"KL":>8} {"top 1":>7} {"tokens/s":>9}'
)


def _line(row: Row) -> str:
  delta = f'{row.delta:+.4f} ± {row.stderr:.4f}'
  return (
    f'{row.weights:<14} {row.activations:<14} {row.bits:>6.3f} '
    f'{row.bytes / 1e6:>7.1f} {row.nll:>8.5f} {delta:>19} {row.kl:>8.4f} '
    f'{row.top1:>7.1%} {row.tokens_per_second:>9.1f}'
  )


def _pairs(weights: Sequence[str], activations: Sequence[str]) -> list[Pair]:
  """Each pair once, the float model first."""
  pairs = [
    Pair(w, w if a == 'same' else a)
    for w, a in itertools.product(weights, activations)
  ]
  return list(dict.fromkeys([_FLOAT, *pairs]))


def _packed(loaded: nnx.Module, floats: nnx.Module, name: str) -> nnx.Module:
  """The model with linear layers in a format.

  Embedding and head stay as the checkpoint has them, unless the head counts.
  """
  fmt = formats.get(name)
  assert isinstance(fmt, formats.BlockFormat)
  model = variants.quantized(floats, fmt, head=_HEAD.value)
  return model if _HEAD.value else variants.with_head(model, loaded)


def _rounding(model: Any, name: str) -> Any:
  """The model with inputs of linear layers in a format, or in none."""
  if name == 'none':
    return model
  fmt = formats.get(name)
  assert isinstance(fmt, formats.BlockFormat)
  return variants.with_activations(model, fmt)


class _Models:
  """A language model in the formats of the table, made when asked for."""

  def __init__(self, loaded: Any) -> None:
    self._loaded = loaded
    self._packed = functools.lru_cache(1)(
      lambda name: _packed(loaded, self.floats, name)
    )

  @functools.cached_property
  def floats(self) -> Any:
    return variants.decoded(self._loaded)

  def __call__(self, pair: Pair) -> Any:
    weights = pair.weights
    model = self.floats if weights == 'none' else self._packed(weights)
    return _rounding(model, pair.activations)


def _check(loaded: Any, pairs: Sequence[Pair], tokens: np.ndarray) -> None:
  """Refuses formats that do not fit the model, before the first is measured."""

  def states(pair):
    floats = variants.decoded(loaded)
    name = pair.weights
    model = floats if name == 'none' else _packed(loaded, floats, name)
    return _rounding(model, pair.activations).states(tokens[:1])[0]

  for pair in pairs:
    with warnings.catch_warnings():
      warnings.simplefilter('error', UserWarning)
      try:
        nnx.eval_shape(functools.partial(states, pair))
      except (TypeError, ValueError, UserWarning) as error:
        raise ValueError(
          f'weights in {pair.weights} with activations in {pair.activations}:'
          f' {error}'
        ) from error


def _digest(path: pathlib.Path) -> str:
  """Of a file, or of all files of a folder."""
  files = sorted(path.iterdir()) if path.is_dir() else [path]
  whole = hashlib.sha256()
  for file in filter(pathlib.Path.is_file, files):
    with file.open('rb') as opened:
      whole.update(hashlib.file_digest(opened, 'sha256').digest())
  return whole.hexdigest()[:16]


def _tokens(tokenizer: Any, path: str) -> list[int]:
  try:
    text = pathlib.Path(path).read_text('utf-8')
  except UnicodeDecodeError as error:
    raise ValueError(f'{path!r} is not UTF-8 text: {error}') from error
  return tokenizer.encode(text)


def _measure(
  pairs: Sequence[Pair],
  loaded: Any,
  windows: np.ndarray,
  store: runs.Store,
  run: dict[str, Any],
) -> list[Row]:
  """The rows of the table, which it prints one by one."""
  models = _Models(loaded)
  judge = None
  rows, floats = [], None
  with command.progress(total=len(pairs) * len(windows), unit='window') as bar:
    for pair in pairs:
      bar.set_description(' '.join(pair))
      results, program = [], None
      for number, tokens in enumerate(windows):
        name = f'{pair.weights}.{pair.activations}.{number}'
        text = hashlib.sha256(tokens.tobytes()).hexdigest()[:16]
        about = {**run, **pair._asdict(), 'window': text}
        result = store.load(name, about)
        if result is None:
          judge = judge or quality.Judge(models.floats, windows)
          if program is None:
            model = models(pair)
            program = quality.Program(model)
          result = {
            'bits': variants.bits(model, head=_HEAD.value),
            'bytes': variants.nbytes(model),
            **judge.scores(program, number)._asdict(),
          }
          store.save(name, about, result)
        results.append(result)
        bar.update()
      bits, nbytes = results[0]['bits'], results[0]['bytes']
      scores = [
        quality.Scores(*(r[field] for field in quality.Scores._fields))
        for r in results
      ]
      floats = floats or scores
      gap = quality.gap(scores, floats)
      method = 'none' if pair.weights == 'none' else _METHOD.value
      rows.append(Row(*pair, method, 'float', bits, nbytes, *gap))
      bar.write(_line(rows[-1]))
  return rows


def _plot(path: pathlib.Path, rows: Sequence[Row], title: str) -> None:
  """Loss over that of the float model against bytes, a mark for each row."""
  figure = report.new_figure(9, 6)
  axes = figure.add_subplot()
  rows = [row for row in rows if row.bytes < rows[0].bytes]
  rows = [row for row in rows if math.isfinite(row.delta)]
  sizes = [row.bytes / 1e6 for row in rows]
  deltas = [row.delta for row in rows]
  axes.set_yscale('symlog', linthresh=0.01, linscale=0.6)
  axes.axhline(0, color='0.4', lw=1, ls='--', zorder=1)
  kinds = {
    'float activations': lambda row: row.activations == 'none',
    'activations as weights': lambda row: row.activations == row.weights,
    'other activations': lambda row: (
      row.activations not in ('none', row.weights)
    ),
  }
  for label, belongs in kinds.items():
    chosen = [row for row in rows if belongs(row)]
    if chosen:
      axes.errorbar(
        [row.bytes / 1e6 for row in chosen],
        [row.delta for row in chosen],
        [row.stderr for row in chosen],
        fmt='o',
        ms=5,
        lw=1,
        ecolor='0.75',
        zorder=2,
        label=label,
      )
  low, high = min(sizes, default=0), max(sizes, default=1)
  room = max(high - low, 0.1 * high)
  axes.set_xlim(low - 0.1 * room, high + 0.2 * room)
  axes.set_ylim(
    min([-0.01, *(2 * d for d in deltas)]), 3 * max([0.01, *deltas])
  )
  axes.set_xlabel('megabytes of all parameters')
  axes.set_ylabel('loss over that of the float model, nats per token')
  axes.set_title(title, fontsize=11)
  axes.grid(alpha=0.25)
  if rows:
    axes.legend(loc='upper right')
    labels = [
      row.weights
      if row.activations in ('none', row.weights)
      else f'{row.weights} × {row.activations}'
      for row in rows
    ]
    points = list(zip(sizes, deltas, strict=True))
    report.place_labels(axes, points, labels, 8.5)
  report.write_figure(path, figure)


def _evaluate(out: pathlib.Path) -> None:
  path = pathlib.Path(_MODEL.value or smollm2.fetch())
  language_model = language_models.load(path)
  config, loaded = language_model.config, language_model.model
  tokens = _tokens(language_model.tokenizer, _TEXT.value)
  windows = quality.windows(tokens, _WINDOWS.value, config.context)
  pairs = _pairs(_WEIGHTS.value, _ACTIVATIONS.value)
  if config.experts and any(pair.activations != 'none' for pair in pairs):
    raise ValueError(
      f'{str(path)!r} is a mixture of experts, whose activations stay in float:'
      ' give --activations=none'
    )
  _check(loaded, pairs, windows)
  store = runs.Store(out / 'runs', 'scores', '--out')
  run = {'model': _digest(path), 'head': _HEAD.value, 'method': _METHOD.value}
  about = f'{path.name}, {len(windows)} x {windows.shape[1]} tokens'
  print(f'{about} of {pathlib.Path(_TEXT.value).name}\n{_HEADER}', flush=True)
  try:
    rows = _measure(pairs, loaded, windows, store, run)
  except KeyboardInterrupt:
    runs.print_kept(store)
    raise
  perplexity = math.exp(rows[0].nll)
  table, plot = out / 'evaluate.csv', out / 'evaluate.png'
  report.write_csv(table, rows)
  print(f'perplexity of the float model: {perplexity:.5f}')
  if not report.can_plot():
    print(f'saved {table}; no plot, because matplotlib is not installed')
    return
  _plot(plot, rows, f'{about}, float perplexity {perplexity:.3f}')
  print(f'saved {table} and {plot}')


def _run() -> None:
  with command.own_directory(_OUT.value, '--out') as out:
    _evaluate(out)


def main(argv: Sequence[str]) -> int:
  errors = (
    smollm2.FetchError,
    llama_config.ConfigError,
    weights.CheckpointMismatch,
    CheckpointError,
    ValueError,
  )
  return command.main(argv, _run, errors)


if __name__ == '__main__':
  app.run(main)
