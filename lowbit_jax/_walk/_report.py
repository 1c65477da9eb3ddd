"""What a walk found, as a table."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax


class Row(NamedTuple):
  """One use of a weight.

  Attributes:
    site: the path of the weight.
    scope: the name scopes around the use.
    operation: the primitive.
    shapes: of the operands, or of a table and of what is looked up.
    how: what computes it; for a weight that is decoded, why.
    decoded: bytes of the weight if all of it is decoded, else 0.
  """

  site: str
  scope: str
  operation: str
  shapes: tuple[jax.ShapeDtypeStruct, ...]
  how: str
  decoded: int = 0


class Report(Sequence[Row]):
  """Every use of a stored weight in a function: a sequence of `Row`s.

  Attributes:
    decoded: bytes of weights that are decoded as a whole, all uses together.
  """

  def __init__(self, rows: Sequence[Row]) -> None:
    self.rows = tuple(rows)

  def __getitem__(self, i: Any) -> Any:
    return self.rows[i]

  def __len__(self) -> int:
    return len(self.rows)

  @property
  def decoded(self) -> int:
    return sum(row.decoded for row in self.rows)

  def __repr__(self) -> str:
    if not self.rows:
      return 'no use of a stored weight'
    lines = [_HEAD, *map(_cells, self.rows)]
    if not any(row.scope for row in self.rows):
      lines = [(site, *rest) for site, _, *rest in lines]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    table = [
      '  '.join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip()
      for line in lines
    ]
    dense = sum(row.decoded > 0 for row in self.rows)
    total = f'{len(self.rows)} uses, {dense} of them decode a weight'
    if dense:
      total += f': {_size(self.decoded)}'
    return '\n'.join([*table, total])


_HEAD = 'site', 'scope', 'operation', 'shapes', 'decoded', 'how'


def _cells(row: Row) -> tuple[str, ...]:
  sign = ' -> ' if row.operation == 'gather' else ' · '
  shapes = sign.join(f'{x.dtype.name}{list(x.shape)}' for x in row.shapes)
  size = _size(row.decoded) if row.decoded else '-'
  return row.site, row.scope or '-', row.operation, shapes, size, row.how


def _size(count: float) -> str:
  for unit in ('B', 'KiB', 'MiB'):
    if count < 1024:
      return f'{count:.4g} {unit}'
    count /= 1024
  return f'{count:.4g} GiB'
