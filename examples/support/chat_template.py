"""Chat messages to a prompt, by the Jinja template of a checkpoint.

Templates are programs of whoever made the checkpoint. They run in a sandbox,
with what `transformers` offers to them.
"""

import datetime
import json
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
from jinja2 import ext, nodes, parser, sandbox


def render(
  template: str | None,
  messages: Sequence[Mapping[str, Any]],
  *,
  bos_token: str,
  eos_token: str,
  add_generation_prompt: bool = True,
  **kwargs: Any,
) -> str:
  """The prompt that a template makes of messages.

  Args:
    template: of the checkpoint, in Jinja.
    messages: with their 'role' and 'content', the oldest first.
    bos_token: the text of the token that begins a text, '' for none.
    eos_token: that of the token that ends one.
    add_generation_prompt: whether the answer of the assistant comes next.
    **kwargs: more names that the template may ask for.

  Raises:
    ValueError: if there is no template, or it is no Jinja, tries what the
      sandbox forbids, or complains about the messages, with its words.
  """
  if template is None:
    raise ValueError('this model has no chat template; take --raw')
  names: dict[str, Any] = {'tools': None, 'documents': None} | kwargs
  try:
    return (
      _environment()
      .from_string(template)
      .render(
        messages=messages,
        bos_token=bos_token,
        eos_token=eos_token,
        add_generation_prompt=add_generation_prompt,
        **names,
      )
    )
  except Exception as error:  # It may fail in all ways of a program.
    complaint = str(error).rstrip('.')
    raise ValueError(
      f'the chat template of this model fails: {complaint}; take --raw'
    ) from error


class _Generation(ext.Extension):
  """`{% generation %}`, which marks what training learns, changes no text."""

  tags = {'generation'}

  def parse(self, parser: parser.Parser) -> nodes.Node:
    line = next(parser.stream).lineno
    body = parser.parse_statements(('name:endgeneration',), drop_needle=True)
    return nodes.Scope(body).set_lineno(line)


def _environment() -> sandbox.ImmutableSandboxedEnvironment:
  environment = sandbox.ImmutableSandboxedEnvironment(
    trim_blocks=True,
    lstrip_blocks=True,
    extensions=[_Generation, ext.loopcontrols],
  )
  environment.filters['tojson'] = _json
  environment.globals['raise_exception'] = _raise
  environment.globals['strftime_now'] = _now
  return environment


def _json(
  value: Any,
  ensure_ascii: bool = False,
  indent: int | None = None,
  separators: tuple[str, str] | None = None,
  sort_keys: bool = False,
) -> str:
  """JSON for a model to read: Jinja's own filter escapes for web pages."""
  return json.dumps(
    value,
    ensure_ascii=ensure_ascii,
    indent=indent,
    separators=separators,
    sort_keys=sort_keys,
  )


def _raise(message: str) -> None:
  raise jinja2.TemplateError(message)


def _now(layout: str) -> str:
  return datetime.datetime.now().strftime(layout)
