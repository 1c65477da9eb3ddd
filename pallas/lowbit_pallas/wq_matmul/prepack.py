"""Weights in the order in which kernels read them.

Standard storage packs neighbouring rows of K into bytes, so unpacking would
interleave. Here K is cut into tiles of `tile` rows and a packing group takes
one row from each of L lanes, L the codes in a group: lane j of tile t holds the
contiguous rows

    t * tile + j * tile / L + (0 ... tile / L - 1).

Byte b of all groups is an array of its own, a plane. Shifts and masks of planes
then give lanes elementwise, and the lanes one after the other are the tile.
"""

import dataclasses

import jax
import jax.numpy as jnp

from lowbit_pallas.arith import packing
from lowbit_pallas.arith.block import Blocked

LAYOUTS = ('kn', 'nk')


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Prepacked:
  """A weight of shape (k, n) as kernels read it. Made by `prepack`.

  With T = tile, steps = ceil(rows / T), L codes in a packing group of B bytes:

  Attributes:
    planes: uint8 of shape (B, steps * T / L, n), or (B, n, steps * T / L) in
      the layout 'nk'.
    scale: block scales as stored, (steps, T / block, n) for blocks up to T,
      (rows / block, 1, n) for longer ones, (1, 1, n) for whole columns; None
      where there are none.
    zero_point: uint8 in the shape of `scale`, or None.
    spec: what codes and scales stand for.
    tile: rows of K in a tile.
    rows: rows of K in standard storage: k padded to whole blocks and bytes.
    k: columns of the x that it multiplies.
    layout: 'kn' or 'nk'.
  """

  planes: jax.Array
  scale: jax.Array | None
  zero_point: jax.Array | None
  spec: Blocked = dataclasses.field(metadata={'static': True})
  tile: int = dataclasses.field(metadata={'static': True})
  rows: int = dataclasses.field(metadata={'static': True})
  k: int = dataclasses.field(metadata={'static': True})
  layout: str = dataclasses.field(metadata={'static': True})

  @property
  def n(self) -> int:
    return self.planes.shape[2 if self.layout == 'kn' else 1]

  @property
  def steps(self) -> int:
    """Tiles along K."""
    return -(-self.rows // self.tile)

  @property
  def tiles_per_block(self) -> int:
    """Tiles that read the same row of scales."""
    if not self.spec.block:
      return max(self.steps, 1)
    return max(self.spec.block // self.tile, 1)


def why_not(spec: Blocked, tile: int) -> str | None:
  """Why a weight cannot be cut into tiles of `tile` rows, or None."""
  group = packing.codes_per_group(spec.bits)
  if tile <= 0 or tile % group:
    return f'{tile=} is not a multiple of the {group} codes in a packing group'
  if spec.block and tile % spec.block and spec.block % tile:
    return f'{tile=} and blocks of {spec.block} do not divide each other'
  lane = tile // group
  if spec.block and lane % spec.block and spec.block % lane:
    return (
      f'{tile=} gives lanes of {lane} rows: they and blocks of {spec.block} do'
      ' not divide each other'
    )
  return None


def prepack(
  codes: jax.Array,
  scale: jax.Array | None,
  zero_point: jax.Array | None,
  spec: Blocked,
  *,
  tile: int,
  k: int | None = None,
  layout: str = 'kn',
) -> Prepacked:
  """Reorders a weight in standard storage.

  Args:
    codes: uint8 (rows * bits / 8, n), packed along axis 0.
    scale: (rows / block, n), (1, n) for whole columns, or None.
    zero_point: uint8 in the shape of `scale`, or None.
    spec: what codes and scales stand for.
    tile: rows of K in a tile.
    k: columns of x, at most rows; None for all rows. Codes beyond stay as they
      are and meet zeros.
    layout: 'kn' for N-minor planes, 'nk' for K-minor ones.

  Raises:
    ValueError: for tiles that do not fit the blocks, and shapes that do not fit
      each other.
  """
  refusal = why_not(spec, tile)
  if refusal is not None:
    raise ValueError(refusal)
  if layout not in LAYOUTS:
    raise ValueError(f'{layout=} is not one of {LAYOUTS}')
  n = codes.shape[1]
  rows = packing.unpacked_size(codes.shape[0], spec.bits)
  k = rows if k is None else k
  if not 0 <= k <= rows:
    raise ValueError(f'{k=} is not within the {rows} rows of the codes')
  if spec.block and rows % spec.block:
    raise ValueError(f'{rows} rows are not whole blocks of {spec.block}')
  blocks = rows // spec.block if spec.block else 1
  for name, leaf in (('scale', scale), ('zero_point', zero_point)):
    if leaf is not None and leaf.shape != (blocks, n):
      raise ValueError(
        f'{name} has shape {leaf.shape}, expected {(blocks, n)} for codes of'
        f' {rows} x {n} in blocks of {spec.block}'
      )
  planes = _to_planes(packing.unpack(codes, spec.bits, 0), spec.bits, tile)
  if layout == 'nk':
    planes = planes.transpose(0, 2, 1)
  return Prepacked(
    planes=planes,
    scale=_to_tiles(scale, spec.block, tile),
    zero_point=_to_tiles(zero_point, spec.block, tile),
    spec=spec,
    tile=tile,
    rows=rows,
    k=k,
    layout=layout,
  )


def unpack(w: Prepacked) -> tuple:
  """The inverse of `prepack`: (codes, scale, zero_point), bit for bit."""
  planes = w.planes.transpose(0, 2, 1) if w.layout == 'nk' else w.planes
  codes = _from_planes(planes, w.spec.bits, w.tile)[: w.rows]
  blocks = w.rows // w.spec.block if w.spec.block else 1

  def flat(leaf):
    if leaf is None:
      return None
    tiles, per_tile, n = leaf.shape
    return leaf.reshape(tiles * per_tile, n)[:blocks]

  packed = packing.pack(codes, w.spec.bits, 0)
  return packed, flat(w.scale), flat(w.zero_point)


def _to_planes(codes, bits: int, tile: int):
  rows, n = codes.shape
  group = packing.codes_per_group(bits)
  codes = jnp.pad(codes, ((0, -rows % tile), (0, 0)))
  # Sizes are spelt out: where one is zero, -1 has no meaning.
  steps = codes.shape[0] // tile
  lanes = codes.reshape(steps, group, tile // group, n)
  shape = (steps * (tile // group), n)
  lanes = [lanes[:, j].reshape(shape) for j in range(group)]
  return jnp.stack(packing.lanes_to_planes(lanes, bits))


def _from_planes(planes, bits: int, tile: int):
  size, rows, n = planes.shape
  group = packing.codes_per_group(bits)
  lanes = packing.planes_to_lanes([planes[b] for b in range(size)], bits)
  shape = (rows * group // tile, tile // group, n)
  lanes = [c.astype(jnp.uint8).reshape(shape) for c in lanes]
  return jnp.stack(lanes, axis=1).reshape(rows * group, n)


def _to_tiles(leaf, block: int, tile: int):
  if leaf is None:
    return None
  n = leaf.shape[1]
  per_tile = max(tile // block, 1) if block else 1
  leaf = jnp.pad(leaf, ((0, -leaf.shape[0] % per_tile), (0, 0)))
  return leaf.reshape(leaf.shape[0] // per_tile, per_tile, n)
