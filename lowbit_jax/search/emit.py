"""Source code of a program, in Python for JAX and in C99.

The printed code is the code that a certificate measures. XLA rewrites float
algebra, also across the border of a function that is inlined. Where it would do
so, a value is fenced by `lax.reduce_precision(v, 8, 23)`: the argument,
the result, and every value of which the next operation would be rewritten,
that is

  (x + c) + d,  (x * c) * d    for constants c and d, and with differences
  (x / y) / z,  x / (y / z),  x / sqrt(y)

Other values are not fenced, since fences there keep loops slow. No fence stops
LLVM from contracting a * b + c to one rounding; a JAX program asks for that
wherever it has a product in a sum. C is compiled with -ffp-contract=off and
rounds once where the program has an fma, and nowhere else. So the two may
differ in their last digits, and each has a certificate of its own.
"""

import ast
import ctypes
import dataclasses
import functools
import hashlib
import pathlib
import shlex
import shutil
import subprocess
import tempfile
import textwrap
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from lowbit_jax.search import certify, targets
from lowbit_jax.search.certify import Certificate
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
  Program,
)
from lowbit_jax.search.targets import Target

_FLAGS = ('-std=c99', '-O2', '-ffp-contract=off')
_PYTHON = {
  ADD: '{} + {}',
  SUB: '{} - {}',
  MUL: '{} * {}',
  DIV: '{} / {}',
  FMA: '{} * {} + {}',
  SQRT: 'jnp.sqrt({})',
  ABS: 'jnp.abs({})',
  MIN: 'jnp.minimum({}, {})',
  MAX: 'jnp.maximum({}, {})',
}
_C = {
  **_PYTHON,
  FMA: 'fmaf({}, {}, {})',
  SQRT: 'sqrtf({})',
  ABS: 'fabsf({})',
  # A NaN of either operand is the result, as in NumPy and JAX.
  MIN: '{0} != {0} || {0} < {1} ? {0} : {1}',
  MAX: '{0} != {0} || {0} > {1} ? {0} : {1}',
}


class Mismatch(ValueError):
  """Emitted code does not compute what its program does."""


def function(program: Program, target: Target) -> Callable:
  """The JAX function of a core program with its fences, to be certified.

  Args:
    program: the core.
    target: whose parity and wrapper it gets.

  Returns:
    Function of float32 arrays: of all of them if the target has a wrapper, of
    those in its interval otherwise.

  Raises:
    ValueError: if the program divides by a constant, which XLA would turn into
      a product, or the target has a wrapper that calls the core outside of the
      interval.
  """
  constants = _float32(program.constants)
  return functools.partial(with_constants(program, target), constants)


def with_constants(program: Program, target: Target) -> Callable:
  """As `function`, of constants (K,) and x, for `float32_coefficients`."""
  whole = _whole(program, target)
  fences = _fences(whole)
  rest = whole.constants[len(program.constants) :]

  def fn(constants, x):
    def core(z):
      # Compare `program.evaluate`, which has no fences.
      registers = [z, *constants, *rest]
      for i, (op, *operands) in enumerate(whole.rows):
        arguments = (registers[j] for j in operands[: OPS[op].arity])
        value = OPS[op].value(jnp, *arguments)
        registers.append(_fence(value) if i in fences else value)
      return registers[-1] if whole.rows else z

    inner = core if target.wrapper is None else target.wrapper(core)
    return _fence(inner(_fence(x)))

  return fn


def _fence(value):
  return lax.reduce_precision(value, 8, 23)


def _whole(program, target) -> Program:
  """The program of x with float32 constants."""
  if target.wrapper is not None and not targets.is_wrappable(target):
    raise ValueError(
      f'interval={target.interval} of {target.name} does not cover'
      f' {target.reduced}, on which its wrapper calls the core; search there,'
      ' or use dataclasses.replace(target, wrapper=None)'
    )
  whole = targets.assemble(target, program)
  constants = range(1, 1 + len(whole.constants))
  for i, (op, _, b, _) in enumerate(whole.rows):
    if op == DIV and b in constants:
      raise ValueError(
        f'rows[{i}] of the program divides by a constant, which XLA turns into'
        ' a product; use canonical(program)'
      )
  return whole.replace_constants(_float32(whole.constants))


