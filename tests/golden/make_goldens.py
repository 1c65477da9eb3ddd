"""Makes the golden vectors beside this file: what other programs compute.

  python tests/golden/make_goldens.py        # needs torch, torchao, ml_dtypes

The vectors committed here come from torch 2.13.0 (CPU), torchao 0.18.0 and
ml_dtypes 0.6.0. Inputs are not stored: `mx_blocks` and `nvfp4_tensors` rebuild
them bit for bit from integers of NumPy's frozen `RandomState` stream, without
any elementary function. What is stored:

mx_torchao.npz, for torchao's four scale rules and five element formats
(`to_mx`, eager, CPU), arrays named `<format>.<rule>.<what>`:
  scales    (4096,) uint8, E8M0 codes of all blocks
  codes     uint8, element codes of the first 256 blocks as a bit stream
            (element i in bits [i*b, (i+1)*b), low bit first)
  checksums (256,) uint32, CRC-32 of the 512 element codes (one byte each) of 16
            consecutive blocks, for all 4096 blocks

nvfp4_te.npz, for the two-level rule of TransformerEngine's reference, written
out in `transformer_engine_nvfp4` because the original needs CUDA, arrays named
`<tensor>.<what>`:
  tensor_scale () float32, scales (256,) uint8, codes (4096 / 2,) uint8 nibbles
"""

import pathlib
import zlib

import numpy as np

HERE = pathlib.Path(__file__).parent
MX_FORMATS = {
  'mxfp8_e4m3': 8,
  'mxfp8_e5m2': 8,
  'mxfp6_e2m3': 6,
  'mxfp6_e3m2': 6,
  'mxfp4': 4,
}
MX_RULES = ('floor', 'ceil', 'even', 'rceil')
LISTED_BLOCKS = 256
BLOCKS_PER_CHECKSUM = 16
F32 = np.float32


def bell(random: np.random.RandomState, shape: tuple[int, ...]) -> np.ndarray:
  """Whole numbers of at most 24 bits with a bell-shaped distribution."""
  return random.randint(0, 2**22, shape + (4,)).sum(axis=-1) - 2**23


