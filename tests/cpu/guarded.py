"""Calls of kernels whose arrays end, or begin, where memory does.

Run in a process of its own: what is read or written outside ends it.
"""

import ctypes
import itertools
import mmap
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from lowbit_jax import formats
from lowbit_jax.cpu import _compiler, _integer_matmul, _matmul
from lowbit_jax.cpu._weights import Kind
from tests.cpu import frames

_PAGE = mmap.PAGESIZE
_LIBRARY = ctypes.CDLL(None, use_errno=True)
_LIBRARY.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_LIBRARY.mmap.restype = ctypes.c_void_p
_LIBRARY.mmap.argtypes = [
  *(ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int),
  *(ctypes.c_int, ctypes.c_long),
]
_LIBRARY.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]


class Guarded:
  """Copies of arrays between pages that nobody may touch."""

  def __init__(self) -> None:
    self._mapped: list[tuple[int, int]] = []

  def copy(self, array: np.ndarray, at_the_end: bool) -> np.ndarray:
    """A copy directly before such a page, or directly behind one."""
    pages = -(-max(array.nbytes, 1) // _PAGE)
    size = (pages + 2) * _PAGE
    kinds = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    address = _LIBRARY.mmap(0, size, 0, kinds, -1, 0)
    self._mapped.append((address, size))
    start, end = address + _PAGE, address + size - _PAGE
    both = mmap.PROT_READ | mmap.PROT_WRITE
    assert _LIBRARY.mprotect(start, pages * _PAGE, both) == 0
    place = end - array.nbytes if at_the_end else start
    memory = (ctypes.c_uint8 * max(array.nbytes, 1)).from_address(place)
    out = np.ndarray(array.shape, array.dtype, memory)
    out[...] = array
    return out

  def free(self) -> None:
    while self._mapped:
      _LIBRARY.munmap(*self._mapped.pop())


def kind_of(layout: str, bits: int, scale: str = 'float32') -> Kind:
  """Elements of some bits, in blocks of 8, with everything that is stored."""
  element = formats.sign if bits == 1 else formats.get(f'uint{bits}')
  has_more = bits > 1
  is_wide = scale.endswith('16')
  return Kind(
    layout,
    element,
    8,
    getattr(formats, scale),
    has_more and not is_wide,
    has_more and is_wide,
  )


def arrays_of(kind: Kind, m: int, k: int, n: int, batch: int = 1, stack=1):
  """Random operands."""
  random = np.random.default_rng((m, k, n))

  def stored(name: str, dtype: str) -> np.ndarray:
    rows = k * kind.element.bits // 8 if name == 'codes' else k // kind.block
    shape = (n, rows) if kind.layout == 'nk' else (rows, n)
    return random.integers(0, 100, (stack, *shape)).astype(jnp.dtype(dtype))

  leaves = [stored(*pair) for pair in kind.arrays.items()]
  x = random.standard_normal((batch, m, k)).astype(np.float32)
  index = random.integers(0, max(stack, 1), batch).astype(np.int32)
  return [x, index, *leaves]


def check(layout: str, bits: Sequence[int], scale: str = 'float32') -> None:
  """Calls kernels beside such pages, and compares with what they give else."""
  guarded = Guarded()
  for b in bits:
    kind = kind_of(layout, b, scale)
    address = _matmul.kernel(kind, _compiler.host())
    least = 8 if layout == 'kn' else 1
    sizes = itertools.product(
      (1, 2, 7, 97), (8, 24, 264), (least, least + 1, 19, 71, 130)
    )
    for m, k, n in sizes:
      arrays = arrays_of(kind, m, k, n, batch=2, stack=2)
      want = frames.result(kind, arrays[0], arrays[2])
      frames.call(address, arrays, [want])
      assert not np.isnan(want).any()
      for at_the_end in (True, False):
        inputs = [guarded.copy(a, at_the_end) for a in arrays]
        out = guarded.copy(np.full_like(want, np.nan), at_the_end)
        frames.call(address, inputs, [out])
        np.testing.assert_array_equal(out, want)
        guarded.free()
  print('nothing outside was touched')


def check_integers(layout: str, bits: Sequence[int]) -> None:
  """The same of kernels that multiply integers."""
  guarded = Guarded()
  for b in bits:
    kind = kind_of(layout, b, 'float16' if b > 1 else 'e8m0')._replace(block=64)
    bare = Kind(layout, kind.element, 0, None, False, False)
    for m, k, n, is_exact in itertools.product(
      (1, 6, 70), (256, 768), (32, 33, 95, 200), (False, True)
    ):
      task = _integer_matmul.task(
        bare if is_exact else kind, 32, k, n, is_exact=is_exact
      )
      assert isinstance(task, _integer_matmul.Task), task
      x, index, *leaves = arrays_of(task.kind, m, k, n, batch=2, stack=2)
      copies = 2 if layout == 'kn' else 1
      nbytes = np.tile(x, copies).astype(np.int8).view(np.uint8)
      units = [] if is_exact else [np.ascontiguousarray(x[:, :, :: task.unit])]
      arrays = [nbytes, *units, *units, index, *leaves]
      address = _integer_matmul.kernel(task, _compiler.host())
      dtype, unwritten = (np.int32, -1) if is_exact else (np.float32, np.nan)
      want = np.full((2, m, n), unwritten, dtype)
      frames.call(address, arrays, [want])
      assert not np.isnan(want).any()
      for at_the_end in (True, False):
        inputs = [guarded.copy(a, at_the_end) for a in arrays]
        out = guarded.copy(np.full_like(want, unwritten), at_the_end)
        frames.call(address, inputs, [out])
        np.testing.assert_array_equal(out, want)
        guarded.free()
  print('nothing outside was touched')


def fuzz(layout: str, count: int, seed: int = 0) -> None:
  """Calls a kernel with arrays that do not fit, or just do.

  Each is beside such a page, so that a size that is believed and not checked
  ends the process.
  """
  kind = kind_of(layout, 3)
  address = _matmul.kernel(kind, _compiler.host())
  random = np.random.default_rng(seed)
  guarded, messages, fitting = Guarded(), set(), 0
  dtypes = (np.int8, np.uint8, np.int32, np.float16, np.float32, np.int64)
  for _ in range(count):
    m, k, n = random.choice([0, 1, 2, 9]), 8 * random.integers(0, 4), 9
    n = n if random.random() < 0.8 else random.integers(0, 9)
    batch, stack = random.integers(0, 3), random.integers(0, 3)
    arrays = arrays_of(kind, m, k, n, batch, stack)
    out = np.full((batch, m, n), np.nan, np.float32)
    all_arrays = [*arrays, out]
    # One fault in most calls.
    fault = random.choice(['none', 'size', 'rank', 'dtype', 'index', 'count'])
    at = random.integers(len(all_arrays))
    array = all_arrays[at]
    if fault == 'size':
      axis = random.integers(array.ndim)
      shape = list(array.shape)
      shape[axis] = max(0, shape[axis] + random.choice([-8, -1, 1, 8]))
      array = np.zeros(shape, array.dtype)
    elif fault == 'rank':
      flat = array.ndim > 1 and random.random() < 0.5
      array = array.reshape(-1) if flat else array[None]
    elif fault == 'dtype':
      array = np.nan_to_num(array).astype(random.choice(dtypes))
    elif fault == 'index' and batch:
      arrays[1][:] = random.choice([-(2**31), -1, stack, 2**31 - 1])
    all_arrays[at] = np.ascontiguousarray(array)
    if fault == 'count':
      all_arrays.pop(random.integers(len(arrays)))
    fits = _fits(kind, all_arrays)
    all_arrays = [guarded.copy(a, True) for a in all_arrays]
    try:
      frames.call(address, all_arrays[:-1], all_arrays[-1:])
      assert fits, [(a.dtype, a.shape) for a in all_arrays]
      assert not np.isnan(all_arrays[-1]).any()
      fitting += 1
    except frames.Refused as refusal:
      assert not fits, (str(refusal), [(a.dtype, a.shape) for a in all_arrays])
      messages.add(str(refusal))
    guarded.free()
  print(fitting, *sorted(messages), sep='\n')


def _fits(kind: Kind, arrays: Sequence[np.ndarray]) -> bool:
  """Whether arrays are those of a product, by what the kernel's page says."""
  dtypes = ['float32', 'int32', *kind.arrays.values(), 'float32']
  if [a.dtype.name for a in arrays] != dtypes:
    return False
  if [a.ndim for a in arrays] != [3, 1, *(3 for _ in kind.arrays), 3]:
    return False
  x, index, codes = arrays[:3]
  (batch, m, k), stack = x.shape, codes.shape[0]
  n = codes.shape[1 if kind.layout == 'nk' else 2]
  is_empty = batch * m * n == 0
  if k % kind.block or (not is_empty and not stack):
    return False
  if kind.layout == 'kn' and n < 8 and not is_empty:
    return False

  def shape(rows):
    return (stack, n, rows) if kind.layout == 'nk' else (stack, rows, n)

  rows = [
    k * kind.element.bits // 8,
    *[k // kind.block] * (len(kind.arrays) - 1),
  ]
  shapes = [(batch, m, k), (batch,), *map(shape, rows), (batch, m, n)]
  return [a.shape for a in arrays] == shapes


def through_xla(layout: str) -> None:
  """Asks XLA for calls that do not fit, and for one that does."""
  kind = kind_of(layout, 3)
  name = _matmul.target_name(kind)
  good = arrays_of(kind, 2, 16, 24, batch=2, stack=3)
  out = frames.result(kind, good[0], good[2])
  shape = jax.ShapeDtypeStruct(out.shape, np.float32)
  x, index, codes, *rest = good

  def attempt(what, arrays, *results):
    results = results or (shape,)
    try:
      jax.block_until_ready(jax.ffi.ffi_call(name, list(results))(*arrays))
      print(f'{what}: done')
    except Exception as error:
      text = str(error).splitlines()[0]
      print(f'{what}: {type(error).__name__}: {text}')

  attempt('fewer arrays', good[:-1])
  attempt('more arrays', [*good, index])
  attempt('no arrays', [])
  attempt('two results', good, shape, shape)
  attempt('other dtype', [x.astype(np.float16), *good[1:]])
  attempt('fewer axes', [x, index, codes[0], *rest])
  attempt('other k', [x[..., :8], *good[1:]])
  attempt('other batch', [x, index[:1], *good[2:]])
  attempt('other stack', [x, index, codes[:1], *rest])
  attempt('no stack', [x, index, *(leaf[:0] for leaf in good[2:])])
  attempt('other m', good, jax.ShapeDtypeStruct((2, 3, 24), np.float32))
  attempt('other n', good, jax.ShapeDtypeStruct((2, 2, 32), np.float32))
  attempt('other result', good, jax.ShapeDtypeStruct(out.shape, np.int32))
  attempt(
    'no rows',
    [x[:, :0], *good[1:]],
    jax.ShapeDtypeStruct((2, 0, 24), np.float32),
  )
  attempt(
    'no batch',
    [x[:0], index[:0], *good[2:]],
    jax.ShapeDtypeStruct((0, 2, 24), np.float32),
  )
  frames.call(_matmul.kernel(kind, _compiler.host()), good, [out])
  got = jax.ffi.ffi_call(name, shape)(*good)
  np.testing.assert_array_equal(got, out)
  print('right values after all')
