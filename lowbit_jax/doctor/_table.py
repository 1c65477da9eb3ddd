"""Rows of a report, and their printed table."""

import dataclasses
import math
import textwrap
from collections.abc import Iterator

from lowbit_jax._typing import Axis
from lowbit_jax.doctor._measure import Measures

WIDTH = 100


@dataclasses.dataclass(frozen=True)
class Row:
  """One tensor of a report.

  Attributes:
    path: its place in the tree, 'array' for a bare array.
    shape: its shape.
    dtype: its dtype (the one that it stands for, if it came quantized).
    fmt: name of the format, '' if skipped.
    axis: the block axis, or None if skipped.
    measures: what was measured, see `Measures`.
    rules: names of the rules that apply, see `lowbit_jax.doctor.RULES`.
    advice: what to change, '' if nothing.
    skipped: why it was not measured, '' if it was.
  """

  path: str
  shape: tuple[int, ...]
  dtype: str
  fmt: str = ''
  axis: Axis = None
  measures: Measures = Measures()
  rules: tuple[str, ...] = ()
  advice: str = ''
  skipped: str = ''

  def to_dict(self) -> dict:
    """All fields in one flat dict."""
    out = {
      f.name: getattr(self, f.name)
      for f in dataclasses.fields(self)
      if f.name != 'measures'
    }
    return {**out, **self.measures._asdict()}


@dataclasses.dataclass(frozen=True)
class Report:
  """Measures and advice for quantized tensors; `print` shows a table.

  Attributes:
    rows: one row per leaf, in the order of the tree.
  """

  rows: tuple[Row, ...]

  def __iter__(self) -> Iterator[Row]:
    return iter(self.rows)

  def __len__(self) -> int:
    return len(self.rows)

  def __getitem__(self, path: str) -> Row:
    """The row of that path."""
    for row in self.rows:
      if row.path == path:
        return row
    known = ', '.join(row.path for row in self.rows[:20])
    raise KeyError(f'no row {path!r}; there are {known}')

  @property
  def ok(self) -> bool:
    """Whether there is no advice."""
    return not any(row.advice for row in self.rows)

  def to_dicts(self) -> list[dict]:
    """The rows as flat dicts, for a data frame or JSON."""
    return [row.to_dict() for row in self.rows]

  def __str__(self) -> str:
    return '\n'.join(_lines(self))


# Heading, width, and text of a row. QSNR in dB; clip, flush and top in percent
# of elements, sub of block scales, zero of blocks; bad counts NaN blocks.
_COLUMNS = (
  ('bits', 5, lambda r: _number(r.measures.bits_per_element, 2)),
  ('dB', 5, lambda r: _number(r.measures.qsnr_db, 1)),
  ('clip%', 5, lambda r: _percent(r.measures.saturated)),
  ('flush%', 6, lambda r: _percent(r.measures.flushed)),
  ('sub%', 5, lambda r: _percent(_limits(r.measures))),
  ('top%', 5, lambda r: _percent(r.measures.at_max)),
  ('zero%', 5, lambda r: _percent(r.measures.zero_blocks)),
  ('bad', 3, lambda r: _count(r.measures.nonfinite_blocks)),
  ('crest', 5, lambda r: _number(r.measures.crest, 1)),
  ('rho', 5, lambda r: _power(r.measures.rho[1])),
)
_SHAPE = 16
_PATH = WIDTH - 1 - _SHAPE - sum(1 + width for _, width, _ in _COLUMNS)
_SAMPLES = 3


def _lines(report: Report) -> list[str]:
  measured = [row for row in report.rows if not row.skipped]
  width = min(_PATH, max([6, *(len(row.path) for row in measured)]))
  heads = ' '.join(f'{name:>{w}}' for name, w, _ in _COLUMNS)
  lines = []
  for fmt in dict.fromkeys(row.fmt for row in measured):
    lines += [fmt, f'{"tensor":<{width}} {"shape":>{_SHAPE}} {heads}']
    lines += [_line(row, width) for row in measured if row.fmt == fmt]
  lines += _advice(measured)
  if any(math.isnan(row.measures.saturated) for row in measured):
    lines += _wrap(
      'dB, clip%, flush% and crest of stored tensors need reference=, the'
      ' original'
    )
  by_reason: dict[str, list[str]] = {}
  for row in report.rows:
    if row.skipped:
      names = by_reason.setdefault(row.skipped, [])
      names.append(_shorten(row.path, 40))
  for reason, names in by_reason.items():
    lines += _wrap(f'skipped ({reason}): {", ".join(names)}')
  return lines


def _line(row: Row, width: int) -> str:
  cells = [f'{_fit(text(row), w):>{w}}' for _, w, text in _COLUMNS]
  name = f'{_shorten(row.path, width):<{width}}'
  return f'{name} {_shape(row):>{_SHAPE}} {" ".join(cells)}'


def _advice(rows) -> list[str]:
  """Advice by tensor; of many with the same rules, the first ones."""
  groups: dict[tuple, list[Row]] = {}
  for row in rows:
    if row.rules:
      groups.setdefault(row.rules, []).append(row)
  lines = []
  for rules, group in groups.items():
    for row in group[:_SAMPLES]:
      lines += _wrap(f'{_shorten(row.path, 40)}: {row.advice}')
    if rest := group[_SAMPLES:]:
      names = ', '.join(_shorten(row.path, 40) for row in rest)
      lines += _wrap(f'also {", ".join(rules)}: {names}')
  return lines


def _wrap(text: str) -> list[str]:
  return textwrap.wrap(
    text, WIDTH, subsequent_indent='  ', break_on_hyphens=False
  )


def _shorten(path: str, width: int) -> str:
  """A path with its parts abbreviated, from the left, until it fits.

  Parts with a number tell layers apart and go last; the name itself stays.
  """
  *parts, last = path.split('/')
  plain = [i for i, part in enumerate(parts) if not _digits(part)]
  numbered = [i for i, part in enumerate(parts) if _digits(part)]
  for i in (*plain, *numbered):
    if len('/'.join([*parts, last])) > width:
      parts[i] = parts[i][:1] + _digits(parts[i])
  short = '/'.join([*parts, last])
  return short if len(short) <= width else '...' + short[3 - width :]


def _digits(part: str) -> str:
  return ''.join(c for c in part if c.isdigit())


def _shape(row: Row) -> str:
  """'64x[128]': the block axis stands in brackets."""
  axes = row.axis if isinstance(row.axis, tuple) else (row.axis,)
  marked = {a + len(row.shape) for a in axes if a is not None}
  sizes = (f'[{n}]' if i in marked else str(n) for i, n in enumerate(row.shape))
  return _fit('x'.join(sizes), _SHAPE)


def _fit(text: str, width: int) -> str:
  return text if len(text) <= width else text[: width - 1] + '~'


def _limits(m: Measures) -> float:
  return m.end_scales if math.isnan(m.subnormal_scales) else m.subnormal_scales


def _number(x: float, digits: int) -> str:
  if math.isnan(x):
    return '-'
  return 'exact' if math.isinf(x) else f'{x:.{digits}f}'


def _percent(share: float) -> str:
  if math.isnan(share):
    return '-'
  if 0 < share < 5e-4:
    return '<.1'
  return f'{100 * share:.1f}' if share else '0'


def _count(n: int) -> str:
  return str(n) if n < 1000 else '>1k'


def _power(x: float) -> str:
  if math.isnan(x):
    return '-'
  return f'{x:.0f}' if x < 1e5 else f'{x:.0e}'.replace('e+0', 'e')
