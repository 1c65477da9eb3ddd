"""Settings of every pytest run: CPU, eight devices, strict dtypes in the core.

Eight host devices let sharding tests run in the same process as all others.
They do not change what one device computes, nor how long it takes.

Compilation takes most of the time, so all processes of a run, those that tests
start included, and later runs share what they compile, in the cache of pytest.
JAX finds a program there if it, the versions and the flags are the same; the
folder is that of one kind of processor. `pytest --cache-clear` empties it.
"""

import os
import pathlib
import platform
import re
import zlib

_DEVICES = '--xla_force_host_platform_device_count'
os.environ.setdefault('JAX_PLATFORMS', 'cpu')
if _DEVICES not in os.environ.get('XLA_FLAGS', ''):
  os.environ['XLA_FLAGS'] = f'{os.environ.get("XLA_FLAGS", "")} {_DEVICES}=8'


def _processor() -> str:
  """A name for the instruction set of this machine."""
  path = pathlib.Path('/proc/cpuinfo')
  text = path.read_text() if path.exists() else platform.processor()
  flags = re.search('^(flags|Features).*$', text, re.MULTILINE)
  text = flags[0] if flags else text
  return f'{platform.machine()}-{zlib.crc32(text.encode()):08x}'


_CACHE = pathlib.Path(__file__).parents[1] / '.pytest_cache' / 'd' / 'jax'
os.environ.setdefault('JAX_COMPILATION_CACHE_DIR', str(_CACHE / _processor()))
os.environ.setdefault('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '0')
os.environ.setdefault('JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES', '-1')

import hypothesis  # noqa: E402
import jax  # noqa: E402
import pytest  # noqa: E402

from tests import compilation  # noqa: E402

_SLOWEST = 10
_LONG = 20  # seconds after which a test needs a reason
_TESTS = pathlib.Path(__file__).parent
_STRICT = ('formats', 'numerics', 'ops', 'pallas', 'qarray', 'transforms')
# No test of these looks at speed or at the last bits of arithmetic,
_QUICK = (
  'docs_test.py',
  'doctor_test.py',
  'examples/',
  'io_test.py',
  'nn/',
  'observers_test.py',
  'pallas/gpu_benchmark_test.py',
  'training/',
  'tree_test.py',
)
# but for these.
_EXACT = ('training/micro_scaling_test.py', 'training/quantizers_test.py')

hypothesis.settings.register_profile(
  'reproducible', deadline=None, derandomize=True
)
hypothesis.settings.load_profile('reproducible')


def _is_core(path: pathlib.Path) -> bool:
  first = path.relative_to(_TESTS).parts[0]
  return first.removesuffix('_test.py').split('_')[0] in _STRICT


def _is_quick(path: pathlib.Path) -> bool:
  name = path.relative_to(_TESTS).as_posix()
  return name.startswith(_QUICK) and name not in _EXACT


@pytest.fixture(autouse=True, scope='module')
def _few_optimizations(request: pytest.FixtureRequest):
  """Compiles with few optimizations where that is all the same."""
  if _is_quick(request.path):
    with compilation.few_optimizations():
      yield
  else:
    yield


@pytest.fixture(autouse=True)
def _strict_dtypes_in_the_core(request: pytest.FixtureRequest):
  """Makes a silent mix of dtypes an error; optax could not live with that."""
  if not _is_core(request.path):
    yield
    return
  with jax.numpy_dtype_promotion('strict'):
    yield


def pytest_terminal_summary(terminalreporter):
  """The slowest tests; beside those that take long, why they do."""
  seconds, reasons = {}, {}
  for reports in terminalreporter.stats.values():
    for report in reports:
      if isinstance(report, pytest.TestReport):
        name = report.nodeid
        seconds[name] = seconds.get(name, 0) + report.duration
        reasons.update((name, v) for k, v in report.user_properties)
  slowest = sorted(seconds, key=seconds.get, reverse=True)[:_SLOWEST]
  if not slowest or seconds[slowest[0]] < 1:
    return
  terminalreporter.section('slowest tests')
  for name in slowest:
    reason = reasons.get(name, '')
    if seconds[name] > _LONG and not reason:
      reason = f'over {_LONG} s: mark it long(reason), or shorten it'
    terminalreporter.line(f'{seconds[name]:6.1f} s  {name}  {reason}'.rstrip())


def pytest_runtest_setup(item: pytest.Item):
  """Lets the report of a test say why it takes long."""
  if mark := item.get_closest_marker('long'):
    item.user_properties.append(('long', *mark.args))
