"""What the walk reads of JAX that is not documented, in the installed version.

It was read in JAX 0.10.2 and 0.11.2. If one of these tests fails with another,
`lowbit_jax/_walk/_versions.py` or the rule of the primitive has to change.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

from lowbit_jax._walk import _products, _versions, _walker

READ_IN = '0.10.2', '0.11.2'
X = np.ones((2, 3), np.float32)
W = np.ones((2, 3, 3), np.float32)


def mesh(kind=AxisType.Auto):
  return jax.make_mesh(
    (2,), ('d',), axis_types=(kind,), devices=jax.devices()[:2]
  )


def sharded(f, **options):
  return jax.shard_map(
    f, mesh=mesh(), in_specs=P('d'), out_specs=P('d'), **options
  )


def with_jvp(f):
  f = jax.custom_jvp(f)
  f.defjvp(lambda p, t: (f(*p), t[0]))
  return f


def with_vjp(f):
  f = jax.custom_vjp(f)
  f.defvjp(lambda x: (f(x), None), lambda _, g: (g,))
  return f


def conv(x):
  return lax.conv(x[None, :, :], W[:, :2], (1,), 'SAME')


def ragged(x):
  return lax.ragged_dot(x, W, np.array([1, 1], np.int32))


def constrained(x):
  return lax.with_sharding_constraint(x, NamedSharding(mesh(), P('d')))


def resharded(x):
  return jax.sharding.reshard(x, NamedSharding(mesh(AxisType.Explicit), P('d')))


# A function in which each primitive is found, and the parameters that its rule
# reads.
PRIMITIVES = {
  'jit': (
    jax.jit(jnp.sin),
    'name jaxpr donated_invars in_shardings out_shardings',
  ),
  'remat2': (
    jax.checkpoint(jnp.sin), 'jaxpr prevent_cse policy differentiated'
  ),
  'scan': (
    lambda x: lax.scan(lambda c, x: (c + x, c), x[0], x),
    'jaxpr length reverse unroll',
  ),
  'while': (
    lambda x: lax.while_loop(lambda x: x.sum() < 3, jnp.sin, x),
    'cond_jaxpr body_jaxpr cond_nconsts body_nconsts',
  ),
  'cond': (
    lambda x: lax.cond(x[0, 0] > 0, jnp.sin, jnp.cos, x), 'branches'
  ),
  'custom_jvp_call': (with_jvp(jnp.sin), 'call_jaxpr'),
  'custom_vjp_call': (with_vjp(jnp.sin), 'call_jaxpr'),
  'shard_map': (
    sharded(jnp.sin),
    'jaxpr mesh in_specs out_specs newly_manual_axes check_vma',
  ),
  'convert_element_type': (lambda x: x.astype(jnp.bfloat16), 'new_dtype'),
  'transpose': (lambda x: x.T, 'permutation'),
  'reshape': (lambda x: x.reshape(3, 2), 'dimensions'),
  'squeeze': (lambda x: lax.squeeze(x[:1], [0]), 'dimensions'),
  'broadcast_in_dim': (lambda x: x[None], 'shape broadcast_dimensions'),
  'slice': (lambda x: x[1:], 'start_indices limit_indices strides'),
  'dynamic_slice': (
    lambda x: lax.dynamic_slice_in_dim(x, x.astype(int)[0, 0], 1), 'slice_sizes'
  ),
  'stop_gradient': (lax.stop_gradient, ''),
  'copy': (jnp.copy, ''),
  'name': (lambda x: checkpoint_name(x, 'x'), 'name'),
  'all_gather': (
    sharded(lambda x: lax.all_gather(x, 'd', tiled=True)),
    'all_gather_dimension tiled',
  ),
  'sharding_constraint': (constrained, 'sharding'),
  'reshard': (resharded, 'dst_sharding'),
  'split': (lambda x: jnp.split(x, 2), 'axis sizes'),
  'concatenate': (lambda x: jnp.concatenate([x, x]), 'dimension'),
  'optimization_barrier': (lax.optimization_barrier, ''),
  'gather': (
    lambda x: x[np.array([[1], [0]])],
    'dimension_numbers slice_sizes mode fill_value',
  ),
  'dot_general': (lambda x: x @ x.T, 'dimension_numbers precision'),
  'ragged_dot_general': (ragged, 'ragged_dot_dimension_numbers precision'),
  'conv_general_dilated': (
    conv,
    'window_strides padding lhs_dilation rhs_dilation dimension_numbers'
    ' feature_group_count batch_group_count',
  ),
}  # fmt: skip
# Other names of them, in one of the versions or in inner programs.
OTHER_NAMES = {
  'pjit', 'closed_call', 'core_call', 'checkpoint', 'remat', 'copy_p', 'pvary',
  'pcast',
}  # fmt: skip


def equations(jaxpr):
  """All equations of a program, those of inner ones too."""
  for eqn in _versions.body(jaxpr).eqns:
    yield eqn
    for inner in _versions.inner(eqn):
      yield from equations(inner)


def first(name, fn, x=X):
  """The first equation of a primitive in the program of a function."""
  found = equations(jax.make_jaxpr(fn)(x))
  return next((e for e in found if e.primitive.name == name), None)


class PrimitivesTest(parameterized.TestCase):
  def test_every_rule_is_of_a_primitive(self):
    rules = {*_walker.RULES}
    self.assertEqual(rules - {*PRIMITIVES} - OTHER_NAMES, set())
    self.assertEqual({*PRIMITIVES} - rules, set())
    self.assertLess({*_products.PRIMITIVES}, rules)

  @parameterized.parameters([*PRIMITIVES])
  def test_names_and_parameters(self, name):
    fn, parameters = PRIMITIVES[name]
    eqn = first(name, fn)
    self.assertIsNotNone(eqn, f'no {name} in {jax.make_jaxpr(fn)(X)}')
    self.assertContainsSubset(parameters.split(), eqn.params)

  def test_a_choice_of_platforms(self):
    def fn(x):
      return lax.platform_dependent(x, cpu=jnp.sin, default=jnp.cos)

    eqn = first('cond', fn)
    self.assertIsNotNone(eqn.params['branches_platforms'])
    plain = first('cond', PRIMITIVES['cond'][0])
    self.assertIsNone(plain.params.get('branches_platforms'))

  def test_ragged_dot(self):
    self.assertTrue(
      _products._is_ragged_dot(first('ragged_dot_general', ragged).params)
    )


class VersionsTest(parameterized.TestCase):
  def test_names_the_versions(self):
    for version in READ_IN:
      self.assertIn(version, _versions.__doc__)

  def test_bodies_and_constants(self):
    table = jnp.arange(3.0)
    jaxpr = jax.make_jaxpr(lambda x: x + table)(X)
    body = _versions.body(jaxpr)
    self.assertLen(_versions.constants(jaxpr), len(body.constvars))
    self.assertIs(_versions.body(body), body)
    self.assertLen(body.invars, 1)
    self.assertLen(body.outvars, 1)

  @parameterized.parameters(
    ('jit', 1), ('remat2', 1), ('scan', 1), ('while', 2), ('cond', 2),
    ('custom_jvp_call', 1), ('custom_vjp_call', 1), ('shard_map', 1),
    ('dot_general', 0),
  )  # fmt: skip
  def test_inner_programs(self, name, count):
    inner = _versions.inner(first(name, PRIMITIVES[name][0]))
    self.assertLen(inner, count)
    for jaxpr in inner:
      self.assertNotEmpty(_versions.body(jaxpr).eqns)

  def test_scopes(self):
    def fn(x):
      with jax.named_scope('block'), jax.named_scope('mlp'):
        return jnp.sin(x)

    self.assertEqual(_versions.scope(first('sin', fn)), 'block/mlp')
    self.assertEqual(_versions.scope(first('sin', jnp.sin)), '')
    (jvp,) = (
      e for e in equations(jax.make_jaxpr(jax.grad(lambda x: fn(x).sum()))(X))
      if e.primitive.name == 'cos'
    )  # fmt: skip
    self.assertEqual(_versions.scope(jvp), 'jvp(block)/mlp')

  def test_place(self):
    def fn(x):
      with jax.named_scope('block'):
        return x @ x.T

    eqn = first('dot_general', fn)

    def again(x):
      with jax.named_scope('outside'), _versions.place(eqn):
        return jnp.matmul(x, x.T)

    made = first('dot_general', again)
    self.assertEqual(_versions.scope(made), 'outside/block')
    traceback = made.source_info.traceback
    self.assertEqual(traceback, eqn.source_info.traceback)

  @parameterized.parameters(
    'jit', 'remat2', 'scan', 'while', 'cond', 'custom_jvp_call',
    'custom_vjp_call', 'shard_map', 'split', 'gather', 'ragged_dot_general',
  )  # fmt: skip
  def test_bind(self, name):
    """An equation bound again is the same equation."""
    eqn = first(name, PRIMITIVES[name][0])
    shapes = [
      jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in eqn.invars
    ]
    again = jax.make_jaxpr(functools.partial(bound, eqn))(*shapes)
    (made,) = _versions.body(again).eqns
    self.assertEqual(made.primitive, eqn.primitive)
    self.assertEqual({*made.params}, {*eqn.params})
    self.assertEqual(
      [v.aval for v in made.outvars], [v.aval for v in eqn.outvars]
    )

  def test_unspecified_shardings(self):
    sharding = NamedSharding(mesh(), P())
    stated = jax.jit(jnp.sin, in_shardings=sharding, out_shardings=sharding)
    for fn, expected in (jax.jit(jnp.sin), True), (stated, False):
      params = first('jit', fn).params
      for name in ('in_shardings', 'out_shardings'):
        (found,) = params[name]
        self.assertEqual(_versions.is_unspecified(found), expected)

  def test_donated(self):
    fn = jax.jit(lambda x, y: x + y, donate_argnums=1)
    eqn = first('jit', lambda x: fn(x, 2 * x))
    self.assertEqual(tuple(eqn.params['donated_invars']), (False, True))

  def test_differentiated(self):
    def fn(x):
      return jax.checkpoint(lambda x: jnp.sin(jnp.sin(x)))(x).sum()

    for f, expected in (fn, [False]), (jax.grad(fn), [True]):
      found = [
        e.params[_versions.DIFFERENTIATED]
        for e in equations(jax.make_jaxpr(f)(X))
        if e.primitive.name == 'remat2'
      ]
      self.assertEqual(found, expected)

  def test_scanned(self):
    """Constants and carries of any rank."""

    def fn(x):
      total = x.sum()

      def step(carry, each):
        a, b = carry
        return (a + each.sum() * total, b + x), each

      return lax.scan(step, (total, x), x)

    self.assertEqual(_versions.scanned(first('scan', fn)), (2, 2))
    self.assertEqual(
      _versions.scanned(first('scan', PRIMITIVES['scan'][0])), (0, 1)
    )

  def test_types_have_shardings(self):
    m = mesh(AxisType.Explicit)
    with jax.set_mesh(m):
      x = jax.device_put(X, NamedSharding(m, P('d')))
      (out,) = jax.make_jaxpr(jnp.sin)(x).out_avals
    self.assertEqual(out.sharding.spec, P('d', None))
    self.assertIn(AxisType.Explicit, out.sharding.mesh.axis_types)
    (out,) = jax.make_jaxpr(jnp.sin)(X).out_avals
    self.assertNotIn(AxisType.Explicit, out.sharding.mesh.axis_types)


def bound(eqn, *values):
  return _versions.bind(eqn, values)


if __name__ == '__main__':
  absltest.main()
