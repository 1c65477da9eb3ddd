"""Draws the figures of the documentation as SVG files beside this script.

  PYTHONPATH=.:pallas python docs/figures/draw.py

Number lines, QSNR and errors in ULP are computed with the library. What takes
longer comes from data/, whose files name the table and the program behind them.
"""

import csv
import io
import math
import pathlib
import re
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
from matplotlib import ticker
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import (
  BoxStyle,
  FancyBboxPatch,
  PathPatch,
  Rectangle,
)
from matplotlib.path import Path

import lowbit_jax as lowbit
from lowbit_jax import formats, special
from lowbit_jax.search import certify

_FOLDER = pathlib.Path(__file__).resolve().parent
_WIDTH = 5.0  # inches; phones show it at three quarters
# Okabe and Ito, darker where they are used for text.
_BLUE, _ORANGE, _GREEN = '#0072B2', '#D55E00', '#00795A'
_PURPLE, _GRAY, _LIGHT = '#A8487F', '#666666', '#D9D9D9'
_LIMIT = 20 * math.log10(2)  # dB a bit, of normal numbers and any code
_MEAN_OF = 20  # steps of a training curve
_FOUR_BITS = ((3.9, 5.25), (15.5, 22.5))  # bits and dB
_STYLE = {
  'axes.edgecolor': _GRAY,
  'axes.labelsize': 10.5,
  'axes.spines.right': False,
  'axes.spines.top': False,
  'figure.constrained_layout.h_pad': 0.09,
  'figure.constrained_layout.w_pad': 0.09,
  'figure.facecolor': 'white',
  'font.size': 10,
  'lines.markersize': 4.5,
  'path.simplify': False,
  'savefig.facecolor': 'white',
  'svg.fonttype': 'path',
  'svg.hashsalt': 'lowbit_jax',
  'xtick.color': _GRAY,
  'xtick.labelcolor': 'black',
  'ytick.color': _GRAY,
  'ytick.labelcolor': 'black',
}


def _table(name: str) -> list[dict[str, str]]:
  """Rows of data/`name`.csv, whose first lines say where it comes from."""
  text = (_FOLDER / 'data' / f'{name}.csv').read_text('utf-8')
  lines = [line for line in text.splitlines() if not line.startswith('#')]
  return list(csv.DictReader(lines))


def _figure(height: float, rows: int = 1, columns: int = 1, **options):
  """A figure of the width of all, and its axes."""
  figure = Figure(figsize=(_WIDTH, height), layout='constrained')
  return figure, figure.subplots(rows, columns, **options)


def _note(axes: Axes, text: str, xy, offset=(0, 0), **options) -> None:
  options = {'fontsize': 9.5, 'va': 'center'} | options
  axes.annotate(text, xy, offset, textcoords='offset points', **options)


# Formats


def _values(name: str) -> np.ndarray:
  """Finite numbers that encoding to an element format can give."""
  fmt = formats.get(name)
  values = np.unique(fmt.values())
  return values[np.abs(values) <= fmt.max]


def _ticks(axes: Axes, values: np.ndarray, y: float, color: str) -> None:
  """One vertical stroke for each value, all of them one path."""
  ends = np.stack([values, values], -1)
  heights = np.broadcast_to([y - 0.3, y + 0.3], ends.shape)
  points = np.stack([ends, heights], -1).reshape(-1, 2)
  path = Path(points, [Path.MOVETO, Path.LINETO] * len(values))
  axes.add_patch(PathPatch(path, color=color, lw=0.9, fill=False))


