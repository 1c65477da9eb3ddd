"""Measures a language model in many formats, beside its float original.

The model is SmolLM2-135M-Instruct, fetched on the first run (98 MB), or any of
the LLaMA family in a GGUF file or in a Hugging Face folder. Its linear layers
are quantized to each format and multiplied packed, with float activations, and
with activations that are quantized too:

  python examples/evaluate.py
  python examples/evaluate.py --weights=mxfp4,nvfp4 --activations=mxfp8_e4m3
  python examples/evaluate.py --model=FOLDER --text=FILE --windows=8
  python examples/evaluate.py --weights=mxfp4 --method=rtn,gptq,mr_gptq

Each window of the text, of 1024 tokens or as many as the model sees, is read on
its own, without a token that begins it. The table says how much the loss grows
over that of the float model on the same tokens, with its standard error over
tokens; how far the distributions of the next token are from those of the float
model (KL, in nats); and how often both find the same token most likely.

Models of the BERT family embed sentences, one on each line of a file, and the
table has the mean cosine to the embeddings of the float model:

  python examples/evaluate.py --model=FOLDER --sentences=FILE

Methods other than rtn calibrate the model with windows of another text, or with
other sentences, block after block: search tries scales, importance weighs
errors by the activations, awq scales inputs, adaround learns to round up or
down, gptq rounds so that outputs change least, mr_gptq rotates first, duquant
rotates by a matrix found for each layer; recommended takes of these what suits
a format best. Beside them inputs that are quantized take the best of a few
scales, where rtn takes the rule of the format. OUT/layers has what each did to
every layer, and OUT/models the blocks that are done.

Results go to OUT/evaluate.csv and OUT/evaluate.png. Those of each format,
method and window are kept in OUT/runs as they are made: the same command goes
on from there, and more of them cost only what is new.
"""

import dataclasses
import functools
import hashlib
import json
import math
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from absl import app, flags

import lowbit_jax as lowbit
from support import (
  calibration,
  command,
  language_models,
  post_training,
  quality,
  report,
  runs,
  sentence_models,
  smollm2,
  variants,
)
from support.checkpoints import CheckpointError
from support.format_flags import is_block_format
from support.language_models import LanguageModel
from support.sentence_models import SentenceModel
from support.variants import Pair

_DATA = pathlib.Path(__file__).parent / 'data'
_TEXT_FILE = _DATA / 'tom_sawyer.txt'
_METHODS = 'rtn', *post_training.METHODS
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
  'text', None, 'UTF-8 file; a text of eight windows by default.'
)
_SENTENCES = flags.DEFINE_string(
  'sentences', None, 'UTF-8 file, one on each line, for the BERT family.'
)
_WINDOWS = flags.DEFINE_integer(
  'windows', 1, 'Windows of the text.', lower_bound=1
)
_WEIGHTS = flags.DEFINE_list(
  'weights', list(_FORMATS), 'Formats of the linear layers; "none" is float.'
)
_ACTIVATIONS = flags.DEFINE_list(
  'activations',
  ['none', 'same'],
  'Formats of their inputs; "none" is float, "same" that of the weights.',
)
_HEAD = flags.DEFINE_bool('head', False, 'Quantize the head too.')
_METHOD = flags.DEFINE_list(
  'method',
  ['rtn'],
  f'How weights are quantized, some of {", ".join(_METHODS)}; rtn rounds to the'
  ' nearest.',
)
_CALIBRATION = flags.DEFINE_string(
  'calibration',
  None,
  'UTF-8 file for other methods than rtn, a text or one sentence on each line;'
  ' unset for ours.',
)
_CALIBRATION_WINDOWS = flags.DEFINE_integer(
  'calibration_windows',
  None,
  'Windows of that text, 8 if unset; of sentences all.',
  lower_bound=1,
)
_SCALE_RULE = flags.DEFINE_string(
  'scale_rule',
  None,
  'How scales follow from weights, and from inputs in the same format, for rtn;'
  ' unset for the rule of each format.',
)
_OUT = flags.DEFINE_string('out', 'evaluate_out', 'Directory of results.')


