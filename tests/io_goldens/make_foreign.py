"""Makes foreign.npz and foreign.json of random numbers.

Needs torch, bitsandbytes 0.50.2, transformers 5.24 and nvidia-modelopt 0.47. A
case has the tensors of one weight as they are saved, and `y`, how the package
itself decodes them.
"""

import copy
import json
import pathlib

import bitsandbytes.functional
import modelopt.torch.quantization as modelopt
import numpy as np
import torch
from modelopt.torch.export import unified_export_hf
from modelopt.torch.quantization.qtensor.mxfp8_tensor import MXFP8QTensor
from transformers.integrations import finegrained_fp8

FOLDER = pathlib.Path(__file__).parent
arrays, meta = {}, {}


def store(case, **tensors):
  """Keeps a case; NumPy lacks some dtypes, which are stored as bytes."""
  dtypes = {}
  for name, x in tensors.items():
    x = x.detach().contiguous()
    dtype = str(x.dtype).removeprefix('torch.')
    is_known = hasattr(np, dtype)
    array = x.numpy() if is_known else x.view(torch.uint8).numpy()
    arrays[f'{case}/{name}'] = array
    if name != 'y':
      dtypes[name] = dtype
  meta[case] = {'dtypes': dtypes}


def four_bits(case, shape, block, kind, dtype, nested=False):
  """A weight of bitsandbytes in which every code occurs."""
  random = torch.Generator().manual_seed(len(meta))
  x = torch.randn(shape, generator=random).to(dtype)
  weight, state = bitsandbytes.functional.quantize_4bit(
    x, blocksize=block, compress_statistics=nested, quant_type=kind
  )
  weight = torch.randint(256, weight.shape, dtype=torch.uint8, generator=random)
  y = bitsandbytes.functional.dequantize_4bit(weight, state)
  parts = state.as_dict(packed=True)
  parts = {f'weight.{name}': part for name, part in parts.items()}
  store(case, weight=weight, y=y.float(), **parts)


def fp8(case, shape, counts, *, is_packed=False):
  """An FP8 weight, or one of FP4 experts, with powers of two as scales."""
  random = torch.Generator().manual_seed(len(meta))
  weight = torch.randint(-128, 128, shape, dtype=torch.int8, generator=random)
  if not is_packed:  # without the two NaN
    weight = weight.where((weight & 127) != 127, 0).view(torch.float8_e4m3fn)
  scale = torch.randint(118, 132, counts, dtype=torch.uint8, generator=random)
  decode = finegrained_fp8.Fp8Dequantize(None)._dequantize_one
  y = decode(weight, scale, torch.float32)
  store(case, weight=weight, weight_scale_inv=scale, y=y)


def int8(case):
  """A weight of LLM.int8."""
  random = torch.Generator().manual_seed(len(meta))
  x = torch.randn((12, 20), generator=random).half()
  weight, scale, _ = bitsandbytes.functional.int8_vectorwise_quant(x)
  y = bitsandbytes.functional.int8_vectorwise_dequant(weight, scale)
  row = torch.tensor(0, dtype=torch.uint8)
  store(case, weight=weight, SCB=scale, weight_format=row, y=y)


def exported(case, shape, config, codes):
  """A weight of ModelOpt; `codes` is its rule, which it has no decoder for."""
  torch.manual_seed(len(meta))
  layer = torch.nn.Linear(shape[1], shape[0], bias=False)
  model = torch.nn.Sequential(layer)
  inputs = torch.randn(2, shape[1])
  modelopt.quantize(model, copy.deepcopy(config), lambda m: m(inputs))
  w = layer.weight.detach().clone()
  unified_export_hf._export_quantized_weight(layer, torch.float32)
  state = layer.state_dict()
  parts = {name: state[name] for name in ('weight', 'weight_scale')}
  scale = parts['weight_scale'].reshape(
    [n for n in parts['weight_scale'].shape if n > 1]
  )
  for axis in range(2):
    if axis == scale.ndim:
      scale = scale[:, None]
    scale = scale.repeat_interleave(-(-shape[axis] // scale.shape[axis]), axis)
  y = codes(w / scale).float() * scale
  store(case, **parts, y=y)


def float8(x):
  return x.to(torch.float8_e4m3fn)


def integers(bits):
  end = 2 ** (bits - 1)
  return lambda x: x.round().clamp(-end, end - 1).to(torch.int8)


def modelopt_mxfp8():
  random = torch.Generator().manual_seed(len(meta))
  x = torch.randn((4, 64), generator=random)
  q, scale = MXFP8QTensor.quantize(x)
  y = q.dequantize(torch.float32, scale=scale)
  store('modelopt_mxfp8', weight=q._quantized_data, weight_scale=scale, y=y)


four_bits('bnb_nf4_nested2', (56, 160), 32, 'nf4', torch.float32, True)
four_bits('bnb_nf4_merged', (6, 48), 64, 'nf4', torch.bfloat16)
four_bits('bnb_nf4_odd', (3, 11, 15), 64, 'nf4', torch.float32, True)
four_bits('bnb_fp4', (8, 64), 64, 'fp4', torch.float32)
four_bits('bnb_fp4_nested', (6, 48), 32, 'fp4', torch.float16, True)
int8('bnb_int8')
fp8('fp8_8x16', (16, 64), (2, 4))
fp8('fp8_1x32', (4, 64), (4, 2))
fp8('fp8_experts', (4, 32), (4, 2), is_packed=True)
exported(
  'modelopt_fp8_rows',
  (8, 24),
  modelopt.FP8_PER_CHANNEL_PER_TOKEN_CFG,
  float8,
)
exported(
  'modelopt_fp8_tiles',
  (256, 128),
  modelopt.FP8_2D_BLOCKWISE_WEIGHT_ONLY_CFG,
  float8,
)
exported('modelopt_int8', (8, 24), modelopt.INT8_WEIGHT_ONLY_CFG, integers(8))
exported(
  'modelopt_int4',
  (8, 256),
  modelopt.INT4_BLOCKWISE_WEIGHT_ONLY_CFG,
  integers(4),
)
modelopt_mxfp8()
np.savez_compressed(FOLDER / 'foreign.npz', **arrays)
(FOLDER / 'foreign.json').write_text(json.dumps(meta, indent=2) + '\n')
