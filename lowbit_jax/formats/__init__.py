"""Number formats as values: elements, blocks, and their names."""

from lowbit_jax.formats._catalogue import (
  bfloat16 as bfloat16,
)
from lowbit_jax.formats._catalogue import (
  bfp as bfp,
)
from lowbit_jax.formats._catalogue import (
  e2m1 as e2m1,
)
from lowbit_jax.formats._catalogue import (
  e2m3 as e2m3,
)
from lowbit_jax.formats._catalogue import (
  e3m2 as e3m2,
)
from lowbit_jax.formats._catalogue import (
  e4m3 as e4m3,
)
from lowbit_jax.formats._catalogue import (
  e4m3b11fnuz as e4m3b11fnuz,
)
from lowbit_jax.formats._catalogue import (
  e4m3fn as e4m3fn,
)
from lowbit_jax.formats._catalogue import (
  e4m3fn_channel as e4m3fn_channel,
)
from lowbit_jax.formats._catalogue import (
  e4m3fn_tensor as e4m3fn_tensor,
)
from lowbit_jax.formats._catalogue import (
  e4m3fnuz as e4m3fnuz,
)
from lowbit_jax.formats._catalogue import (
  e5m2 as e5m2,
)
from lowbit_jax.formats._catalogue import (
  e5m2_channel as e5m2_channel,
)
from lowbit_jax.formats._catalogue import (
  e5m2_tensor as e5m2_tensor,
)
from lowbit_jax.formats._catalogue import (
  e5m2fnuz as e5m2fnuz,
)
from lowbit_jax.formats._catalogue import (
  e8m0 as e8m0,
)
from lowbit_jax.formats._catalogue import (
  float32 as float32,
)
from lowbit_jax.formats._catalogue import (
  fp8_1x128 as fp8_1x128,
)
from lowbit_jax.formats._catalogue import (
  fp8_128x128 as fp8_128x128,
)
from lowbit_jax.formats._catalogue import (
  grouped as grouped,
)
from lowbit_jax.formats._catalogue import (
  int2 as int2,
)
from lowbit_jax.formats._catalogue import (
  int3 as int3,
)
from lowbit_jax.formats._catalogue import (
  int4 as int4,
)
from lowbit_jax.formats._catalogue import (
  int4_channel as int4_channel,
)
from lowbit_jax.formats._catalogue import (
  int4_g32 as int4_g32,
)
from lowbit_jax.formats._catalogue import (
  int4_g64 as int4_g64,
)
from lowbit_jax.formats._catalogue import (
  int4_g128 as int4_g128,
)
from lowbit_jax.formats._catalogue import (
  int5 as int5,
)
from lowbit_jax.formats._catalogue import (
  int6 as int6,
)
from lowbit_jax.formats._catalogue import (
  int7 as int7,
)
from lowbit_jax.formats._catalogue import (
  int8 as int8,
)
from lowbit_jax.formats._catalogue import (
  int8_channel as int8_channel,
)
from lowbit_jax.formats._catalogue import (
  int8_tensor as int8_tensor,
)
from lowbit_jax.formats._catalogue import (
  minifloat as minifloat,
)
from lowbit_jax.formats._catalogue import (
  mxfp4 as mxfp4,
)
from lowbit_jax.formats._catalogue import (
  mxfp6_e2m3 as mxfp6_e2m3,
)
from lowbit_jax.formats._catalogue import (
  mxfp6_e3m2 as mxfp6_e3m2,
)
from lowbit_jax.formats._catalogue import (
  mxfp8_e4m3 as mxfp8_e4m3,
)
from lowbit_jax.formats._catalogue import (
  mxfp8_e5m2 as mxfp8_e5m2,
)
from lowbit_jax.formats._catalogue import (
  mxint4 as mxint4,
)
from lowbit_jax.formats._catalogue import (
  mxint8 as mxint8,
)
from lowbit_jax.formats._catalogue import (
  nf4 as nf4,
)
from lowbit_jax.formats._catalogue import (
  nf4_g64 as nf4_g64,
)
from lowbit_jax.formats._catalogue import (
  nvfp4 as nvfp4,
)
from lowbit_jax.formats._catalogue import (
  nvfp4_16x16 as nvfp4_16x16,
)
from lowbit_jax.formats._catalogue import (
  nvint4 as nvint4,
)
from lowbit_jax.formats._catalogue import (
  per_channel as per_channel,
)
from lowbit_jax.formats._catalogue import (
  per_tensor as per_tensor,
)
from lowbit_jax.formats._catalogue import (
  ternary as ternary,
)
from lowbit_jax.formats._catalogue import (
  ternary_channel as ternary_channel,
)
from lowbit_jax.formats._catalogue import (
  ternary_tensor as ternary_tensor,
)
from lowbit_jax.formats._catalogue import (
  ue4m3 as ue4m3,
)
from lowbit_jax.formats._catalogue import (
  ue5m3 as ue5m3,
)
from lowbit_jax.formats._catalogue import (
  uint2 as uint2,
)
from lowbit_jax.formats._catalogue import (
  uint3 as uint3,
)
from lowbit_jax.formats._catalogue import (
  uint4 as uint4,
)
from lowbit_jax.formats._catalogue import (
  uint4_g32 as uint4_g32,
)
from lowbit_jax.formats._catalogue import (
  uint4_g64 as uint4_g64,
)
from lowbit_jax.formats._catalogue import (
  uint4_g128 as uint4_g128,
)
from lowbit_jax.formats._catalogue import (
  uint5 as uint5,
)
from lowbit_jax.formats._catalogue import (
  uint6 as uint6,
)
from lowbit_jax.formats._catalogue import (
  uint7 as uint7,
)
from lowbit_jax.formats._catalogue import (
  uint8 as uint8,
)
from lowbit_jax.formats._registry import from_dict as from_dict
from lowbit_jax.formats._registry import get as get
from lowbit_jax.formats._registry import names as names
from lowbit_jax.formats._registry import register as register
from lowbit_jax.formats._registry import to_dict as to_dict
from lowbit_jax.formats._types import (
  BlockFormat as BlockFormat,
)
from lowbit_jax.formats._types import (
  CodebookFormat as CodebookFormat,
)
from lowbit_jax.formats._types import (
  ElementFormat as ElementFormat,
)
from lowbit_jax.formats._types import (
  FloatFormat as FloatFormat,
)
from lowbit_jax.formats._types import (
  Format as Format,
)
from lowbit_jax.formats._types import (
  IntFormat as IntFormat,
)
