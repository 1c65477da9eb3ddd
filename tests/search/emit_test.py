"""Emitted code against strict float32, exact fused products, and itself."""

import dataclasses
import functools
import itertools
import shutil
from unittest import mock

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest
from absl.testing import absltest, parameterized
from scipy import special

from lowbit_jax.search import certify, emit, polish, targets
from lowbit_jax.search.program import (
  ABS,
  ADD,
  DIV,
  FMA,
  MAX,
  MIN,
  MUL,
  OPS,
  SQRT,
  SUB,
  Degenerate,
  Program,
  canonical,
)
from lowbit_jax.search.targets import Target
from lowbit_pallas.arith import elementary

_F = np.float32
_MAGIC = 1.5 * 2**23
_COMPILER = 'cc' if shutil.which('cc') else None
_PROVENANCE = certify.Provenance(command='evolve "x" */ --a=\\b', seed=7)
_MINE = Target('mine', lambda x: x, (0.5, 2.0))

# c1 / (u + c2 + c3 / u) + c5 for u = x + c4 / x: 2^x on [-1/2, 1/2].
_SYMMETRIC = Program(
  ((DIV, 4, 0, 0), (ADD, 0, 6, 0), (DIV, 3, 7, 0), (ADD, 7, 8, 0),
   (ADD, 2, 9, 0), (DIV, 1, 10, 0), (ADD, 5, 11, 0)),
  (62.65316508, -31.32658254, 236.7287941, 90.38941057, 1.0),
)  # fmt: skip
_EXP2 = dataclasses.replace(
  targets.get('exp2'), interval=(-0.5, 0.5), wrapper=None
)


def _random(rng, ops, rows) -> Program:
  """A canonical program that XLA may be asked for."""
  while True:
    k = int(rng.integers(1, 4))
    lines = []
    for i in range(rows):
      op = int(rng.choice(ops))
      operands = rng.integers(0, 1 + k + i, 3)
      operands[OPS[op].arity :] = 0
      lines.append((op, *map(int, operands)))
    constants = rng.integers(2**11, 2**12, k) * 2.0**-11
    try:
      program = canonical(Program(tuple(lines), tuple(constants.tolist())))
    except Degenerate:
      continue
    if len(program.rows) > 1:
      return program


def _short() -> np.ndarray:
  """float32 with 12 bits, of which products are exact."""
  rng = np.random.default_rng(1)
  return (rng.integers(2**11, 2**12, 2048) * 2.0**-11).astype(_F)


def _contracts(program) -> bool:
  """Whether it has a product in a sum."""
  first = 1 + len(program.constants)
  return any(
    op in (ADD, SUB) and j >= first and program.rows[j - first][0] == MUL
    for op, *operands in program.rows
    for j in operands[:2]
  )


def _all_of(fns, x) -> list[np.ndarray]:
  """Results of functions in one executable, of an argument each.

  Of one argument the functions would share what they have in common.
  """
  run = jax.jit(lambda *xs: [fn(x) for fn, x in zip(fns, xs, strict=True)])
  return [np.asarray(y) for y in run(*[x] * len(fns))]


def _share_of_differing(y, expected) -> float:
  return float(np.mean((y != expected) & ~(np.isnan(y) & np.isnan(expected))))


def _differing(fn, x, expected) -> float:
  return _share_of_differing(*_all_of([fn], x), expected)


# Sweeps are of 2^16 inputs here: the default chunk would cost more than they.
_CHUNK = mock.patch.object(certify, 'CHUNK', 2**17)


def setUpModule():
  _CHUNK.start()


def tearDownModule():
  _CHUNK.stop()


