"""Every public function says of which types its arguments and result are."""

import ast
import pathlib

from absl.testing import absltest

_ROOT = pathlib.Path(__file__).parents[1]


def unannotated(tree: ast.AST) -> list[str]:
  """Public functions and methods of a module, with what has no annotation."""
  found = []

  def visit(node, prefix: str):
    for child in ast.iter_child_nodes(node):
      if isinstance(child, ast.ClassDef) and not child.name.startswith('_'):
        visit(child, f'{prefix}{child.name}.')
      elif isinstance(child, ast.If | ast.Try):
        visit(child, prefix)
      elif isinstance(child, ast.FunctionDef) and _is_public(child.name):
        if missing := _missing(child, is_method=bool(prefix)):
          found.append(f'{prefix}{child.name}: {", ".join(missing)}')

  visit(tree, '')
  return found


def _is_public(name: str) -> bool:
  return not name.startswith('_') or name.endswith('__')


def _missing(function: ast.FunctionDef, is_method: bool) -> list[str]:
  given = function.args
  arguments = [*given.posonlyargs, *given.args, *given.kwonlyargs]
  arguments += [a for a in (given.vararg, given.kwarg) if a is not None]
  decorators = [ast.unparse(d) for d in function.decorator_list]
  if is_method and 'staticmethod' not in decorators:
    arguments = arguments[1:]
  missing = [a.arg for a in arguments if a.annotation is None]
  return missing + ['return'] * (function.returns is None)


class AnnotationsTest(absltest.TestCase):
  def test_every_public_function_is_annotated(self):
    found = []
    for folder in ('lowbit_jax', 'pallas'):
      for path in sorted((_ROOT / folder).rglob('*.py')):
        tree = ast.parse(path.read_text('utf-8'))
        found += [f'{path.name}: {name}' for name in unannotated(tree)]
    self.assertEqual(found, [])

  def test_sees_what_is_missing(self):
    text = (
      'def f(x, *, y: int, **z) -> int: ...\n'
      'def _g(x): ...\n'
      'class A:\n'
      '  def h(self, x: int): ...\n'
    )
    want = ['f: x, z', 'A.h: return']
    self.assertEqual(unannotated(ast.parse(text)), want)


if __name__ == '__main__':
  absltest.main()