def _whole_core(program, target) -> Program:
  return _whole(program, dataclasses.replace(target, wrapper=None))


def _float32(constants) -> tuple[float, ...]:
  with np.errstate(over='ignore'):
    values = np.array([float(c) for c in constants]).astype(np.float32)
  if not np.all(np.isfinite(values)):
    raise ValueError(f'constants={constants} must be finite in float32')
  return tuple(values.tolist())


def _fences(whole: Program) -> set[int]:
  """Rows that XLA would merge with a row that uses them."""
  first = 1 + len(whole.constants)
  constant = range(1, first)

  def sums(op, operands):
    """Whether the row ends by adding a constant."""
    if op == FMA:
      return operands[2] in constant
    return op in (ADD, SUB) and any(j in constant for j in operands[:2])

  def scales(op, operands):
    """Whether the row begins with a product with a constant."""
    return op in (MUL, FMA) and any(j in constant for j in operands[:2])

  fences = set()
  for op, *operands in whole.rows:
    for j in operands[: OPS[op].arity]:
      if j < first:
        continue
      inner, *inside = whole.rows[j - first]
      if (
        (op != FMA and sums(op, operands) and sums(inner, inside))
        or (inner != FMA and scales(op, operands) and scales(inner, inside))
        or (op == DIV and inner in (DIV, SQRT))
      ):
        fences.add(j - first)
  return fences


def python(
  program: Program, target: Target, certificate: Certificate | None = None
) -> str:
  """Python source of `function(program, target)`, named after the target.

  The function takes float32 arrays and has the derivative that the target
  states, which is right also where that of the program is NaN, as for c / x at
  zero. It imports JAX and, for a wrapper, the module of that.

  Args:
    program: the core.
    target: its function.
    certificate: of `function(program, target)`, to sum up; or None.

  Raises:
    ValueError: as `function`, or if the certificate is one of another program,
      the wrapper is not importable by name, or the target has a name that the
      code gives to something else.
  """
  whole = _whole(program, target)
  fences = _fences(whole)
  imports, expression = _imported(target.wrapper)
  names = ['x', *(f'_C{i}' for i in range(1, 1 + len(whole.constants)))]
  lines = []
  for i, text in enumerate(_expressions(whole, _PYTHON, names)):
    lines.append(f'u{i + 1} = ' + (f'_fence({text})' if i in fences else text))
  lines.append(f'return {names[-1] if whole.rows else "x"}')
  summary = _summary(program, target, certificate, 'of float32 arrays')
  constants = ''.join(
    f"_C{i} = float.fromhex('{_hex(c)}')\n"
    for i, c in enumerate(whole.constants, 1)
  )

  def source(name):
    return _PYTHON_SOURCE.format(
      imports=''.join(f'{line}\n' for line in imports if line != _LAX),
      constants=constants,
      core=''.join(f'  {line}\n' for line in lines),
      decorator='' if target.derivative is None else '@jax.custom_jvp\n',
      name=name,
      summary=summary.replace('\\', r'\\').replace('"', r'\"'),
      expression=expression,
      rule=_rule(name, target.derivative),
    )

  _check_name(target.name, source('_function'))
  return source(target.name)


def _check_name(name, source):
  """The source, of a function by another name, must not use this one."""
  taken = set()
  for node in ast.walk(ast.parse(source)):
    match node:
      case ast.Name(id=word) | ast.arg(arg=word) | ast.FunctionDef(name=word):
        taken.add(word)
      case ast.alias():
        taken.add(node.asname or node.name)
  if name in taken:
    raise ValueError(
      f'name={name!r} of the target is one that the code uses for something'
      ' else; choose another by dataclasses.replace(target, name=...)'
    )


