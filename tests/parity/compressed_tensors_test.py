"""Folders of compressed-tensors, against the package of that name.

It decompresses what `export` writes, and `open` reads what it compresses, to
the same numbers.
"""

import json
import os
import pathlib

import ml_dtypes
import numpy as np
import pytest
from absl.testing import absltest, parameterized

import lowbit_jax as lowbit
from lowbit_jax import formats
from lowbit_jax.io import safetensors
from tests import checkpoints
from tests.parity import packages

pytestmark = pytest.mark.slow

NAME = f'{checkpoints.MODULE}.weight'
SHAPE = (24, 256)
NAMED = (
  *('int8_channel', 'int4_channel', 'int8_tensor', 'e4m3fn_tensor'),
  *('e4m3fn_channel', 'fp8_1x128', 'fp8_128x128'),
  *('nvfp4', 'mxfp4', 'mxfp6_e2m3', 'mxfp8_e4m3'),
)
EXPORTED = {
  **{f'{name}': formats.get(name) for name in NAMED},
  **{
    f'int{bits}_g32': formats.grouped(formats.get(f'int{bits}'), 32)
    for bits in range(2, 9)
  },
  **{
    f'uint{bits}_g16': formats.grouped(formats.get(f'uint{bits}'), 16)
    for bits in range(2, 9)
  },
  **{
    f'{element}_g64_{scale.name}': formats.grouped(
      formats.get(element), 64, scale
    )
    for element in ('int4', 'uint4', 'e4m3fn')
    for scale in (formats.bfloat16, formats.float16)
  },
}


def data(shape=SHAPE) -> np.ndarray:
  return np.random.RandomState(0).randn(*shape).astype(np.float32)


def dtype_of(fmt) -> str:
  """The dtype in which the package decompresses what we write in a format.

  That of the scales, and bfloat16 for layouts with scales of 8 bits.
  """
  if fmt.scale is None:
    return 'float32'
  return 'bfloat16' if fmt.scale.bits == 8 else fmt.scale.name


def assert_decompressed(actual, q, dtype: str) -> None:
  """Whether these float32 numbers are those of `q`, rounded to a dtype."""
  expected = np.asarray(lowbit.dequantize(q))
  expected = expected.astype(getattr(ml_dtypes, dtype, dtype))
  expected = expected.astype(np.float32)
  if q.fmt == formats.nvfp4:
    # Both scales are multiplied in another order: when that is rounded to
    # bfloat16, a number at the edge may become the next one.
    np.testing.assert_allclose(actual, expected, rtol=2**-7)
    assert (actual == expected).mean() > 0.99
  else:
    np.testing.assert_array_equal(actual, expected)


@packages.needs('torch', 'transformers', 'compressed_tensors')
class ExportedTest(checkpoints.FolderTest):
  """The package makes a dense folder of one that `export` wrote."""

  def decompressed(self, tensors, **options):
    """Dense float32 tensors by name."""
    import torch
    from compressed_tensors.entrypoints import convert
    from safetensors.torch import load_file

    source = pathlib.Path(self.folder, 'source')
    source.mkdir()
    (source / 'config.json').write_text('{"model_type": "llama"}')
    folder, dense = (os.path.join(self.folder, k) for k in ('packed', 'dense'))
    safetensors.export(folder, tensors, source, **options)
    convert.convert_checkpoint(
      folder,
      dense,
      convert.CompressedTensorsDequantizer(folder, dtype=torch.float32),
    )
    config = json.loads(pathlib.Path(dense, 'config.json').read_text())
    self.assertEqual(config, {'model_type': 'llama'})
    files = pathlib.Path(dense).glob('*.safetensors')
    return {
      name: x.float().numpy()
      for file in files
      for name, x in load_file(file).items()
    }

  @parameterized.parameters(*EXPORTED)
  def test_each_format(self, name):
    q = lowbit.quantize(data(), EXPORTED[name])
    actual = self.decompressed({NAME: q})[NAME]
    assert_decompressed(actual, q, dtype_of(q.fmt))

  @parameterized.parameters('int4_channel', 'int8_tensor', 'e4m3fn_channel')
  def test_rows_of_any_length(self, name):
    q = lowbit.quantize(data((20, 221)), EXPORTED[name])
    actual = self.decompressed({NAME: q})[NAME]
    assert_decompressed(actual, q, dtype_of(q.fmt))

  @parameterized.parameters('int4_g32', 'uint3_g16', 'mxfp8_e4m3')
  def test_stacks(self, name):
    q = lowbit.quantize(data((3, 20, 64)), EXPORTED[name])
    actual = self.decompressed({NAME: q})[NAME]
    assert_decompressed(actual, q, dtype_of(q.fmt))

  def test_mixed_precision_in_shards(self):
    tensors = {
      f'layers.{k}.weight': lowbit.quantize(data(), fmt)
      for k, fmt in enumerate(EXPORTED.values())
    }
    tensors['norm.weight'] = data((7,))
    actual = self.decompressed(tensors, shard_bytes=20_000)
    self.assertCountEqual(actual, tensors)
    np.testing.assert_array_equal(
      actual.pop('norm.weight'), tensors['norm.weight']
    )
    for name, x in actual.items():
      q = tensors[name]
      assert_decompressed(x, q, dtype_of(q.fmt))

  def test_partial_tiles(self):
    # Its converter cannot save them, since it forgets to copy a slice.
    import torch
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig
    from safetensors.torch import load_file

    q = lowbit.quantize(data((200, 300)), formats.fp8_128x128)
    folder = os.path.join(self.folder, 'packed')
    safetensors.export(folder, {NAME: q})
    config = json.loads(pathlib.Path(folder, 'config.json').read_text())
    config = QuantizationConfig.model_validate(config['quantization_config'])
    ((_, scheme),) = config.config_groups.items()
    prefix = NAME.removesuffix('weight')
    state = {
      name.removeprefix(prefix): x
      for name, x in load_file(f'{folder}/model.safetensors').items()
    }
    compressor = BaseCompressor.get_value_from_registry(config.format)
    weight = compressor.decompress(state, scheme)['weight']
    self.assertEqual(weight.dtype, torch.float32)
    assert_decompressed(weight.numpy(), q, 'float32')


