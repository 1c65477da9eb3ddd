"""Measures L-Mul: errors of products, and losses of a model that attends by it.

L-Mul replaces a multiplication by an integer addition. The first table has the
relative errors of its products, beside those of true products of narrow
numbers, for pairs with uniform mantissas. The second has the held-out loss of
the byte-level model of models/byte_lm.py, trained in float32 with exact
attention, when the products of its attention (Q K^T, and weights times V) are
L-Mul; its other layers stay exact.

  python examples/lmul_attention.py   # six minutes on two cores, one if trained

The model is the one that quantize_lm.py trains: its checkpoint is reused, or
made, in WORKDIR/checkpoints. Results go to WORKDIR/lmul_errors.csv and
WORKDIR/lmul_losses.csv.
"""

import functools
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from lowbit_jax import formats
from lowbit_jax.ops import lmul_attention
from lowbit_pallas.arith import lmul as arith
from models import byte_lm
from support import command, data, loop, model_flags, report
from support.checkpoints import CheckpointError, Checkpoints

_SAVE_EVERY = 40

_WORKDIR = flags.DEFINE_string(
  'workdir', 'quantize_lm_out', 'Directory of checkpoints and results.'
)
_CONFIG = model_flags.define('steps', 'seed')
_EVAL_WINDOWS = flags.DEFINE_integer(
  'eval_windows', 96, 'Held-out windows.', lower_bound=2
)
_PAIRS = flags.DEFINE_integer(
  'pairs', 2_000_000, 'Pairs of the table of errors.', lower_bound=1
)


class Error(NamedTuple):
  """Relative error of a product, in percent."""

  product: str
  mean: float
  rms: float
  max: float


class Loss(NamedTuple):
  """One arithmetic of the attention.

  Attributes:
    products: the format of operands and products.
    reading: of L-Mul; '' for exact products.
    loss: held-out loss in nats per byte.
    difference: loss minus the loss with exact products.
    standard_error: of the difference, over the held-out windows.
  """

  products: str
  reading: str
  loss: float
  difference: float
  standard_error: float


def _rounded(x: jax.Array, mantissa_bits: int) -> jax.Array:
  """float32 codes, rounded to so many mantissa bits."""
  return arith.round_mantissa(x, arith.FLOAT32, mantissa_bits)


def _l_mul(offset: float, reading: str = 'integer', mantissa_bits: int = 23):
  def product(x, y):
    x, y = (_rounded(v, mantissa_bits) for v in (x, y))
    ulps = round(offset * 2**23)
    return arith.multiply(x, y, arith.FLOAT32, reading, ulps)

  return product


def _true(mantissa_bits: int, round_product: bool):
  def product(x, y):
    x, y = (_values(_rounded(v, mantissa_bits)) for v in (x, y))
    code = arith.to_codes(x * y, arith.FLOAT32)
    return _rounded(code, mantissa_bits) if round_product else code

  return product


def _values(codes: jax.Array) -> jax.Array:
  return arith.from_codes(codes, arith.FLOAT32)


PRODUCTS: dict[str, Callable[[jax.Array, jax.Array], jax.Array]] = {
  'L-Mul, integer': _l_mul(2**-4),
  'L-Mul, formula': _l_mul(2**-4, 'formula'),
  'no offset (Mitchell)': _l_mul(0),
  'offset 2^-5': _l_mul(2**-5),
  'offset 2^-3': _l_mul(2**-3),
} | {
  f'L-Mul, {k} bits': _l_mul(2.0 ** -arith.offset_bits(k), mantissa_bits=k)
  for k in (2, 3, 4, 5, 6)
}
PRODUCTS |= {
  'true, E4M3 operands': _true(3, False),
  'true, E4M3 operands and product': _true(3, True),
  'true, E5M2 operands': _true(2, False),
  'true, E5M2 operands and product': _true(2, True),
}