_LAX = 'from jax import lax'
_PYTHON_SOURCE = """import jax
import jax.numpy as jnp
from jax import lax
{imports}
{constants}

def _fence(v):
  # Keeps XLA from merging the arithmetic before v with that after it.
  return lax.reduce_precision(v, 8, 23)


def _core(x):
{core}

{decorator}def {name}(x):
  \"""{summary}\"""
  x = jnp.asarray(x)
  if x.dtype != jnp.float32:
    raise TypeError(f'x has dtype {{x.dtype}}; {name} takes float32')
  return _fence({expression}(_fence(x)))
{rule}"""


def _rule(name: str, derivative: str | None) -> str:
  if derivative is None:
    return ''
  slope = textwrap.fill(
    derivative, 76, initial_indent='    ', subsequent_indent='    '
  )
  slope = f'(\n{slope}\n  )' if '\n' in slope else slope.strip()
  return f"""

@{name}.defjvp
def _jvp(primals, tangents):
  (x,), (t,) = primals, tangents
  f = {name}(x)
  slope = {slope}
  return f, slope * t
"""


def c99(
  program: Program, target: Target, certificate: Certificate | None = None
) -> str:
  """C99 source of the program on the interval of the target, without wrapper.

  It defines `float lowbit_NAME(float x)` for NAME of the target.

  Args:
    program: the core.
    target: its function.
    certificate: of `load_c(...)` of this source without one; or None.

  Raises:
    ValueError: as `python`, wrappers aside.

  Examples:
    >>> from lowbit_jax.search.program import MUL
    >>> target = Target('square', lambda x: x * x, (0.5, 1.0))
    >>> print(c99(Program(((MUL, 0, 0, 0),)), target), end='')
    /* square of a float, from 1 operations, for x from 0.5 to 1.
      Compile with -std=c99 -O2 -ffp-contract=off.
    */
    <BLANKLINE>
    #include <math.h>
    <BLANKLINE>
    float lowbit_square(float x) {
      const float u1 = x * x;
      return u1;
    }
  """
  whole = _whole_core(program, target)
  names = ['x', *(f'c{i}' for i in range(1, 1 + len(whole.constants)))]
  lines = [
    f'static const float c{i} = {_hex(value)}f;'
    for i, value in enumerate(whole.constants, 1)
  ]
  for i, text in enumerate(_expressions(whole, _C, names)):
    lines.append(f'const float u{i + 1} = {text};')
  lines.append(f'return {names[-1] if whole.rows else "x"};')
  summary = _summary(program, target, certificate, 'of a float')
  return _C_SOURCE.format(
    summary=summary.replace('*/', '* /'),
    flags=' '.join(_FLAGS),
    name=target.name,
    body=''.join(f'  {line}\n' for line in lines),
  )


_C_SOURCE = """/* {summary}
  Compile with {flags}.
*/

#include <math.h>

float lowbit_{name}(float x) {{
{body}}}
"""


def _expressions(whole, templates, names):
  """The rows as text; appends the names u1, u2, ... of their results."""
  for i, (op, *operands) in enumerate(whole.rows):
    arguments = [names[j] for j in operands[: OPS[op].arity]]
    names.append(f'u{i + 1}')
    yield templates[op].format(*arguments)


def _hex(value: float) -> str:
  """Hexadecimal without the zeros that float.hex pads with."""
  mantissa, exponent = value.hex().split('p')
  return f'{mantissa.rstrip("0").rstrip(".")}p{exponent}'


