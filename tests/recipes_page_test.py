"""The table of recipes in the docs is what the recipes are."""

import importlib.util
import pathlib

from absl.testing import absltest

from lowbit_jax.training import recipes

_PAGE = pathlib.Path(__file__).parents[1] / 'docs' / 'recipes.md'


def writer():
  """The module that writes the page."""
  spec = importlib.util.spec_from_file_location(
    'recipes_page', _PAGE.with_suffix('.py')
  )
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


class PageTest(absltest.TestCase):
  def test_table_is_that_of_the_recipes(self):
    text = _PAGE.read_text('utf-8')
    self.assertEqual(writer().page(text), text, 'run docs/recipes.py')

  def test_has_a_row_for_each(self):
    rows = writer().table().splitlines()[2:]
    named = [row.split('`')[1] for row in rows]
    self.assertEqual(named, list(recipes.names()))


if __name__ == '__main__':
  absltest.main()