def mx_blocks(seed: int = 20250801) -> np.ndarray:
  """(4096, 32) float32: amax over 140 octaves, then the edges of the rules.

  Blocks 0..: bell-shaped, block exponents in [-70, 70). Of every 16 blocks the
  last has a maximum of m * 2^k, of the float32 below it, or of that times
  1 + 2^-12, for m among 1 and the largest numbers of the formats; one block of
  64 is zero (of both signs). (One ulp above m * 2^k the CPU path of torchao's
  RCEIL is off by one, since log2 rounds the difference away.)
  """
  random = np.random.RandomState(seed)
  x = bell(random, (4096, 32)).astype(np.float64)
  exponent = random.randint(-70, 70, (4096, 1)) - 23
  x = np.ldexp(x, exponent).astype(F32)
  maxima = np.array([1, 448, 57344, 7.5, 28, 6, 1.75, 1.875], F32)
  for n, row in enumerate(range(15, 4096, 16)):
    k = random.randint(-60, 60)
    edge = F32(np.ldexp(maxima[n % 8], k))
    edges = (np.nextafter(edge, F32(0)), edge, edge * F32(1 + 2**-12))
    x[row] *= F32(np.ldexp(1.0, k - 24 - int(exponent[row, 0])))
    x[row, n % 32] = edges[n // 8 % 3] * (-1) ** n
  x[7::64] = np.where(np.arange(32) % 3 == 0, F32(-0.0), F32(0.0))
  return x


def nvfp4_tensors(seed: int = 20250802) -> dict[str, np.ndarray]:
  """Tensors of (256, 16) float32, a row being a block."""
  random = np.random.RandomState(seed)

  def tensor(low: int, high: int) -> np.ndarray:
    exponent = random.randint(low, high, (256, 1)) - 23
    return np.ldexp(bell(random, (256, 16)).astype(float), exponent).astype(F32)

  def bfloat16(low: int) -> np.ndarray:
    bits = tensor(low, 1).view(np.uint32)
    return (bits & np.uint32(0xFFFF0000)).view(F32)

  zeros = tensor(0, 1)
  zeros[::5] = 0.0
  return {
    'plain': tensor(0, 1),
    'small': tensor(-40, -39),
    'large': tensor(90, 91),
    'octaves14': tensor(-14, 1),
    'octaves30': tensor(-30, 1),
    'some_zero_blocks': zeros,
    'all_zero': np.zeros((256, 16), F32),
    # Short mantissas lie on ties, which tell one order of operations from
    # another: these are the tensors that are sensitive to the last bit.
    **{f'bfloat16_{i}': bfloat16(-(i % 4)) for i in range(12)},
  }


def bit_stream(codes: np.ndarray, bits: int) -> np.ndarray:
  """Little-endian bit stream of codes, in bytes."""
  each = codes.reshape(-1, 1) >> np.arange(bits, dtype=np.uint8) & 1
  return np.packbits(each.astype(np.uint8).ravel(), bitorder='little')


def checksums(codes: np.ndarray) -> np.ndarray:
  """CRC-32 of the codes of each run of `BLOCKS_PER_CHECKSUM` blocks."""
  rows = codes.astype(np.uint8).reshape(-1, BLOCKS_PER_CHECKSUM * 32)
  return np.array([zlib.crc32(row.tobytes()) for row in rows], np.uint32)


def torchao_mx(x: np.ndarray, name: str, rule: str):
  """Scale codes (blocks,) and element codes (blocks, 32) of torchao."""
  import torch
  from torchao.prototype.mx_formats import mx_tensor

  dtype = {
    'mxfp8_e4m3': torch.float8_e4m3fn,
    'mxfp8_e5m2': torch.float8_e5m2,
    'mxfp6_e2m3': mx_tensor.DTYPE_FP6_E2M3,
    'mxfp6_e3m2': mx_tensor.DTYPE_FP6_E3M2,
    'mxfp4': torch.float4_e2m1fn_x2,
  }[name]
  mode = mx_tensor.ScaleCalculationMode[rule.upper()]
  scales, codes = mx_tensor.to_mx(
    torch.from_numpy(np.ascontiguousarray(x)), dtype, 32, mode
  )
  codes = codes.view(torch.uint8)
  if name == 'mxfp4':
    codes = mx_tensor.unpack_uint4(codes)
  return (
    scales.view(torch.uint8).numpy().reshape(-1),
    codes.numpy().reshape(-1, 32),
  )


def transformer_engine_nvfp4(x: np.ndarray):
  """The NVFP4 rule of TransformerEngine's reference, float32 step by step.

  Args:
    x: (blocks, 16) float32, one tensor.

  Returns:
    Tensor scale (decode direction), E4M3 scale codes (blocks,), E2M1 codes
    (blocks, 16).
  """
  import ml_dtypes

  f32_max = np.finfo(F32).max
  fp4_max, fp8_max = F32(6), F32(448)
  amax = np.abs(x).max()
  if amax == 0:
    encode_scale = F32(1)
  else:
    encode_scale = np.minimum(fp8_max * fp4_max / amax, f32_max)
  tensor_scale = F32(1) / encode_scale
  block_amax = np.abs(x).max(axis=1)
  scale = block_amax * (encode_scale * (F32(1) / fp4_max))
  scale = np.minimum(scale, fp8_max).astype(ml_dtypes.float8_e4m3fn)
  with np.errstate(divide='ignore'):
    multiplier = F32(1) / (scale.astype(F32) * tensor_scale)
  multiplier = np.minimum(multiplier, f32_max)
  scaled = np.clip(x * multiplier[:, None], -fp4_max, fp4_max)
  codes = scaled.astype(ml_dtypes.float4_e2m1fn).view(np.uint8)
  return tensor_scale, scale.view(np.uint8), codes


def mx_goldens() -> dict[str, np.ndarray]:
  x = mx_blocks()
  out = {}
  for name, bits in MX_FORMATS.items():
    for rule in MX_RULES:
      scales, codes = torchao_mx(x, name, rule)
      key = f'{name}.{rule}'
      out[f'{key}.scales'] = scales
      out[f'{key}.codes'] = bit_stream(codes[:LISTED_BLOCKS], bits)
      out[f'{key}.checksums'] = checksums(codes)
  return out


def nvfp4_goldens() -> dict[str, np.ndarray]:
  out = {}
  for name, x in nvfp4_tensors().items():
    tensor_scale, scales, codes = transformer_engine_nvfp4(x)
    out[f'{name}.tensor_scale'] = tensor_scale
    out[f'{name}.scales'] = scales
    out[f'{name}.codes'] = bit_stream(codes, 4)
  return out


def main():
  np.savez_compressed(HERE / 'mx_torchao.npz', **mx_goldens())
  np.savez_compressed(HERE / 'nvfp4_te.npz', **nvfp4_goldens())


if __name__ == '__main__':
  main()
