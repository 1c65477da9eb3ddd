"""Writes the table of recipes in recipes.md from the recipes themselves.

python docs/recipes.py            writes docs/recipes.md
python docs/recipes.py --check    fails where the page says something else
"""

import dataclasses
import inspect
import pathlib
import sys

from lowbit_jax.recipe import GemmSpec, QuantSpec, Recipe
from lowbit_jax.training import recipes
from lowbit_pallas.arith.codec import RANDOM_BITS

_PAGE = pathlib.Path(__file__).with_suffix('.md')
_START, _END = '<!-- table -->\n', '<!-- end of table -->\n'
_HEAD = (
  '| recipe | y = x w | dx = dy wᵀ | dw = xᵀ dy | besides | what it is |\n'
  '|---|---|---|---|---|---|\n'
)


def table() -> str:
  """One row for each recipe: its operands, product by product."""
  return _HEAD + ''.join(map(_row, recipes.names()))


def _row(name: str) -> str:
  recipe = recipes.get(name)
  text = inspect.getdoc(recipes._RECIPES[name]) or ''
  cells = [
    f'`{name}`',
    *_products(recipe),
    _besides(recipe),
    ' '.join(text.split()),
  ]
  return f'| {" | ".join(cells)} |\n'


def _products(recipe: Recipe) -> list[str]:
  """The three products; of those that reuse an operand, what it is."""
  forward, dgrad, wgrad = recipe.gemms
  if recipe.residuals != 'forward':
    return [_product(gemm) for gemm in recipe.gemms]
  reused = 'as in y'
  return [
    _product(forward),
    _product(dgrad, right=reused),
    _product(wgrad, left=reused),
  ]


def _product(gemm: GemmSpec, left: str = '', right: str = '') -> str:
  """Both operands, once if they are alike, and the rotation of the product."""
  left, right = left or _operand(gemm.lhs), right or _operand(gemm.rhs)
  text = left if left == right else f'{left} × {right}'
  if gemm.hadamard:
    text += f'; rotated by {gemm.hadamard}'
    text += {'none': '', 'fixed': ', fixed signs', 'per_call': ', new signs'}[
      gemm.signs
    ]
  return text


def _operand(quantizer) -> str:
  """A quantizer in words: format, and what differs from the defaults."""
  if quantizer is None:
    return 'as it is'
  if not isinstance(quantizer, QuantSpec):
    return _custom(quantizer)
  words = [quantizer.fmt.name]
  if quantizer.scale_rule != QuantSpec(quantizer.fmt).scale_rule:
    words.append(quantizer.scale_rule)
  if quantizer.rounding != 'nearest_even':
    words.append(quantizer.rounding)
  if quantizer.random_bits != RANDOM_BITS:
    words.append(f'{quantizer.random_bits} random bits')
  if quantizer.prescale != 1:
    words.append(f'of {quantizer.prescale:g} x')
  if quantizer.tensor_scaling is not None:
    held = quantizer.tensor_scaling
    words.append(
      f'scale held {held.every} steps'
      if held.every > 1
      else f'scale of the last {held.window} steps'
    )
  return ' '.join(words)


def _custom(quantizer) -> str:
  """The class of a quantizer with the fields that are not the defaults."""
  values = []
  for field in dataclasses.fields(quantizer):
    value = getattr(quantizer, field.name)
    if value == field.default:
      continue
    is_spec = isinstance(value, QuantSpec)
    values.append(_operand(value) if is_spec else f'{field.name}={value}')
  return f'{type(quantizer).__name__}({", ".join(values)})'


def _besides(recipe: Recipe) -> str:
  """What is done beside the quantizers."""
  notes = []
  if recipe.center:
    notes.append('x relative to its mean')
  if recipe.principal:
    notes.append(f'{recipe.principal} directions of x in high precision')
  notes += {
    'high_precision': [],
    'forward': ['gradients of the quantized product'],
    'requantized': ['backward quantizes what forward used'],
  }[recipe.residuals]
  return ', '.join(notes)


def page(text: str) -> str:
  """The text of the page with a new table."""
  before, rest = text.split(_START)
  _, after = rest.split(_END)
  return f'{before}{_START}\n{table()}\n{_END}{after}'


def main(arguments: list[str]) -> int:
  text = _PAGE.read_text('utf-8')
  if arguments == ['--check']:
    if page(text) != text:
      print(f'{_PAGE} is not what the recipes are: run docs/recipes.py')
      return 1
  elif arguments:
    print(__doc__)
    return 2
  else:
    _PAGE.write_text(page(text), 'utf-8')
  return 0


if __name__ == '__main__':
  sys.exit(main(sys.argv[1:]))