class StrictTest(parameterized.TestCase):
  def test_fma_is_rounded_once(self):
    rng = np.random.default_rng(0)
    a, b, c = rng.normal(size=(3, 2000)).astype(_F)
    c = np.where(rng.random(2000) < 0.5, c, -a * b)  # cancels
    # Near a tie of float32 that float64 rounds to the tie itself.
    up, down = _F(1 + 2.0**-23), _F(1 - 2.0**-23)
    a = np.r_[a, up, up, -up, 2, np.inf].astype(_F)
    b = np.r_[b, 2.0**-24 * np.array([down, up, down]), 3, 1].astype(_F)
    c = np.r_[c, up, 1, -up, 4, 1].astype(_F)
    program = Program(((FMA, 0, 1, 2),), (0.0, 0.0))
    with mpmath.workprec(300):
      exact = [
        mpmath.mpf(float(u)) * float(v) + float(w)
        for u, v, w in zip(a, b, c, strict=True)
      ]
    with mpmath.workprec(24):
      expected = np.array([float(+v) for v in exact])
    y = [
      emit.strict(program.replace_constants([v, w]), np.array([u]))[0]
      for u, v, w in zip(a, b, c, strict=True)
    ]
    np.testing.assert_array_equal(y, expected.astype(_F))
    twice = (a.astype(np.float64) * b + c).astype(_F)
    self.assertTrue(np.any(twice != expected))  # such inputs are among these


class FenceTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    if jax.default_backend() != 'cpu':
      self.skipTest('the rules are those of the CPU backend')

  @parameterized.named_parameters(
    ('sums', ((ADD, 0, 1, 0), (ADD, 3, 2, 0)), (0.7, 1.3)),
    ('a difference', ((SUB, 1, 0, 0), (ADD, 2, 3, 0)), (0.7, 1.3)),
    ('products', ((MUL, 0, 1, 0), (MUL, 3, 2, 0)), (0.7, 1.3)),
    ('reciprocals', ((DIV, 1, 0, 0), (DIV, 1, 2, 0)), (1.0,)),
    ('quotients', ((ADD, 0, 1, 0), (DIV, 0, 2, 0), (DIV, 3, 0, 0)), (0.7,)),
    ('a quotient below', ((ADD, 0, 1, 0), (DIV, 0, 2, 0), (DIV, 2, 3, 0)),
     (0.7,)),
    ('a root', ((SQRT, 0, 0, 0), (DIV, 1, 2, 0)), (0.7,)),
    ('rounding', ((MUL, 0, 1, 0), (ADD, 4, 2, 0), (SUB, 5, 2, 0),
                  (SUB, 4, 6, 0)), (32.0, _MAGIC, 1.0)),
  )  # fmt: skip
  def test_keeps(self, rows, constants):
    program = Program(rows, constants)
    x = np.random.default_rng(0).uniform(0.5, 2, 4096).astype(_F)
    expected = emit.strict(program, x)
    emitted, bare = _all_of([emit.function(program, _MINE), program], x)
    self.assertEqual(_share_of_differing(emitted, expected), 0)
    emit.check(program, _MINE)
    self.assertGreater(
      _share_of_differing(bare, expected),
      0.1,
      f'JAX {jax.__version__} no longer rewrites this; fences may go',
    )

  def test_a_product_with_a_sum_after_it_is_scaled_alone(self):
    # (x c) d + e: the product is one with a constant twice.
    program = Program(((MUL, 0, 1, 0), (FMA, 4, 2, 3)), (0.7, 1.3, 0.1))
    self.assertEqual(emit._fences(program), {0})

  def assert_strict(self, programs, x):
    results = _all_of([emit.function(p, _MINE) for p in programs], x)
    for program, y in zip(programs, results, strict=True):
      expected = emit.strict(program, x)
      self.assertEqual(_share_of_differing(y, expected), 0, str(program))

  def test_no_other_pair_is_rewritten(self):
    pairs = itertools.product(
      (ADD, SUB, MUL, DIV), ((0, 0), (0, 1), (1, 0)),
      (ADD, SUB, MUL, DIV, MIN, ABS), ((3, 0), (0, 3), (3, 2), (2, 3), (3, 3)),
    )  # fmt: skip
    # Twelve bits and products within 24: sums of products are exact too.
    x, programs = _short(), []
    for op, a, then, b in pairs:
      rows = ((op, *a, 0), (then, *b[: OPS[then].arity], 0, 0)[:4])
      try:
        program = canonical(Program(rows, (1.31298828125, 0.70263671875)))
      except Degenerate:
        continue
      short = all((c * 2**11).is_integer() for c in program.constants)
      if short and len(program.rows) == 2 and program not in programs:
        programs.append(program)
    self.assert_strict(programs[::6], x)
    self.assertGreater(len(programs[::6]), 15)

  def test_no_longer_program_is_rewritten(self):
    rng, programs = np.random.default_rng(2), []
    while len(programs) < 20:
      program = _random(rng, (ADD, SUB, MUL, DIV, SQRT, ABS, MIN, MAX), 5)
      if not _contracts(program):
        programs.append(program)
    self.assert_strict(programs, _short())

  def test_is_the_same_inside_a_larger_program(self):
    program = Program(((ADD, 0, 1, 0), (MUL, 3, 3, 0), (ADD, 4, 2, 0)),
                      (0.7, 1.3))  # fmt: skip
    fn = emit.function(program, _MINE)
    emitted = emit.load_python(emit.python(program, _MINE), 'mine')
    x = np.random.default_rng(0).uniform(0.5, 2, 4096).astype(_F)
    expected = np.asarray(jax.jit(fn)(x + _F(0.1))) + _F(0.2)
    larger = lambda fn: lambda x: fn(x + _F(0.1)) + _F(0.2)
    self.assertEqual(_differing(larger(fn), x, expected), 0)
    self.assertEqual(_differing(larger(emitted), x, expected), 0)
    with mock.patch.object(emit, '_fence', lambda v: v):
      bare = emit.function(program, _MINE)
      self.assertGreater(_differing(larger(bare), x, expected), 0.1)


