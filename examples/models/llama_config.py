"""What decides the shapes and the function of a model of the LLaMA family."""

import dataclasses

from models import rotary


class ConfigError(ValueError):
  """A configuration that makes no model; the message says which value."""


@dataclasses.dataclass(frozen=True)
class Config:
  """What decides the shapes and the function of a model.

  Attributes:
    vocabulary: tokens.
    width: of the residual stream.
    hidden: width between `up` and `down`, of each expert.
    blocks: how many.
    heads: of queries.
    kv_heads: of keys and values; each serves heads / kv_heads queries.
    head_size: channels of a head.
    context: positions that the model was made for.
    rope: rotation of queries and keys.
    epsilon: of the norms.
    tied: whether the embedding is the head too.
    biases: linear layers of a block with a bias, of 'query', 'key', 'value',
      'out', 'gate', 'up' and 'down'.
    head_norms: whether heads of queries and keys are normalized.
    still: blocks that rotate nothing.
    windows: positions back that each block sees, its own included; none for
      all.
    experts: how many, 0 for a plain MLP.
    chosen: experts of a token.
    normalized: whether the weights of the chosen experts add up to 1.
  """

  vocabulary: int
  width: int
  hidden: int
  blocks: int
  heads: int
  kv_heads: int
  head_size: int
  context: int
  rope: rotary.Rope
  epsilon: float = 1e-5
  tied: bool = False
  biases: tuple[str, ...] = ()
  head_norms: bool = False
  still: tuple[int, ...] = ()
  windows: tuple[int, ...] = ()
  experts: int = 0
  chosen: int = 0
  normalized: bool = True

  def __post_init__(self) -> None:
    for name in ('vocabulary', 'width', 'hidden', 'blocks', 'heads'):
      if getattr(self, name) < 1:
        raise ConfigError(f'{name}={getattr(self, name)} must be at least 1')
    if self.kv_heads < 1 or self.heads % self.kv_heads:
      raise ConfigError(
        f'kv_heads={self.kv_heads} must divide heads={self.heads}'
      )
    if self.windows and len(self.windows) != self.blocks:
      raise ConfigError(f'{len(self.windows)} windows for blocks={self.blocks}')
    if not 0 <= self.chosen <= self.experts or bool(self.experts) != bool(
      self.chosen
    ):
      raise ConfigError(
        f'chosen={self.chosen} must be from 1 to experts={self.experts}'
      )
