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

from lowbit_jax import formats
from lowbit_jax.io._checkpoint import Checkpoint
from support import (
  command,
  conversion,
  format_flags,
  outputs,
  translation,
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
  'method', 'rtn', list(conversion.METHODS), 'rtn rounds to nearest.'
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
  if method:
    conversion.check(source, names, method)
  fmts = {name: method.fmt for name in names} if method else {}
  rest = outputs.rehearsed(source, fmts, layout, rest)
  parts = conversion.Parts(source, names, method, out)
  with parts.locked():
    try:
      tensors = conversion.Merged(source, parts.complete())
      print(f'writing {out}', flush=True)
      outputs.write(parts.output, layout, tensors, rest)
      parts.finish()
    except (KeyboardInterrupt, OSError):
      print(f'\n{parts.kept()}', file=sys.stderr)
      raise


def work() -> None:
  out = pathlib.Path(_OUT.value)
  if os.path.lexists(out):
    raise ConversionError(f'--out={out} exists; choose another name')
  if not out.absolute().parent.is_dir():
    raise ConversionError(f'--out={out}: its folder does not exist; make it')
  method = None
  if _FORMAT.value != 'none':
    fmt = formats.get(_FORMAT.value)
    assert isinstance(fmt, formats.BlockFormat)  # as the flag is checked
    method = conversion.Method(_METHOD.value, fmt, _SCALE_RULE.value)
  elif _SELECT.value or _SCALE_RULE.value:
    raise ConversionError(
      '--format=none quantizes nothing; leave out --select and --scale_rule'
    )
  by_name = 'gguf' if out.suffix == '.gguf' else 'compressed-tensors'
  layout = _LAYOUT.value or by_name
  with (
    conversion.open_source(pathlib.Path(_MODEL.value)) as source,
    tempfile.TemporaryDirectory() as folder,
  ):
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
    convert(source, rest, out, layout, method)
  with conversion.open_source(out) as result:
    print(result.describe())


def main(argv: Sequence[str]) -> int:
  return command.main(argv, work, (ConversionError,))


if __name__ == '__main__':
  app.run(main)
