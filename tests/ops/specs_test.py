"""Every field of a QuantSpec counts, or is refused, wherever a spec is run."""

import dataclasses
import functools

import jax
import numpy as np
from absl.testing import absltest, parameterized

from lowbit_jax import formats, nn, ops
from lowbit_jax.ops import specs
from lowbit_jax.recipe import GemmSpec, QuantSpec, Recipe, TensorScaling
from lowbit_jax.training import quantizers
from lowbit_jax.training.optimizers import _oscillation

PLAIN = QuantSpec(formats.nvfp4)
# What each field may be besides its default; a test keeps the list complete.
CHANGED = {
  'fmt': QuantSpec(formats.mxfp4),
  'scale_rule': QuantSpec(formats.nvfp4, 'four_over_six'),
  'rounding': QuantSpec(formats.nvfp4, rounding='toward_zero'),
  'backward': QuantSpec(formats.nvfp4, backward='absmax'),
  'random_bits': QuantSpec(formats.nvfp4, rounding='stochastic', random_bits=1),
  'prescale': QuantSpec(formats.nvfp4, prescale=0.75),
  'target': QuantSpec(formats.nvfp4, target=256.0),
  'tensor_scaling': QuantSpec(formats.nvfp4, tensor_scaling=TensorScaling(2)),
  'row_scales': QuantSpec(formats.nvfp4, row_scales=True),
}
X = np.random.RandomState(0).randn(32, 32).astype(np.float32)
KEY = jax.random.key(0)


def by_specs(spec, x):
  return specs.fake_quant(x, spec, -1, key=KEY)


def by_product(spec, x):
  product = nn.linen.DotGeneral(lhs=spec)
  rngs = {'quant': KEY}
  dims = (((1,), (0,)), ((), ()))
  identity = np.eye(32, dtype=np.float32)
  return product.apply({}, x, identity, dims, rngs=rngs)


def by_site(spec, x):
  return quantizers.apply(spec, x, key=KEY)


def by_leaf(spec, x):
  return _oscillation._leaf_quantizer(spec, -1)(x)


def by_recipe(spec, x):
  recipe = Recipe('one operand', fwd=GemmSpec(lhs=spec))
  return ops.qdot(x, np.eye(32, dtype=np.float32), recipe, key=KEY)


RUNNERS = {f.__name__: f for f in (
  by_specs, by_product, by_site, by_leaf, by_recipe
)}  # fmt: skip


@functools.cache
def outcome(run, spec) -> str:
  """The program of values and gradient of a spec, or how it is refused."""

  def program(x):
    y, pull = jax.vjp(functools.partial(RUNNERS[run], spec), x)
    return y, pull(x)

  try:
    return str(jax.make_jaxpr(program)(X))
  except ValueError as error:
    return f'refused: {error}'


class FieldsTest(parameterized.TestCase):
  def test_every_field_is_tried(self):
    fields = [field.name for field in dataclasses.fields(QuantSpec)]
    self.assertEqual(list(CHANGED), fields)

  @parameterized.product(run=tuple(RUNNERS), field=tuple(CHANGED))
  def test_counts_or_is_refused(self, run, field):
    if field == 'tensor_scaling' and run in ('by_specs', 'by_recipe'):
      self.skipTest('their callers hold the scale')
    base = PLAIN
    if field == 'random_bits':
      base = QuantSpec(formats.nvfp4, rounding='stochastic')
    got = outcome(run, CHANGED[field])
    if got.startswith('refused'):
      self.assertRegex(got, f'{field}=|rounding=.stochastic')
    else:
      self.assertNotEqual(got, outcome(run, base))

  @parameterized.parameters('by_product', 'by_site', 'by_leaf', 'by_recipe')
  def test_all_agree(self, run):
    for field in ('rounding', 'prescale', 'target'):
      y = RUNNERS[run](CHANGED[field], X)
      want = RUNNERS['by_specs'](CHANGED[field], X)
      # Products multiply by tensor scale and prescale last: three roundings.
      np.testing.assert_allclose(y, want, rtol=4 * 2.0**-24, err_msg=field)


class RowScalesTest(parameterized.TestCase):
  @parameterized.parameters(
    ('absmax', None, 0), ('four_over_six', 256.0, -1), ('sweep', None, 1)
  )
  def test_rows_are_quantized_on_their_own(self, rule, target, axis):
    sizes = np.exp(np.arange(15).reshape(3, 5, 1) / 2)
    x = (np.random.RandomState(1).randn(3, 5, 48) * sizes).astype(np.float32)
    alone = QuantSpec(formats.nvfp4, rule, target=target)
    of_rows = dataclasses.replace(alone, row_scales=True)

    @jax.jit
    def one_by_one(rows):
      return jax.vmap(lambda row: specs.fake_quant(row, alone, -1))(rows)

    rows = np.moveaxis(x, axis, -1)
    expected = one_by_one(rows.reshape(-1, rows.shape[-1]))
    expected = np.moveaxis(expected.reshape(rows.shape), -1, axis)
    np.testing.assert_array_equal(specs.fake_quant(x, of_rows, axis), expected)
    self.assertTrue((specs.fake_quant(x, alone, axis) != expected).any())

  def test_values_that_are_not_finite_stay_in_their_row(self):
    x = np.ones((3, 32), np.float32)
    x[1, 0] = np.inf
    y = np.asarray(specs.fake_quant(x, CHANGED['row_scales'], -1))
    np.testing.assert_array_equal(np.isnan(y).any(-1), [False, True, False])
    np.testing.assert_allclose(y[[0, 2]], 1, rtol=2**-4)  # that of E4M3


if __name__ == '__main__':
  absltest.main()
