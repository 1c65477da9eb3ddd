"""Makes smollm2_tokens.json: the ids of SmolLM2 as another program has them.

  PYTHONPATH=.:examples python tests/golden/make_token_goldens.py

It needs transformers, gguf and torch, and fetches the model. The file committed
here comes from transformers 5.24.0, tokenizers 0.23.3 and gguf 0.19.0, which
read the tokenizer from the metadata of the GGUF file. They take any text apart
as GPT-2 does; that digits stand alone, as in the model's own tokenizer.json, is
set here, and matters for digits beyond ASCII such as a half only. It holds:

  texts     pairs of a text and its ids, with nothing added
  template  the chat template of the file
  chats     messages, whether the answer comes next, the prompt and its ids
"""

import json
import pathlib

from support import smollm2

TEXTS = (
  'The capital of France is',
  'def fibonacci(n):\n',
  '<|im_start|>user\nHello 1234 wörld  \n\n x',
  '  two leading spaces,\ttabs\t\tand trailing  ',
  "I'll say it's DON'T, naïve café Ångström: señor Müller",
  '3.14159 ½ ² 1,000,000 x86_64 007',
  'e\N{COMBINING ACUTE ACCENT} is not \N{LATIN SMALL LETTER E WITH ACUTE}',
  'emoji 🙂👩‍🚀 and 日本語, русский, العربية',
  '<|im_end|><|endoftext|> <|im_start|>\n<|not_special|>',
  'a\r\nb\n\n\n\nc   \n  d',
  '',
  '"TOM!"\n\nNo answer.\n\n"TOM!"\n\nNo answer.\n\n"What\'s gone with that boy,'
  '  I wonder? You TOM!"\n\nNo answer.',
)
USER = {'role': 'user', 'content': 'Are dogs real?'}
CHATS = (
  ([USER], True),
  ([USER], False),
  (
    [
      {'role': 'system', 'content': 'Answer in German.'},
      USER,
      {'role': 'assistant', 'content': 'Ja, natürlich.'},
      {'role': 'user', 'content': 'Und Katzen? 🐈'},
    ],
    True,
  ),
)


def main() -> None:
  import transformers
  from tokenizers import pre_tokenizers

  path = smollm2.fetch()
  tokenizer = transformers.AutoTokenizer.from_pretrained(
    path.parent, gguf_file=path.name
  )
  backend = tokenizer.backend_tokenizer
  backend.pre_tokenizer = pre_tokenizers.Sequence(
    [
      pre_tokenizers.Digits(individual_digits=True),
      pre_tokenizers.ByteLevel(add_prefix_space=False),
    ]
  )

  def ids(text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False)

  def chat(messages: list[dict[str, str]], answer: bool) -> list[object]:
    prompt = tokenizer.apply_chat_template(
      messages, tokenize=False, add_generation_prompt=answer
    )
    return [messages, answer, prompt, ids(prompt)]

  content = {
    'texts': [[text, ids(text)] for text in TEXTS],
    'template': tokenizer.chat_template,
    'chats': [chat(*example) for example in CHATS],
  }
  file = pathlib.Path(__file__).with_name('smollm2_tokens.json')
  file.write_text(json.dumps(content, ensure_ascii=False, indent=1) + '\n')


if __name__ == '__main__':
  main()
