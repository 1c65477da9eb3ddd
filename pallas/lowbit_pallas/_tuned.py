"""Sizes that were timed on a device: one JSON table for a kernel and a device.

`<op>/tuned/<device kind>.json` maps a key to the sizes of a kernel. A key says
everything that sizes may depend on but the number of rows: the order of sums
follows from the entry, and a row must not depend on the rows beside it. Where
there is no table or no entry, the heuristic of the kernel decides. Tables are
written by `benchmarks/gpu.py`.
"""

import functools
import json
import pathlib
import re
from collections.abc import Callable
from typing import Any

from lowbit_pallas import _support
from lowbit_pallas.arith import codec
from lowbit_pallas.arith.block import Blocked

ROOT = pathlib.Path(__file__).resolve().parent


def path(op: str, device_kind: str) -> pathlib.Path:
  """Where the table of a kernel on a device is, if there is one."""
  name = re.sub('[^a-z0-9]+', '_', device_kind.lower()).strip('_')
  return ROOT / op / 'tuned' / f'{name}.json'


def operand(spec: Blocked) -> str:
  """A quantized operand in a key."""
  element = spec.element
  if isinstance(element, codec.Float):
    name = f'e{element.exponent_bits}m{element.mantissa_bits}'
  elif isinstance(element, codec.Int):
    name = 'int' if element.signed else 'uint'
  else:
    name = f'codebook{len(element.table)}'
  scale = 'float'
  if spec.scale is not None:
    scale = f'e{spec.scale.exponent_bits}m{spec.scale.mantissa_bits}'
  return f'{name}:{spec.bits}:{spec.block}:{scale}'


def find(op: str, implementation: str, key: str, make: Callable) -> Any:
  """The configuration of an entry for the device here, or None.

  Args:
    op: folder of the kernel.
    implementation: 'tpu' or 'mosaic_gpu'.
    key: see the module.
    make: gives a configuration for the sizes of the entry, by name, or raises
      TypeError or ValueError where they do not fit.

  Raises:
    ValueError: for a damaged table, or an entry that does not fit.
  """
  device = _support.device_of(implementation)
  if device is None:
    return None
  table = path(op, device.device_kind)
  sizes = read(table).get(key)
  if sizes is None:
    return None
  try:
    if not all(isinstance(v, int) and v > 0 for v in sizes.values()):
      raise ValueError('sizes are positive integers')
    return make(**sizes)
  except (TypeError, ValueError) as error:
    raise ValueError(
      f'entry {key!r} of {table} is {sizes}, which does not fit: {error}.'
      ' Delete the entry, or time it again with benchmarks/gpu.py'
    ) from error


@functools.cache
def read(table: pathlib.Path) -> dict[str, dict[str, int]]:
  """The entries of a table; none where there is no file."""
  try:
    text = table.read_text('utf-8')
  except FileNotFoundError:
    return {}
  try:
    entries = json.loads(text)
  except ValueError as error:
    raise ValueError(f'{table} is not JSON: {error}. Delete it') from error
  if not isinstance(entries, dict) or not all(
    isinstance(sizes, dict) for sizes in entries.values()
  ):
    raise ValueError(f'{table} does not map keys to sizes. Delete it')
  return entries
