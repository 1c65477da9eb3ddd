"""The rotation that a configuration describes."""

import dataclasses
import math

import numpy as np

from lowbit_jax.io._checkpoint import Checkpoint
from models.keys import ConfigError, Keys
from models.rotary import Rope

_ORIGINAL = 'original_max_position_embeddings'
_ALWAYS = (
  _ORIGINAL,
  'finetuned',
  'partial_rotary_factor',
  'rope_theta',
  'rope_type',
  'type',
)
_SHORT_AND_LONG = 'rope_factors_short.weight', 'rope_factors_long.weight'
_ONE = 'rope_freqs.weight'


def from_huggingface(
  keys: Keys, model_type: str, head_size: int, context: int
) -> Rope:
  """Of config.json: rope_theta and rope_scaling, or rope_parameters.

  Source: `modeling_rope_utils` of transformers 5.24.
  """
  old = 'rope_scaling' in keys
  section = keys.section('rope_scaling' if old else 'rope_parameters')
  name = 'rope_type' if 'rope_type' in section else 'type'
  if model_type == 'phi3':
    kinds = ('default', 'longrope', 'su')
  else:
    kinds = ('default', 'linear', 'llama3', 'yarn', 'longrope')
  kind = section.choice(name, kinds, 'default')
  holder = section if 'partial_rotary_factor' in section else keys
  share = holder.number('partial_rotary_factor', 1.0)
  if model_type != 'phi3' and share != 1:
    raise holder.error('partial_rotary_factor', f'1 for {model_type!r}')
  base = section if 'rope_theta' in section else keys
  # Files of before July 2023 do not name it.
  default = {'default': 1e4} if model_type == 'llama' else {}
  rope = Rope(base.number('rope_theta', **default), int(head_size * share))
  original = _original(keys, section)
  rope = _KINDS[kind](rope, section, original, context)
  section.check_all_read(_ALWAYS)
  return rope


def _original(keys: Keys, section: Keys) -> int | None:
  """The context in training; it stands in one of two places."""
  values = {
    holder.integer(_ORIGINAL)
    for holder in (keys, section)
    if _ORIGINAL in holder
  }
  if len(values) > 1:
    raise keys.error(_ORIGINAL, 'the same in the whole file')
  return values.pop() if values else None


def _default(rope, section, original, context):
  return rope


def _linear(rope, section, original, context):
  factor = section.number('factor')
  return dataclasses.replace(rope, kind='linear', factor=factor)


def _llama3(rope, section, original, context):
  return dataclasses.replace(
    rope,
    kind='llama3',
    factor=section.number('factor'),
    original=original or section.integer(_ORIGINAL),
    low=section.number('low_freq_factor'),
    high=section.number('high_freq_factor'),
  )


def _yarn(rope, section, original, context):
  section.choice('truncate', (True,), True)
  original = original or context
  factor = section.number('factor', context / original)
  if 'mscale' in section and 'mscale_all_dim' in section:
    scales = section.number('mscale'), section.number('mscale_all_dim')
  else:
    scales = 1.0, 0.0
  gains = [1 + 0.1 * scale * math.log(max(factor, 1)) for scale in scales]
  return dataclasses.replace(
    rope,
    kind='yarn',
    factor=factor,
    original=original,
    low=section.number('beta_slow', 1.0),
    high=section.number('beta_fast', 32.0),
    gain=section.number('attention_factor', gains[0] / gains[1]),
  )


def _longrope(rope, section, original, context):
  original = original or section.integer(_ORIGINAL)
  factor = section.number('factor', context / original)
  gain = math.sqrt(1 + math.log(max(factor, 1)) / math.log(max(original, 2)))
  return dataclasses.replace(
    rope,
    kind='long',
    original=original,
    gain=section.number('attention_factor', gain),
    short=section.numbers('short_factor', rope.channels // 2),
    long=section.numbers('long_factor', rope.channels // 2),
  )


_KINDS = {
  'default': _default,
  'linear': _linear,
  'llama3': _llama3,
  'yarn': _yarn,
  'longrope': _longrope,
  'su': _longrope,  # its name in the first files
}


def from_gguf(
  keys: Keys, checkpoint: Checkpoint, head_size: int, context: int
) -> Rope:
  """Of the metadata and of tensors with a factor for each pair of channels.

  Source: llama.cpp, `conversion/base.py`, `conversion/phi.py` and
  `llama_context`. That program leaves out `yarn_attn_factor` and the betas,
  which its converter copies from config.json; here they count.
  """
  channels = keys.integer('rope.dimension_count', head_size)
  rope = Rope(keys.number('rope.freq_base', 1e4), channels)
  old = keys.number('rope.scale_linear', 1.0)
  factor = keys.number('rope.scaling.factor', old)
  kinds = ('none', 'linear', 'yarn', 'longrope')
  kind = keys.choice('rope.scaling.type', kinds, 'linear')
  original = keys.integer('rope.scaling.original_context_length', context)
  gain = keys.number('rope.scaling.attn_factor', 1.0)
  rope = dataclasses.replace(rope, original=original, gain=gain)
  for short, long in (_SHORT_AND_LONG, (_ONE, _ONE)):
    if long in checkpoint:
      if kind == 'yarn' or factor != 1:
        raise keys.error('rope.scaling.factor', f'1 beside {long!r}')
      return dataclasses.replace(
        rope,
        kind='long',
        short=_factors(checkpoint, short, channels),
        long=_factors(checkpoint, long, channels),
      )
  if kind == 'longrope':
    raise ConfigError(f'{_SHORT_AND_LONG[1]!r} is missing for {kind!r}')
  if kind == 'yarn':
    keys.choice('rope.scaling.yarn_ext_factor', (1,), 1)
    default = 1 + 0.1 * math.log(max(factor, 1))
    return dataclasses.replace(
      rope,
      kind='yarn',
      factor=factor,
      low=keys.number('rope.scaling.yarn_beta_slow', 1.0),
      high=keys.number('rope.scaling.yarn_beta_fast', 32.0),
      gain=gain * keys.number('rope.scaling.yarn_attn_factor', default),
    )
  if kind == 'linear' and factor != 1:
    return dataclasses.replace(rope, kind='linear', factor=factor)
  return rope


def _factors(
  checkpoint: Checkpoint, name: str, channels: int
) -> tuple[float, ...]:
  if name not in checkpoint:
    raise ConfigError(f'{name!r} is missing')
  factors = np.asarray(checkpoint[name], np.float64)
  if factors.shape != (channels // 2,) or not (factors > 0).all():
    raise ConfigError(
      f'{name} has the shape {factors.shape}; what is read is a factor above 0'
      f' for each of {channels // 2} pairs of channels'
    )
  return tuple(factors.tolist())