def element_formats() -> Figure:
  """Number lines, relative to the largest number and by powers of two."""
  names = (
    ('ternary', 'int4', 'nf4', 'e2m1', 'e3m2', 'e2m3', 'e5m2', 'e4m3fn'),
    ('int4', 'e2m1', 'e2m3', 'e3m2', 'int8', 'e4m3fn', 'e5m2'),
  )
  figure, (scaled, powers) = _figure(
    5.6, 2, gridspec_kw={'height_ratios': [len(part) for part in names]}
  )
  colors = {'i': _BLUE, 't': _BLUE, 'n': _GREEN, 'e': _ORANGE}
  for axes, rows in zip((scaled, powers), names, strict=True):
    for y, name in enumerate(rows):
      values = _values(name)
      if axes is scaled:
        values = values / np.max(values)
      else:
        values = np.log2(values[values > 0])
      axes.axhline(y, color=_LIGHT, lw=0.8, zorder=0)
      _ticks(axes, values, y, colors[name[0]])
    axes.set_yticks(range(len(rows)), rows)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.tick_params('y', length=0)
    axes.spines['left'].set_visible(False)
  scaled.set_xlim(-1.03, 1.03)
  scaled.set_xticks([-1, -0.5, 0, 0.5, 1])
  scaled.set_xlabel('value divided by the largest')
  exponents = range(-16, 17, 4)
  powers.set_xlim(-16.5, 16.5)
  powers.set_xticks(exponents, [f'$2^{{{e}}}$' for e in exponents])
  powers.set_xlabel('positive values without a scale')
  return figure


def _qsnr(x: jax.Array, name: str, rule: str | None = None):
  """Bits per element, and QSNR in dB under a scale rule."""

  @jax.jit
  def measure(x):
    error = x - lowbit.fake_quant(x, fmt, scale_rule=rule)
    return 10 * jnp.log10(jnp.sum(x**2) / jnp.sum(error**2))

  fmt = formats.get(name)
  return fmt.bits_per_element, float(measure(x))


def _qsnr_of_all(axes: Axes, x: jax.Array) -> None:
  limit = np.array([1.6, 7.9])
  axes.plot(limit, _LIMIT * limit, color=_GRAY, lw=1, ls='--')
  text = 'no code with\nthis many bits\ncan be above'
  _note(axes, text, (4.2, 25.3), (-4, 24), color=_GRAY, ha='right')
  for suffix, style in (('g128', '-'), ('channel', ':')):
    points = [_qsnr(x, f'int{bits}_{suffix}') for bits in range(2, 9)]
    axes.plot(*np.transpose(points), style, color=_BLUE, lw=1.2, marker='o')
  text = 'integers, one scale for 128 (solid)\nor for a whole row (dotted)'
  _note(axes, text, (3, 8.7), (4, -26), color=_BLUE)
  for name, (dx, dy, ha) in {
    'mxint8': (7, -2, 'left'),
    'mxfp8_e4m3': (0, 12, 'center'),
    'mxfp8_e5m2': (0, -11, 'center'),
    'mxfp6_e2m3': (7, -5, 'left'),
    'mxfp6_e3m2': (0, -11, 'center'),
  }.items():
    point = _qsnr(x, name)
    axes.plot(*point, 'D', color=_GREEN)
    _note(axes, name, point, (dx, dy), color=_GREEN, ha=ha)
  point = _qsnr(x, 'ternary_channel')
  axes.plot(*point, 's', color=_BLUE)
  _note(axes, 'ternary', point, (0, 10), color=_BLUE, ha='center')
  axes.set_xlim(1.5, 9.3)
  axes.set_ylim(0, 47)
  (left, right), (low, high) = _FOUR_BITS
  corner, size = (left, low), (right - left, high - low)
  axes.add_patch(Rectangle(corner, *size, fill=False, color=_GRAY, lw=0.8))
  _note(axes, 'see below', (right, low), (3, 5), color=_GRAY)