def _imported(wrapper) -> tuple[list[str], str]:
  """Import statements, and the wrapper of _core as an expression."""
  if wrapper is None:
    return [], '_core'
  if not isinstance(wrapper, functools.partial):
    wrapper = functools.partial(wrapper)
  imports = set()

  def text(value):
    if not callable(value):
      return repr(value)
    path, name = value.__module__, value.__qualname__
    package, _, module = path.rpartition('.')
    if path == '__main__' or not name.isidentifier():
      raise ValueError(
        f'wrapper {path}.{name} has no name to import it by; define it with def'
        ' in a module, or use functools.partial of such a function'
      )
    imports.add(
      f'from {package} import {module}' if package else f'import {module}'
    )
    return f'{module}.{name}'

  arguments = [*(text(v) for v in wrapper.args), '_core']
  arguments += [f'{k}={text(v)}' for k, v in wrapper.keywords.items()]
  expression = f'{text(wrapper.func)}({", ".join(arguments)})'
  return sorted(imports), expression


def _summary(program, target, certificate, kind) -> str:
  """The head of the source: the formula, and facts from its certificate."""
  count = len(targets.assemble(target, program).rows)
  lo, hi = target.interval
  text = [
    f'{target.name} {kind}, from {count} operations, for x from'
    f' {lo:.9g} to {hi:.9g}.'
  ]
  if certificate is not None:
    _check_program(program, certificate)
    lo, hi = (float.fromhex(end) for end in certificate.interval)
    environment = certificate.environment
    size = f'{certificate.max_ulp:.4f} ULP'
    where = f'for x from {lo:.9g} to {hi:.9g}'
    if certificate.tier == 'all':
      error = f'The error is at most {size} {where}: measured on every input,'
      error += f' {certificate.n_inputs},'
    else:
      error = f'The largest error that was found is {size} {where}: measured on'
      error += f' a sample of {certificate.n_inputs} inputs'
      error += f' ({certificate.tier}), and no bound for the others,'
    text += [
      f'{error} the largest at {certificate.argmax};'
      f' {certificate.n_gt_1ulp} exceed 1 ULP.',
      f'Holds for {environment.backend}, {environment.device_kind},'
      f' jaxlib {environment.jaxlib}, {environment.instruction_set}, XLA_FLAGS='
      f'{environment.xla_flags!r}.',
      f'Made by `{certificate.provenance.command}`, seed'
      f' {certificate.provenance.seed}.',
    ]
  filled = (textwrap.fill(line, 74, break_on_hyphens=False) for line in text)
  summary = textwrap.indent('\n\n'.join(filled), '  ').lstrip()
  return summary if certificate is None else summary + '\n  '


def _check_program(program, certificate):
  content = certificate.program
  if content is None:
    return
  rows = tuple(tuple(row) for row in content['rows'])
  constants = _float32(float.fromhex(v) for v in content['constants'])
  if rows != program.rows or constants != _float32(program.constants):
    raise ValueError(
      f'the certificate of {certificate.function} is for another program;'
      ' certify this one'
    )


def load_python(source: str, name: str) -> Callable:
  """The function of a name in Python source, which is executed."""
  namespace: dict = {'__name__': f'emitted_{name}'}
  exec(compile(source, f'<emitted {name}>', 'exec'), namespace)
  return namespace[name]


def load_c(source: str, name: str, compiler: str = 'cc') -> certify.Native:
  """`lowbit_NAME` of C source, compiled, for `certify.certify`.

  Args:
    source: by `c99`.
    name: of the target.
    compiler: command; gcc and clang take its flags.

  Raises:
    FileNotFoundError: if there is no such compiler.
    ValueError: if it does not compile the source, with its messages.
  """
  if shutil.which(compiler) is None:
    raise FileNotFoundError(f'compiler={compiler!r} is not on the PATH')
  with tempfile.TemporaryDirectory() as directory:
    path = pathlib.Path(directory)
    (path / 'emitted.c').write_text(source + _LOOP.format(name=name))
    command = [compiler, *_FLAGS, '-shared', '-fPIC', '-o', 'emitted.so']
    command += ['emitted.c', '-lm']
    run = subprocess.run(command, cwd=path, capture_output=True, text=True)
    if run.returncode != 0:
      raise ValueError(f'{shlex.join(command)} fails: {run.stderr}')
    library = ctypes.CDLL(str(path / 'emitted.so'))
  array = np.ctypeslib.ndpointer(np.float32, 1, flags='C_CONTIGUOUS')
  library.each.argtypes = (array, array, ctypes.c_size_t)
  library.each.restype = None

  def call(x):
    x = np.ascontiguousarray(x, np.float32)
    y = np.empty_like(x)
    library.each(x, y, len(x))
    return y

  version = subprocess.run(
    [compiler, '--version'], capture_output=True, text=True
  )
  environment = dataclasses.replace(
    certify.Environment.current(),
    backend=f'{compiler} {" ".join(_FLAGS)}',
    device_kind=version.stdout.partition('\n')[0],
  )
  digest = hashlib.sha256(source.encode()).hexdigest()
  return certify.Native(call, environment, digest)


