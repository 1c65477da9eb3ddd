"""Plants one fault after the other and asks whether the default tests see it.

  python tests/mutants.py              all of them, about a quarter of an hour
  python tests/mutants.py io training  those of some parts of the library

Each mutant is one line of the source that is replaced by a wrong one, in a copy
of the checkout, and the tests that must fail then. A mutant that survives
makes the command fail. `docs/contributing.md` has the list with its result.
"""

import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
from typing import NamedTuple

_ROOT = pathlib.Path(__file__).resolve().parents[1]
_CACHE = _ROOT / '.pytest_cache' / 'd' / 'jax' / 'mutants'
_COPIED = ('lowbit_jax', 'pallas', 'tests', 'examples', 'pyproject.toml')


class Mutant(NamedTuple):
  """A fault.

  Attributes:
    part: of the library.
    what: is wrong, in words.
    file: that holds it.
    right: the text that is replaced; it occurs once.
    wrong: what stands there instead.
    test: the file of tests, or one of its classes, that must see it.
  """

  part: str
  what: str
  file: str
  right: str
  wrong: str
  test: str


_ARITH = 'pallas/lowbit_pallas/arith'
MUTANTS = (
  Mutant(
    'formats', 'the fn policy has one number too many',
    'lowbit_jax/formats/_types.py',
    "return self.magnitude_mask - (self.special == 'fn')",
    'return self.magnitude_mask',
    'tests/formats/conformance_test.py::TableTest',
  ),
  Mutant(
    'formats', 'the smallest exponent ignores subnormals',
    'lowbit_jax/formats/_types.py',
    'return 1 - self.bias if self.zero else -self.bias',
    'return -self.bias',
    'tests/formats/conformance_test.py::TableTest',
  ),
  Mutant(
    'numerics', 'an element index counts columns of the slice',
    f'{_ARITH}/hashing.py',
    'start, full = ((0,) * len(shape), shape) if origin is None else origin',
    'start, full = ((0,) * len(shape), shape)',
    'tests/ops/stochastic_test.py::SameBitsTest',
  ),
  Mutant(
    'numerics', 'the high word of an index is dropped',
    f'{_ARITH}/hashing.py',
    'h = _mix(h + index_hi * jnp.uint32(_HIGH))',
    'h = _mix(h)',
    'tests/ops/stochastic_test.py::ElementIndexTest',
  ),
  Mutant(
    'numerics', 'a key enters by one of its words',
    f'{_ARITH}/hashing.py',
    'k0, k1 = key_words[..., 0], key_words[..., 1]',
    'k0, k1 = key_words[..., 0], key_words[..., 0]',
    'tests/ops/stochastic_test.py::HashTest',
  ),
  Mutant(
    'ops', 'a clipped gradient passes at one end of the range',
    'lowbit_jax/ops/_fake_quant.py',
    'return (x >= low - slack) & (x <= high + slack)',
    'return x >= low - slack',
    'tests/ops/fake_quant_test.py::EquationTest',
  ),
  Mutant(
    'ops', 'the trusted distance is a whole step',
    'lowbit_jax/ops/_fake_quant.py',
    'trust = _largest_step(job.fmt) / 2',
    'trust = _largest_step(job.fmt)',
    'tests/ops/fake_quant_test.py::EquationTest',
  ),
  Mutant(
    'ops', 'ties of the maximum each get its whole gradient',
    'lowbit_jax/ops/_fake_quant.py',
    'share = weight * _scaling.reciprocal(count.astype(jnp.float32))',
    'share = weight',
    'tests/ops/fake_quant_test.py::EquationTest',
  ),
  Mutant(
    'ops', 'a learned step has no gradient where it clips',
    'lowbit_jax/ops/_fake_quant.py',
    'slope = jnp.where(inside, (y - x) * inverse, element * inverse)',
    'slope = jnp.where(inside, (y - x) * inverse, 0)',
    'tests/ops/fake_quant_test.py::LearnedStepTest',
  ),
  Mutant(
    'ops', 'columns that fill no tile are left out',
    'lowbit_jax/ops/_dot_xla.py',
    'starts = jnp.arange(0, n, columns)',
    'starts = jnp.arange(0, n - columns + 1, columns)',
    'tests/ops/dot_test.py::TileTest',
  ),
  Mutant(
    'ops', 'zero points of a tile are forgotten',
    'lowbit_jax/ops/_dot_xla.py',
    'w = w - zero.astype(jnp.float32)[:, None]',
    'w = w',
    'tests/ops/dot_test.py::DotTest',
  ),
  Mutant(
    'ops', 'minima of a tile are forgotten',
    'lowbit_jax/ops/_dot_xla.py',
    'w = w + minimum.astype(jnp.float32)[:, None]',
    'w = w',
    'tests/minima_test.py::ProductTest',
  ),
  Mutant(
    'qarray', 'padding counts as the least number of a block',
    'lowbit_jax/_quantize.py',
    'low = jnp.min(jnp.where(real, x, math.inf), **inner)',
    'low = jnp.min(x, **inner)',
    'tests/minima_test.py::OracleTest',
  ),
  Mutant(
    'ops', 'int32 sums may overflow',
    'lowbit_jax/ops/_dot_xla.py',
    'if size * 128**2 >= 1 << 31:',
    'if size * 128**2 >= 1 << 41:',
    'tests/ops/dot_test.py::SelectTest',
  ),
  Mutant(
    'ops', 'the two backward products share random bits',
    'lowbit_jax/ops/_qdot.py',
    'return tuple(jax.random.fold_in(key, 3 * which + i) for i in range(3))',
    'return tuple(jax.random.fold_in(key, i) for i in range(3))',
    'tests/ops/qdot_test.py::DefinitionTest',
  ),
  Mutant(
    'ops', 'a prescale is not taken out again',
    'lowbit_jax/ops/_qdot.py',
    'y = y if scale == 1 else y * jnp.float32(1 / scale)',
    'y = y',
    'tests/ops/qdot_test.py::StochasticTest',
  ),
  Mutant(
    'ops', 'a rotated gradient is not turned back',
    'lowbit_jax/ops/_qdot.py',
    'g = rotate(g, axis, inverse=True)',
    'g = g',
    'tests/ops/qdot_test.py',
  ),
  Mutant(
    'ops', 'the derivative of log_softmax forgets the probabilities',
    'lowbit_jax/ops/_softmax.py',
    'y = jnp.exp(out) if is_log else out',
    'y = out',
    'tests/ops/softmax_test.py::DerivativeTest',
  ),
  Mutant(
    'qarray', 'a slice may begin within a block',
    'lowbit_jax/qarray.py',
    'if step != 1 or start % whole or (stop % whole and stop != n):',
    'if step != 1 or (stop % whole and stop != n):',
    'tests/qarray_test.py::IndexTest',
  ),
  Mutant(
    'transforms', 'turning back applies the signs on the wrong side',
    f'{_ARITH}/hadamard.py',
    'matrix = hadamard_matrix(block) * jnp.expand_dims(flip, int(not inverse))',
    'matrix = hadamard_matrix(block) * jnp.expand_dims(flip, 1)',
    'tests/transforms/transforms_test.py::HadamardCoreTest',
  ),
  Mutant(
    'training', 'a delayed scale sees the current step',
    'lowbit_jax/_held_scales.py',
    'return state, jnp.where(renewed, amax, self.amax)',
    'return state, amax',
    'tests/training/scaling_test.py::StateTest',
  ),
  Mutant(
    'training', 'an overflow enters the history of a scale',
    'lowbit_jax/_held_scales.py',
    'keep = (top == 0) | ~jnp.isfinite(top)',
    'keep = top == 0',
    'tests/training/scaling_test.py::StateTest',
  ),
  Mutant(
    'training', 'merged scales take the smaller magnitude',
    'lowbit_jax/_held_scales.py',
    'seen=jnp.maximum(s.seen, t.seen)',
    'seen=jnp.minimum(s.seen, t.seen)',
    'tests/training/scaling_test.py::StateTest',
  ),
  Mutant(
    'training', 'momentum is reset a step late',
    'lowbit_jax/training/optimizers/_stable_spam.py',
    'restart = state.steps == every',
    'restart = state.steps == every + 1',
    'tests/training/optimizers/stable_spam_test.py',
  ),
  Mutant(
    'training', 'a gradient is clipped by its old peak',
    'lowbit_jax/training/optimizers/_stable_spam.py',
    'limit = optax.tree.bias_correction(peak, theta, count)',
    'limit = peak',
    'tests/training/optimizers/stable_spam_test.py',
  ),
  Mutant(
    'training', 'a learned step takes the factor of another range',
    'lowbit_jax/training/qat.py',
    's = _with_value(s, s / math.sqrt(max(n, 1) * high))',
    's = _with_value(s, s / math.sqrt(max(n, 1)))',
    'tests/training/qat_test.py::LsqTest',
  ),
  Mutant(
    'training', 'the gradient of PACT reaches clipped activations',
    'lowbit_jax/training/qat.py',
    'clip = jnp.where(wide >= top, alpha, jnp.where(wide < 0, 0, wide))',
    'clip = jnp.where(wide >= top, wide, jnp.where(wide < 0, 0, wide))',
    'tests/training/qat_test.py::PactTest',
  ),
  Mutant(
    'training', 'stochastic gradients lose their dither',
    'lowbit_jax/training/quantizers.py',
    'r = x / (2 * jnp.where(top > 0, top, 1)) + 0.5 + noise',
    'r = x / (2 * jnp.where(top > 0, top, 1)) + 0.5',
    'tests/training/quantizers_test.py::DoReFaTest',
  ),
  Mutant(
    'search', 'a sweep misses its last input',
    'lowbit_jax/search/certify.py',
    'count = min(CHUNK, (last - start) // stride + 1)',
    'count = max(min(CHUNK, (last - start) // stride), 1)',
    'tests/search/certify_test.py::SweepTest',
  ),
  Mutant(
    'search', 'a denser tier follows one that failed',
    'lowbit_jax/search/certify.py',
    '    if result.max_ulp > bound:\n      break\n    result = sweep(',
    '    result = sweep(',
    'tests/search/certify_test.py::TiersTest',
  ),
  Mutant(
    'search', 'the front keeps entries that are no better',
    'lowbit_jax/search/archive.py',
    'if not result or entry.error < result[-1].error:',
    'if not result or entry.error <= 2 * result[-1].error:',
    'tests/search/evolve_test.py::ArchiveTest',
  ),
  Mutant(
    'search', 'crowding compares gaps of different units',
    'lowbit_jax/search/archive.py',
    'gaps = (values[order[2:]] - values[order[:-2]]) / span',
    'gaps = values[order[2:]] - values[order[:-2]]',
    'tests/search/evolve_test.py::ArchiveTest',
  ),
  Mutant(
    'search', 'a child may be larger than the limits',
    'lowbit_jax/search/variation.py',
    'return limits.check(child)',
    'return child',
    'tests/search/evolve_test.py::VariationTest',
  ),
  Mutant(
    'io', 'a file is overwritten silently',
    'lowbit_jax/io/_native.py',
    'if os.path.exists(path) and not overwrite:',
    'if False:',
    'tests/io_test.py',
  ),
  Mutant(
    'io', 'a file of a newer version is read',
    'lowbit_jax/io/_native.py',
    'if version > VERSION:\n    raise',
    'if version > VERSION + 9:\n    raise',
    'tests/io_test.py',
  ),
  Mutant(
    'io', 'the padding of an array is lost',
    'lowbit_jax/io/_native.py',
    "pad=tuple(_field(node, 'pad', where, list)),",
    "pad=(0,) * len(_field(node, 'pad', where, list)),",
    'tests/io_test.py',
  ),
  Mutant(
    'io', 'a file that was not finished takes the place of the old one',
    'lowbit_jax/_files.py',
    'with contextlib.suppress(FileNotFoundError):\n      os.unlink(temporary)',
    'os.replace(temporary, target)',
    'tests/io_test.py',
  ),
  Mutant(
    'results', 'a file that was changed is trusted',
    'lowbit_jax/_results.py',
    'encode() != mark[2]',
    "encode() == b''",
    'tests/results_test.py',
  ),
  Mutant(
    'io', 'numbers of another dtype are taken for those of the file',
    'lowbit_jax/io/_native.py',
    'return array.astype(_stored(dtype), copy=False).view(dtype)',
    'return array.astype(dtype)',
    'tests/io_test.py',
  ),
  Mutant(
    'io', 'leaves that changed places are taken as they are',
    'lowbit_jax/io/_native.py',
    'if read != size or not checksum == info.CRC == saved:',
    'if read != size or checksum != info.CRC:',
    'tests/io_test.py',
  ),
  Mutant(
    'io', 'a temporary file is deleted while its writer lives',
    'lowbit_jax/_files.py',
    'fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)',
    'pass',
    'tests/replacing_test.py',
  ),
)  # fmt: skip


