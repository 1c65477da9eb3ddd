"""Matrix products of real models, by name, for tests and benchmarks alike."""

from typing import NamedTuple


class MatmulShape(NamedTuple):
  """(m, k) times (k, n).

  Attributes:
    name: model, layer and phase.
    m: rows of the activation: tokens.
    k: contracted size.
    n: columns of the weight.
  """

  name: str
  m: int
  k: int
  n: int

  @property
  def flops(self) -> int:
    """Multiplications and additions."""
    return 2 * self.m * self.k * self.n


# What a kernel gets wrong first: sizes that tiles do not divide, one of
# anything, nothing at all. Each runs in milliseconds.
SMALL_SHAPES = (
  MatmulShape('one_block', 4, 32, 8),
  MatmulShape('two_blocks', 3, 256, 16),
  MatmulShape('vector', 1, 128, 64),
  MatmulShape('one_column', 5, 64, 1),
  MatmulShape('one_element', 1, 1, 1),
  MatmulShape('ragged_rows', 7, 64, 24),
  MatmulShape('ragged_contraction', 6, 100, 12),
  MatmulShape('ragged_everything', 13, 77, 19),
  MatmulShape('below_one_block', 2, 5, 3),
  MatmulShape('no_rows', 0, 64, 8),
  MatmulShape('no_columns', 4, 64, 0),
  MatmulShape('no_contraction', 3, 0, 4),
  MatmulShape('smollm_135m_kv', 2, 576, 192),
)

# One layer of a model; decode has one token per sequence, prefill many. Sizes
# from the configurations of the released checkpoints. 576, 2880 and 4544 are
# multiples of 32 but not of 128.
LARGE_SHAPES = (
  MatmulShape('smollm_135m_up_decode', 1, 576, 1536),
  MatmulShape('bert_base_up', 128, 768, 3072),
  MatmulShape('vit_large_up', 197, 1024, 4096),
  MatmulShape('gemma2_2b_up_decode', 1, 2304, 9216),
  MatmulShape('gpt_oss_20b_qkv_decode', 1, 2880, 5120),
  MatmulShape('qwen25_7b_down_decode', 1, 18944, 3584),
  MatmulShape('falcon_7b_out_decode', 1, 4544, 4544),
  MatmulShape('llama3_8b_qkv_decode', 1, 4096, 6144),
  MatmulShape('llama3_8b_out_decode', 1, 4096, 4096),
  MatmulShape('llama3_8b_out_batch16', 16, 4096, 4096),
  MatmulShape('llama3_8b_out_prefill', 256, 4096, 4096),
  MatmulShape('llama3_8b_gate_up_decode', 1, 4096, 28672),
  MatmulShape('llama3_8b_down_decode', 1, 14336, 4096),
  MatmulShape('llama3_8b_down_prefill', 256, 14336, 4096),
  MatmulShape('llama3_70b_down_decode', 1, 28672, 8192),
  MatmulShape('deepseek_v3_expert_up', 64, 7168, 2048),
)

SHAPES = {shape.name: shape for shape in (*SMALL_SHAPES, *LARGE_SHAPES)}


def dot_cases(
  *, large: bool = False, max_elements: int | None = None
) -> tuple[MatmulShape, ...]:
  """Shapes to test or time.

  Args:
    large: the real models instead of the small cases.
    max_elements: only those whose weight has at most that many elements.

  Examples:
    >>> [s.name for s in dot_cases(large=True, max_elements=1 << 20)]
    ['smollm_135m_up_decode']
  """
  shapes = LARGE_SHAPES if large else SMALL_SHAPES
  if max_elements is None:
    return shapes
  return tuple(s for s in shapes if s.k * s.n <= max_elements)