def _qsnr_of_four_bits(axes: Axes, x: jax.Array) -> None:
  for name, searched, color, shift, (dx, dy, ha) in (
    ('int4_channel', 'sweep', _BLUE, 0, (7, 0, 'left')),
    ('int4_g128', 'sweep', _BLUE, 1, (7, -3, 'left')),
    ('int4_g64', 'sweep', _BLUE, 0, (7, 0, 'left')),
    ('int4_g32', 'sweep', _BLUE, 0, (0, -11, 'center')),
    ('uint4_g128', '', _BLUE, 0, (-7, 2, 'right')),
    ('mxfp4', 'mse', _GREEN, -1, (-7, 0, 'right')),
    ('mxint4', 'mse', _GREEN, 0, (7, 0, 'left')),
    ('nvfp4', 'sweep', _ORANGE, -1, (-7, 0, 'right')),
    ('nvint4', 'sweep', _ORANGE, 1, (7, 0, 'left')),
    ('nf4_g64', 'sweep', _PURPLE, 0, (7, -2, 'left')),
  ):
    bits, ratio = _qsnr(x, name)
    bits += 0.015 * shift  # points of the same bits, side by side
    if searched:
      ratios = [ratio, _qsnr(x, name, searched)[1]]
      axes.plot([bits] * 2, ratios, color=color, lw=1)
      axes.plot(bits, ratios[1], 'o', color=color, mfc='white')
    axes.plot(bits, ratio, 'o', color=color)
    _note(axes, name, (bits, ratio), (dx, dy), color=color, ha=ha)
  text = 'best of\nseveral scales'
  _note(axes, text, (5, 20.8), (0, 18), color=_GRAY, ha='center')
  across, upward = _FOUR_BITS
  axes.set_xlim(across)
  axes.set_ylim(upward)


def qsnr() -> Figure:
  """Signal-to-noise ratio of block formats against bits per element."""
  x = jax.random.normal(jax.random.key(0), (128, 4096))
  figure, (every, four) = _figure(7.4, 2)
  _qsnr_of_all(every, x)
  _qsnr_of_four_bits(four, x)
  for axes in (every, four):
    axes.set_ylabel('QSNR, dB')
  four.set_xlabel('bits per element, scales included')
  return figure


# Models


def main_job() -> Figure:
  """Held-out loss of one model in many formats against its bytes."""
  figure, axes = _figure(5.2)
  places = {
    'mxint8': (6, -8, 'left'),
    'int8_channel': (-7, -2, 'right'),
    'e4m3fn_channel': (-7, 2, 'right'),
    'nvfp4': (-7, 3, 'right'),
    'nf4_g64': (-6, -9, 'right'),
    'mxfp6_e2m3': (0, -16, 'center'),
    'int4_g32': (1, -12, 'left'),
    'uint4_g32': (7, 5, 'left'),
  }
  for row in _table('quantize_lm')[1:]:
    name, size = row['format'], int(row['bytes']) / 1e6
    difference, error = float(row['difference']), float(row['standard_error'])
    color = _BLUE if 'int' in name or 'ternary' in name else _ORANGE
    color = _GREEN if name.startswith('nf') else color
    axes.errorbar(size, difference, error, fmt='o', color=color, elinewidth=1)
    dx, dy, ha = places.get(name, (7, 0, 'left'))
    _note(axes, name, (size, difference), (dx, dy), color=color, ha=ha)
  axes.axhline(0, color=_GRAY, lw=0.8, ls='--')
  _note(axes, 'float32, 4.72 MB', (0.27, 0), (0, 8), color=_GRAY)
  axes.set_yscale('symlog', linthresh=1e-3)
  axes.set_ylim(-5e-4, 2)
  axes.set_yticks([0, 1e-3, 1e-2, 0.1, 1], ['0', '0.001', '0.01', '0.1', '1'])
  axes.yaxis.set_minor_locator(ticker.NullLocator())
  axes.set_xlim(0.25, 1.52)
  axes.set_xlabel('weights, MB (scales included)')
  axes.set_ylabel('held-out loss minus float32, nats per byte')
  return figure


def real_model() -> Figure:
  """Loss of a published model in six formats against its bytes."""
  figure, axes = _figure(4.6)
  for row in _table('evaluate')[1:]:
    name, size = row['weights'], int(row['bytes']) / 1e6
    is_float = row['activations'] == 'none'
    color = _BLUE if is_float else _ORANGE
    delta, error = float(row['delta']), float(row['stderr'])
    axes.errorbar(size, delta, error, fmt='o', color=color, elinewidth=1)
    _note(axes, name, (size, delta), (7, 0), color=color)
  axes.axhline(0, color=_GRAY, lw=0.8, ls='--')
  _note(axes, 'float32, 538 MB', (80, 0), (0, 7), color=_GRAY)
  text = 'weights and activations'
  _note(axes, text, (80, 2.2), (0, 0), color=_ORANGE)
  _note(axes, 'weights alone', (80, 1.5), (0, 0), color=_BLUE)
  axes.set_yscale('symlog', linthresh=1e-2)
  axes.set_ylim(-5e-3, 3)
  axes.set_yticks([0, 1e-2, 0.1, 1], ['0', '0.01', '0.1', '1'])
  axes.yaxis.set_minor_locator(ticker.NullLocator())
  axes.set_xlim(78, 158)
  axes.set_xlabel('all parameters, MB (scales included)')
  axes.set_ylabel('loss minus float32, nats per token')
  return figure


