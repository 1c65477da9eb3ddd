"""Shows indented equations of docstrings as blocks of their own.

Docstrings indent by two spaces, and Markdown begins a block of code at four.
"""

import re

import griffe

_SECTION = re.compile(r'[A-Z][a-z]+:$')  # as in 'Returns:'
_INDENTED = re.compile(r'  +(?!\s|[-*|] |\|)')  # but for lists and tables


def blocks(text: str) -> str:
  """The text with paragraphs indented by two spaces indented by four.

  What stands under a heading such as 'Returns:' is left as it is.
  """
  paragraphs, in_section = text.split('\n\n'), False
  for i, paragraph in enumerate(paragraphs):
    lines = paragraph.split('\n')
    flush = [line for line in lines if line and not line.startswith(' ')]
    if flush:
      in_section = bool(_SECTION.fullmatch(flush[-1]))
    elif not in_section and _INDENTED.match(lines[0]):
      paragraphs[i] = '\n'.join('  ' + line for line in lines)
  return '\n\n'.join(paragraphs)


class Equations(griffe.Extension):
  """Rewrites the docstring of every object before it is parsed."""

  def on_object(self, *, obj: griffe.Object, **_: object) -> None:
    if obj.docstring:
      obj.docstring.value = blocks(obj.docstring.value)
