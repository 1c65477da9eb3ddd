"""Rounding, codes, packing and scales of arrays, and tools to check them."""

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
