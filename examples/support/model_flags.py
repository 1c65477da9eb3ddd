"""Flags of the byte-level model and its training, as several scripts have."""

from collections.abc import Callable

from absl import flags

from models import byte_lm

flags.disclaim_key_flags()  # --help of a script lists those that it defines.

_HELP = {
  'width': 'Model width.',
  'heads': 'Attention heads.',
  'blocks': 'Transformer blocks.',
  'context': 'Bytes per window.',
  'batch': 'Windows per step.',
  'steps': 'Training steps.',
  'learning_rate': 'Peak learning rate.',
  'seed': 'Seed of weights, data order and all else that is random.',
}
_LOWEST = {'steps': 1, 'seed': 0}


def define(*names: str) -> Callable[[], byte_lm.Config]:
  """Defines flags for some fields of a `byte_lm.Config`, by default for all.

  Returns:
    A function that makes the configuration once flags are parsed.
  """
  holders = {}
  for name in names or _HELP:
    default = getattr(byte_lm.Config(), name)
    kind = flags.DEFINE_float
    if isinstance(default, int):
      kind = flags.DEFINE_integer
    holders[name] = kind(
      name, default, _HELP[name], lower_bound=_LOWEST.get(name)
    )
  return lambda: byte_lm.Config(**{n: h.value for n, h in holders.items()})
