"""The error of a compiled float32 function over every input of an interval.

Only compiled code can be certified: XLA rewrites float algebra, LLVM contracts
a * b + c, and constants fold differently from one program to the next. So one
executable takes all float32 numbers of an interval by their bit patterns, and
a certificate holds for the backend, versions and flags that it names.

The error of a result y of f(x) is |y - f(x)| / ulp32(f(x)) with

  ulp32(v) = 2^(max(floor(log2 |v|), -126) - 23)

  - Inputs are zero and the normal numbers. Subnormal inputs are left out: CPU
    backends read them as zero.
  - Where |f(x)| < 2^-126, a result of zero counts as exact: CPU backends flush
    subnormal results. Any other result has its error in units of 2^-149.
  - An infinite result counts as +-2^128, the number after the largest, while
    |f(x)| < 2^128. Where f(x) is larger or NaN, the result must be the
    infinity of its sign or NaN; any other has infinite error.

f is taken in float64, and for the worst thousand inputs with 60 digits.
"""

import dataclasses
import hashlib
import json
import os
import pathlib
import platform
import re
from collections.abc import Callable, Iterable, Mapping
from importlib import metadata
from typing import Any

import jax
import numpy as np
import numpy.typing as npt

from lowbit_jax import _files
from lowbit_jax._typing import PathLike

TIERS = ('2^12', '2^16', '2^20', 'stride61', 'all')
CHUNK = 2**22

_BLOCK = 2**15  # inputs whose error is computed while they stay in cache
_WORST = 1000
_SMALLEST = 0x00800000  # bits of the smallest normal number
_LARGEST = 0x7F7FFFFF
# Disagreement of the float64 reference with 60 digits that is still a
# reference: 2^9 ulp64, since compositions such as erfc(x) amplify rounding.
_REFERENCE_ULP = 2.0**-20


class Refuted(ValueError):
  """A function exceeds the bound that it was to be certified for."""


def import_mpmath() -> Any:
  """The module, or an ImportError that says how to get it."""
  try:
    import mpmath
  except ImportError as error:
    raise ImportError(
      'exact references need mpmath; install it with'
      ' `pip install lowbit-jax[search]`'
    ) from error
  return mpmath


def ulp32(value: npt.ArrayLike) -> np.ndarray:
  """2^(max(floor(log2 |value|), -126) - 23) of finite float64 numbers."""
  bits = np.asarray(value, np.float64).view(np.int64)
  exponent = (bits >> 52) & 0x7FF
  return ((np.maximum(exponent, 1023 - 126) - 23) << 52).view(np.float64)


def ulp_error(y: np.ndarray, f: np.ndarray) -> np.ndarray:
  """Errors of float32 results in ULP, by the rules of this module.

  Args:
    y: float32 (N,).
    f: float64 (N,), the values that the results stand for.

  Returns:
    float64 (N,), never NaN.
  """
  wide = y.astype(np.float64)
  with np.errstate(invalid='ignore', over='ignore'):
    error = np.abs(wide - f) / ulp32(f)
    size = np.abs(f)
    error[(size < 2.0**-126) & (wide == 0)] = 0
    # One comparison for the rare cases: NaN, infinity and overflow.
    if not (np.max(size) < 2.0**128 and np.max(error) < 2.0**128):
      infinite = np.isinf(wide)
      near = np.abs(np.copysign(2.0**128, wide) - f) / ulp32(f)
      error = np.where(infinite, near, error)
      signed = np.where(infinite & (np.sign(f) == np.sign(wide)), 0, np.inf)
      error = np.where(size >= 2.0**128, signed, error)
      error = np.where(np.isnan(f), np.where(np.isnan(wide), 0, np.inf), error)
      error = np.where(np.isnan(error), np.inf, error)
  return error