_LOOP = """
#include <stddef.h>

void each(const float *x, float *y, size_t n) {{
  for (size_t i = 0; i < n; i++) y[i] = lowbit_{name}(x[i]);
}}
"""


def strict(program: Program, x: np.ndarray) -> np.ndarray:
  """Evaluates in float32 with one rounding for each operation, fma included."""
  constants = (np.float32(c) for c in program.constants)
  registers = [x, *(np.full_like(x, c) for c in constants)]
  with np.errstate(all='ignore'):
    for op, *operands in program.rows:
      arguments = [registers[i] for i in operands[: OPS[op].arity]]
      value = _fma(*arguments) if op == FMA else OPS[op].value(np, *arguments)
      registers.append(value)
  return registers[-1] if program.rows else x


def _fma(a, b, c):
  """a b + c of float32, rounded once (Boldo and Melquiond, 2008).

  The float64 sum of the exact product and c is rounded to odd, after which the
  rounding to float32 is that of the exact sum.
  """
  product, c = a.astype(np.float64) * b, c.astype(np.float64)
  total = product + c
  other = total - product
  lost = (product - (total - other)) + (c - other)
  bits = total.view(np.int64)
  inexact = np.isfinite(total) & (lost != 0) & (bits % 2 == 0)
  away = (lost > 0) == (total > 0)
  bits = bits + np.where(inexact, np.where(away, 1, -1), 0)
  return bits.view(np.float64).astype(np.float32)


def check(
  program: Program,
  target: Target,
  *,
  inputs: int = 2**16,
  compiler: str | None = None,
) -> None:
  """Prints the program, reads the source and compares results bit for bit.

  The Python source is compared with `function`, over all float32 numbers if the
  target has a wrapper and over its interval otherwise; C with `strict` there.

  Args:
    program: the core.
    target: its function.
    inputs: number of inputs, evenly spaced among the float32 numbers.
    compiler: of C; None leaves C out.

  Raises:
    Mismatch: if a result differs.
    ValueError: as `function` and `python`.
    FileNotFoundError: as `load_c`.
  """
  name = target.name
  x = _inputs(target.interval, inputs)
  if compiler is not None:
    emitted = load_c(c99(program, target), name, compiler)
    _compare('C', emitted(x), strict(_whole_core(program, target), x), x)
  if target.wrapper is not None:
    limit = float(np.finfo(np.float32).max)
    x = _inputs((-limit, limit), inputs)
  emitted = load_python(python(program, target), name)
  expected = jax.jit(function(program, target))(x)
  _compare('Python', jax.jit(emitted)(x), expected, x)


def _inputs(interval, count):
  lo, hi = certify.positions(interval)
  return certify.from_position(np.linspace(lo, hi, count).astype(np.int64))


def _compare(language, y, expected, x):
  y, expected = np.asarray(y), np.asarray(expected)
  equal = y.view(np.int32) == expected.view(np.int32)
  equal |= np.isnan(y) & np.isnan(expected)
  if not equal.all():
    i = int(np.argmin(equal))
    raise Mismatch(
      f'{language} gives {y[i]!r} at x={x[i]!r} and must give {expected[i]!r};'
      f' {np.count_nonzero(~equal)} of {len(x)} results differ'
    )