def loss_against_bytes() -> Figure:
  """Held-out loss against bytes of the weights of the linear layers."""
  figure, axes = _figure(4.6)
  rows = [
    row
    for row in _table('scaling_laws')
    if row['data'] == '524288' and row['block'] in ('', '32')
  ]
  offsets = {
    'e1m1': (-7, 0, 'right'),
    'e2m1': (-6, -4, 'right'),
    'e4m3': (0, 10, 'center'),
    'float32': (0, -11, 'center'),
  }
  for count, color, shift in (
    ('24576', _BLUE, 38),
    ('98304', _ORANGE, 38),
    ('221184', _GREEN, 16),
  ):
    points = []
    for row in rows:
      if row['weights'] == count:
        name = row['element']
        bits = 32.0
        if row['block']:
          bits = 1 + int(name[1]) + int(name[3]) + 32 / int(row['block'])
        points.append((int(count) * bits / 8000, float(row['loss']), name))
    points.sort()
    kilobytes, losses, names = zip(*points, strict=True)
    axes.plot(kilobytes, losses, color=color, lw=1.2, marker='o')
    axes.plot(kilobytes[-1], losses[-1], 'o', color=color, mfc='white')
    text = f'{int(count):,} weights'.replace(',', ' ')
    _note(axes, text, points[-1][:2], (shift, 12), color=color, ha='right')
    for x, y, name in points:
      if name in offsets:
        dx, dy, ha = offsets[name]
        _note(axes, name, (x, y), (dx, dy), color=color, ha=ha)
  axes.set_xscale('log')
  axes.set_xticks([10, 20, 50, 100, 200, 500, 1000])
  axes.set_xlim(5.5, 1300)
  axes.set_ylim(1.73, 2.1)
  axes.xaxis.set_major_formatter(ticker.ScalarFormatter())
  axes.xaxis.set_minor_locator(ticker.NullLocator())
  axes.set_xlabel('weights of the linear layers, kB (scales included)')
  axes.set_ylabel('held-out loss, nats per byte')
  return figure


def _lines(axes: Axes, names: Sequence[str]) -> None:
  """A line for each name, from top to bottom."""
  axes.hlines(range(len(names)), 0, 9, color=_LIGHT, lw=0.8, zorder=0)
  axes.set_yticks(range(len(names)), names)
  axes.set_ylim(len(names) - 0.5, -0.6)
  axes.tick_params('y', length=0)
  axes.spines['left'].set_visible(False)
  axes.set_xscale('log')
  axes.xaxis.set_minor_locator(ticker.NullLocator())


def _loss_by_format(axes: Axes) -> None:
  """Of a language model to the nearest number, and as recommended."""
  rows = _table('ptq')
  names = list(
    dict.fromkeys((row['format'], row['activations']) for row in rows)
  )
  _lines(axes, [name for name, _ in names])
  for row in rows:
    y = names.index((row['format'], row['activations']))
    color = _BLUE if row['activations'] == 'none' else _ORANGE
    face = color if row['method'] == 'recommended' else 'white'
    delta, error = float(row['delta']), float(row['stderr'])
    axes.errorbar(
      delta, y, xerr=error, fmt='o', color=color, mfc=face, elinewidth=1
    )
  ticks = 0.01, 0.1, 1
  axes.set_xlim(0.004, 1.6)
  axes.set_xticks(ticks, list(map(str, ticks)))
  axes.set_xlabel('loss minus float32, nats per token')
  for row, text in zip(
    rows[1:3], ('nearest numbers', 'recommended'), strict=True
  ):
    place = float(row['delta']), 1
    _note(axes, text, place, (0, 11), color=_GRAY, ha='center')


