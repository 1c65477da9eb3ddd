"""What `lowbit.packed` costs and saves, next to products written by hand.

A decoder of several layers, written twice: with `@`, and with `lowbit.dot`. The
first one runs through `packed`. Both programs are compared first: they give the
same bits.

  python benchmarks/any_function.py
  python benchmarks/any_function.py --layers 48 --width 512 --loop scan
"""

import re
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

import lowbit_jax as lowbit

_LAYERS = flags.DEFINE_integer('layers', 24, 'Layers.', lower_bound=1)
_WIDTH = flags.DEFINE_integer('width', 256, 'Features.', lower_bound=64)
_LOOP = flags.DEFINE_enum(
  'loop', 'python', ['python', 'scan'], 'How the layers follow each other.'
)
_FORMAT = flags.DEFINE_string('format', 'mxfp4', 'Block format of the weights.')
_ROUNDS = flags.DEFINE_integer('rounds', 9, 'Traces of each candidate.')
_HEADS = 4


def attention(multiply, x, weights):
  batch, length, width = x.shape
  heads = (batch, length, _HEADS, width // _HEADS)
  q, k, v = (multiply(x, weights[name]).reshape(heads) for name in 'qkv')
  scores = jnp.einsum('bthd,bshd->bhts', q, k) / heads[-1] ** 0.5
  mixed = jnp.einsum('bhts,bshd->bthd', jax.nn.softmax(scores, -1), v)
  return multiply(mixed.reshape(x.shape), weights['o'])


def layer(multiply, x, weights):
  x = x + attention(multiply, normalized(x), weights)
  hidden = jax.nn.silu(multiply(normalized(x), weights['up']))
  return x + multiply(hidden, weights['down'])


def normalized(x):
  return x * jax.lax.rsqrt(jnp.mean(x**2, -1, keepdims=True) + 1e-6)


def model(multiply):
  """A function of (x, weights), by a product of two matrices."""

  def run(x, weights):
    if _LOOP.value == 'scan':
      step = lambda x, own: (layer(multiply, x, own), None)  # noqa: E731
      return jax.lax.scan(step, x, weights)[0]
    for own in weights:
      x = layer(multiply, x, own)
    return x

  return run


def quantized_weights():
  width, fmt = _WIDTH.value, lowbit.formats.get(_FORMAT.value)
  shapes = dict.fromkeys('qkvo', (width, width))
  shapes |= {'up': (width, 4 * width), 'down': (4 * width, width)}

  def one(key):
    keys = dict(zip(shapes, jax.random.split(key, len(shapes)), strict=True))
    return {
      name: lowbit.quantize(
        jax.random.normal(keys[name], shape) / shape[0] ** 0.5, fmt, axis=-2
      )
      for name, shape in shapes.items()
    }

  keys = jax.random.split(jax.random.key(0), _LAYERS.value)
  return jax.vmap(one)(keys) if _LOOP.value == 'scan' else list(map(one, keys))


def tracing(candidates, *args) -> dict[str, float]:
  """Median CPU seconds of a trace of each candidate, in turn."""
  times = {name: [] for name in candidates}
  for _ in range(_ROUNDS.value):
    for name, function in candidates.items():
      jax.clear_caches()
      start = time.process_time()
      jax.jit(function).trace(*args)
      times[name].append(time.process_time() - start)
  return {name: statistics.median(own) for name, own in times.items()}


def instructions(function, *args) -> str:
  """The compiled program, without names and places in the source."""
  text = jax.jit(function).lower(*args).compile().as_text()
  noise = r', metadata=\{[^}]*\}|HloModule[^\n]*|(?s:\nFileNames.*)'
  return re.sub(noise, '', text)


def temporaries(function, *args) -> int:
  compiled = jax.jit(function).lower(*args).compile()
  return compiled.memory_analysis().temp_size_in_bytes


def main(argv):
  del argv
  weights, x = quantized_weights(), jnp.ones((2, 16, _WIDTH.value))
  candidates = {
    'by hand': model(lowbit.dot),
    'packed': lowbit.packed(model(jnp.matmul), strict=True),
    'decoded': model(lambda x, w: jnp.matmul(x, lowbit.dequantize(w))),
  }
  hand, packed = (jax.jit(candidates[n]) for n in ('by hand', 'packed'))
  np.testing.assert_array_equal(hand(x, weights), packed(x, weights))
  times = tracing(candidates, x, weights)
  base = times['by hand']
  print(f'jax {jax.__version__}, {_LAYERS.value} layers by {_LOOP.value}')
  print('same instructions:', end=' ')
  texts = [
    instructions(candidates[n], x, weights) for n in list(candidates)[:2]
  ]
  print('yes' if texts[0] == texts[1] else 'no')
  print('| | trace, CPU ms | to by hand | temporaries, MiB |')
  print('|---|---|---|---|')
  for name, function in candidates.items():
    size = temporaries(function, x, weights) / 2**20
    took = times[name]
    print(f'| {name} | {1e3 * took:.0f} | {took / base:.2f} | {size:.2f} |')


if __name__ == '__main__':
  app.run(main)
