"""Calibration of a block of a model of 7 billion parameters fits four chips.

What `ptq.calibrate` and `ptq.sequential` run for each batch, and what GPTQ runs
for each layer, is one compiled program each, whose memory the compiler knows.
Bounds are bytes of each chip.
"""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import absltest, parameterized
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P

import lowbit_jax as lowbit
from lowbit_jax import formats
from lowbit_jax.ptq import _gptq, _grid, _statistics
from lowbit_jax.transforms import Hadamard
from models import llama, llama_config, places, rotary
from tests.aot import targets

MEMORY = 16 * 1024**3  # bytes of a v5e chip
CONFIG = llama_config.Config(
  vocabulary=32000,
  width=4096,
  hidden=11008,
  blocks=32,
  heads=32,
  kv_heads=32,
  head_size=128,
  context=2048,
  rope=rotary.Rope(10000.0, 128),
)
WINDOWS, TOKENS = 4, 2048
DATA, MODEL = 2, 2  # parts of windows, and of weights
INPUTS = {
  'attention/query/kernel': 4096,
  'attention/key/kernel': 4096,
  'attention/value/kernel': 4096,
  'attention/out/kernel': 4096,
  'mlp/gate/kernel': 4096,
  'mlp/up/kernel': 4096,
  'mlp/down/kernel': 11008,
}
# Statistics of a weight: products of its channels; of each of them the mean,
# the spread and the largest magnitude; and twice the number of tokens.
STATISTICS = {k: 4 * (n**2 + 3 * n + 2) for k, n in INPUTS.items()}


def block():
  """The block as a function, and its parameters by path; of shapes alone."""

  def make():
    options = {'dtype': jnp.bfloat16, 'param_dtype': jnp.bfloat16}
    return llama.Block(CONFIG, rngs=nnx.Rngs(0), **options)

  graph, state = nnx.split(nnx.eval_shape(make))
  parameters = {
    '/'.join(map(str, path)): variable.get_raw_value()
    for path, variable in nnx.to_flat_state(state)
  }

  def run(parameters, x):
    place = places.places(CONFIG, jnp.arange(TOKENS), TOKENS)(jnp.int32(0))
    module = lowbit.nn.nnx.assign(nnx.merge(graph, state), parameters)
    return module(x, place, None)[0]

  return run, parameters


def spread(leaf, sharding):
  return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def held(leaf):
  """Bytes of the part on each chip."""
  part = leaf.sharding.shard_shape(leaf.shape)
  return math.prod(part) * leaf.dtype.itemsize


def axes(path):
  """Heads and hidden channels are split."""
  if 'norm' in path:
    return ()
  first = path.split('/')[1] in ('out', 'down')
  return ('model', None) if first else (None, 'model')


def sizes(name, compiled):
  """Bytes of arguments, results and what lies between; printed too."""
  memory = compiled.memory_analysis()
  found = (
    memory.argument_size_in_bytes,
    memory.output_size_in_bytes,
    memory.temp_size_in_bytes,
  )
  print(name, 'arguments, results, between:', *(f'{n:,}' for n in found))
  return found


def rotated(x):
  """Activations as they meet a rotated weight, see `ptq.calibrate`."""
  rotation = Hadamard(128)
  rounded = lowbit.fake_quant(rotation.apply(x), formats.mxfp4, axis=-1)
  return rotation.inverse(rounded)


