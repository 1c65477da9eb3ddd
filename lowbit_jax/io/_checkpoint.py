"""A file or folder of named tensors that are read when they are asked for."""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from types import TracebackType
from typing import Any, NamedTuple, Self

import numpy as np

from lowbit_jax._transformed import Transformed
from lowbit_jax.formats import BlockFormat
from lowbit_jax.qarray import QArray

Leaf = np.ndarray | QArray | Transformed


class Tensor(NamedTuple):
  """What is known of a tensor before it is read.

  Attributes:
    layout: how the file stores its numbers, such as 'Q4_0' or 'F32'.
    shape: of the array that it stands for.
    nbytes: in the file, companions such as scales included.
    fmt: the format of the QArray that it becomes, also of one behind a
      transform; None for an array.
    read: makes the array, QArray or Transformed, whose leaves are NumPy arrays.
  """

  layout: str
  shape: tuple[int, ...]
  nbytes: int
  fmt: BlockFormat | None
  read: Callable[[], Leaf]


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Checkpoint(Mapping[str, Leaf]):
  """Tensors by name; each is read from its file when it is asked for.

  Used in `with`, or closed by `close`, after which nothing can be read.
  QArrays have NumPy leaves: whoever asked places them on devices.

  Attributes:
    path: of the file or folder.
    tensors: what is known of each tensor, by name, in the order of the file.
    metadata: what else the file says.
    release: closes the files.
  """

  path: str
  tensors: dict[str, Tensor]
  metadata: dict[str, Any]
  release: Callable[[], None]

  def __getitem__(self, name: str) -> Leaf:
    return self.tensors[name].read()

  def __contains__(self, name: object) -> bool:
    return name in self.tensors  # without reading it

  def __iter__(self) -> Iterator[str]:
    return iter(self.tensors)

  def __len__(self) -> int:
    return len(self.tensors)

  def __enter__(self) -> Self:
    return self

  def __exit__(
    self,
    kind: type[BaseException] | None,
    error: BaseException | None,
    trace: TracebackType | None,
  ) -> None:
    del kind, error, trace
    self.close()

  def close(self) -> None:
    """Closes the files; arrays that were read stay as they are."""
    self.release()

  def describe(self) -> str:
    """A table of what was understood: a line for each layout.

    Layouts that become QArrays come first, what stays dense last.
    """
    rows = [('layout', 'tensors', 'numbers', 'bits', 'bytes', 'arrives as')]
    groups: dict[tuple[bool, str, str], list[Tensor]] = {}
    for tensor in self.tensors.values():
      arrival = 'array' if tensor.fmt is None else str(tensor.fmt)
      key = (tensor.fmt is None, tensor.layout, arrival)
      groups.setdefault(key, []).append(tensor)
    for (_, layout, arrival), members in sorted(groups.items()):
      rows.append((layout, *_sums(members), arrival))
    rows.append(('all', *_sums(self.tensors.values()), ''))
    return '\n'.join([f'{self.path}', '', *_aligned(rows)])

  def __repr__(self) -> str:
    return f'Checkpoint({self.path!r}, {len(self)} tensors)'


def _sums(tensors) -> tuple[str, str, str, str]:
  """Tensors, numbers, bits per number and bytes, as text."""
  size = sum(math.prod(t.shape) for t in tensors)
  nbytes = sum(t.nbytes for t in tensors)
  bits = f'{8 * nbytes / size:.4g}' if size else ''
  return f'{len(tensors):,}', f'{size:,}', bits, f'{nbytes:,}'


def _aligned(rows: list[tuple[str, ...]]) -> list[str]:
  """Lines of columns: text to the left, numbers to the right."""
  widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
  text = (0, len(widths) - 1)
  return [
    '  '.join(
      cell.ljust(width) if k in text else cell.rjust(width)
      for k, (cell, width) in enumerate(zip(row, widths, strict=True))
    ).rstrip()
    for row in rows
  ]