def planted(mutant: Mutant, root: pathlib.Path) -> None:
  """Replaces the text of a mutant in a copy of the checkout.

  Raises:
    ValueError: if the text does not occur once.
  """
  path = root / mutant.file
  text = path.read_text('utf-8')
  if text.count(mutant.right) != 1:
    raise ValueError(
      f'{mutant.right!r} occurs {text.count(mutant.right)} times in'
      f' {mutant.file}, not once'
    )
  path.write_text(text.replace(mutant.right, mutant.wrong), 'utf-8')


def is_caught(mutant: Mutant) -> bool:
  """Whether the default tests of its file fail."""
  with tempfile.TemporaryDirectory() as name:
    root = pathlib.Path(name)
    for part in _COPIED:
      copy = shutil.copytree if (_ROOT / part).is_dir() else shutil.copy
      copy(_ROOT / part, root / part)
    planted(mutant, root)
    command = [sys.executable, '-m', 'pytest', '-q', '-x', mutant.test]
    done = subprocess.run(
      command,
      cwd=root,
      env={'JAX_COMPILATION_CACHE_DIR': str(_CACHE)} | os.environ,
      capture_output=True,
      text=True,
    )
  # 1: a test failed; 2: other processes were stopped because of that.
  if done.returncode not in (0, 1, 2) or ' error' in done.stdout[-200:]:
    raise RuntimeError(f'{command} did not run:\n{done.stdout}{done.stderr}')
  return done.returncode > 0


def main(parts: list[str]) -> None:
  survivors = 0
  for mutant in MUTANTS:
    if not parts or mutant.part in parts:
      caught = is_caught(mutant)
      survivors += not caught
      mark = 'caught' if caught else 'SURVIVED'
      print(f'| {mutant.part} | {mutant.what} | `{mutant.test}` | {mark} |')
      sys.stdout.flush()
  if survivors:
    raise SystemExit(f'{survivors} mutants survived')


if __name__ == '__main__':
  main(sys.argv[1:])
