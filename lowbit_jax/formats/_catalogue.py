"""The formats that are there from the start.

Sources: OCP Microscaling Formats v1.0 (mx*), OCP 8-bit Floating Point (e4m3fn,
e5m2), the NVFP4 recipe of TransformerEngine, QLoRA appendix E (nf4), BitNet
b1.58 (ternary), DeepSeek-V3 (fp8_1x128, fp8_128x128).
"""

import dataclasses

from lowbit_jax.formats._registry import register
from lowbit_jax.formats._types import (
  BlockFormat,
  CodebookFormat,
  ElementFormat,
  FloatFormat,
  IntFormat,
  check_element,
  check_float,
  check_int,
)

float32 = FloatFormat('float32', 8, 23, 127, 'ieee')
bfloat16 = FloatFormat('bfloat16', 8, 7, 127, 'ieee')
float16 = FloatFormat('float16', 5, 10, 15, 'ieee')


def minifloat(
  exponent_bits: int, mantissa_bits: int, special: str
) -> FloatFormat:
  """The signed ExMy format with the usual bias 2^(E-1) - 1 (fnuz: one more).

  The plain name ExMy means 'ieee' at 8 bits, as in ml_dtypes, and 'none' below;
  other policies are suffixed.
  """
  check_int('exponent_bits', exponent_bits, 1, 11)
  check_int('mantissa_bits', mantissa_bits, 0, 52)
  plain = 'ieee' if exponent_bits + mantissa_bits == 7 else 'none'
  suffix = '' if special == plain else special
  bias = (1 << (exponent_bits - 1)) - 1 + (special == 'fnuz')
  name = f'e{exponent_bits}m{mantissa_bits}{suffix}'
  return FloatFormat(name, exponent_bits, mantissa_bits, bias, special)


def _has_a_positive_number(fmt: FloatFormat) -> bool:
  return fmt.code_max > 0


for _bits in range(3, 9):
  for _e in range(1, _bits):
    for _special in ('none', 'fn', 'ieee', 'fnuz'):
      _fmt = minifloat(_e, _bits - 1 - _e, _special)
      if _has_a_positive_number(_fmt):
        register(_fmt)

e2m1 = minifloat(2, 1, 'none')
e2m3 = minifloat(2, 3, 'none')
e3m2 = minifloat(3, 2, 'none')
e4m3 = minifloat(4, 3, 'ieee')
e4m3fn = minifloat(4, 3, 'fn')
e4m3fnuz = minifloat(4, 3, 'fnuz')
e5m2 = minifloat(5, 2, 'ieee')
e5m2fnuz = minifloat(5, 2, 'fnuz')
e4m3b11fnuz = register(FloatFormat('e4m3b11fnuz', 4, 3, 11, 'fnuz'))
e8m0 = register(FloatFormat('e8m0', 8, 0, 127, 'fn', signed=False, zero=False))
ue4m3 = register(FloatFormat('ue4m3', 4, 3, 7, 'fn', signed=False))
ue5m3 = register(FloatFormat('ue5m3', 5, 3, 15, 'ieee', signed=False))

int2, int3, int4, int5, int6, int7, int8 = (
  register(IntFormat(f'int{b}', b)) for b in range(2, 9)
)
uint2, uint3, uint4, uint5, uint6, uint7, uint8 = (
  register(IntFormat(f'uint{b}', b, signed=False)) for b in range(2, 9)
)
ternary = register(IntFormat('ternary', 2))
nf4 = register(
  CodebookFormat(
    'nf4',
    (
      -1.0,
      -0.6961928009986877,
      -0.5250730514526367,
      -0.39491748809814453,
      -0.28444138169288635,
      -0.18477343022823334,
      -0.09105003625154495,
      0.0,
      0.07958029955625534,
      0.16093020141124725,
      0.24611230194568634,
      0.33791524171829224,
      0.44070982933044434,
      0.5626170039176941,
      0.7229568362236023,
      1.0,
    ),
  )
)


