"""Tables and plots of the examples, written whole or not at all."""

import csv
import importlib.util
import io
import json
import math
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

from lowbit_jax import _files


class Row(NamedTuple):
  """One line of the table of formats.

  Attributes:
    format: name of the format.
    bytes: of all leaves of the quantized weights.
    bits_per_weight: 8 * bytes / number of weights.
    loss: held-out loss in nats per byte.
    difference: loss minus the loss in float32.
    standard_error: of the difference, over the held-out windows.
    microseconds_per_byte: median time per evaluated byte (token).
    relative_time: the same relative to float32.
  """

  format: str
  bytes: int
  bits_per_weight: float
  loss: float
  difference: float
  standard_error: float
  microseconds_per_byte: float
  relative_time: float


HEADER = (
  f'{"format":<16} {"bytes":>9} {"bits/weight":>11} {"loss":>8} '
  f'{"difference to float32":>21} {"time":>6}'
)


def format_row(row: Row) -> str:
  """Returns one line of text under HEADER."""
  difference = f'{row.difference:+.4f} ± {row.standard_error:.4f}'
  return (
    f'{row.format:<16} {row.bytes:>9,} {row.bits_per_weight:>11.3f} '
    f'{row.loss:>8.4f} {difference:>21} {row.relative_time:>5.2f}x'
  )


def write_atomically(path: str | os.PathLike[str], data: bytes) -> None:
  """Writes a file so that readers see the old content or all of the new."""
  with _files.replacing(path) as file:
    file.write(data)


def write_json(path: str | os.PathLike[str], content: Any) -> None:
  """Saves JSON, a value on each line."""
  text = json.dumps(content, indent=2) + '\n'
  write_atomically(path, text.encode())


def write_csv(path: str | os.PathLike[str], rows: Sequence[Any]) -> None:
  """Saves named tuples of one type, at least one, as CSV with a header line.

  Floats have seven digits.
  """
  text = io.StringIO()
  writer = csv.writer(text, lineterminator='\n')
  writer.writerow(rows[0]._fields)
  for row in rows:
    writer.writerow(
      f'{value:.7g}' if isinstance(value, float) else value for value in row
    )
  write_atomically(path, text.getvalue().encode())


def can_plot() -> bool:
  """Whether Matplotlib is installed."""
  return importlib.util.find_spec('matplotlib') is not None


def new_figure(width: float, height: float) -> Any:
  """A Matplotlib figure of so many inches, without a window."""
  from matplotlib.backends.backend_agg import FigureCanvasAgg
  from matplotlib.figure import Figure

  figure = Figure(figsize=(width, height), layout='constrained')
  FigureCanvasAgg(figure)
  return figure


def write_figure(
  path: str | os.PathLike[str], figure: Any, dpi: int = 150
) -> None:
  """Saves a figure as PNG."""
  image = io.BytesIO()
  figure.savefig(image, format='png', dpi=dpi)
  write_atomically(path, image.getvalue())


def place_labels(axes, points, labels, size):
  """Puts a label beside each point, clear of points, labels and y = 0.

  Args:
    axes: Matplotlib axes whose limits are final.
    points: data coordinates, one (x, y) per label.
    labels: texts.
    size: font size in points.
  """
  figure = axes.figure
  figure.canvas.draw()
  renderer = figure.canvas.get_renderer()
  frame = axes.get_window_extent(renderer)
  pixel = figure.dpi / 72
  pixels = axes.transData.transform(points)
  boxes = [(x - 5, y - 5, x + 5, y + 5) for x, y in pixels]
  zero = axes.transData.transform((0, 0))[1]
  boxes.append((frame.x0, zero - 1, frame.x1, zero + 1))

  def free(box):
    inside = (
      box[0] >= frame.x0
      and box[2] <= frame.x1
      and box[1] >= frame.y0
      and box[3] <= frame.y1
    )
    return inside and not any(
      box[0] < other[2]
      and other[0] < box[2]
      and box[1] < other[3]
      and other[1] < box[3]
      for other in boxes
    )

  for index in sorted(range(len(points)), key=lambda i: -pixels[i][1]):
    x, y = pixels[index]
    text = axes.annotate(
      labels[index],
      points[index],
      xytext=(0, 0),
      textcoords='offset points',
      fontsize=size,
      va='center',
    )
    extent = text.get_window_extent(renderer)
    width, height = extent.width, extent.height
    candidates = [
      (dx, dy)
      for dy in sorted(
        (step * height * 0.55 for step in range(-40, 41)), key=abs
      )
      for dx in (8 * pixel, -8 * pixel - width, 26 * pixel, -26 * pixel - width)
    ]
    candidates.sort(key=lambda c: (c[0] + width / 2) ** 2 / 4 + c[1] ** 2)
    for dx, dy in candidates:
      box = (x + dx, y + dy - height / 2, x + dx + width, y + dy + height / 2)
      if free(box):
        break
    else:
      dx, dy = candidates[0]
      box = (x + dx, y + dy - height / 2, x + dx + width, y + dy + height / 2)
    boxes.append(box)
    text.set_position((dx / pixel, dy / pixel))
    if abs(dy) > height or abs(dx) > 20 * pixel + (width if dx < 0 else 0):
      axes.annotate(
        '',
        points[index],
        xytext=((dx if dx > 0 else dx + width) / pixel, dy / pixel),
        textcoords='offset points',
        arrowprops={'arrowstyle': '-', 'color': '0.7', 'lw': 0.6},
      )


