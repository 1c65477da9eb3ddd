"""How blocks of the LLaMA family differ: by rotation, and by what they see."""

from collections.abc import Sequence

from models.keys import ConfigError, Keys

_EVERYTHING = 2**30  # a window that no context reaches
_SLIDING = 'sliding_attention'


def still(keys: Keys, blocks: int) -> tuple[int, ...]:
  """The blocks without rotation: of SmolLM3 each fourth, or as listed."""
  if 'no_rope_layers' not in keys:
    step = keys.integer('no_rope_layer_interval', 4)
    return tuple(range(step - 1, blocks, step))
  rotates = keys.list('no_rope_layers', (0, 1))
  if len(rotates) < blocks:
    raise keys.error('no_rope_layers', f'a list of at least {blocks}')
  return tuple(k for k in range(blocks) if not rotates[k])


def windows(
  keys: Keys, model_type: str, blocks: int, still: Sequence[int]
) -> tuple[int, ...]:
  """Positions that each block sees; none where all blocks see everything.

  Args:
    keys: of config.json.
    model_type: as in it.
    blocks: how many.
    still: those without rotation.
  """
  if model_type == 'llama':
    return ()
  size = _size(keys, model_type)
  slides = list(range(blocks))
  if model_type == 'smollm3':
    slides = list(still)
  elif model_type in ('qwen2', 'qwen3'):
    slides = slides[keys.integer('max_window_layers', 28, least=0) :]
  if 'layer_types' in keys:
    kinds = keys.list('layer_types', ('full_attention', _SLIDING))
    listed = [k for k, kind in enumerate(kinds) if kind == _SLIDING]
    if model_type in ('qwen2', 'qwen3', 'smollm3'):
      slides = listed
    if len(kinds) != blocks or listed != (slides if size else []):
      raise keys.error(
        'layer_types',
        f'one for each of {blocks} blocks, as sliding_window and'
        f' use_sliding_window of {model_type!r} say',
      )
  if size is None or not slides:
    return ()
  return tuple(size if k in slides else _EVERYTHING for k in range(blocks))


def _size(keys: Keys, model_type: str) -> int | None:
  switched = model_type in ('qwen2', 'qwen3', 'qwen3_moe', 'smollm3')
  if switched and not keys.flag('use_sliding_window', False):
    return None
  # Where it is left out, these have a window, which null takes from them.
  if model_type in ('mistral', 'qwen2', 'qwen3', 'qwen3_moe'):
    if not keys.has('sliding_window'):
      raise ConfigError('sliding_window is missing; null stands for none')
  return keys.integer('sliding_window', None)