def per_tensor(
  element: ElementFormat, *, scale_rule: str = 'absmax'
) -> BlockFormat:
  """`element` with one float32 scale for the whole tensor."""
  check_element(element)
  return BlockFormat(
    f'{element.name}_tensor', element, (1,), None, True, scale_rule=scale_rule
  )


def per_channel(
  element: ElementFormat,
  scale: FloatFormat = float32,
  *,
  scale_rule: str | None = None,
) -> BlockFormat:
  """`element` with one scale for each slice along the quantized axis."""
  check_element(element)
  check_float(scale, 'scale')
  name = f'{element.name}_channel' + _scale_suffix(scale)
  if scale_rule is None:
    scale_rule = _default_rule(scale)
  return BlockFormat(name, element, (0,), scale, scale_rule=scale_rule)


def grouped(
  element: ElementFormat,
  block: int,
  scale: FloatFormat = float32,
  *,
  minimum: bool = False,
) -> BlockFormat:
  """`element` with one scale for `block` elements along the quantized axis.

  An unsigned integer element also gets a zero point for each group, or in its
  place a minimum.
  """
  check_element(element)
  check_float(scale, 'scale')
  unsigned = isinstance(element, IntFormat) and not element.signed
  name = f'{element.name}_g{block}' + ('_min' if minimum else '')
  return BlockFormat(
    name + _scale_suffix(scale),
    element,
    (block,),
    scale,
    zero_point=unsigned and not minimum,
    scale_rule='minmax' if unsigned else _default_rule(scale),
    minimum=minimum,
  )


def bfp(precision: int, block: int) -> BlockFormat:
  """Block floating point BFP(p, g).

  The shared exponent is floor(log2 amax); mantissas are p-bit integers with
  sign, so the step is 2^(exponent - (p - 2)). `bfp(8, 32)` is mxint8.

  Args:
    precision: p, mantissa bits with sign, 2 to 8.
    block: g, elements that share an exponent.
  """
  check_int('precision', precision, 2, 8)
  element = IntFormat(
    f'int{precision}f{precision - 2}', precision, fraction_bits=precision - 2
  )
  return BlockFormat(
    f'bfp{precision}_g{block}', element, (block,), e8m0, scale_rule='floor'
  )


def _default_rule(scale: FloatFormat) -> str:
  return 'absmax' if scale.zero else 'floor'


def _scale_suffix(scale: FloatFormat) -> str:
  return '' if scale == float32 else f'_{scale.name}'


def _mx(name: str, element: ElementFormat, rule: str = 'floor') -> BlockFormat:
  register(
    BlockFormat(f'{name}_32x32', element, (32, 32), e8m0, scale_rule=rule)
  )
  return register(BlockFormat(name, element, (32,), e8m0, scale_rule=rule))


def _nv(name: str, element: ElementFormat, block: tuple[int, ...]):
  return register(BlockFormat(name, element, block, e4m3fn, True))


mxfp8_e4m3 = _mx('mxfp8_e4m3', e4m3fn)
mxfp8_e5m2 = _mx('mxfp8_e5m2', e5m2)
mxfp6_e2m3 = _mx('mxfp6_e2m3', e2m3)
mxfp6_e3m2 = _mx('mxfp6_e3m2', e3m2)
mxfp4 = _mx('mxfp4', e2m1)
mxint8 = _mx('mxint8', bfp(8, 32).element)
mxint4 = _mx('mxint4', bfp(4, 32).element, 'rceil')

nvfp4 = _nv('nvfp4', e2m1, (16,))
nvfp4_16x16 = _nv('nvfp4_16x16', e2m1, (16, 16))
nvint4 = _nv('nvint4', int4, (16,))
# The 8 numbers with the least squared error for a normal distribution (Lloyd
# and Max) in float32, the largest of them 1: for weights that were rotated.
lloyd3 = register(
  CodebookFormat(
    'lloyd3',
    (
      -1.0,
      -0.6245089173316956,
      -0.35131242871284485,
      -0.11389422416687012,
      0.11389422416687012,
      0.35131242871284485,
      0.6245089173316956,
      1.0,
    ),
  )
)
nvlloyd3 = _nv('nvlloyd3', lloyd3, (16,))