class EmitTest(parameterized.TestCase):
  def assert_reads_back_the_same(self, seed):
    rng = np.random.default_rng(seed)
    program = _random(rng, range(len(OPS)), 6)
    parity = (None, 'root', 'even', 'odd')[seed % 4]
    offset = 0.3 if parity in ('even', 'odd') and seed > 6 else 0.0
    interval = (-1.5, 1.5) if parity else (-1.0, 3.0)
    target = Target('mine', lambda x: x, interval, parity=parity, offset=offset)
    emit.check(program, target, inputs=2**12, compiler=_COMPILER)

  # Every parity, and offsets with those that may have one.
  @parameterized.parameters(0, 1, 10, 11)
  def test_reads_back_the_same(self, seed):
    self.assert_reads_back_the_same(seed)

  @parameterized.parameters(*range(2, 10))
  @pytest.mark.slow
  def test_reads_back_the_same_again(self, seed):
    self.assert_reads_back_the_same(seed)

  @parameterized.parameters(
    ('_PYTHON', SUB, '{1} - {0}'),
    ('_PYTHON', DIV, '{0} * (1 / {1})'),
    ('_C', FMA, '{} * {} + {}'),
    ('_C', MIN, '{0} < {1} ? {1} : {0}'),
  )
  def test_finds_a_fault(self, table, op, template):
    if table == '_C' and _COMPILER is None:
      self.skipTest('no C compiler')
    program = Program(
      ((SUB, 1, 0, 0), (DIV, 3, 0, 0), (FMA, 4, 0, 2), (MIN, 4, 5, 0)),
      (1.25, 0.1),
    )
    emit.check(program, _MINE, compiler=_COMPILER)
    with mock.patch.dict(getattr(emit, table), {op: template}):
      with self.assertRaisesRegex(emit.Mismatch, 'results differ'):
        emit.check(program, _MINE, compiler=_COMPILER)

  def test_constants_keep_all_digits(self):
    program = Program(((ADD, 0, 1, 0), (MUL, 0, 3, 0)), (1 / 3, -(2.0**-140)))
    source = emit.python(program, _MINE)
    self.assertIn("_C1 = float.fromhex('0x1.555556p-2')", source)
    self.assertIn("_C2 = float.fromhex('-0x1p-140')", source)
    self.assertIn('c1 = 0x1.555556p-2f;', emit.c99(program, _MINE))

  def test_x_itself(self):
    emit.check(Program(()), _MINE, compiler=_COMPILER)

  def test_derivatives_at_the_zero_of_a_quotient(self):
    exp2 = emit.load_python(emit.python(_SYMMETRIC, _EXP2), 'exp2')
    log2 = float(np.log(2))
    x = np.array([0.0, 0.25, -0.5], _F)
    orders = (exp2, jax.grad(exp2), jax.grad(jax.grad(exp2)))
    for order, result in enumerate(_all_of([*map(jax.vmap, orders)], x)):
      np.testing.assert_allclose(result, log2**order * np.exp2(x), rtol=3e-6)
    forward = jax.jit(lambda x, dx: jax.jvp(exp2, (x,), (dx,)))
    y, tangent = forward(x, np.ones_like(x))
    np.testing.assert_allclose(tangent, log2 * np.exp2(x), rtol=3e-6)
    self.assertEqual(y[0], 1)
    plain = dataclasses.replace(_EXP2, derivative=None)
    bare = emit.load_python(emit.python(_SYMMETRIC, plain), 'exp2')
    self.assertTrue(np.isnan(jax.jit(jax.grad(bare))(_F(0))))

  @parameterized.parameters(*targets.TARGETS)
  def test_every_target_has_its_derivative(self, name):
    target = dataclasses.replace(targets.get(name), wrapper=None)
    program = Program(((ADD, 0, 1, 0),), (1.0,))
    fn = emit.load_python(emit.python(program, target), name)

    @jax.jit
    def both(x):
      f, slope = jax.value_and_grad(fn)(x)
      if target.derivative is None:
        return slope, 1.0
      names = {'x': x, 'f': f, 'jnp': jnp, 'lax': jax.lax}
      return slope, eval(target.derivative, names)

    np.testing.assert_allclose(*both(_F(0.75)), rtol=1e-6)

  @parameterized.parameters(
    ('exp', (-80, 80), 1e-6), ('exp2', (-120, 120), 1e-6),
    ('log2', (1.5, 1e30), 1e-4), ('sin', (-1.5, 1.5), 1e-6),
    ('cos', (-9e4, -8e4), 1e-4), ('tanh', (-40, -9), 1e-6),
    ('erf', (-30, 30), 0.05),
  )  # fmt: skip
  def test_wrappers(self, name, wide, error):
    target = targets.get(name)
    if not targets.is_wrappable(target):
      target = dataclasses.replace(target, interval=target.reduced)
    s = targets.samples(target, points=80)
    powers = s.x[:, None] ** np.arange(8)
    constants = np.linalg.lstsq(powers * s.w[:, None], s.f * s.w)[0]
    rows = [(FMA, 0, 8, 7), *((FMA, 0, 9 + i, 6 - i) for i in range(6))]
    program = Program(tuple(rows), tuple(constants.tolist()))
    fn = emit.load_python(emit.python(program, target), name)
    x = np.linspace(*wide, 1001).astype(_F)
    oracle = special.erf if name == 'erf' else getattr(np, name)
    f = oracle(x.astype(np.float64))
    np.testing.assert_allclose(jax.jit(fn)(x), f, rtol=error)

  def test_takes_float32(self):
    fn = emit.load_python(emit.python(_SYMMETRIC, _EXP2), 'exp2')
    self.assertEqual(fn(0.0), 1)
    with self.assertRaisesRegex(TypeError, 'x has dtype bfloat16; exp2 takes'):
      fn(jnp.ones(3, jnp.bfloat16))

  def test_refuses(self):
    half = Program(((DIV, 0, 1, 0),), (2.0,))
    with self.assertRaisesRegex(
      ValueError, r'rows\[0\].*divides by a constant'
    ):
      emit.function(half, _MINE)
    with self.assertRaisesRegex(ValueError, 'must be finite in float32'):
      emit.function(Program(((ADD, 0, 1, 0),), (1e39,)), _MINE)
    with self.assertRaisesRegex(ValueError, r'does not cover \(-0.5, 0.5\)'):
      emit.python(_SYMMETRIC, targets.get('exp2'))
    local = dataclasses.replace(
      _MINE, wrapper=lambda core: core, reduced=(1.0, 2.0)
    )
    with self.assertRaisesRegex(ValueError, 'has no name to import it by'):
      emit.python(_SYMMETRIC, local)
    with self.assertRaisesRegex(FileNotFoundError, "compiler='no-such-cc'"):
      emit.load_c('', 'mine', 'no-such-cc')

  @parameterized.parameters(
    'lax', 'jax', 'jnp', '_core', '_fence', '_jvp', '_C1', 'x', 'u1', 'f', 't',
    'slope', 'primals', 'tangents', 'float', 'TypeError', 'elementary',
  )  # fmt: skip
  def test_names_that_the_code_uses(self, name):
    target = dataclasses.replace(
      targets.get('exp2'), interval=(-0.5, 0.5), name=name
    )
    with self.assertRaisesRegex(ValueError, f"name='{name}' of the target is"):
      emit.python(_SYMMETRIC, target)
    source = emit.c99(_SYMMETRIC, target)
    self.assertIn(f'float lowbit_{name}(float x)', source)

  @parameterized.parameters('lambda', 'None', 'π', '2x')
  def test_names_that_no_function_can_have(self, name):
    with self.assertRaisesRegex(ValueError, 'ASCII identifier of Python'):
      dataclasses.replace(_MINE, name=name)

  def test_c_that_does_not_compile(self):
    if _COMPILER is None:
      self.skipTest('no C compiler')
    with self.assertRaisesRegex(ValueError, r'-ffp-contract=off .* fails: '):
      emit.load_c('float x(', 'mine')


