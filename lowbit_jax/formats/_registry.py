"""Names of formats. Values are passed around; names live in flags and files."""

import dataclasses
import difflib
from typing import Any, TypeVar

from lowbit_jax.formats._types import (
  BlockFormat,
  CodebookFormat,
  ElementFormat,
  FloatFormat,
  Format,
  IntFormat,
)

F = TypeVar('F', bound=Format)

_FORMATS: dict[str, Any] = {}


def register(fmt: F) -> F:
  """Adds a format under its name and returns it.

  Args:
    fmt: an element or block format.

  Raises:
    TypeError: if `fmt` is not a format.
    ValueError: if the name is taken by a different format.
  """
  _check(fmt)
  known = _FORMATS.setdefault(fmt.name, fmt)
  if known != fmt:
    raise ValueError(
      f'the name {fmt.name!r} already stands for {known!r}; register the new'
      ' format under another name'
    )
  return known


def _check(fmt: object) -> None:
  if not isinstance(fmt, ElementFormat | BlockFormat):
    raise TypeError(
      f'fmt={fmt!r} is not a format; pass an ElementFormat or a BlockFormat'
    )


def get(name: str) -> Format:
  """The format of that name.

  Raises:
    TypeError: if `name` is not a string.
    ValueError: if no format has that name; the message lists close names.
  """
  if not isinstance(name, str):
    raise TypeError(
      f'name={name!r} must be a string; formats are passed as values elsewhere'
    )
  if name not in _FORMATS:
    close = difflib.get_close_matches(name, _FORMATS, n=5, cutoff=0.5)
    hint = f'; did you mean {", ".join(close)}' if close else ''
    raise ValueError(
      f'unknown format name={name!r}{hint}? lowbit_jax.formats.names() lists'
      ' all'
    )
  return _FORMATS[name]


def names(kind: str | None = None) -> tuple[str, ...]:
  """All registered names, in the order of registration.

  Args:
    kind: None for all, 'element' or 'block'.
  """
  kinds = {None: object, 'element': ElementFormat, 'block': BlockFormat}
  if not isinstance(kind, str | None) or kind not in kinds:
    raise ValueError(f"kind={kind!r} must be None, 'element' or 'block'")
  return tuple(n for n, f in _FORMATS.items() if isinstance(f, kinds[kind]))


def to_dict(fmt: Format) -> dict:
  """A JSON-ready description from which `from_dict` rebuilds the format."""
  _check(fmt)
  fields = {}
  for f in dataclasses.fields(fmt):
    v = getattr(fmt, f.name)
    fields[f.name] = to_dict(v) if isinstance(v, Format) else v
  return {'kind': type(fmt).__name__, **fields}


def from_dict(description: dict) -> Any:
  """The inverse of `to_dict`; needs no registry.

  Raises:
    TypeError: for a field of another type.
    ValueError: for fields or a kind that no format has, and for numbers that no
      format can have.
  """
  kinds = (FloatFormat, IntFormat, CodebookFormat, BlockFormat)
  classes = {c.__name__: c for c in kinds}
  if not isinstance(description, dict):
    raise TypeError(f'{description=} of a format must be a dict')
  fields = dict(description)
  kind = fields.pop('kind', None)
  if not isinstance(kind, str) or kind not in classes:
    raise ValueError(f'{kind=} of a format is not one of {sorted(classes)}')
  known = dataclasses.fields(classes[kind])
  needed = {f.name for f in known if f.default is dataclasses.MISSING}
  if not needed <= fields.keys() <= {f.name for f in known}:
    raise ValueError(
      f'a {kind} has the fields {[f.name for f in known]}, got {list(fields)}'
    )
  for name, v in fields.items():
    if isinstance(v, dict):
      fields[name] = from_dict(v)
    elif isinstance(v, list):
      fields[name] = tuple(v)
  return classes[kind](**fields)