def positions(interval: tuple[float, float]) -> tuple[int, int]:
  """Places of the ends among zero and the normal numbers, 0 for zero.

  Args:
    interval: (lo, hi), rounded to float32.

  Raises:
    ValueError: if an end is not finite or subnormal, or lo > hi.
  """
  ends = np.array(interval, np.float64).astype(np.float32)
  size = np.abs(ends).view(np.int32)
  if ends.shape != (2,) or np.any(size > _LARGEST) or not ends[0] <= ends[1]:
    raise ValueError(f'interval={interval} must be finite with lo <= hi')
  if np.any((0 < size) & (size < _SMALLEST)):
    raise ValueError(
      f'interval={interval} has a subnormal end; end it at 0 or +-2^-126'
    )
  place = np.where(size == 0, 0, size - (_SMALLEST - 1))
  lo, hi = np.where(ends < 0, -place, place).tolist()
  return lo, hi


def from_position(place: npt.ArrayLike) -> np.ndarray:
  """float32 numbers at places; the inverse of `positions`."""
  place = np.asarray(place, np.int32)
  size = np.abs(place)
  size += np.where(size == 0, np.int32(0), np.int32(_SMALLEST - 1))
  return (size | (place & np.int32(-(2**31)))).view(np.float32)


@dataclasses.dataclass(frozen=True)
class Sweep:
  """Errors over the inputs of an interval.

  Attributes:
    stride: distance of the inputs, in float32 numbers.
    n_inputs: number of inputs; fewer than requested if a bound was exceeded.
    max_ulp: the largest error.
    argmax: its input.
    n_gt_1ulp: number of errors above 1.
    misrounded: the fraction of errors above 1/2.
    mean_ulp: the mean of the errors.
    worst: float32, the inputs with the largest errors, largest first.
    results: float32, the values of the function there.
  """

  stride: int
  n_inputs: int
  max_ulp: float
  argmax: float
  n_gt_1ulp: int
  misrounded: float
  mean_ulp: float
  worst: np.ndarray
  results: np.ndarray


def compile_chunk(fn: 'Callable | Native') -> 'jax.stages.Compiled | Native':
  """The executable that a sweep calls, of float32 (2^22,).

  Raises:
    TypeError: if the result is not float32 of that shape.
  """
  if isinstance(fn, Native):
    return fn
  shape = jax.ShapeDtypeStruct((CHUNK,), np.float32)
  lowered = jax.jit(fn).lower(shape)
  out = lowered.out_info
  if getattr(out, 'shape', None) != (CHUNK,) or out.dtype != np.float32:
    raise TypeError(
      f'fn maps float32 ({CHUNK},) to {out}; it must give float32 of that shape'
    )
  return lowered.compile()