def presets() -> tuple[str, ...]:
  """The schemes of the package that quantize weights."""
  return (
    *('W4A16_ASYM', 'W8A8', 'W4AFP8', 'FP8', 'FP8_DYNAMIC', 'FP8_BLOCK'),
    *('NVFP4A16', 'NVFP4', 'MXFP4A16', 'MXFP4', 'MXFP4XFP8', 'MXFP6A16'),
    *('MXFP6A8', 'MXFP8A16', 'MXFP8', 'W2A4', 'W2A8', 'W2A16', 'W3A4', 'W3A8'),
    *('W3A16', 'W4A4', 'W4A8', 'W4A16', 'W5A8', 'W5A16', 'W6A8', 'W6A16'),
    *('W7A8', 'W7A16', 'W8A16'),
  )


@packages.needs('torch', 'transformers', 'compressed_tensors')
class CompressedTest(checkpoints.FolderTest):
  """`open` reads what the package compressed."""

  def compress(self, scheme, dtype):
    """Writes a folder with a weight; gives its numbers, decompressed."""
    import torch
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.compressors.format import infer_module_format
    from compressed_tensors.quantization import QuantizationConfig
    from compressed_tensors.quantization.utils import (
      calculate_qparams,
      generate_gparam,
    )
    from safetensors.torch import save_file

    weight = torch.tensor(data((256, 256))).to(dtype)
    weight[0], weight[1, 3] = 0, 25  # a row of zeros, an outlier
    state = {'weight': weight}
    arguments = scheme.weights
    low, high = ranges(weight, arguments)
    divisor = None
    if arguments.strategy == 'tensor_group':
      divisor = generate_gparam(weight.amin(), weight.amax())
      state['weight_global_scale'] = divisor
    state['weight_scale'], state['weight_zero_point'] = calculate_qparams(
      low, high, arguments, global_scale=divisor
    )
    layout = infer_module_format(torch.nn.Linear, scheme)
    compressor = BaseCompressor.get_value_from_registry(layout.value)
    state = compressor.compress(state, scheme)
    prefix = NAME.removesuffix('weight')
    named = {prefix + name: x.contiguous() for name, x in state.items()}
    save_file(named, self.path)
    config = QuantizationConfig(
      config_groups={'group_0': scheme},
      format=layout.value,
      quantization_status='compressed',
      ignore=['lm_head'],
    )
    text = config.model_dump_json()
    pathlib.Path(self.folder, 'config.json').write_text(
      json.dumps({'quantization_config': json.loads(text)})
    )
    return compressor.decompress(state, scheme)['weight']

  def check(self, scheme, dtype):
    expected = self.compress(scheme, dtype)
    with safetensors.open(self.folder) as checkpoint:
      q = checkpoint[NAME]
    name = str(expected.dtype).removeprefix('torch.')
    assert_decompressed(expected.float().numpy(), q, name)
    return q

  @parameterized.product(preset=presets(), dtype=('float32', 'bfloat16'))
  def test_presets(self, preset, dtype):
    import torch
    from compressed_tensors.quantization import preset_name_to_scheme

    scheme = preset_name_to_scheme(preset, ['Linear'])
    self.check(scheme, getattr(torch, dtype))

  def test_every_preset_is_tested(self):
    from compressed_tensors.quantization.quant_scheme import PRESET_SCHEMES

    same = {'UNQUANTIZED', 'INT8'}  # nothing to read, and W8A8
    self.assertCountEqual(PRESET_SCHEMES, {*presets(), *same})

  @parameterized.product(
    bits=tuple(range(2, 9)),
    symmetric=(True, False),
    strategy=('group', 'channel'),
  )
  def test_integers(self, bits, symmetric, strategy):
    import torch
    from compressed_tensors.quantization import (
      QuantizationArgs,
      QuantizationScheme,
    )

    weights = QuantizationArgs(
      num_bits=bits,
      symmetric=symmetric,
      strategy=strategy,
      group_size=64 if strategy == 'group' else None,
    )
    scheme = QuantizationScheme(targets=['Linear'], weights=weights)
    q = self.check(scheme, torch.float16)
    self.assertEqual((q.fmt.element.bits, q.scale.dtype), (bits, np.float16))


def ranges(weight, arguments):
  """The least and the greatest number for each scale."""
  rows, columns = weight.shape
  strategy = arguments.strategy
  if strategy == 'tensor':
    return weight.amin().reshape(1), weight.amax().reshape(1)
  if strategy == 'channel':
    return weight.amin(1, keepdim=True), weight.amax(1, keepdim=True)
  if strategy == 'block':
    r, c = arguments.block_structure
    tiles = weight.reshape(rows // r, r, columns // c, c)
    return tiles.amin((1, 3)), tiles.amax((1, 3))
  groups = weight.reshape(rows, -1, arguments.group_size)
  return groups.amin(-1), groups.amax(-1)


if __name__ == '__main__':
  absltest.main()
