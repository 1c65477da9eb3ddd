"""The choice of an implementation, for every platform that a program is for."""

import functools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized
from jax.sharding import PartitionSpec as P

import lowbit_jax as lowbit
from lowbit_jax import formats
from lowbit_jax.ops import _dispatch
from lowbit_jax.recipe import GemmSpec, QuantSpec, Recipe
from lowbit_pallas import _support

# Programs of three implementations that do not compute the same.
_FUNCTIONS = {'tpu': jnp.sin, 'mosaic_gpu': jnp.cos, 'xla': jnp.tanh}
_BY_PLATFORM = {'cpu': 'tanh', 'cuda': 'cosine', 'tpu': 'sine'}


def _plan(name, x, scale):
  del x

  def run(x):
    return {'y': _FUNCTIONS[name](x) * scale}

  return _dispatch.Plan(f'by {name}', run)


TABLE = {name: functools.partial(_plan, name) for name in _FUNCTIONS}


def _with_devices(*names):
  """A process that has devices for implementations."""
  device = mock.Mock(device_kind='a proven one', compute_capability='')
  devices = _support.devices

  def with_more(name):
    return [device] if name in names else devices(name)

  return mock.patch.multiple(
    _support, devices=with_more, why_unproven=lambda name: None
  )


def _lowered(f, platform, *arguments):
  traced = jax.jit(f).trace(*arguments)
  return traced.lower(lowering_platforms=(platform,)).as_text()


class PlatformTest(parameterized.TestCase):
  def run_op(self, x, implementation=None):
    return _dispatch.run('op', TABLE, implementation, (x,), 2.0)['y']

  def check(self, f, platform):
    text = _lowered(f, platform, np.float32([1, 2]))
    functions = [n for n in _BY_PLATFORM.values() if f'stablehlo.{n}' in text]
    self.assertEqual(functions, [_BY_PLATFORM[platform]])

  @parameterized.parameters('cpu', 'cuda', 'tpu')
  def test_each_platform_gets_its_own(self, platform):
    with _with_devices('tpu', 'mosaic_gpu'):
      self.check(self.run_op, platform)
      self.check(jax.vmap(self.run_op), platform)

  @parameterized.parameters('cpu', 'cuda', 'tpu')
  def test_a_list_is_for_the_platforms_of_its_names(self, platform):
    names = ('mosaic_gpu', 'tpu', 'xla')
    self.check(functools.partial(self.run_op, implementation=names), platform)

  def test_nothing_is_traced_for_platforms_without_a_device(self):
    jaxpr = jax.make_jaxpr(self.run_op)(np.float32([1, 2]))
    self.assertEqual([e.primitive.name for e in jaxpr.eqns], ['tanh', 'mul'])

  def test_it_runs_where_the_data_are(self):
    x = np.float32([1, 2])
    with _with_devices('tpu', 'mosaic_gpu'):
      np.testing.assert_allclose(
        jax.jit(self.run_op)(x), 2 * np.tanh(x), rtol=1e-6
      )

  def test_the_derivative_is_that_of_the_platform(self):
    with _with_devices('tpu'):
      slope = jax.grad(lambda x: self.run_op(x))
      self.assertIn('stablehlo.cosine', _lowered(slope, 'tpu', np.float32(1)))
      x = np.float32(1)
      want = 2 / np.cosh(x) ** 2
      np.testing.assert_allclose(jax.jit(slope)(x), want, rtol=1e-6)

  def test_a_program_for_several_platforms_holds_them_all(self):
    names = ('mosaic_gpu', 'tpu', 'xla')
    f = jax.jit(functools.partial(self.run_op, implementation=names))
    x = np.float32([1, 2])
    exported = jax.export.export(f, platforms=('cpu', 'cuda', 'tpu'))(x)
    for function in _BY_PLATFORM.values():
      self.assertIn(f'stablehlo.{function}', exported.mlir_module())
    np.testing.assert_allclose(exported.call(x), 2 * np.tanh(x), rtol=1e-6)

  def test_without_one_for_this_platform_nothing_is_traced(self):
    with self.assertRaisesRegex(NotImplementedError, 'tpu: .* for cpu'):
      jax.jit(lambda x: self.run_op(x, ['tpu']))(np.float32([1]))

  def test_static_parts_of_operands_stay(self):
    def plan(operands):
      del operands
      return _dispatch.Plan('', lambda o: o['x'] * o['times'] + len(o['name']))

    with _with_devices('tpu'):
      out = jax.jit(
        lambda x: _dispatch.run(
          'op', {'tpu': plan, 'xla': plan}, None,
          ({'x': x, 'times': 3, 'name': 'four'},),
        )
      )(np.float32(2))  # fmt: skip
    self.assertEqual(out, 10)


class AskTest(parameterized.TestCase):
  def choose(self, **options):
    w = lowbit.quantize(jnp.ones((512, 128)), formats.mxfp4, axis=0)
    x = jnp.ones((8, 512))
    return lowbit.select_implementation('dot', x, w, **options)

  def test_of_a_platform(self):
    self.assertEqual(self.choose(platform='cpu'), self.choose())
    self.assertEqual(self.choose().implementation, 'xla')
    self.assertIn('for cpu', self.choose().refusals['tpu'])
    choice = self.choose(platform='tpu')
    self.assertEqual(choice.implementation, 'tpu')
    self.assertEqual(choice.refusals, {})
    choice = self.choose(platform='gpu')
    self.assertEqual(choice.implementation, 'xla')
    self.assertIn('for cuda', choice.refusals['tpu'])
    self.assertIn('name it', choice.refusals['mosaic_gpu'])

  def test_unknown_platforms_are_refused(self):
    with self.assertRaisesRegex(ValueError, "platform='npu'"):
      self.choose(platform='npu')


class ProductTest(absltest.TestCase):
  """The public products, lowered for a platform that is not the default."""

  def test_a_list_is_exported_with_its_kernel(self):
    w = lowbit.quantize(jnp.ones((512, 128)), formats.mxfp4, axis=0)
    x = jnp.ones((8, 512))

    def f(x):
      return lowbit.dot(x, w, implementation=['tpu', 'xla'])

    def slope(x):
      return jax.value_and_grad(lambda x: jnp.sum(f(x)))(x)

    auto = (jax.sharding.AxisType.Auto,)
    mesh = jax.make_mesh((8,), ('d',), axis_types=auto)
    split = jax.shard_map(
      f, mesh=mesh, in_specs=P('d'), out_specs=P('d'), check_vma=False
    )
    for g in (f, slope, split, lambda x: jax.vmap(f)(x[None])):
      self.assertIn('tpu_custom_call', _lowered(g, 'tpu', x))
      self.assertNotIn('tpu_custom_call', _lowered(g, 'cpu', x))
    np.testing.assert_array_equal(jax.jit(f)(x), lowbit.dot(x, w))

  def test_a_training_product_is_exported_with_its_kernel(self):
    spec = QuantSpec(formats.mxfp8_e4m3, 'rceil')
    gemm = GemmSpec(spec, spec)
    recipe = Recipe('mxfp8', gemm, gemm, gemm)
    x, w = jnp.ones((128, 128)), jnp.ones((128, 128))

    def f(x, w):
      return lowbit.qdot(x, w, recipe, implementation=['tpu', 'xla'])

    slope = jax.grad(lambda x, w: jnp.sum(f(x, w)), (0, 1))
    for g in (f, slope):
      self.assertIn('tpu_custom_call', _lowered(g, 'tpu', x, w))
      self.assertNotIn('tpu_custom_call', _lowered(g, 'cpu', x, w))


if __name__ == '__main__':
  absltest.main()