nf4_g64 = register(grouped(nf4, 64))
fp8_1x128 = register(BlockFormat('fp8_1x128', e4m3fn, (128,), float32))
fp8_128x128 = register(BlockFormat('fp8_128x128', e4m3fn, (128, 128), float32))

for _element in (e4m3fn, e5m2, int2, int3, int4, int5, int6, int7, int8):
  register(per_tensor(_element))
  register(per_channel(_element))
for _block in (32, 64, 128):
  for _element in (int2, int3, int4, int5, int6, int7, int8):
    register(grouped(_element, _block))
  for _element in (uint2, uint3, uint4, uint5, uint6, uint7, uint8):
    register(grouped(_element, _block))
ternary_tensor = register(per_tensor(ternary, scale_rule='absmean'))
ternary_channel = register(per_channel(ternary, scale_rule='absmean'))
for _precision in range(2, 9):
  for _block in (16, 32, 64, 128):
    register(bfp(_precision, _block))

# The blocks of GGUF files, where other names do not say the same: Q4_0 is
# int4_g32_float16, Q4_1 uint4_g32_min_float16.
for _element in (int4, int5, int8):
  register(grouped(_element, 32, float16))
for _element in (uint4, uint5):
  register(grouped(_element, 32, float16, minimum=True))
iq4nl = register(
  CodebookFormat(
    'iq4nl',
    tuple(
      map(
        float,
        (-127, -104, -83, -65, -49, -35, -22, -10)
        + (1, 13, 25, 38, 53, 69, 89, 113),
      )
    ),
  )
)
iq4_nl = register(
  BlockFormat('iq4_nl', iq4nl, (32,), float16, scale_rule='least_squares')
)
sign = register(CodebookFormat('sign', (-1.0, 1.0)))
quaternary = register(CodebookFormat('quaternary', (-1.0, 0.0, 1.0, 2.0)))
for _element, _block in ((sign, 128), (ternary, 256)):
  register(
    dataclasses.replace(
      grouped(_element, _block, float16), scale_rule='absmean'
    )
  )
register(grouped(quaternary, 64, float16))


def _k_quant(
  name: str, element: ElementFormat, block: int, scale: IntFormat
) -> BlockFormat:
  """256 elements with a float16 scale, and in it blocks with integer ones."""
  minimum = isinstance(element, IntFormat) and not element.signed
  scales = BlockFormat(
    f'{scale.name}_g{256 // block}_float16', scale, (256 // block,), float16
  )
  return register(
    BlockFormat(
      name,
      element,
      (block,),
      float32,
      scale_rule='least_squares',
      minimum=minimum,
      scale_blocks=scales,
    )
  )


q2_k = _k_quant('q2_k', uint2, 16, uint4)
q3_k = _k_quant('q3_k', int3, 16, int6)
q4_k = _k_quant('q4_k', uint4, 32, uint6)
q5_k = _k_quant('q5_k', uint5, 32, uint6)
q6_k = _k_quant('q6_k', int6, 16, int8)
iq4_xs = _k_quant('iq4_xs', iq4nl, 32, int6)

e4m3fn_tensor = per_tensor(e4m3fn)
e4m3fn_channel = per_channel(e4m3fn)
e5m2_tensor = per_tensor(e5m2)
e5m2_channel = per_channel(e5m2)
int8_tensor = per_tensor(int8)
int8_channel = per_channel(int8)
int4_channel = per_channel(int4)
int4_g32, int4_g64, int4_g128 = (grouped(int4, b) for b in (32, 64, 128))
uint4_g32, uint4_g64, uint4_g128 = (grouped(uint4, b) for b in (32, 64, 128))