def write_plot(path: str | os.PathLike[str], rows: list[Row], title: str):
  """Saves a plot of loss difference against bits per weight as PNG.

  Args:
    path: file to write.
    rows: the table; the baseline (32 bits) and rows whose loss is not finite
      get no point.
    title: of the plot.
  """
  from matplotlib.ticker import NullFormatter

  rows = [
    row
    for row in rows
    if row.bits_per_weight < 32 and math.isfinite(row.difference)
  ]
  many = len(rows) > 25
  figure = new_figure(*(14, 9) if many else (9, 6))
  axes = figure.add_subplot()
  linear = 1e-3
  bits = [row.bits_per_weight for row in rows]
  gaps = [row.difference for row in rows]
  axes.set_yscale('symlog', linthresh=linear, linscale=0.6)
  axes.axhline(0, color='0.4', lw=1, ls='--', zorder=1)
  axes.errorbar(
    bits,
    gaps,
    [row.standard_error for row in rows],
    fmt='o',
    ms=5,
    lw=1,
    color='tab:blue',
    ecolor='0.75',
    zorder=2,
  )
  low, high = min(bits, default=2), max(bits, default=9)
  axes.set_xlim(low - 0.5, high + 1.2)
  axes.set_ylim(
    min(-linear, 2 * min(gaps, default=0)), 3 * max(gaps + [linear])
  )
  axes.yaxis.set_minor_formatter(NullFormatter())
  axes.set_xlabel('bits per weight, scales included')
  axes.set_ylabel('held-out loss minus float32, nats per byte')
  axes.set_title(title, fontsize=11)
  axes.grid(alpha=0.25)
  axes.text(
    0.995,
    0,
    'float32 ',
    transform=axes.get_yaxis_transform(),
    ha='right',
    va='bottom',
    color='0.4',
    fontsize=8,
  )
  if rows:
    place_labels(
      axes,
      list(zip(bits, gaps, strict=True)),
      [row.format for row in rows],
      7 if many else 8.5,
    )
  write_figure(path, figure)


class Point(NamedTuple):
  """A model in a plot of what its size costs.

  Attributes:
    label: beside the point.
    group: points of one group share a colour.
    bytes: of the model.
    value: what it costs.
    error: standard error of that.
  """

  label: str
  group: str
  bytes: int
  value: float
  error: float


def write_size_plot(
  path: str | os.PathLike[str],
  points: Sequence[Point],
  value: str,
  title: str,
):
  """Saves a plot of values, 0 for the original model, against bytes as PNG.

  Args:
    path: file to write.
    points: those whose value is not finite are left out.
    value: what the values are.
    title: of the plot.
  """
  points = [point for point in points if math.isfinite(point.value)]
  figure = new_figure(9, 6)
  axes = figure.add_subplot()
  axes.set_yscale('symlog', linthresh=0.01, linscale=0.6)
  axes.axhline(0, color='0.4', lw=1, ls='--', zorder=1)
  for group in dict.fromkeys(point.group for point in points):
    chosen = [point for point in points if point.group == group]
    axes.errorbar(
      [point.bytes / 1e6 for point in chosen],
      [point.value for point in chosen],
      [point.error for point in chosen],
      fmt='o',
      ms=5,
      lw=1,
      ecolor='0.75',
      zorder=2,
      label=group,
    )
  places = [(point.bytes / 1e6, point.value) for point in points]
  if points:
    sizes, values = zip(*places, strict=True)
    room = max(max(sizes) - min(sizes), 0.1 * max(sizes))
    axes.set_xlim(min(sizes) - 0.1 * room, max(sizes) + 0.2 * room)
    axes.set_ylim(2 * min(-0.002, *values), 3 * max(0.01, *values))
    axes.legend(loc='upper right')
  axes.set_xlabel('megabytes of all parameters')
  axes.set_ylabel(value)
  axes.set_title(title, fontsize=11)
  axes.grid(alpha=0.25)
  place_labels(axes, places, [point.label for point in points], 8.5)
  write_figure(path, figure)
