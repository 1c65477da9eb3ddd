"""Two formats in one model of sentences, by what each layer loses alone.

  PYTHONPATH=.:pallas python benchmarks/allocation.py
  PYTHONPATH=.:pallas python benchmarks/allocation.py --bits=4.75,6.25

What a choice loses is 1 - mean cosine between embeddings of all-MiniLM-L6-v2
and those with weights in MXFP4 and MXFP8. Each layer takes them alone first,
while the others stay in float: `ptq.allocate` goes by the sum of these losses.
Beside it stands what its choice loses, and what the same bits do where the
first, the last or random layers take MXFP8.
"""

import dataclasses
import pathlib
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from flax import nnx
from tqdm import tqdm

import lowbit_jax as lowbit
from lowbit_jax import formats, ptq
from lowbit_jax.formats import BlockFormat

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / 'examples'))
from support import calibration, minilm, sentence_models  # noqa: E402
from support.variants import LINEARS  # noqa: E402

_BITS = flags.DEFINE_list(
  'bits', ['4.75', '5.25', '6.25'], 'For a weight, on average.'
)
_SENTENCES = 'examples/data/sentences.txt'
_SMALL, _LARGE = formats.mxfp4, formats.mxfp8_e4m3

Choice = Mapping[str, BlockFormat]


def _kernels(model: nnx.Module) -> dict[str, jax.Array]:
  """Of linear layers, those of each stack as one, by path."""
  leaves = nnx.to_flat_state(nnx.state(model))
  named = (('/'.join(map(str, path)), leaf) for path, leaf in leaves)
  return {
    path: leaf.get_raw_value()
    for path, leaf in named
    if LINEARS.fullmatch(path)
  }


def _paths(kernels: Mapping[str, jax.Array]) -> list[str]:
  """Of all layers, in the order in which activations meet them."""
  blocks = range(len(next(iter(kernels.values()))))
  return [f'{path}/{k}' for k in blocks for path in kernels]


def _losses(found: sentence_models.SentenceModel) -> Callable[[Choice], float]:
  """What a model loses with some layers in other formats than float."""
  sentences = calibration.sentences(pathlib.Path(_SENTENCES))
  kernels, floats = _kernels(found.model), found.embed(sentences)

  def rounded(path, kernel, choice):
    if path not in choice:
      return kernel
    return lowbit.fake_quant(kernel, choice[path], axis=-2)

  def loss(choice: Choice) -> float:
    values = {}
    for path, stack in kernels.items():
      layers = [
        rounded(f'{path}/{k}', own, choice) for k, own in enumerate(stack)
      ]
      values[path] = jnp.stack(layers)
    model = lowbit.nn.nnx.assign(nnx.clone(found.model), values)
    made = dataclasses.replace(found, model=model).embed(sentences)
    return 1 - sentence_models.mean_cosine(made, floats)

  return loss


def _in_order(
  paths: Iterable[str], sizes: Mapping[str, int], bits: float
) -> Choice:
  """As many of the first layers in the large format as the bits allow."""
  left = (bits - _SMALL.bits_per_element) * sum(sizes.values())
  choice = {}
  for path in paths:
    more = _LARGE.bits_per_element - _SMALL.bits_per_element
    fits = left >= sizes[path] * more
    left -= sizes[path] * more * fits
    choice[path] = _LARGE if fits else _SMALL
  return choice


def main(argv: Sequence[str]) -> None:
  del argv
  found = sentence_models.load(minilm.fetch())
  kernels = _kernels(found.model)
  paths, loss = _paths(kernels), _losses(found)
  sizes = {
    f'{path}/{k}': own.size
    for path, kernel in kernels.items()
    for k, own in enumerate(kernel)
  }
  losses = {
    path: {fmt: loss({path: fmt}) for fmt in (_SMALL, _LARGE)}
    for path in tqdm(paths, unit='layer')
  }
  for fmt in (_SMALL, _LARGE):
    total = sum(own[fmt] for own in losses.values())
    print(f'all {fmt}: {loss(dict.fromkeys(paths, fmt)):.4f}, sum {total:.4f}')

  orders = {
    'first': paths,
    'last': paths[::-1],
    'random': np.random.default_rng(0).permutation(paths).tolist(),
  }
  print(f'{"bits":>5} {"sum":>7} {"chosen":>7} ', *map('{:>7}'.format, orders))
  for bits in map(float, _BITS.value):
    chosen = ptq.allocate(losses, sizes, bits)
    expected = sum(losses[path][fmt] for path, fmt in chosen.items())
    others = [loss(_in_order(own, sizes, bits)) for own in orders.values()]
    columns = ' '.join(f'{x:>7.4f}' for x in (expected, loss(chosen), *others))
    print(f'{bits:>5} {columns}', flush=True)


if __name__ == '__main__':
  app.run(main)
