"""GPTQ of one layer, beside what it cannot do without.

  PYTHONPATH=.:pallas python benchmarks/gptq.py
  PYTHONPATH=.:pallas python benchmarks/gptq.py --inputs=1536 --outputs=576

The floor is one Cholesky factor of (inputs, inputs) in float64, by NumPy, and
one product of it with the weight in float32, by XLA: the factor is needed, and
each weight takes the errors of those before it. Before anything is timed, the
error of the outputs is compared with that of the nearest numbers. Formats have
blocks of 128, of 32 and of 16 inputs.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

import _timing
from lowbit_jax import formats, ptq

_INPUTS = flags.DEFINE_integer('inputs', 4096, 'Of the layer.', lower_bound=128)
_OUTPUTS = flags.DEFINE_integer('outputs', 4096, 'Of the layer.', lower_bound=1)
_ROUNDS = flags.DEFINE_integer('rounds', 3, 'Of timing.', lower_bound=1)

_FORMATS = (
  formats.grouped(formats.int4, 128, formats.float16),
  formats.mxfp4,
  formats.nvfp4,
)


def _layer(fmt: formats.BlockFormat) -> ptq.Layer:
  """Activations whose channels depend on each other, and a normal weight."""
  inputs, outputs = _INPUTS.value, _OUTPUTS.value
  keys = jax.random.split(jax.random.key(0), 3)
  x = jax.random.normal(keys[0], (2 * inputs, inputs))
  x = x + jax.random.normal(keys[1], (2 * inputs, 1))
  weight = jax.random.normal(keys[2], (inputs, outputs)) / inputs**0.5
  products = jax.lax.dot(x.T, x, precision='highest')
  seen = jnp.float32(len(x))
  statistics = ptq.Statistics(seen, products / seen, x.mean(0), abs(x).max(0))
  return ptq.Layer('layer', weight, fmt, statistics)


def _row(fmt: formats.BlockFormat) -> list[str]:
  """A format, errors of the outputs, times over the floor, and seconds."""
  layer, step = _layer(fmt), ptq.gptq()
  assert layer.statistics is not None
  made, nearest = step(layer).error(), layer.error()
  assert made < nearest, (made, nearest)
  moments = np.asarray(layer.statistics.moments, np.float64)
  moments += 0.01 * moments.diagonal().mean() * np.eye(len(moments))

  def floor():
    factor = np.linalg.cholesky(moments).astype(np.float32)
    return jax.lax.dot(factor, layer.weight, precision='highest')

  def gptq():
    return step(layer).quantized

  _, ratio = _timing.compare(floor, {'gptq': gptq}, rounds=_ROUNDS.value)
  return [
    fmt.name,
    *(f'{error:.5f}' for error in (nearest, made)),
    *(f'{value:.2f}' for value in (ratio.wall, ratio.cpu)),
    f'{ratio.milliseconds / 1e3:.1f}',
  ]


def main(argv: Sequence[str]) -> None:
  del argv
  print(f'{_timing.machine()}\n')
  title = f'GPTQ of {_INPUTS.value} x {_OUTPUTS.value}, floor = 1'
  header = ['format', 'nearest', 'error', 'wall', 'CPU', 'seconds']
  print(_timing.table(title, header, list(map(_row, _FORMATS))))


if __name__ == '__main__':
  app.run(main)
