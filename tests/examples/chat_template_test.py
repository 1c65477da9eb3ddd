"""Prompts from chat templates, and templates that fail or break out."""

import json
import pathlib

import pytest
from absl.testing import absltest, parameterized

pytest.importorskip('jinja2', reason='of the extra `examples`')

from support import chat_template  # noqa: E402

_GOLDEN = pathlib.Path(__file__).parents[1] / 'golden' / 'smollm2_tokens.json'
_USER = {'role': 'user', 'content': 'Grüße <b>'}


def _render(template, messages=(_USER,), **kwargs) -> str:
  kwargs = {'bos_token': '<s>', 'eos_token': '</s>'} | kwargs
  return chat_template.render(template, messages, **kwargs)


class RenderTest(parameterized.TestCase):
  def test_prompts_of_smollm2(self):
    golden = json.loads(_GOLDEN.read_text('utf-8'))
    for messages, answer, prompt, _ in golden['chats']:
      self.assertEqual(
        _render(golden['template'], messages, add_generation_prompt=answer),
        prompt,
      )

  @parameterized.parameters(
    ('{{ bos_token }}{{ messages[0].content }}{{ eos_token }}',
     '<s>Grüße <b></s>'),
    # Blocks leave no line and no indentation behind.
    ('  {% for m in messages %}\n  {{ m.role }}\n  {% endfor %}\n  .',
     '  user\n  .'),
    ('{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}'
     '{% endfor %}', '01'),
    ('{% for i in range(3) %}{% if i == 1 %}{% continue %}{% endif %}{{ i }}'
     '{% endfor %}', '02'),
    ('{{ messages[0] | tojson }}', '{"role": "user", "content": "Grüße <b>"}'),
    ('{{ [1] | tojson(indent=1) }}', '[\n 1\n]'),
    ('{{ {"b": 1, "a": "é"} | tojson(ensure_ascii=True, sort_keys=True,'
     ' separators=(",", ":")) }}', '{"a":"\\u00e9","b":1}'),
    ('{% set s = namespace(n=1) %}{% set s.n = 2 %}{{ s.n }}', '2'),
    ('a{% generation %}b{% set x = 1 %}{% endgeneration %}{{ x }}c', 'abc'),
    ('{{ tools is none }}{{ documents is none }}{{ missing is defined }}',
     'TrueTrueFalse'),
    ('{{ add_generation_prompt }}', 'True'),
  )  # fmt: skip
  def test_what_templates_use(self, template, expected):
    self.assertEqual(_render(template), expected)

  def test_names_of_the_caller(self):
    template = '{{ tools[0] }} {{ enable_thinking }}'
    rendered = _render(template, tools=['t'], enable_thinking=False)
    self.assertEqual(rendered, 't False')

  def test_date(self):
    self.assertRegex(_render('{{ strftime_now("%Y-%m") }}'), r'^20\d\d-\d\d$')

  @parameterized.parameters(
    ('{{ raise_exception("roles must alternate") }}', 'roles must alternate'),
    ('{% if %}', 'Expected an expression'),
    ('{% nonsense %}', 'unknown tag'),
    ('{% generation %}', 'endgeneration'),
    ('{{ messages[7].content + "x" }}', 'no element 7'),
    ('{{ 1 / 0 }}', 'division by zero'),
    ('{{ messages.append(1) }}', "'append' of 'list'.*unsafe"),
    ('{{ "".__class__.__mro__ }}', '__class__.*unsafe'),
    ('{{ raise_exception.__globals__["json"] }}', '__globals__.*unsafe'),
    ('{{ "{0.__class__.__mro__}".format(1) }}', '__class__.*unsafe'),
    ('{{ range(999999999) }}', 'Range too big'),
    ('{% include "/etc/hostname" %}', 'no loader'),
  )
  def test_complaints(self, template, complaint):
    with self.assertRaisesRegex(
      ValueError, rf'(?s)chat template .* fails: .*{complaint}.*--raw'
    ):
      _render(template, [_USER])

  def test_no_template(self):
    with self.assertRaisesRegex(ValueError, 'no chat template; take --raw'):
      _render(None)


if __name__ == '__main__':
  absltest.main()