def sweep(
  fn: Callable,
  reference: Callable[[np.ndarray], np.ndarray],
  lo: float,
  hi: float,
  *,
  stride: int = 1,
  bound: float = np.inf,
) -> Sweep:
  """Errors of a function on the float32 numbers from lo to hi.

  Args:
    fn: from float32 (N,) to float32 (N,), traceable, or `Native`, or the
      executable that `compile_chunk` made of one.
    reference: the function in NumPy, from float64 to float64, with an error of
      an ulp of float64 or so.
    lo: first input, rounded to float32.
    hi: last input, rounded to float32.
    stride: distance of inputs, in float32 numbers. An odd one meets all low
      bits.
    bound: stop after a chunk with a larger error.

  Raises:
    ValueError: for an interval or stride that does not fit.
    TypeError: if `fn` does not give float32 of the shape of its argument.
  """
  if stride < 1:
    raise ValueError(f'stride={stride} must be 1 or more')
  first, last = positions((lo, hi))
  compiled = fn if isinstance(fn, jax.stages.Compiled) else compile_chunk(fn)
  n_inputs = n_gt_1ulp = n_misrounded = 0
  total, threshold = 0.0, -1.0
  worst = np.empty(0), np.empty(0, np.float32), np.empty(0, np.float32)
  for start in range(first, last + 1, stride * CHUNK):
    # One executable for all chunks: the last one repeats its last input.
    place = start + stride * np.arange(CHUNK, dtype=np.int64)
    count = min(CHUNK, (last - start) // stride + 1)
    x = from_position(np.minimum(place, last))
    y = np.asarray(compiled(x))
    # Errors, in blocks that stay in cache.
    for i in range(0, count, _BLOCK):
      part = slice(i, min(i + _BLOCK, count))
      error = ulp_error(y[part], reference(x[part].astype(np.float64)))
      n_gt_1ulp += int(np.count_nonzero(error > 1))
      n_misrounded += int(np.count_nonzero(error > 0.5))
      total += float(np.sum(error))
      # Only errors above the smallest of the worst can become one of them.
      if np.max(error) > threshold:
        above = np.flatnonzero(error > threshold)
        new = error[above], x[part][above], y[part][above]
        worst = _largest(worst, new)
        threshold = worst[0][-1] if len(worst[0]) == _WORST else -1.0
    n_inputs += count
    if worst[0][0] > bound:
      break
  error, inputs, results = worst
  return Sweep(
    stride=stride,
    n_inputs=n_inputs,
    max_ulp=float(error[0]),
    argmax=float(inputs[0]),
    n_gt_1ulp=n_gt_1ulp,
    misrounded=n_misrounded / n_inputs,
    mean_ulp=total / n_inputs,
    worst=inputs,
    results=results,
  )


def _largest(*parts):
  """The parts (error, x, y) with the largest errors, in falling order."""
  joined = [np.concatenate(column) for column in zip(*parts, strict=True)]
  error = joined[0]
  top = np.arange(len(error))
  if len(top) > _WORST:
    top = np.argpartition(error, -_WORST)[-_WORST:]
  order = top[np.lexsort((top, -error[top]))]
  return tuple(column[order] for column in joined)


def tiered(
  fn: Callable,
  reference: Callable[[np.ndarray], np.ndarray],
  interval: tuple[float, float],
  *,
  tier: str = 'all',
  bound: float = np.inf,
) -> Sweep:
  """Sweeps of growing density up to a tier, the first that fails being last.

  Args:
    fn: as in `sweep`.
    reference: as in `sweep`.
    interval: (lo, hi), rounded to float32.
    tier: one of TIERS: '2^12', '2^16' and '2^20' take that many inputs or
      more, 'stride61' every 61st if those are more, 'all' every one.
    bound: largest error, in ULP, with which the next tier is worth its time.

  Raises:
    ValueError: for an unknown tier.
  """
  if tier not in TIERS:
    raise ValueError(f'tier={tier!r} must be one of {TIERS}')
  compiled = fn if isinstance(fn, jax.stages.Compiled) else compile_chunk(fn)
  tiers = TIERS[: TIERS.index(tier) + 1]
  first, *rest = dict.fromkeys(_stride(t, interval) for t in tiers)
  result = sweep(compiled, reference, *interval, stride=first, bound=bound)
  for stride in rest:
    if result.max_ulp > bound:
      break
    result = sweep(compiled, reference, *interval, stride=stride, bound=bound)
  return result


def _stride(tier: str, interval) -> int:
  if tier == 'all':
    return 1
  if tier == 'stride61':
    return min(61, _stride('2^20', interval))
  lo, hi = positions(interval)
  stride = (hi - lo + 1) // 2 ** int(tier[2:])
  return max(stride - (stride % 2 == 0), 1)


@dataclasses.dataclass(frozen=True)
class Provenance:
  """How a function came about.

  Attributes:
    command: shell command that produces the function and its certificate.
    seed: of the search for its constants; None if there was none.
    wrapper: the range reduction around the core program, in words.
  """

  command: str
  seed: int | None = None
  wrapper: str = ''


@dataclasses.dataclass(frozen=True)
class Environment:
  """Where a certificate holds."""

  backend: str
  device_kind: str
  instruction_set: str
  jax: str
  jaxlib: str
  numpy: str
  xla_flags: str

  @classmethod
  def current(cls) -> 'Environment':
    """That of this process."""
    return cls(
      backend=jax.default_backend(),
      device_kind=jax.devices()[0].device_kind,
      instruction_set=_instruction_set(),
      jax=jax.__version__,
      jaxlib=metadata.version('jaxlib'),
      numpy=np.__version__,
      xla_flags=os.environ.get('XLA_FLAGS', '').strip(),
    )


@dataclasses.dataclass(frozen=True)
class Native:
  """A function that is not XLA's, such as one in C, to measure like those.

  Attributes:
    call: from float32 (N,) to float32 (N,), of NumPy.
    environment: where it runs, with what compiled it.
    fingerprint: hash of its code, in place of one of HLO.
  """

  call: Callable[[np.ndarray], np.ndarray]
  environment: Environment
  fingerprint: str

  def __call__(self, x: np.ndarray) -> np.ndarray:
    return self.call(x)


def _instruction_set() -> str:
  """The machine and the extensions that decide about vectors and FMA."""
  try:
    text = pathlib.Path('/proc/cpuinfo').read_text()
  except OSError:
    return platform.machine()
  flags = re.search(r'^(?:flags|Features)\s*:\s*(.*)$', text, re.MULTILINE)
  words = flags.group(1).split() if flags else []
  known = re.compile(r'fma|f16c|avx\w*|sse4_\d|neon|asimd\w*|sve\w*|fphp')
  chosen = sorted(word for word in words if known.fullmatch(word))
  return ' '.join([platform.machine(), *chosen])


# Parts of the text of an executable that depend on its source or on the
# division of work among cores, and not on the computation.
_INCIDENTAL = re.compile(
  r'^(?:FileNames|FunctionNames|FileLocations|StackFrames)\n(?:.+\n)*'
  r'|, metadata=\{[^}]*\}'
  r'|, backend_config=.*$'
  r'|(?<=^HloModule )\S+'
  r'|[\w.-]+(?=: \w+\[)',  # names of parameters
  re.MULTILINE,
)


def fingerprint(compiled: jax.stages.Compiled | Native) -> str:
  """SHA-256 of the optimised HLO, without what stands for the source alone."""
  if isinstance(compiled, Native):
    return compiled.fingerprint
  text = _INCIDENTAL.sub('', compiled.as_text() or '')
  names: dict[str, str] = {}
  text = re.sub(
    r'%[\w.-]+',
    lambda match: names.setdefault(match.group(), f'%{len(names)}'),
    text,
  )
  return hashlib.sha256(text.encode()).hexdigest()


@dataclasses.dataclass(frozen=True)
class Certificate:
  """The error of a function, and all that is needed to measure it again.

  Attributes:
    function: its name.
    program: rows and constants (hexadecimal) of the core program, or None.
    provenance: command, seed and wrapper.
    interval: (lo, hi), as hexadecimal float32.
    tier: the density of the inputs, one of TIERS.
    bound: ULP that the largest error was to stay within.
    n_inputs: how many inputs were measured.
    max_ulp: the largest error, from 60 digits.
    argmax: its input, hexadecimal.
    n_gt_1ulp: number of errors above 1.
    misrounded: the fraction of errors above 1/2.
    mean_ulp: the mean of the errors.
    n_exact: of how many worst inputs the error was taken from 60 digits.
    edges: (input, result) pairs that hold bit for bit, as hexadecimal.
    environment: backend, versions and flags for which it holds.
    hlo: fingerprint of the executable.
    timing: what `timing.compare` measured, or None.
  """

  function: str
  program: Mapping[str, Any] | None
  provenance: Provenance
  interval: tuple[str, str]
  tier: str
  bound: float
  n_inputs: int
  max_ulp: float
  argmax: str
  n_gt_1ulp: int
  misrounded: float
  mean_ulp: float
  n_exact: int
  edges: tuple[tuple[str, str], ...]
  environment: Environment
  hlo: str
  timing: Mapping[str, Any] | None = None

  def to_json(self) -> str:
    """JSON with sorted keys and the hash of all other content."""
    content = dataclasses.asdict(self)
    content['content_hash'] = _content_hash(content)
    return json.dumps(content, indent=2, sort_keys=True) + '\n'

  @classmethod
  def from_json(cls, text: str) -> 'Certificate':
    """The certificate that `to_json` wrote.

    Raises:
      ValueError: if the text is damaged or was changed.
    """
    try:
      content = json.loads(text)
      stated = content.pop('content_hash')
      if stated != _content_hash(content):
        raise ValueError('its content does not match its hash')
      content['provenance'] = Provenance(**content['provenance'])
      content['environment'] = Environment(**content['environment'])
      content['interval'] = tuple(content['interval'])
      content['edges'] = tuple(tuple(pair) for pair in content['edges'])
      return cls(**content)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
      raise ValueError(
        f'the certificate is damaged ({error}); run its command again'
      ) from error

  def save(self, path: PathLike, *, overwrite: bool = False) -> None:
    """Writes JSON to a file, which appears complete or not at all.

    Args:
      path: of the file.
      overwrite: replace a file that exists.

    Raises:
      FileExistsError: if the file exists and `overwrite` is False.
    """
    path = os.fspath(path)
    if os.path.exists(path) and not overwrite:
      raise FileExistsError(
        f'path={path!r} exists; pass overwrite=True or choose another name'
      )
    with _files.replacing(path) as f:
      f.write(self.to_json().encode())

  @classmethod
  def load(cls, path: PathLike) -> 'Certificate':
    """Reads what `save` wrote.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: if it is damaged, with its name.
    """
    try:
      return cls.from_json(pathlib.Path(path).read_text())
    except ValueError as error:
      raise ValueError(f'path={os.fspath(path)!r}: {error}') from error


def _content_hash(content: Mapping[str, Any]) -> str:
  text = json.dumps(content, sort_keys=True, separators=(',', ':'))
  return hashlib.sha256(text.encode()).hexdigest()


def certify(
  fn: Callable,
  *,
  name: str,
  reference: Callable[[np.ndarray], np.ndarray],
  exact: Callable,
  interval: tuple[float, float],
  provenance: Provenance,
  tier: str = 'all',
  bound: float = 1.0,
  edges: Iterable[tuple[float, float]] = (),
  program: Any = None,
) -> Certificate:
  """Measures a function and certifies its error if that is within a bound.

  Args:
    fn: from float32 (N,) to float32 (N,), traceable, or `Native`.
    name: of the function.
    reference: the function in NumPy, from float64 to float64.
    exact: the same of mpmath numbers; it is evaluated with 60 digits.
    interval: (lo, hi), rounded to float32.
    provenance: the command and seed that reproduce it.
    tier: density of the inputs, as in `tiered`.
    bound: largest error allowed, in ULP.
    edges: inputs and the results that they must give bit for bit (any NaN for
      a NaN): infinities, NaN, -0, overflow, subnormal numbers.
    program: with `rows` and `constants`, the core to record.

  Raises:
    Refuted: if an error exceeds the bound or an edge does not hold.
    ValueError: for arguments that do not fit, or a reference that disagrees
      with `exact`.
    ImportError: without mpmath.
  """
  # Edges first, since they are cheap; then all inputs against float64, and the
  # worst of them against 60 digits.
  compiled = compile_chunk(fn)
  edges = tuple(edges)
  _check_edges(compiled, name, edges)
  result = tiered(compiled, reference, interval, tier=tier, bound=bound)
  max_ulp, argmax = _exact_maximum(result, reference, exact)
  if max_ulp > bound:
    raise Refuted(
      f'{name} has an error of {max_ulp:.4g} ULP at {argmax.hex()}'
      f' = {argmax:.9g}, above the bound of {bound:g}, after'
      f' {result.n_inputs} inputs'
    )
  lo, hi = (float(v).hex() for v in from_position(positions(interval)))
  return Certificate(
    function=name,
    program=None if program is None else _program_content(program),
    provenance=provenance,
    interval=(lo, hi),
    tier=tier,
    bound=float(bound),
    n_inputs=result.n_inputs,
    max_ulp=max_ulp,
    argmax=argmax.hex(),
    n_gt_1ulp=result.n_gt_1ulp,
    misrounded=result.misrounded,
    mean_ulp=result.mean_ulp,
    n_exact=len(result.worst),
    edges=tuple((_hex32(x), _hex32(y)) for x, y in edges),
    environment=_environment(compiled),
    hlo=fingerprint(compiled),
  )


def _environment(compiled) -> Environment:
  if isinstance(compiled, Native):
    return compiled.environment
  return Environment.current()


def _hex32(value: float) -> str:
  return float(np.float64(value).astype(np.float32)).hex()


def _program_content(program) -> dict[str, Any]:
  return {
    'rows': [list(row) for row in program.rows],
    'constants': [float(c).hex() for c in program.constants],
  }


def _check_edges(compiled, name, edges) -> None:
  if not edges:
    return
  x, expected = np.array(edges, np.float64).astype(np.float32).T
  y = np.asarray(compiled(np.resize(x, CHUNK)))[: len(x)]
  equal = y.view(np.int32) == np.ascontiguousarray(expected).view(np.int32)
  equal |= np.isnan(y) & np.isnan(expected)
  if not np.all(equal):
    i = int(np.argmin(equal))
    raise Refuted(f'{name}({x[i]}) is {y[i]} and must be {expected[i]}')


def _exact_maximum(result: Sweep, reference, exact) -> tuple[float, float]:
  """The largest error of the worst inputs, and its input, with 60 digits."""
  mpmath = import_mpmath()
  f = reference(result.worst.astype(np.float64))
  approximate = ulp_error(result.results, f)
  maximum = (-1.0, 0.0)
  with mpmath.workdps(60):
    for x, y, value, error in zip(
      result.worst.tolist(),
      result.results.tolist(),
      f.tolist(),
      approximate.tolist(),
      strict=True,
    ):
      if not (np.isfinite(value) and np.isfinite(error)) or error == 0:
        maximum = max(maximum, (error, x))  # decided by rule, not by distance
        continue
      true = exact(mpmath.mpf(x))
      unit = float(ulp32(float(true)))
      if abs(true - value) > _REFERENCE_ULP * unit:
        raise ValueError(
          f'reference({x.hex()}) = {value!r} and exact gives'
          f' {mpmath.nstr(true, 17)}: they must agree to {_REFERENCE_ULP:.1g}'
          ' ULP of float32'
        )
      y = max(min(y, 2.0**128), -(2.0**128))
      maximum = max(maximum, (float(abs(true - y) / unit), x))
  return maximum


def check(
  certificate: Certificate,
  fn: Callable,
  reference: Callable[[np.ndarray], np.ndarray],
) -> Sweep:
  """Measures a certified function again, on 2^20 inputs of those certified.

  Args:
    certificate: of the function.
    fn: as in `certify`.
    reference: as in `certify`.

  Raises:
    Refuted: if an error is larger than that of the certificate, or an edge no
      longer holds; the message lists changes of the environment.
  """
  compiled = compile_chunk(fn)
  edges = [(float.fromhex(x), float.fromhex(y)) for x, y in certificate.edges]
  _check_edges(compiled, certificate.function, edges)
  lo, hi = (float.fromhex(end) for end in certificate.interval)
  bound = certificate.max_ulp + _REFERENCE_ULP
  tier = min(certificate.tier, '2^20', key=TIERS.index)
  result = tiered(compiled, reference, (lo, hi), tier=tier, bound=bound)
  if result.max_ulp > bound:
    raise Refuted(
      f'{certificate.function} has an error of {result.max_ulp:.4g} ULP at'
      f' {result.argmax.hex()}, and {certificate.max_ulp:.4g} by its'
      f' certificate; changed since: {_changes(certificate, compiled)}'
    )
  return result


def _changes(certificate: Certificate, compiled) -> str:
  old = dataclasses.asdict(certificate.environment)
  new = dataclasses.asdict(_environment(compiled))
  changes = [f'{k} {old[k]} -> {new[k]}' for k in new if old[k] != new[k]]
  if certificate.hlo != fingerprint(compiled):
    changes.append('the optimised HLO')
  return '; '.join(changes) or 'nothing that the certificate records'
