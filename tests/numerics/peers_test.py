"""Live comparison with torchao, gfloat and qwix, where they are installed.

Data are such that the programs agree by definition: finite, not extreme, no
scale that another program computes with an inexact log2. The committed vectors
of golden_test.py need none of them.
"""

import contextlib
import importlib.util
import io
import pathlib
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import absltest, parameterized

import lowbit_jax
from lowbit_jax import formats, numerics

SHAPE = (64, 128)


def load_goldens_script():
  path = pathlib.Path(__file__).resolve().parents[1] / 'golden/make_goldens.py'
  spec = importlib.util.spec_from_file_location('make_goldens', path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


make_goldens = load_goldens_script()


def numbers(seed: int) -> np.ndarray:
  """Bell-shaped; 16 neighbours share one of eleven exponents."""
  random = np.random.RandomState(seed)
  exponent = np.repeat(random.randint(-5, 6, (SHAPE[0], 8)), 16, axis=1) - 23
  bell = make_goldens.bell(random, SHAPE).astype(np.float64)
  return np.ldexp(bell, exponent).astype(np.float32)


def codes_of(q) -> np.ndarray:
  return np.asarray(numerics.unpack(q.codes, q.fmt.element.bits))


def quantize(x, name, **kwargs):
  return lowbit_jax.quantize(jnp.asarray(x), formats.get(name), **kwargs)


def dequantize(q) -> np.ndarray:
  return np.asarray(lowbit_jax.dequantize(q))


def import_or_skip(test: absltest.TestCase, name: str):
  """The module `name`; peers may warn or talk while they are imported."""
  try:
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
      warnings.simplefilter('ignore')
      return importlib.import_module(name)
  except ImportError:
    test.skipTest(f'{name} is not installed')


class TorchaoTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    import_or_skip(self, 'torchao.prototype.mx_formats.mx_tensor')

  @parameterized.product(
    name=tuple(make_goldens.MX_FORMATS), rule=make_goldens.MX_RULES
  )
  def test_mx(self, name, rule):
    x = numbers(1)
    scales, codes = make_goldens.torchao_mx(x.reshape(-1, 32), name, rule)
    q = quantize(x, name, scale_rule=rule)
    np.testing.assert_array_equal(np.asarray(q.scale).ravel(), scales)
    np.testing.assert_array_equal(codes_of(q).reshape(-1, 32), codes)

  def test_nvfp4(self):
    nvfp4 = import_or_skip(self, 'torchao.prototype.mx_formats.nvfp4_tensor')
    import torch

    # All blocks alike, because torchao keeps block scales above 2^-6.
    random = np.random.RandomState(2)
    x = np.ldexp(make_goldens.bell(random, SHAPE).astype(float), -23)
    x = x.astype(np.float32)
    q = quantize(x, 'nvfp4')
    scales, packed = nvfp4.nvfp4_quantize(
      torch.from_numpy(x),
      per_tensor_scale=torch.tensor(np.asarray(q.tensor_scale).item()),
    )
    np.testing.assert_array_equal(q.scale, scales.view(torch.uint8).numpy())
    np.testing.assert_array_equal(q.codes, packed.numpy())

  def test_packing(self):
    mx_tensor = import_or_skip(self, 'torchao.prototype.mx_formats.mx_tensor')
    import torch

    codes = np.random.RandomState(3).randint(0, 16, SHAPE).astype(np.uint8)
    want = mx_tensor.pack_uint4(torch.from_numpy(codes)).numpy()
    np.testing.assert_array_equal(numerics.pack(jnp.asarray(codes), 4), want)


class GfloatTest(parameterized.TestCase):
  def test_mx_floor(self):
    self.assert_equals_gfloat('mxfp4', 'format_info_mxfp4_e2m1')

  @parameterized.parameters(
    ('mxfp8_e4m3', 'format_info_mxfp8_e4m3'),
    ('mxfp8_e5m2', 'format_info_mxfp8_e5m2'),
    ('mxfp6_e2m3', 'format_info_mxfp6_e2m3'),
    ('mxfp6_e3m2', 'format_info_mxfp6_e3m2'),
  )
  @pytest.mark.slow
  def test_mx_floor_of_other_formats(self, name, info):
    self.assert_equals_gfloat(name, info)

  def assert_equals_gfloat(self, name, info):
    gfloat = import_or_skip(self, 'gfloat')
    block_info = getattr(import_or_skip(self, 'gfloat.formats'), info)
    x = numbers(4)
    got = dequantize(quantize(x, name, scale_rule='floor')).reshape(-1, 32)
    want = [
      gfloat.quantize_block(
        block_info,
        block.astype(np.float64),
        gfloat.block.compute_scale_amax,
        gfloat.RoundMode.TiesToEven,
      )
      for block in x.reshape(-1, 32)
    ]
    np.testing.assert_array_equal(got, np.array(want))


class QwixTest(parameterized.TestCase):
  def quantize(self, x, qtype: str, block: int):
    qwix = import_or_skip(self, 'qwix._src.core.qarray')
    how = qwix.HowToQuantize(
      qtype=qtype, channelwise_axes=[0], tiled_axes={1: block}
    )
    # qwix relies on implicit promotion.
    with jax.numpy_dtype_promotion('standard'):
      return qwix.quantize(jnp.asarray(x), how)

  @parameterized.parameters(('mxfp8', 'mxfp8_e4m3'), ('mxfp4', 'mxfp4'))
  def test_mx_rceil(self, qtype, name):
    x = numbers(5)
    want = self.quantize(x, qtype, 32)
    q = quantize(x, name, scale_rule='rceil')
    scale = np.exp2(np.asarray(q.scale, np.float32) - 127)
    np.testing.assert_array_equal(scale, want.scale)
    values = q.fmt.element.values()[codes_of(q)]
    np.testing.assert_array_equal(values, np.asarray(want.qvalue, np.float64))

  def test_nf4(self):
    x = numbers(6)
    want = self.quantize(x, 'nf4', 64)
    q = quantize(x, 'nf4_g64')
    np.testing.assert_array_equal(q.scale, want.scale)
    codes = np.asarray(want.qvalue).astype(np.uint8)
    np.testing.assert_array_equal(codes_of(q), codes)


if __name__ == '__main__':
  absltest.main()