class BlockTest(parameterized.TestCase):
  def check(self, select, rounding=None):
    """Checks what runs for each batch of windows."""
    if (why := targets.why_not('v5e')) is not None:
      self.skipTest(why)
    devices = np.array(targets.topology('v5e').devices).reshape(DATA, MODEL)
    mesh = Mesh(devices, ('data', 'model'))
    place = lambda *axes: NamedSharding(mesh, P(*axes))
    run, parameters = block()
    parameters = {
      path: spread(leaf, place(*axes(path)))
      for path, leaf in parameters.items()
    }
    x = jax.ShapeDtypeStruct(
      (WINDOWS, TOKENS, CONFIG.width), jnp.bfloat16, sharding=place('data')
    )
    observer = _statistics.Selected(select, rounding)
    lowered = _statistics.recorder(run, observer).lower(parameters, x)
    chosen = [path for path in INPUTS if re.search(select, path)]
    self.assertCountEqual(lowered.out_info, chosen)
    compiled = lowered.compile()
    arguments, results, between = sizes(select, compiled)

    # Statistics may be whole on each chip.
    statistics = sum(STATISTICS[path] for path in chosen)
    self.assertLessEqual(results, 1.001 * statistics)
    self.assertGreaterEqual(results, statistics / MODEL)
    # One block of weights, and a batch.
    given = sum(map(held, [*parameters.values(), x]))
    self.assertLessEqual(arguments, 1.001 * given)
    # Scores of attention before and after the softmax, in float32; or, not at
    # the same time, what the gate, `up` and both make in bfloat16 and what is
    # measured in float32, with products that are not summed over chips yet.
    windows = WINDOWS // DATA
    scores = 4 * windows * CONFIG.heads // MODEL * TOKENS**2
    hidden = (3 * 2 + 4) * windows * TOKENS * CONFIG.hidden
    unsummed = max(STATISTICS[path] for path in chosen)
    # The states that the block takes, those behind its attention, norms of
    # both.
    states = 4 * 2 * windows * TOKENS * CONFIG.width
    bound = max(2 * scores, hidden + unsummed) + states
    self.assertLessEqual(between, bound)
    # Those of the batches before, those of a batch, and the sum of both.
    self.assertLess(given + bound + 3 * statistics, MEMORY / 4)

    # However many batches there are: what is merged takes the place of what was
    # there, so that both programs run again as they are.
    seen = jax.tree.map(spread, lowered.out_info, compiled.output_shardings)
    merge = _statistics._merged.lower(seen, seen)
    merged = merge.compile()
    again = jax.tree.map(spread, merge.out_info, merged.output_shardings)
    self.assertEqual(again, seen)
    arguments, both, between = sizes(f'merge {select}', merged)
    self.assertLessEqual(arguments, 2.001 * results)
    self.assertLessEqual(both + between, 1.001 * results)

  @pytest.mark.long('the compiler lays a block out over four chips')
  def test_calibrate(self):
    self.check('kernel')

  @parameterized.parameters(
    'attention/(query|key|value)/kernel',
    'attention/out/kernel',
    'mlp/(gate|up)/kernel',
    'mlp/down/kernel',
  )
  @pytest.mark.slow
  def test_stages_of_sequential(self, select):
    self.check(select, rotated)


class GptqTest(parameterized.TestCase):
  @parameterized.parameters(
    (CONFIG.width, CONFIG.hidden), (CONFIG.hidden, CONFIG.width)
  )
  @pytest.mark.long('four loops over rows are compiled')
  def test_layer(self, inputs, outputs):
    if (why := targets.why_not('v5e')) is not None:
      self.skipTest(why)
    fmt = formats.mxfp4
    weight = jax.ShapeDtypeStruct((inputs, outputs), jnp.float32)
    like = jax.eval_shape(lambda w: lowbit.quantize(w, fmt, axis=-2), weight)
    run = functools.partial(_gptq._rounded, element=fmt.element)
    compiled = targets.compile_for(
      'v5e',
      run,
      weight,
      jax.eval_shape(_grid.grid, like),
      jax.ShapeDtypeStruct((inputs,), jnp.int32),
      jax.ShapeDtypeStruct((inputs, inputs), jnp.float32),
    )
    found = sizes(f'gptq {inputs} {outputs}', compiled)
    # The weight, its scales and its rounded numbers; the factor of H, and a
    # copy of most of its rows.
    scales = inputs // fmt.block[0] * outputs
    factor = inputs**2
    bound = 4 * (2 * inputs * outputs + scales + 2 * factor + inputs)
    self.assertLessEqual(sum(found), 1.01 * bound)
    self.assertLess(bound, MEMORY / 8)


if __name__ == '__main__':
  absltest.main()
