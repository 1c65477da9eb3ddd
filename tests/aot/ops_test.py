"""Public operations compile to kernels for every TPU."""

import functools

import jax
import jax.numpy as jnp
import pytest
from absl.testing import absltest, parameterized

import lowbit_jax
from lowbit_jax import formats, transforms
from lowbit_pallas import _support
from tests.aot import targets

KERNEL = 'tpu_custom_call'
X = jax.ShapeDtypeStruct((24, 512), jnp.bfloat16)


def weight(name: str):
  fmt = formats.get(name)
  axis = (-2, -1) if fmt.is_tile else -2
  quantize = functools.partial(lowbit_jax.quantize, fmt=fmt, axis=axis)
  return jax.eval_shape(quantize, jax.ShapeDtypeStruct((512, 200), jnp.float32))


def operations():
  """(name, function, arguments) of everything that reaches a kernel."""
  dot = functools.partial(lowbit_jax.dot, implementation='tpu')
  prepack = functools.partial(lowbit_jax.prepack, implementation='tpu')
  for name in ('mxfp4', 'nvfp4', 'int4_g128', 'int3_g32', 'int8_channel'):
    yield f'dot_{name}', dot, (X, weight(name))
  for name in ('mxfp4', 'mxfp8_e4m3', 'nvfp4', 'int8_channel', 'fp8_1x128'):
    lhs = jax.eval_shape(
      functools.partial(lowbit_jax.quantize, fmt=formats.get(name)), X
    )
    right = 'fp8_128x128' if name == 'fp8_1x128' else name
    yield f'dot_{name}_blocks', dot, (lhs, weight(right))
  yield 'dot_prepacked', dot, (X, jax.eval_shape(prepack, weight('mxfp4')))
  yield (
    'dot_float32',
    dot,
    (jax.ShapeDtypeStruct((24, 512), jnp.float32), weight('mxfp4')),
  )
  yield (
    'einsum',
    functools.partial(lowbit_jax.einsum, 'bk,kn->nb', implementation='tpu'),
    (X, weight('mxfp4')),
  )
  yield (
    'vmap',
    jax.vmap(dot, (0, None)),
    (
      jax.ShapeDtypeStruct((3, 24, 512), jnp.bfloat16),
      weight('mxfp4'),
    ),
  )
  for kind in ('softmax', 'log_softmax', 'logsumexp'):
    f = functools.partial(getattr(lowbit_jax, kind), implementation='tpu')
    yield kind, f, (X,)
  for name in ('mxfp4', 'nvfp4', 'mxfp8_e4m3', 'int4_g32'):
    f = functools.partial(
      lowbit_jax.quantize, fmt=formats.get(name), implementation='tpu'
    )
    yield f'quantize_{name}', f, (X,)
    rotated = functools.partial(f, rotation=transforms.Hadamard(32))
    yield f'rotate_and_quantize_{name}', rotated, (X,)


class OpsTest(parameterized.TestCase):
  def compile(self, target: str, f, arguments):
    if (why := targets.why_not(target)) is not None:
      self.skipTest(why)
    text = targets.compile_for(target, f, *arguments).as_text()
    self.assertIn(KERNEL, text)

  @parameterized.named_parameters(*operations())
  def test_v5e(self, f, arguments):
    self.compile('v5e', f, arguments)

  @parameterized.product(
    target=tuple(t for t in _support.TPUS if t != 'v5e'),
    operation=tuple(name for name, *_ in operations()),
  )
  @pytest.mark.slow
  def test_others(self, target, operation):
    for name, f, arguments in operations():
      if name == operation:
        self.compile(target, f, arguments)


if __name__ == '__main__':
  absltest.main()