class CertifiedTest(parameterized.TestCase):
  """From a polynomial to source: 2^x over all float32."""

  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    # Horner's rule with fma, c_0 = 1 fixed: 2^0 must be 1.
    degree = 6
    rows = [(FMA, 0, degree + 1, degree)]
    rows += [
      (FMA, 0, degree + 2 + i, degree - 1 - i) for i in range(degree - 1)
    ]
    program = Program(tuple(rows), (1.0,) * (degree + 1))

    def model(x, c):
      y, jacobian = targets.model(program)(x, np.r_[np.longdouble(1), c])
      return y, jacobian[:, 1:]

    cls.target = dataclasses.replace(targets.get('exp2'), interval=(-0.5, 0.5))
    fit = polish.minimax(
      model,
      np.exp2,
      targets.core_interval(cls.target),
      [0.0] * degree,
      weight=targets.core_weight(cls.target),
    )
    cls.program = program.replace_constants([1.0, *fit.constants])

  def _certify(self, fn, **changes):
    arguments = {
      'name': 'exp2',
      'reference': np.exp2,
      'exact': self.target.exact,
      'interval': (-125.9, 127.5),
      'tier': '2^16',
      'provenance': _PROVENANCE,
      'program': self.program,
    }
    return certify.certify(fn, **{**arguments, **changes})

  def assert_names_a_sample(self, source, certificate):
    words = ' '.join(source.split())
    found = f'The largest error that was found is {certificate.max_ulp:.4f} ULP'
    self.assertIn(found, words)
    self.assertIn(f'sample of {certificate.n_inputs} inputs (2^16)', words)
    self.assertNotIn('at most', words)

  def test_a_bound_is_of_every_input(self):
    certificate = self._certify(
      emit.function(self.program, self.target),
      interval=(1.0, 1.01),
      tier='all',
    )
    words = ' '.join(
      emit.python(self.program, self.target, certificate).split()
    )
    self.assertIn(f'at most {certificate.max_ulp:.4f} ULP', words)
    self.assertIn(f'on every input, {certificate.n_inputs},', words)

  def test_python(self):
    certificate = self._certify(emit.function(self.program, self.target))
    self.assertLess(certificate.max_ulp, 1)
    emit.check(self.program, self.target, compiler=_COMPILER)
    source = emit.python(self.program, self.target, certificate)
    self.assert_names_a_sample(source, certificate)
    self.assertIn('from lowbit_pallas.arith import elementary', source)
    self.assertLessEqual(max(map(len, source.splitlines())), 80)
    exp2 = emit.load_python(source, 'exp2')
    self.assertIn('evolve "x" */ --a=\\b', exp2.__doc__)
    certify.check(certificate, exp2, np.exp2)
    x = np.array([-np.inf, -200, -0.0, 3, 200, np.inf, np.nan], _F)
    y = jax.jit(exp2)(x)
    np.testing.assert_array_equal(y, [0, 0, 1, 8, np.inf, np.inf, np.nan])

  def test_constants_as_arguments_can_be_polished(self):
    fn = emit.with_constants(self.program, self.target)
    x = np.linspace(-20, 20, 1001, dtype=_F)
    constants = np.array([float(c) for c in self.program.constants], _F)
    np.testing.assert_array_max_ulp(
      np.asarray(jax.jit(fn)(constants, x)),
      np.asarray(jax.jit(emit.function(self.program, self.target))(x)),
      1,
    )
    worse = constants * _F(1 + 1e-6)
    fit = polish.float32_coefficients(
      fn, worse, np.exp2, (-20, 20), samples=2**12, evaluations=60
    )
    start = certify.ulp_error(
      np.asarray(jax.jit(fn)(worse, x)), np.exp2(x * 1.0)
    )
    self.assertLess(fit.error, np.max(start) - 1)

  def test_c_has_a_certificate_of_its_own(self):
    if _COMPILER is None:
      self.skipTest('no C compiler')
    emitted = emit.load_c(emit.c99(self.program, self.target), 'exp2')
    interval = self.target.interval
    certificate = self._certify(emitted, interval=interval)
    self.assertLess(certificate.max_ulp, 1)
    self.assertIn('-ffp-contract=off', certificate.environment.backend)
    self.assertEqual(certificate.hlo, emitted.fingerprint)
    text = certificate.to_json()
    self.assertEqual(certify.Certificate.from_json(text), certificate)
    certify.check(certificate, emitted, np.exp2)
    source = emit.c99(self.program, self.target, certificate)
    self.assert_names_a_sample(source, certificate)
    again = emit.load_c(source, 'exp2')
    x = np.linspace(-0.5, 0.5, 1000, dtype=_F)
    np.testing.assert_array_equal(again(x), emitted(x))
    with self.assertRaises(certify.Refuted):
      self._certify(
        emitted,
        interval=interval,
        reference=lambda x: np.exp2(x) + 1e-6,
        exact=lambda x: self.target.exact(x) + 1e-6,
      )

  def test_refuses_a_certificate_of_another_program(self):
    certificate = self._certify(emit.function(self.program, self.target))
    other = self.program.replace_constants(
      [c * (1 + 1e-6) for c in self.program.constants]
    )
    with self.assertRaisesRegex(ValueError, 'is for another program'):
      emit.python(other, self.target, certificate)
    # Digits beyond float32 make no other program.
    emit.python(
      self.program.replace_constants(
        np.float32([float(c) for c in self.program.constants]).tolist()
      ),
      self.target,
      certificate,
    )

  def test_wrapper_with_arguments(self):
    clamp = functools.partial(elementary.odd_clamp, limit=0.5)
    target = Target(
      'mine', lambda x: x, (-0.5, 0.5), parity='odd', wrapper=clamp,
      reduced=(0.0, 0.5),
    )  # fmt: skip
    source = emit.python(Program(((ADD, 0, 1, 0),), (1.0,)), target)
    self.assertIn('elementary.odd_clamp(_core, limit=0.5)', source)
    fn = emit.load_python(source, 'mine')
    np.testing.assert_allclose(
      jax.jit(fn)(_F([-2, 0.25])), [-1, 0.25 + 0.25**3]
    )


if __name__ == '__main__':
  absltest.main()
