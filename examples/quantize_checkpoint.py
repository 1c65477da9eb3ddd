"""Quantizes the weights of a checkpoint, and writes a complete one.

  python examples/quantize_checkpoint.py --model=SmolLM2 --out=SmolLM2-mxfp4 \
    --format=mxfp4
  python examples/quantize_checkpoint.py --model=a.gguf --out=b.gguf \
    --format=int4_g32_float16

--model is a folder as it is published on the hub, or a GGUF file. What --out
is called decides its layout, if --layout does not: a GGUF file, or a folder in
the layouts of compressed-tensors; 'own' is a folder for this library alone, in
which every format has room. Configuration, tokenizer and metadata go along.

The linear layers are quantized, or what --select finds in the names that the
output has; other weights are written as they are. --format=none changes the
container only. A GGUF file of the LLaMA family becomes a folder too; a folder
does not become a GGUF file.

Methods other than rtn run the model, of the LLaMA or BERT family, on windows of
a text or on sentences, and quantize block after block the linear layers in it;
`evaluate.py` measures them:

  python examples/quantize_checkpoint.py --model=SmolLM2 --out=SmolLM2-int4 \
    --format=int4_g32_float16 --method=recommended

Those that rotate or scale the inputs of layers write --layout=own only;
recommended does so where there is room for it.

Finished parts are kept in a folder beside --out until all is written: the same
command goes on from there after an interruption. --out appears complete or not
at all.
"""

import os
import pathlib
import re
import sys
import tempfile
from collections.abc import Sequence

from absl import app, flags

from lowbit_jax.io._checkpoint import Checkpoint
from support import (
  calibrated,
  command,
  conversion,
  format_flags,
  outputs,
  post_training,
  translation,
  variants,
)
from support.conversion import ConversionError

_MODEL = flags.DEFINE_string(
  'model', None, 'Folder or GGUF file to read.', required=True
)
_OUT = flags.DEFINE_string(
  'out', None, 'Folder or GGUF file to write; it must not exist.', required=True
)
_FORMAT = flags.DEFINE_string(
  'format', None, 'Block format of the weights, or "none".', required=True
)
_LAYOUT = flags.DEFINE_enum(
  'layout', None, outputs.LAYOUTS, 'Layout of the output; by its name if unset.'
)
_METHOD = flags.DEFINE_enum(
  'method',
  'rtn',
  ['rtn', *post_training.METHODS],
  'rtn rounds to the nearest; for others see evaluate.py.',
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
  'scale_rule', None, 'How scales follow from weights; unset for the usual way.'
)
_SELECT = flags.DEFINE_string(
  'select',
  None,
  'Regular expression that finds the names of the weights to quantize.',
)


def _is_format(name: str | None) -> bool:
  return name == 'none' or format_flags.is_block_format(name)


def _is_pattern(pattern: str | None) -> bool:
  try:
    re.compile(pattern or '')
  except re.error as error:
    raise flags.ValidationError(f'{pattern!r}: {error}') from error
  return True


flags.register_validator('format', _is_format)
flags.register_validator('select', _is_pattern)


def convert(
  source: Checkpoint,
  rest: outputs.Beside,
  out: pathlib.Path,
  layout: str,
  method: conversion.Method | None,
) -> None:
  """Writes a checkpoint in another layout, with weights quantized.

  Args:
    source: the checkpoint.
    rest: what it has beside its weights.
    out: the file or folder to write.
    layout: of it, one of `outputs.LAYOUTS`.
    method: that quantizes, None to leave all weights as they are.
  """
  names = conversion.selected(source, _SELECT.value) if method else []
  changed = []
  if isinstance(method, calibrated.Calibrated):
    names = method.choose(names, _SELECT.value is not None)
    changed = method.changed()
  if method:
    conversion.check(source, names, method.fmt, _SCALE_RULE.value)
  fmts = {name: method.fmt for name in names} if method else {}
  rest = outputs.rehearsed(source, fmts, layout, rest)
  parts = conversion.Parts(source, [*names, *changed], method, out)
  with parts.locked():
    try:
      tensors = conversion.Merged(source, parts.complete())
      print(f'writing {out}', flush=True)
      outputs.write(parts.output, layout, tensors, rest)
      parts.finish()
    except (KeyboardInterrupt, OSError):
      print(f'\n{parts.kept()}', file=sys.stderr)
      raise


def _method(layout: str, is_translated: bool) -> conversion.Method | None:
  """What the flags say.

  Args:
    layout: of the output.
    is_translated: whether a GGUF file becomes a folder.
  """
  if _FORMAT.value == 'none':
    return None
  fmt = variants.block_format(_FORMAT.value)
  if _METHOD.value == 'rtn':
    return conversion.Nearest(fmt, _SCALE_RULE.value)
  found = calibrated.load(pathlib.Path(_MODEL.value))
  path = _CALIBRATION.value and pathlib.Path(_CALIBRATION.value)
  return calibrated.Calibrated(
    found,
    calibrated.table(found, is_translated),
    _METHOD.value,
    fmt,
    path,
    _CALIBRATION_WINDOWS.value,
    layout == 'own',
  )


def work() -> None:
  out = pathlib.Path(_OUT.value)
  if os.path.lexists(out):
    raise ConversionError(f'--out={out} exists; choose another name')
  if not out.absolute().parent.is_dir():
    raise ConversionError(f'--out={out}: its folder does not exist; make it')
  is_plain = _METHOD.value == 'rtn'
  if _FORMAT.value == 'none' and (
    _SELECT.value or _SCALE_RULE.value or not is_plain
  ):
    raise ConversionError(
      '--format=none quantizes nothing; leave out --select, --scale_rule and'
      ' --method'
    )
  if not is_plain and _SCALE_RULE.value:
    raise ConversionError('--scale_rule is for --method=rtn; leave it out')
  if is_plain and _CALIBRATION.value:
    raise ConversionError(
      '--method=rtn needs no --calibration; leave it out, or name a method'
    )
  by_name = 'gguf' if out.suffix == '.gguf' else 'compressed-tensors'
  layout = _LAYOUT.value or by_name
  with (
    conversion.open_source(pathlib.Path(_MODEL.value)) as source,
    tempfile.TemporaryDirectory() as folder,
  ):
    is_translated = not os.path.isdir(source.path) and layout != 'gguf'
    if os.path.isdir(source.path):
      if layout == 'gguf':
        raise ConversionError(
          f'--model={source.path} is a folder, whose tokenizer is not'
          ' translated to GGUF; write a folder, or start from a GGUF file'
        )
      rest = outputs.Beside(source.path, {})
    elif layout == 'gguf':
      rest = outputs.Beside(None, source.metadata)
    else:
      source = translation.to_folder(source, pathlib.Path(folder))
      rest = outputs.Beside(folder, {})
    convert(source, rest, out, layout, _method(layout, is_translated))
  with conversion.open_source(out) as result:
    print(result.describe())


def main(argv: Sequence[str]) -> int:
  return command.main(argv, work, (ConversionError,))


if __name__ == '__main__':
  app.run(main)
