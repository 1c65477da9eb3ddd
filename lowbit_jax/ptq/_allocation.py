"""Which layer takes which format, where the bits of all are given.

References: the integer program of 'HAWQ-V3', arXiv:2011.10680.
"""

import math
from collections.abc import Mapping

import numpy as np

from lowbit_jax.formats import BlockFormat


def allocate(
  losses: Mapping[str, Mapping[BlockFormat, float]],
  sizes: Mapping[str, int],
  bits: float,
) -> dict[str, BlockFormat]:
  """The formats with the least sum of losses within an average of bits.

  What layers lose is taken to add up, which holds the better the smaller it is.

  Args:
    losses: by path and format what the model loses where that layer alone takes
      the format.
    sizes: numbers of each layer.
    bits: for a number, scales of blocks included, on average over all layers.

  Returns:
    A format for each path, the best of all choices.

  Raises:
    ValueError: if the smallest formats take more bits, for a layer without a
      size or a format, and for losses that are not finite.

  Examples:
    >>> from lowbit_jax import formats, ptq
    >>> small, large = formats.mxfp4, formats.mxfp8_e4m3
    >>> losses = {
    ...   'up': {small: 0.03, large: 0.01},
    ...   'down': {small: 0.09, large: 0.01},
    ... }
    >>> chosen = ptq.allocate(losses, {'up': 64, 'down': 64}, 6.25)
    >>> {path: fmt.name for path, fmt in chosen.items()}
    {'up': 'mxfp4', 'down': 'mxfp8_e4m3'}
  """
  _check(losses, sizes, bits)
  # One unknown for each pair, 1 where the layer takes the format.
  pairs = [(path, fmt) for path, own in losses.items() for fmt in own]
  paths = list(losses)
  is_of = np.array([[path == own for own, _ in pairs] for path in paths])
  taken = np.array([sizes[path] * fmt.bits_per_element for path, fmt in pairs])
  loss = np.array([losses[path][fmt] for path, fmt in pairs])
  bound = bits * sum(sizes[path] for path in paths)

  from scipy import optimize

  found = optimize.milp(
    loss / (np.abs(loss).max() or 1),
    integrality=np.ones(len(pairs)),
    bounds=optimize.Bounds(0, 1),
    constraints=[
      optimize.LinearConstraint(is_of, 1, 1),
      optimize.LinearConstraint(taken[None] / bound, ub=1),
    ],
    options={'mip_rel_gap': 0},
  )
  assert found.success, found.message  # a choice was there, see _check
  return {
    path: fmt
    for (path, fmt), share in zip(pairs, found.x, strict=True)
    if share > 0.5
  }


def _check(
  losses: Mapping[str, Mapping[BlockFormat, float]],
  sizes: Mapping[str, int],
  bits: float,
) -> None:
  if not losses:
    raise ValueError('losses is empty: it needs one layer at least')
  least = 0.0
  for path, own in losses.items():
    if not own or not sizes.get(path, 0) > 0:
      raise ValueError(
        f'{path!r} needs a format in losses and a positive size in sizes'
      )
    for fmt, loss in own.items():
      if not isinstance(fmt, BlockFormat) or not math.isfinite(loss):
        raise ValueError(
          f'losses[{path!r}][{fmt!r}]={loss!r} must be a finite number for a'
          ' block format'
        )
    least += sizes[path] * min(fmt.bits_per_element for fmt in own)
  least /= sum(sizes[path] for path in losses)
  if not bits >= least:
    raise ValueError(
      f'{bits=} are too few: the smallest formats take {least:.6g} on average'
    )