def _cosine_by_method(axes: Axes) -> None:
  """Of a model of sentences in MXFP4, calibrated with three sets."""
  rows = _table('ptq_methods')
  _lines(axes, [row['method'] for row in rows])
  for y, row in enumerate(rows):
    for kind, color in (('weights', _BLUE), ('both', _ORANGE)):
      lost = [1 - float(row[f'{kind}_{k}'] or 'nan') for k in range(3)]
      axes.plot(lost, [y] * 3, 'o', color=color, mfc='white')
  ticks = 0.01, 0.02, 0.05
  axes.set_xlim(0.0085, 0.078)
  axes.set_xticks(ticks, list(map(str, ticks)))
  axes.set_xlabel('1 − mean cosine to the embeddings in float32')
  for kind, color, text in (
    ('weights', _BLUE, 'weights'),
    ('both', _ORANGE, 'activations too'),
  ):
    place = 1 - float(rows[0][f'{kind}_0']), 0
    _note(axes, text, place, (14, 11), color=color, ha='right')


def post_training() -> Figure:
  """What methods leave of two real models."""
  figure, (loss, cosine) = _figure(6.4, 2)
  _loss_by_format(loss)
  _cosine_by_method(cosine)
  return figure


def recipes() -> Figure:
  """Loss of recipes minus that of float32: three seeds, mean and goal."""
  rows = _table('recipes')
  figure, axes = _figure(4.8)
  for y, row in enumerate(rows):
    color = _BLUE if 'mxfp4' in row['recipe'] else _ORANGE
    color = color if 'fp4' in row['recipe'] else _GREEN
    seeds = [float(row[f'seed_{seed}']) for seed in range(3)]
    axes.axhline(y, color=_LIGHT, lw=0.8, zorder=0)
    axes.plot(seeds, [y] * 3, 'o', color=color, mfc='white')
    axes.plot(float(row['mean']), y, 'D', color=color, ms=6)
    if row['goal']:
      axes.plot(float(row['goal']), y, '|', color='black', ms=14, mew=1.5)
  last = len(rows) - 1
  mean, seed = float(rows[last]['mean']), float(rows[last]['seed_1'])
  _note(axes, 'goal', (float(rows[0]['goal']), 0), (5, 0))
  _note(axes, 'mean', (mean, last), (0, 11), ha='center')
  _note(axes, 'a seed', (seed, last), (-7, 0), ha='right')
  axes.set_yticks(range(len(rows)), [row['recipe'] for row in rows])
  axes.set_ylim(last + 0.5, -0.6)
  axes.tick_params('y', length=0)
  axes.spines['left'].set_visible(False)
  axes.set_xlim(0, 0.084)
  axes.set_xlabel('held-out loss minus float32, nats per byte')
  return figure


def curves() -> Figure:
  """Training loss in float32, and what recipes add to it, means of steps."""
  figure, (top, bottom) = _figure(
    5.2, 2, sharex=True, gridspec_kw={'height_ratios': [2, 3]}
  )
  rows = _table('curves')
  steps, loss = (
    np.array([float(row[k]) for row in rows]) for k in ('step', 'float32')
  )
  middle = steps.reshape(-1, _MEAN_OF).mean(1)
  top.plot(steps, loss, color=_LIGHT, lw=0.8)
  top.plot(middle, loss.reshape(-1, _MEAN_OF).mean(1), color=_GRAY, lw=1.4)
  _note(top, 'float32', (120, 2.4), (0, 20), color=_GRAY)
  top.set_ylim(1.8, 6)
  top.set_ylabel('training loss,\nnats per byte')
  for name, color, dy in (
    ('mxfp4_rtn', _BLUE, 5),
    ('nvfp4', _ORANGE, -6),
    ('mxfp8', _GREEN, 0),
  ):
    more = np.array([float(row[name]) for row in rows]) - loss
    more = more.reshape(-1, _MEAN_OF).mean(1)
    bottom.plot(middle, more, color=color, lw=1.4, marker='o')
    _note(bottom, name, (middle[-1], more[-1]), (7, dy), color=color)
  bottom.axhline(0, color=_GRAY, lw=0.8, ls='--')
  bottom.set_xlim(0, 292)
  bottom.set_xticks(range(0, 241, 40))
  bottom.set_xlabel('step')
  bottom.set_ylabel('loss minus float32,\nnats per byte')
  return figure


