"""Number formats as values: elements, blocks, and their names.

Element formats are `bfloat16`, `e2m1`, `e2m3`, `e3m2`, `e4m3`, `e4m3b11fnuz`,
`e4m3fn`, `e4m3fnuz`, `e5m2`, `e5m2fnuz`, `e8m0`, `float16`, `float32`, `int2`,
`int3`, `int4`, `int5`, `int6`, `int7`, `int8`, `iq4nl`, `lloyd3`, `nf4`,
`quaternary`, `sign`, `ternary`, `ue4m3`, `ue5m3`, `uint2`, `uint3`, `uint4`,
`uint5`, `uint6`, `uint7` and `uint8`.

Block formats are `e4m3fn_channel`, `e4m3fn_tensor`, `e5m2_channel`,
`e5m2_tensor`, `fp8_128x128`, `fp8_1x128`, `int4_channel`, `int4_g128`,
`int4_g32`, `int4_g64`, `int8_channel`, `int8_tensor`, `iq4_nl`, `iq4_xs`,
`mxfp4`, `mxfp6_e2m3`, `mxfp6_e3m2`, `mxfp8_e4m3`, `mxfp8_e5m2`, `mxint4`,
`mxint8`, `nf4_g64`, `nvfp4`, `nvfp4_16x16`, `nvint4`, `nvlloyd3`, `q2_k`,
`q3_k`, `q4_k`, `q5_k`, `q6_k`, `ternary_channel`, `ternary_tensor`,
`uint4_g128`, `uint4_g32` and `uint4_g64`; `get` finds more by name. `Format`
is the type of both.

- `BlockFormat`: Elements in blocks that share a scale: x ~ element * scale *
  tensor_scale.
- `CodebookFormat`: A fixed table of numbers in ascending order; the code is the
  index.
- `ElementFormat`: A set of at most 2**bits numbers, each with an unsigned
  integer code.
- `FloatFormat`: A binary minifloat: sign, exponent field e, mantissa field m.
- `IntFormat`: Integers with an implied step of 2**-fraction_bits.
- `bfp`: Block floating point BFP(p, g).
- `from_dict`: The inverse of `to_dict`; needs no registry.
- `get`: The format of that name.
- `grouped`: `element` with one scale for `block` elements along the quantized
  axis.
- `minifloat`: The signed ExMy format with the usual bias 2^(E-1) - 1 (fnuz: one
  more).
- `names`: All registered names, in the order of registration.
- `per_channel`: `element` with one scale for each slice along the quantized
  axis.
- `per_tensor`: `element` with one float32 scale for the whole tensor.
- `register`: Adds a format under its name and returns it.
- `to_dict`: A JSON-ready description from which `from_dict` rebuilds the
  format.
"""

from lowbit_jax.formats._catalogue import (
  bfloat16 as bfloat16,
  bfp as bfp,
  e2m1 as e2m1,
  e2m3 as e2m3,
  e3m2 as e3m2,
  e4m3 as e4m3,
  e4m3b11fnuz as e4m3b11fnuz,
  e4m3fn as e4m3fn,
  e4m3fn_channel as e4m3fn_channel,
  e4m3fn_tensor as e4m3fn_tensor,
  e4m3fnuz as e4m3fnuz,
  e5m2 as e5m2,
  e5m2_channel as e5m2_channel,
  e5m2_tensor as e5m2_tensor,
  e5m2fnuz as e5m2fnuz,
  e8m0 as e8m0,
  float16 as float16,
  float32 as float32,
  fp8_1x128 as fp8_1x128,
  fp8_128x128 as fp8_128x128,
  grouped as grouped,
  int2 as int2,
  int3 as int3,
  int4 as int4,
  int4_channel as int4_channel,
  int4_g32 as int4_g32,
  int4_g64 as int4_g64,
  int4_g128 as int4_g128,
  int5 as int5,
  int6 as int6,
  int7 as int7,
  int8 as int8,
  int8_channel as int8_channel,
  int8_tensor as int8_tensor,
  iq4_nl as iq4_nl,
  iq4_xs as iq4_xs,
  iq4nl as iq4nl,
  lloyd3 as lloyd3,
  minifloat as minifloat,
  mxfp4 as mxfp4,
  mxfp6_e2m3 as mxfp6_e2m3,
  mxfp6_e3m2 as mxfp6_e3m2,
  mxfp8_e4m3 as mxfp8_e4m3,
  mxfp8_e5m2 as mxfp8_e5m2,
  mxint4 as mxint4,
  mxint8 as mxint8,
  nf4 as nf4,
  nf4_g64 as nf4_g64,
  nvfp4 as nvfp4,
  nvfp4_16x16 as nvfp4_16x16,
  nvint4 as nvint4,
  nvlloyd3 as nvlloyd3,
  per_channel as per_channel,
  per_tensor as per_tensor,
  q2_k as q2_k,
  q3_k as q3_k,
  q4_k as q4_k,
  q5_k as q5_k,
  q6_k as q6_k,
  quaternary as quaternary,
  sign as sign,
  ternary as ternary,
  ternary_channel as ternary_channel,
  ternary_tensor as ternary_tensor,
  ue4m3 as ue4m3,
  ue5m3 as ue5m3,
  uint2 as uint2,
  uint3 as uint3,
  uint4 as uint4,
  uint4_g32 as uint4_g32,
  uint4_g64 as uint4_g64,
  uint4_g128 as uint4_g128,
  uint5 as uint5,
  uint6 as uint6,
  uint7 as uint7,
  uint8 as uint8,
)
from lowbit_jax.formats._registry import (
  from_dict as from_dict,
  get as get,
  names as names,
  register as register,
  to_dict as to_dict,
)
from lowbit_jax.formats._types import (
  BlockFormat as BlockFormat,
  CodebookFormat as CodebookFormat,
  ElementFormat as ElementFormat,
  FloatFormat as FloatFormat,
  Format as Format,
  IntFormat as IntFormat,
)
