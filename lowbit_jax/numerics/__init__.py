"""Rounding, codes, packing and scales of arrays, and tools to check them."""

from lowbit_jax.numerics._codec import decode as decode
from lowbit_jax.numerics._codec import encode as encode
from lowbit_jax.numerics._codec import round_to as round_to
from lowbit_jax.numerics._packing import codes_per_group as codes_per_group
from lowbit_jax.numerics._packing import pack as pack
from lowbit_jax.numerics._packing import packed_size as packed_size
from lowbit_jax.numerics._packing import unpack as unpack
from lowbit_jax.numerics._packing import unpacked_size as unpacked_size
from lowbit_jax.numerics._rounding import ROUNDINGS as ROUNDINGS
from lowbit_jax.numerics._rounding import dither as dither
from lowbit_jax.numerics._rounding import random_words as random_words
from lowbit_jax.numerics._scaling import scale_rules as scale_rules
from lowbit_jax.numerics._ulp import all_float32 as all_float32
from lowbit_jax.numerics._ulp import next_float as next_float
from lowbit_jax.numerics._ulp import ulp_distance as ulp_distance