def errors(pairs: int, seed: int) -> list[Error]:
  """Relative errors of all products for pairs 1 + u, u uniform in [0, 1)."""
  rng = np.random.default_rng(seed)
  x, y = (1 + rng.integers(0, 1 << 23, (2, pairs)) / 2**23).astype(np.float32)
  exact = x.astype(np.float64) * y
  codes = [arith.to_codes(jnp.asarray(v), arith.FLOAT32) for v in (x, y)]

  def error(name: str) -> Error:
    product = np.asarray(_values(jax.jit(PRODUCTS[name])(*codes)), np.float64)
    relative = 100 * (product / exact - 1)
    rms = np.sqrt(np.mean(relative**2))
    return Error(
      name, float(relative.mean()), float(rms), float(np.abs(relative).max())
    )

  return [error(name) for name in PRODUCTS]


ARITHMETICS: dict[str, dict[str, Any]] = {
  'float32': {},
  'bfloat16': {'fmt': formats.bfloat16},
  **{f'{k} bits': {'mantissa_bits': k} for k in (2, 3, 4, 5, 6)},
  'E4M3': {'fmt': formats.e4m3fn},
  'E5M2': {'fmt': formats.e5m2},
}


def losses(
  config: byte_lm.Config, params: Any, windows: np.ndarray
) -> list[Loss]:
  """Held-out losses with exact attention and with each arithmetic."""
  batches = np.array_split(windows, -(-len(windows) // config.batch))

  def measured(attention) -> np.ndarray:
    loss = byte_lm.make_loss(byte_lm.ByteLM(config, attention=attention))
    parts = [loss(params, jnp.asarray(batch)) for batch in batches]
    return np.concatenate(parts).astype(np.float64)

  exact = measured(jax.nn.dot_product_attention)

  def row(products: str, reading: str, values: np.ndarray) -> Loss:
    difference = values - exact
    row = Loss(
      products,
      reading,
      float(values.mean()),
      float(difference.mean()),
      float(difference.std(ddof=1) / len(values) ** 0.5),
    )
    print(_loss_line(row), flush=True)
    return row

  print(f'{"products":<10} {"reading":<8} {"loss":>8} {"difference":>18}')
  rows = [row('exact', '', exact)]
  for name, options in ARITHMETICS.items():
    for reading in arith.READINGS:
      attention = functools.partial(lmul_attention, reading=reading, **options)
      rows.append(row(name, reading, measured(attention)))
  return rows


def _loss_line(row: Loss) -> str:
  difference = f'{row.difference:+.4f} ± {row.standard_error:.4f}'
  return (
    f'{row.products:<10} {row.reading:<8} {row.loss:>8.4f} {difference:>18}'
  )


def _save(path: pathlib.Path, rows: Sequence[Error] | Sequence[Loss]) -> None:
  report.write_csv(path, rows)
  print(f'saved {path}')


def run(
  config: byte_lm.Config,
  workdir: pathlib.Path,
  pairs: int,
  eval_windows: int,
  corpus: data.Corpus,
) -> None:
  """Measures, prints and saves both tables."""
  checkpoints = Checkpoints(
    workdir / 'checkpoints', loop.identity(config, corpus)
  )
  try:
    params = loop.train(config, corpus, checkpoints, _SAVE_EVERY)
  finally:
    checkpoints.close()
  print(f'{"relative error in %":<32} {"mean":>6} {"rms":>6} {"max":>6}')
  table = errors(pairs, config.seed)
  for row in table:
    print(
      f'{row.product:<32} {row.mean:>+6.2f} {row.rms:>6.2f} {row.max:>6.2f}'
    )
  _save(workdir / 'lmul_errors.csv', table)
  windows = data.held_out_windows(corpus, config.context, eval_windows)
  _save(workdir / 'lmul_losses.csv', losses(config, params, windows))


def work() -> None:
  config = _CONFIG()
  with command.own_directory(_WORKDIR.value) as workdir:
    run(config, workdir, _PAIRS.value, _EVAL_WINDOWS.value, data.load_corpus())


def main(argv: Sequence[str]) -> int:
  return command.main(argv, work, (byte_lm.ConfigError, CheckpointError))


if __name__ == '__main__':
  app.run(main)
