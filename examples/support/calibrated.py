"""Weights of a checkpoint that are quantized by a method with calibration."""

import json
import pathlib
import re
from collections.abc import Sequence
from typing import Any

import jax
import ml_dtypes
import numpy as np

import lowbit_jax as lowbit
from lowbit_jax import formats
from lowbit_jax.io._checkpoint import Checkpoint, Leaf
from models import bert_config
from support import (
  calibration,
  command,
  language_models,
  post_training,
  sentence_models,
  translation,
  variants,
  weights,
)
from support.blocks import STAGES
from support.conversion import ConversionError
from support.language_models import LanguageModel
from support.sentence_models import SentenceModel

Model = LanguageModel | SentenceModel
_DTYPES = {'F16': np.float16, 'BF16': ml_dtypes.bfloat16}


def load(path: pathlib.Path) -> Model:
  """The model in a folder or GGUF file, of sentences or of language.

  Raises:
    ConversionError: for one that is not understood.
  """
  try:
    if _embeds_sentences(path):
      return sentence_models.load(path)
    return language_models.load(path)
  except (OSError, ValueError) as error:
    raise ConversionError(
      f'methods other than rtn run the model: {error}'
    ) from error


def _embeds_sentences(path: pathlib.Path) -> bool:
  if path.is_file():
    with lowbit.io.gguf.open(path) as file:
      return file.metadata.get('general.architecture') == 'bert'
  if (path / 'modules.json').is_file():
    return True
  config = json.loads((path / 'config.json').read_text('utf-8'))
  kind = config.get('model_type') if isinstance(config, dict) else None
  return kind in bert_config.HUGGING_FACE


def table(found: Model, is_translated: bool) -> weights.Table:
  """Where a checkpoint has the parameters of a block.

  Args:
    found: the model.
    is_translated: whether the checkpoint is a GGUF file as a folder.
  """
  if is_translated and isinstance(found, LanguageModel):
    metadata = found.checkpoint.metadata
    return translation.table(found.config, metadata['general.architecture'])
  return found.block


class Calibrated:
  """Weights of the linear layers in the blocks of a model.

  Args:
    found: the model.
    place: where the checkpoint to write has the parameters of a block.
    name: of the method, one of `post_training.METHODS`.
    fmt: of the results.
    path: of the text or of the sentences, None for ours.
    count: windows of it, see `calibration.of_file`.
    has_transforms: whether the layout holds what inputs take as layers run.

  Raises:
    ConversionError: for a method that needs a transform where there is no room
      for one, and for a text that cannot be used.
  """

  def __init__(
    self,
    found: Model,
    place: weights.Table,
    name: str,
    fmt: formats.BlockFormat,
    path: pathlib.Path | None,
    count: int | None,
    has_transforms: bool,
  ) -> None:
    self.fmt, self._name, self._place = fmt, name, place
    try:
      made, self._digest = calibration.of_file(found, path, count)
    except (OSError, ValueError) as error:
      raise ConversionError(f'--calibration: {error}') from error
    self._blocks = made(variants.decoded(found.model), None)
    self._recipe = post_training.recipe(
      name, fmt, self._blocks, has_transforms=has_transforms
    )
    if self._recipe.transforms and not has_transforms:
      raise ConversionError(
        f'--method={name}: inputs of its layers take a transform as they run,'
        ' for which only --layout=own has room; choose that, or another method'
      )
    # Kernels by block and path, and the tensors that hold them.
    self._chosen: dict[tuple[int, str], list[str]] = {}
    self._done: dict[str, Leaf] | None = None

  def choose(self, names: Sequence[str], are_chosen: bool) -> list[str]:
    """Which weights are quantized.

    Args:
      names: of weights that could be.
      are_chosen: whether a user did. If not, those that are no linear layers of
        blocks stay as they are; if so, no ranges move between weights.

    Raises:
      ConversionError: for others if a user chose them, and where nothing is
        left.
    """
    wanted = set(names)
    self._chosen = {
      (number, path): source.names(number)
      for number in range(len(self._blocks))
      for path, source in self._place.items()
      if any(re.search(stage, path) for stage in STAGES)
      and wanted.intersection(source.names(number))
    }
    found = {name for some in self._chosen.values() for name in some}
    others = [n for n in names if n not in found]
    if not found or (are_chosen and others):
      raise ConversionError(
        f'--method={self._name} is for linear layers in the blocks of a model,'
        f' and {(others or ["nothing"])[0]!r} is none; leave it out of --select'
      )
    if are_chosen:
      self._recipe = self._recipe._replace(smooths=False)
    return [n for n in names if n in found]

  def changed(self) -> list[str]:
    """Names of the weights that a method changes otherwise: it moves ranges."""
    if not self._recipe.smooths:
      return []
    quantized = {name for some in self._chosen.values() for name in some}
    return [
      name
      for number in range(len(self._blocks))
      for source in self._place.values()
      for name in source.names(number)
      if name not in quantized
    ]

  def settings(self) -> dict[str, Any]:
    recipe = self._recipe._replace(step=self._name)
    return {
      'format': formats.to_dict(self.fmt),
      'calibration': self._digest,
      **recipe._asdict(),
    }

  def quantized(
    self, source: Checkpoint, name: str, folder: pathlib.Path
  ) -> Leaf:
    if self._done is None:
      self._done = self._tensors(folder / 'blocks')
    leaf = self._done[name]
    if isinstance(leaf, np.ndarray):
      floats = _DTYPES.get(source.tensors[name].layout, np.float32)
      leaf = leaf.astype(floats)
    return leaf

  def _tensors(self, folder: pathlib.Path) -> dict[str, Leaf]:
    """All weights by name, with NumPy leaves."""
    done = post_training.one_by_one(
      self._blocks,
      self.fmt,
      self._recipe,
      select=lambda number, path: (number, path) in self._chosen,
      folder=folder,
    )
    total, tensors = len(self._blocks), {}
    bar = command.progress(done, total=total, desc='calibrating', unit='block')
    for number, block in enumerate(bar):
      parameters = {
        path: jax.device_get(leaf)
        for path, leaf in block.parameters.items()
        if self._recipe.smooths or (number, path) in self._chosen
      }
      try:
        tensors |= weights.tensors(self._place, number, parameters)
      except ValueError as error:
        raise ConversionError(str(error)) from error
    return tensors