# Functions


def exp2_front() -> Figure:
  """Errors of formulas for 2^x against their number of operations."""
  figure, axes = _figure(4.4)
  rows = _table('exp2_front')
  for method, label, color, place, (dx, dy, ha) in (
    ('classical', 'classical', _GRAY, -1, (4, -11, 'right')),
    ('operon', 'Operon', _ORANGE, -2, (0, 11, 'left')),
    ('found', 'found by the search', _BLUE, -3, (-8, -5, 'right')),
  ):
    points = [
      (int(row['operations']), float(row['error']))
      for row in rows
      if row['method'] == method
    ]
    axes.plot(*np.transpose(points), color=color, lw=1.2, marker='o')
    _note(axes, label, points[place], (dx, dy), color=color, ha=ha)
  axes.set_yscale('log')
  axes.set_yticks([10.0**e for e in range(-15, 0, 3)])
  axes.yaxis.set_minor_locator(ticker.NullLocator())
  axes.set_xlabel('operations')
  axes.set_ylabel('largest relative error of $2^x$ on [0, 1]')
  return figure


def _softplus(x: np.ndarray) -> np.ndarray:
  return np.logaddexp(0, x)


def _sigmoid(x: np.ndarray) -> np.ndarray:
  return 1 / (1 + np.exp(-x))


def _gelu(x: np.ndarray) -> np.ndarray:
  return x / 2 * np.vectorize(math.erfc)(-x / math.sqrt(2))


def _exact_gelu(x: jax.Array) -> jax.Array:
  return jax.nn.gelu(x, approximate=False)


# Name, the function of JAX, that of NumPy in float64, and the ends of x.
_FUNCTIONS = (
  ('exp2', jnp.exp2, np.exp2, (-126, 128)),
  ('exp', jnp.exp, np.exp, (-87.3, 88.7)),
  ('log2', jnp.log2, np.log2, (0.25, 4)),
  ('sin', jnp.sin, np.sin, (0, 1e5)),
  ('cos', jnp.cos, np.cos, (0, 1e5)),
  ('tanh', jnp.tanh, np.tanh, (-10, 10)),
  ('sigmoid', jax.nn.sigmoid, _sigmoid, (-80, 20)),
  ('erf', jax.scipy.special.erf, np.vectorize(math.erf), (-5, 5)),
  ('gelu', _exact_gelu, _gelu, (-13, 13)),
  ('softplus', jax.nn.softplus, _softplus, (-80, 20)),
)
_BINS, _POINTS = 80, 100


def _largest_errors(function, exact, x: np.ndarray) -> np.ndarray:
  """Largest error in ULP in each row of x."""
  y = np.asarray(jax.jit(function)(x.ravel()))
  errors = certify.ulp_error(y, exact(x.ravel().astype(np.float64)))
  return errors.reshape(x.shape).max(1)


def special_errors() -> Figure:
  """Errors in ULP of the elementary functions and of those of JAX."""
  figure, grid = _figure(7.8, 5, 2, sharey=True)
  for axes, (name, theirs, exact, ends) in zip(
    grid.flat, _FUNCTIONS, strict=True
  ):
    x = np.linspace(*ends, _BINS * _POINTS, endpoint=False, dtype=np.float32)
    x = x.reshape(_BINS, _POINTS)
    middle = x.mean(1)
    for function, color in ((theirs, _ORANGE), (getattr(special, name), _BLUE)):
      errors = np.minimum(_largest_errors(function, exact, x), 2.0**10)
      axes.plot(middle, errors, color=color, lw=1.1)
    axes.axhline(special.MAX_ULP[name], color=_GRAY, lw=0.8, ls='--')
    axes.set_title(name, fontsize=10.5, loc='left', pad=3)
    axes.set_yscale('log', base=2)
    axes.set_ylim(0.35, 100)
    axes.set_yticks([0.5, 2, 8, 32], ['½', '2', '8', '32'])
    axes.yaxis.set_minor_locator(ticker.NullLocator())
    axes.xaxis.set_major_locator(ticker.MaxNLocator(4, steps=[1, 2, 5, 10]))
  _note(grid[0, 0], 'JAX', (-60, 32), (-4, -12), color=_ORANGE, ha='right')
  _note(grid[0, 0], 'lowbit_jax', (-60, 1), (0, 8), color=_BLUE, ha='center')
  for axes in grid[:, 0]:
    axes.set_ylabel('error, ULP')
  for axes in grid[-1]:
    axes.set_xlabel('x')
  return figure


