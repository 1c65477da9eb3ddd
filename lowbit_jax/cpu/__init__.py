"""Kernels for CPUs: machine code that is written in Python and called by XLA.

A kernel is emitted for the formats of a call and for the processor here, by
LLVM through the package llvmlite, and runs inside `jax.jit` on XLA's own
threads. `LOWBIT_JAX_CPU=0` in the environment switches all of them off.

- `why_not`: Why there are no kernels here, or None.
- `why_unproven`: Why the processor here does not take kernels unasked, or None.

The modules, each of which knows only those before it:

  _primitive        an operation that is lowered to a kernel where it can
  _code             machine code as Python values
  _compiler         from such code to an address in memory
  _frame            what XLA hands to a kernel, and how a kernel refuses it
  _registry         kernels by the names that XLA calls them by
  _stages           chunks of work for several threads
  _decode           from packed codes to float32
  _weights          from the arrays of a packed matrix to float32
  _part             the part of a product that a thread computes
  _rows             products with matrices that are stored as (n, k)
  _columns          products with matrices that are stored as (k, n)
  _matmul           a kernel of either
  _integers         products of integers, and their sums
  _integer_rows     products of int8 with matrices that are stored as (n, k)
  _integer_columns  products of int8 with matrices that are stored as (k, n)
  _integer_matmul   a kernel of either
  _exponential      the exponential function
  _attention        a kernel of decode attention
  _encode           from float32 to packed codes
  _scales           from the maxima of blocks to their scales
  _quantize         a kernel that quantizes
  _dequantize       a kernel that decodes what lies across bytes

Importing this package imports none of them, and so no llvmlite.
"""

import functools
import importlib.util
import os
import sys

_SWITCH = 'LOWBIT_JAX_CPU'


def why_not() -> str | None:
  """Why there are no kernels here, or None."""
  if os.environ.get(_SWITCH) == '0':
    return f'{_SWITCH}=0 switches it off'
  return _why_not_here()


@functools.cache
def _why_not_here() -> str | None:
  if importlib.util.find_spec('llvmlite') is None:
    return "llvmlite is not installed: pip install 'lowbit-jax[cpu]'"
  if sys.platform == 'win32':
    return 'it has no threads on Windows'
  return None


def why_unproven() -> str | None:
  """Why the processor here does not take kernels unasked, or None."""
  from lowbit_jax.cpu import _compiler

  target = _compiler.host()
  if not target.triple.startswith('x86_64'):
    kind = target.triple.split('-')[0]
    return f'kernels are not proven on {kind}: name it'
  if missing := {'avx2', 'fma', 'f16c'} - target.features:
    return f'the processor has no {", ".join(sorted(missing))}'
  return None