def _are_formats(names: Sequence[str], words: Sequence[str]) -> bool:
  return all(name in words or is_block_format(name) for name in names)


flags.mark_flags_as_mutual_exclusive(['text', 'sentences'])
flags.register_validator('weights', lambda v: _are_formats(v, ['none']))
flags.register_validator(
  'activations', lambda v: _are_formats(v, ['none', 'same'])
)
flags.register_validator(
  'method',
  lambda v: bool(v) and set(v) <= set(_METHODS),
  f'must be some of {", ".join(_METHODS)}',
)


class Row(NamedTuple):
  """One line of the table.

  Attributes:
    weights: format of the linear layers.
    activations: format of their inputs.
    method: how weights were rounded, and the scale rule if one was named.
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


class SentenceRow(NamedTuple):
  """One line of the table of a model of sentences.

  Attributes:
    weights, activations, method, bits, bytes: as in `Row`.
    cosine: mean of those between embeddings and those of the float model.
  """

  weights: str
  activations: str
  method: str
  bits: float
  bytes: int
  cosine: float


class _Text:
  """Windows of a text that a language model reads.

  Attributes:
    header: of the table.
    value: that the plot shows.
    variants: of the model.
    parts: what is measured one after the other, with what tells them apart.
    about: what else methods depend on.
    title: what is measured.
  """

  header = (
    f'{"weights":<14} {"activations":<14} {"method":<11} '
    f'{"bits":>6} {"MB":>7} {"nll":>8} '
    f'{"over float":>19} {"KL":>8} {"top 1":>7} {"tokens/s":>9}'
  )
  value = 'loss over that of the float model, nats per token'

  def __init__(
    self,
    path: pathlib.Path,
    file: pathlib.Path,
    out: pathlib.Path,
    run: Mapping[str, Any],
  ) -> None:
    found = language_models.load(path)
    count = _WINDOWS.value
    self._windows = calibration.windows(found, file, count)
    self.about, methods = _methods(found, out, run)
    self.variants = variants.Variants(
      found.model, _HEAD.value, _SCALE_RULE.value, methods
    )
    self.parts = [
      {'window': calibration.digest(window)} for window in self._windows
    ]
    length = self._windows.shape[1]
    self.title = f'{path.name}, {count} x {length} tokens of {file.name}'

  @functools.cached_property
  def _judge(self) -> quality.Judge:
    return quality.Judge(self.variants.floats, self._windows)

  def run(self, model: Any) -> Any:
    """What can be traced to see whether a model works."""
    return model.states(self._windows[:1])[0]

  def scorer(self, pair: Pair) -> Callable[[int], dict[str, Any]]:
    """What measures the model in a pair of formats on one of the parts."""
    model = self.variants(pair)
    sizes, program = self.variants.sizes(model), quality.Program(model)
    return lambda part: {
      **sizes,
      **self._judge.scores(program, part)._asdict(),
    }

  def row(self, pair: Pair, results: Any, floats: Any) -> Row:
    """The line of a pair from results of all parts, and those in float."""
    scores, originals = (
      [
        quality.Scores(*(one[name] for name in quality.Scores._fields))
        for one in some
      ]
      for some in (results, floats)
    )
    gap = quality.gap(scores, originals)
    bits, nbytes = results[0]['bits'], results[0]['bytes']
    weights, activations, _ = pair
    own = weights, activations, _method(pair), 'float', bits, nbytes
    return Row(*own, *gap)

  def line(self, row: Row) -> str:
    delta = f'{row.delta:+.4f} ± {row.stderr:.4f}'
    return (
      f'{row.weights:<14} {row.activations:<14} {row.method:<11} '
      f'{row.bits:>6.3f} {row.bytes / 1e6:>7.1f} {row.nll:>8.5f} {delta:>19} '
      f'{row.kl:>8.4f} '
      f'{row.top1:>7.1%} {row.tokens_per_second:>9.1f}'
    )

  def summary(self, rows: Sequence[Row]) -> str:
    return f'float perplexity {math.exp(rows[0].nll):.5f}'

  def point(self, row: Row) -> report.Point:
    return _point(row, row.delta, row.stderr)


class _Sentences:
  """Sentences that a model of the BERT family embeds; see `_Text`."""

  header = (
    f'{"weights":<14} {"activations":<14} {"method":<11} '
    f'{"bits":>6} {"MB":>7} {"cosine":>9}'
  )
  value = '1 - mean cosine to embeddings of the float model'

  def __init__(
    self,
    path: pathlib.Path,
    file: pathlib.Path,
    out: pathlib.Path,
    run: Mapping[str, Any],
  ) -> None:
    if _HEAD.value:
      raise ValueError('--head: models of sentences have no head')
    self._found = sentence_models.load(path)
    self._sentences = calibration.sentences(file)
    self.about, methods = _methods(self._found, out, run)
    self.variants = variants.Variants(
      self._found.model, scale_rule=_SCALE_RULE.value, calibration=methods
    )
    text = '\n'.join(self._sentences).encode()
    self.parts = [{'sentences': calibration.digest(text)}]
    count = len(self._sentences)
    self.title = f'{path.name}, {count} sentences of {file.name}'

  @functools.cached_property
  def _floats(self) -> np.ndarray:
    return self._embeddings(self.variants.floats)

  def _embeddings(self, model: Any) -> np.ndarray:
    found = dataclasses.replace(self._found, model=model)
    return found.embed(self._sentences)

  def run(self, model: Any) -> Any:
    tokens = np.zeros((1, self._found.config.context), np.int32)
    return model.embeddings(tokens, tokens == 0)

  def scorer(self, pair: Pair) -> Callable[[int], dict[str, Any]]:
    model = self.variants(pair)
    made = self._embeddings(model)
    cosine = sentence_models.mean_cosine(made, self._floats)
    return lambda part: {**self.variants.sizes(model), 'cosine': cosine}

  def row(self, pair: Pair, results: Any, floats: Any) -> SentenceRow:
    del floats
    bits, nbytes, cosine = (results[0][k] for k in ('bits', 'bytes', 'cosine'))
    weights, activations, _ = pair
    return SentenceRow(
      weights, activations, _method(pair), bits, nbytes, cosine
    )

  def line(self, row: SentenceRow) -> str:
    return (
      f'{row.weights:<14} {row.activations:<14} {row.method:<11} '
      f'{row.bits:>6.3f} {row.bytes / 1e6:>7.1f} {row.cosine:>9.6f}'
    )

  def summary(self, rows: Sequence[SentenceRow]) -> str:
    return f'lowest cosine {min(row.cosine for row in rows):.6f}'

  def point(self, row: SentenceRow) -> report.Point:
    return _point(row, 1 - row.cosine, 0.0)


def _method(pair: Pair) -> str:
  if pair.weights == 'none':
    return 'none'
  return ' '.join(filter(None, (pair.method, _SCALE_RULE.value)))


def _methods(
  found: LanguageModel | SentenceModel,
  out: pathlib.Path,
  run: Mapping[str, Any],
) -> tuple[dict[str, str], variants.Calibration | None]:
  """What other methods than rtn depend on, and what they need.

  Args:
    found: the model.
    out: directory of results.
    run: what decides results beside the pair and the calibration.
  """
  if set(_METHOD.value) == {'rtn'}:
    return {}, None
  if _SCALE_RULE.value is not None:
    raise ValueError('--scale_rule is for --method=rtn; leave it out')
  path = _CALIBRATION.value and pathlib.Path(_CALIBRATION.value)
  make, digest = calibration.of_file(found, path, _CALIBRATION_WINDOWS.value)
  about = {'calibration': digest}

  def folder(pair: Pair) -> pathlib.Path:
    decisive = {**about, **run, **pair._asdict(), 'of': lowbit.__version__}
    text = json.dumps(decisive, sort_keys=True)
    name = [*pair, calibration.digest(text.encode())[:8]]
    return out / 'models' / '.'.join(name)

  def write_layers(pair: Pair, errors: Sequence[post_training.Error]) -> None:
    (out / 'layers').mkdir(exist_ok=True)
    report.write_csv(out / 'layers' / f'{".".join(pair)}.csv', errors)

  return about, variants.Calibration(make, folder, write_layers)


def _digest_files(path: pathlib.Path) -> str:
  """Of a file, or of all files of a folder."""
  files = sorted(path.iterdir()) if path.is_dir() else [path]
  digests = b''
  for file in filter(pathlib.Path.is_file, files):
    with file.open('rb') as opened:
      digests += hashlib.file_digest(opened, 'sha256').digest()
  return calibration.digest(digests)


def _measure(
  task: _Text | _Sentences,
  pairs: Sequence[Pair],
  store: runs.Store,
  run: dict[str, Any],
) -> list[Any]:
  """The rows of the table, which it prints one by one."""
  rows, floats = [], None
  total = len(pairs) * len(task.parts)
  with command.progress(total=total, unit='part') as bar:
    for pair in pairs:
      bar.set_description(' '.join(pair))
      results, scorer = [], None
      for number, part in enumerate(task.parts):
        names = pair if pair.method != 'rtn' else pair[:2]
        name = '.'.join([*names, str(number)])
        about = {**run, **pair._asdict(), **part}
        if pair.method != 'rtn':
          about |= task.about
        result = store.load(name, about)
        if result is None:
          scorer = scorer or task.scorer(pair)
          result = scorer(number)
          store.save(name, about, result)
        results.append(result)
        bar.update()
      floats = floats or results
      rows.append(task.row(pair, results, floats))
      bar.write(task.line(rows[-1]))
  return rows


def _point(row: Row | SentenceRow, value: float, error: float) -> report.Point:
  if row.activations == 'none':
    label, group = _label(row), 'float activations'
  elif row.activations == row.weights:
    label, group = _label(row), 'activations like weights'
  else:
    label, group = f'{_label(row)} × {row.activations}', 'other activations'
  return report.Point(label, group, row.bytes, value, error)


def _label(row: Row | SentenceRow) -> str:
  if set(_METHOD.value) == {'rtn'}:
    return row.weights
  return f'{row.weights} {row.method}'


def _evaluate(out: pathlib.Path) -> None:
  if _SENTENCES.value and not _MODEL.value:
    raise ValueError('--sentences needs --model, one of the BERT family')
  path = pathlib.Path(_MODEL.value or smollm2.fetch())
  run = {'model': _digest_files(path)}
  run |= {'head': _HEAD.value}
  run |= {'scale_rule': _SCALE_RULE.value}
  if _SENTENCES.value:
    task = _Sentences(path, pathlib.Path(_SENTENCES.value), out, run)
  else:
    file = pathlib.Path(_TEXT.value or _TEXT_FILE)
    task = _Text(path, file, out, run)
  pairs = variants.pairs(_WEIGHTS.value, _ACTIVATIONS.value, _METHOD.value)
  for pair in pairs[1:]:
    task.variants.check(pair, task.run)
  store = runs.Store(out / 'runs', 'scores', '--out')
  print(f'{task.title}\n{task.header}', flush=True)
  try:
    rows = _measure(task, pairs, store, run)
  except KeyboardInterrupt:
    runs.print_kept(store)
    raise
  table, plot = out / 'evaluate.csv', out / 'evaluate.png'
  report.write_csv(table, rows)
  print(task.summary(rows))
  if not report.can_plot():
    print(f'saved {table}; no plot, because matplotlib is not installed')
    return
  points = [task.point(row) for row in rows if row.weights != 'none']
  title = f'{task.title}: {task.summary(rows)}'
  report.write_size_plot(plot, points, task.value, title)
  print(f'saved {table} and {plot}')


def _run() -> None:
  command.keep_programs()
  with command.own_directory(_OUT.value, '--out') as out:
    _evaluate(out)


def main(argv: Sequence[str]) -> int:
  errors = smollm2.FetchError, CheckpointError, ValueError
  return command.main(argv, _run, errors)


if __name__ == '__main__':
  app.run(main)