# Parts


def _box(axes: Axes, text: str, xy, width: float, color: str) -> None:
  x, y = xy
  style = BoxStyle('round', pad=0, rounding_size=0.08)
  axes.add_patch(
    FancyBboxPatch(
      (x - width / 2, y - 0.25), width, 0.5, style, ec=color, fc='white', lw=1.2
    )
  )
  axes.text(x, y, text, ha='center', va='center', linespacing=1.25)


def parts() -> Figure:
  """Arrays, QArrays and files, and the functions that lead between them."""
  figure, axes = _figure(3.75)
  axes.set_axis_off()
  axes.set_xlim(0, 5)
  axes.set_ylim(0.4, 4.1)
  axes.set_aspect('equal')
  for text, xy, width, color in (
    ('Flax parameters', (0.75, 3.55), 1.4, _GRAY),
    ('float array', (2.95, 3.55), 1.1, _GRAY),
    ('what to\nchange', (4.55, 3.55), 0.8, _GREEN),
    ('QArray: packed\ncodes and scales', (1.3, 2.15), 2.5, _BLUE),
    ('float array with\na stated gradient', (4.15, 2.15), 1.5, _ORANGE),
    ('float array', (0.55, 0.75), 1.0, _GRAY),
    ('product', (1.75, 0.75), 0.9, _GRAY),
    ('file', (2.85, 0.75), 0.7, _GRAY),
  ):
    _box(axes, text, xy, width, color)
  for text, start, end, offset, ha in (
    ('nn.quantize_params', (0.5, 3.3), (0.5, 2.4), (0.08, 0), 'left'),
    ('quantize', (2.7, 3.3), (2.2, 2.4), (0.12, 0), 'left'),
    ('fake_quant', (3.2, 3.3), (4.0, 2.4), (0.12, 0), 'left'),
    ('doctor.report', (3.5, 3.55), (4.15, 3.55), (0, 0.37), 'center'),
    ('dequantize', (0.3, 1.9), (0.3, 1.0), (0.08, 0), 'left'),
    ('dot, einsum', (1.45, 1.9), (1.45, 1.0), (0.08, 0), 'left'),
    ('io.save\nio.load', (2.45, 1.9), (2.8, 1.0), (0.12, 0), 'left'),
  ):
    style = '<|-|>' if 'load' in text else '-|>'
    arrow = {'arrowstyle': style, 'color': _GRAY, 'shrinkA': 0, 'shrinkB': 0}
    axes.annotate('', end, start, arrowprops=arrow)
    x, y = np.add(np.add(start, end) / 2, offset)
    font = {'family': 'monospace', 'fontsize': 9}
    axes.text(x, y, text, ha=ha, va='center', **font)
  return figure


_FIGURES = (
  parts,
  element_formats,
  qsnr,
  real_model,
  post_training,
  main_job,
  loss_against_bytes,
  recipes,
  curves,
  exp2_front,
  special_errors,
)


def _svg(figure: Figure) -> str:
  """SVG text, the same in every run, with coordinates of two decimals."""
  text = io.StringIO()
  figure.savefig(text, format='svg', metadata={'Date': None, 'Creator': None})

  def shorten(path: re.Match) -> str:
    return re.sub(r'\d+\.\d+', lambda x: f'{float(x[0]):.2f}', path[0])

  svg = re.sub(r' d="[^"]*"', shorten, text.getvalue())
  return re.sub(r' +$', '', svg, flags=re.MULTILINE)


def main() -> None:
  for draw in _FIGURES:
    path = _FOLDER / f'{draw.__name__}.svg'
    with matplotlib.rc_context(_STYLE):
      path.write_text(_svg(draw()), 'utf-8')
    print(path)


if __name__ == '__main__':
  main()
