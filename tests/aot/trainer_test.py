"""One training step of a model of 7 billion parameters for 256 chips."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import absltest
from jax.experimental import topologies

from models import byte_lm
from support import trainer
from tests.aot import targets

MEMORY = 16 * 1024**3  # bytes of a v5e chip


class TrainerTest(absltest.TestCase):
  @pytest.mark.long('the compiler lays a model out over 256 chips')
  def test_a_step_fits_on_v5e_256(self):
    if (why := targets.why_not('v5e')) is not None:
      self.skipTest(why)
    settings = trainer.Settings(
      byte_lm.Config(
        width=4096, heads=32, blocks=34, context=1024, batch=256, steps=100
      ),
      recipe='mxfp8',
      scan=True,
    )
    chips = topologies.get_topology_desc(
      platform='tpu', topology_name='v5e:16x16'
    )
    devices = np.asarray(chips.devices).reshape(1, 64, 4)
    mesh = jax.sharding.Mesh(devices, trainer.AXES)
    state = jax.eval_shape(lambda: trainer.init(settings))
    parameters = sum(p.size for p in jax.tree.leaves(state.params))
    self.assertBetween(parameters, 6.8e9, 7.2e9)
    places = trainer.state_shardings(state, mesh)
    rows = jax.sharding.NamedSharding(
      mesh, jax.sharding.PartitionSpec(('data', 'fsdp'))
    )
    step = jax.jit(
      trainer.make_step(settings, mesh=mesh),
      in_shardings=(places, rows),
      out_shardings=(places, None),
      donate_argnums=0,
    )
    windows = jax.ShapeDtypeStruct((256, 1025), jnp.int32)
    compiled = step.lower(state, windows).compile()
    memory = compiled.memory_analysis()
    peak = (
      memory.argument_size_in_bytes
      + memory.output_size_in_bytes
      - memory.alias_size_in_bytes
      + memory.temp_size_in_bytes
    )
    self.assertLess(peak, MEMORY / 2)
    self.assertGreater(peak, 12 * parameters / 256)  # weights and two moments


if __name__ == '__main__':
  absltest.main()
