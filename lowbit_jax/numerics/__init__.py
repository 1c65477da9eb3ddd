"""Rounding, codes, packing and scales of arrays, and tools to check them.

`ROUNDINGS` names the ways to round.

- `all_float32`: The float32 numbers with bit patterns start, start + 1, ...,
  stop - 1.
- `codes_per_group`: Codes in the smallest run that fills whole bytes.
- `decode`: Values of element codes.
- `dither`: Uniform offsets in [-1/2, 1/2), known to whoever holds the key.
- `encode`: Element codes of `x`, without any scale.
- `next_float`: The neighbour of `x` in the direction of `toward`, in the dtype
  of `x`.
- `pack`: Packs codes of `bits` bits into bytes along `axis`, little end first.
- `packed_size`: Bytes that `n` codes occupy; `n` is a multiple of
  `codes_per_group`.
- `random_words`: 32 random bits for each element, a hash of key and row-major
  index.
- `round_to`: The nearest number of the format, as a value.
- `scale_rules`: The names of the rules that make sense for a block format.
- `ulp_distance`: How many representable numbers lie between `a` and `b`.
- `unpack`: The inverse of `pack`: uint8 codes.
- `unpacked_size`: Codes in `n` bytes.
- `oracle`: The numerics one number at a time, in plain Python: what the arrays
  must do.
"""

from lowbit_jax.numerics._codec import (
  decode as decode,
  encode as encode,
  round_to as round_to,
)
from lowbit_jax.numerics._packing import (
  codes_per_group as codes_per_group,
  pack as pack,
  packed_size as packed_size,
  unpack as unpack,
  unpacked_size as unpacked_size,
)
from lowbit_jax.numerics._rounding import (
  ROUNDINGS as ROUNDINGS,
  dither as dither,
  random_words as random_words,
)
from lowbit_jax.numerics._scaling import scale_rules as scale_rules
from lowbit_jax.numerics._ulp import (
  all_float32 as all_float32,
  next_float as next_float,
  ulp_distance as ulp_distance,
)
