"""The training product compiles for accelerators, its directions included."""

import jax
import jax.numpy as jnp
import pytest
from absl.testing import absltest, parameterized

import lowbit_jax
from lowbit_jax.training import recipes
from tests.aot import targets


class QdotTest(parameterized.TestCase):
  @parameterized.parameters('v5e', 'h100')
  @pytest.mark.long('both directions of a product with rotations')
  def test_both_directions(self, target):
    self.check('mxfp4_sr_rht', target)

  @parameterized.parameters('v5e', 'h100')
  @pytest.mark.long('leading directions come from a QR, long to compile')
  @pytest.mark.slow
  def test_leading_directions(self, target):
    self.check('mxfp4_lowbit', target)

  def check(self, recipe, target):
    if (why := targets.why_not(target)) is not None:
      self.skipTest(why)

    def gradients(x, w):
      def loss(x, w):
        y = lowbit_jax.qdot(x, w, recipes.get(recipe), key=jax.random.key(0))
        return jnp.sum(jnp.square(y))

      return jax.grad(loss, (0, 1))(x, w)

    compiled = targets.compile_for(
      target,
      gradients,
      jax.ShapeDtypeStruct((2048, 512), jnp.bfloat16),
      jax.ShapeDtypeStruct((512, 256), jnp.float32),
    )
    self.assertLess(
      compiled.memory_analysis().temp_size_in_bytes, 128 * 1024**2
    )


if __name__ == '__main__':
  absltest.main()
