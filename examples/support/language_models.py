"""Language models from what people have: a GGUF file or a folder."""

import dataclasses
import functools
import json
import os
import pathlib
from collections.abc import Callable
from typing import Any

from flax import nnx
from jax.sharding import Mesh

from lowbit_jax.io import gguf, safetensors
from lowbit_jax.io._checkpoint import Checkpoint
from models import llama, llama_config, llama_names
from models.llama_config import Config, ConfigError
from support import weights
from support.weights import Table

_JSON_BYTES = 2**24


@dataclasses.dataclass(frozen=True, eq=False)
class LanguageModel:
  """A model, and what it was made of.

  Attributes:
    model: with its parameters, packed as the checkpoint has them.
    config: of the model.
    checkpoint: that it came from; it is closed, and says what was there.
    block: where it has the parameters of a block.
  """

  model: llama.Llama
  config: Config
  checkpoint: Checkpoint
  block: Table

  @functools.cached_property
  def tokenizer(self) -> Any:
    """Of the same file or folder, made when it is asked for."""
    from support import tokenizer  # needs packages that models do not

    if os.path.isdir(self.checkpoint.path):
      return tokenizer.from_folder(self.checkpoint.path)
    return tokenizer.from_gguf(self.checkpoint.metadata)


def load(
  path: str | os.PathLike[str],
  *,
  mesh: Mesh | None = None,
  progress: Callable[[Any], Any] = lambda paths: paths,
) -> LanguageModel:
  """Loads a model of the LLaMA family.

  Args:
    path: a GGUF file, or a folder with config.json and safetensors files.
    mesh: devices to split the model over, along its axis 'model', each of which
      gets its part as it is read; None for the default device.
    progress: wraps the sequence of parameters, such as tqdm.

  Returns:
    The model.

  Raises:
    FileNotFoundError: if there is no such file or folder.
    ConfigError: a ValueError, for a configuration that is not read.
    CheckpointMismatch: a ValueError, for tensors other than the configuration
      says, by name.
    ValueError: for files that are damaged or of another kind.
  """
  path = os.fspath(path)
  if mesh is not None and 'model' not in mesh.axis_names:
    raise ValueError(f"{mesh.axis_names=} must have an axis 'model'")
  checkpoint, config, (whole, block) = _opened(path)
  with checkpoint:
    sizes = weights.stacks(checkpoint, block, config.blocks)
    model = weights.load(
      lambda: llama.Llama(config, sizes, rngs=nnx.Rngs(0)),
      checkpoint,
      whole,
      block,
      sizes,
      harmless=llama_names.harmless(config).fullmatch,
      mesh=mesh,
      specs=llama_names.specs(config),
      progress=progress,
    )
  return LanguageModel(model, config, checkpoint, block)


def _opened(path: str) -> tuple[Checkpoint, Config, tuple[Table, Table]]:
  if os.path.isdir(path):
    return _folder(path)
  if path.endswith('.safetensors'):
    raise ValueError(
      f'{path!r} has no configuration; name its folder, with config.json'
    )
  checkpoint = gguf.open(path)
  try:
    config = llama_config.from_gguf(checkpoint)
  except ConfigError as error:
    checkpoint.close()
    raise ConfigError(f'{path!r}: {error}') from error
  architecture = checkpoint.metadata['general.architecture']
  return checkpoint, config, llama_names.gguf(config, architecture)


def _folder(path: str) -> tuple[Checkpoint, Config, tuple[Table, Table]]:
  file = pathlib.Path(path, 'config.json')
  if not file.is_file():
    found = sorted(p.name for p in pathlib.Path(path).glob('*.gguf'))
    advice = f'name the file {found[0]!r} in it' if found else 'name another'
    raise FileNotFoundError(f'{path!r} has no config.json; {advice}')
  try:
    if file.stat().st_size > _JSON_BYTES:
      raise ConfigError(f'it has more than {_JSON_BYTES} bytes')
    node = json.loads(file.read_text('utf-8'))
    if not isinstance(node, dict):
      raise ConfigError('it is no JSON object')
    config = llama_config.from_huggingface(node)
  except ConfigError as error:
    raise ConfigError(f'{os.fspath(file)!r}: {error}') from error
  except (ValueError, RecursionError) as error:
    raise ConfigError(f'{os.fspath(file)!r} is no JSON: {error}') from error
  tables = llama_names.huggingface(config, node['model_type'])
  return safetensors.open(path), config, tables
