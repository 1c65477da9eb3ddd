"""Codes and scales against the golden vectors of torchao and TransformerEngine.

What the vectors hold, and how they were made, is said in
tests/golden/make_goldens.py.
"""

import functools
import importlib.util
import itertools
import pathlib

import jax
import numpy as np
import pytest
from absl.testing import absltest, parameterized

import lowbit_jax
from lowbit_jax import formats, numerics

# XOR of the CRC-32 of all runs of 512 bytes of the MX input.
INPUT_CHECKSUM = 2086448210
GOLDEN = pathlib.Path(__file__).resolve().parents[1] / 'golden'


unpack = jax.jit(numerics.unpack, static_argnums=1)


def load_script():
  """make_goldens.py as a module; it imports torch only where it needs it."""
  spec = importlib.util.spec_from_file_location(
    'make_goldens', GOLDEN / 'make_goldens.py'
  )
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


make_goldens = load_script()


# Each width and each rule.
EVERY_DAY = (
  ('mxfp8_e5m2', 'ceil'),
  ('mxfp6_e2m3', 'floor'),
  ('mxfp6_e3m2', 'rceil'),
  ('mxfp4', 'even'),
)


@functools.cache
def golden(name: str) -> dict[str, np.ndarray]:
  with np.load(GOLDEN / name) as arrays:
    return dict(arrays)


@functools.cache
def mx_input():
  return make_goldens.mx_blocks()


@functools.partial(jax.jit, static_argnames=('fmt', 'scale_rule'))
def quantize(x, fmt, scale_rule=None):
  return lowbit_jax.quantize(x, fmt, scale_rule=scale_rule)


def codes_of(q) -> np.ndarray:
  return np.asarray(unpack(q.codes, q.fmt.element.bits))


class MxTest(parameterized.TestCase):
  @parameterized.parameters(*EVERY_DAY)
  def test_equals_torchao(self, name, rule):
    self.assert_equals_torchao(name, rule)

  @parameterized.parameters(
    *itertools.product(make_goldens.MX_FORMATS, make_goldens.MX_RULES)
  )
  @pytest.mark.slow
  def test_equals_torchao_by_every_rule(self, name, rule):
    self.assert_equals_torchao(name, rule)

  def assert_equals_torchao(self, name, rule):
    fmt = formats.get(name)
    q = quantize(mx_input(), fmt, scale_rule=rule)
    want = golden('mx_torchao.npz')
    key = f'{name}.{rule}'
    np.testing.assert_array_equal(q.scale[:, 0], want[f'{key}.scales'])
    codes = codes_of(q)
    listed = codes[: make_goldens.LISTED_BLOCKS]
    np.testing.assert_array_equal(
      make_goldens.bit_stream(listed, fmt.element.bits), want[f'{key}.codes']
    )
    np.testing.assert_array_equal(
      make_goldens.checksums(codes), want[f'{key}.checksums']
    )

  def test_the_input_is_the_one_of_the_vectors(self):
    x = make_goldens.mx_blocks()
    amax = np.abs(x).max(axis=1)
    self.assertEqual(np.count_nonzero(amax == 0), 64)
    octaves = np.log2(amax[amax > 0])
    self.assertGreater(octaves.max() - octaves.min(), 140)
    checksum = make_goldens.checksums(x.view(np.uint8).reshape(-1, 32))
    self.assertEqual(int(np.bitwise_xor.reduce(checksum)), INPUT_CHECKSUM)


class Nvfp4Test(parameterized.TestCase):
  @parameterized.parameters(*make_goldens.nvfp4_tensors())
  def test_equals_transformer_engine(self, name):
    x = make_goldens.nvfp4_tensors()[name]
    q = quantize(x, formats.nvfp4)
    want = golden('nvfp4_te.npz')
    scales = want[f'{name}.scales']
    self.assertEqual(
      np.asarray(q.tensor_scale).item(), want[f'{name}.tensor_scale'].item()
    )
    np.testing.assert_array_equal(q.scale[:, 0], scales)
    # Under a zero scale TransformerEngine leaves +-6, which decode to zero.
    live = np.repeat(scales != 0, 16)
    stream = want[f'{name}.codes']
    wanted = np.stack([stream & 15, stream >> 4], -1).ravel()
    codes = codes_of(q).ravel()
    np.testing.assert_array_equal(codes[live], wanted[live])
    self.assertFalse(np.any(codes[~live] & 7))


if __name__ == '__main__':
  absltest.main()
