"""What TPU kernels cost by the compiler's own schedule, without a TPU.

A TPU core issues one VLIW bundle a cycle, so the bundles of a kernel body tell
two versions of a tile apart. They ignore waiting for memory and are no times.
Needs the extra `aot`; under a minute. Prints each product next to the bfloat16
product of the same tile, and softmax for one tile of rows, with the path for
entries near each other and the guarded one both counted.

  python benchmarks/static_cost.py             prints the figures
  python benchmarks/static_cost.py --check     fails where one rose by 10 %
  python benchmarks/static_cost.py --update    writes static_cost.json
"""

import functools
import json
import os
import pathlib
import re
import shutil
import sys
import tempfile
from collections.abc import Callable
from typing import NamedTuple

_DUMP = tempfile.mkdtemp(prefix='static_cost')
os.environ.setdefault('TPU_SKIP_MDS_QUERY', '1')
os.environ.setdefault('JAX_PLATFORMS', 'cpu')
os.environ['LIBTPU_INIT_ARGS'] = (
  f'--xla_jf_dump_to={_DUMP} --xla_jf_dump_llo_text=true'
)

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from absl import app, flags  # noqa: E402
from jax.experimental import pallas as pl, topologies  # noqa: E402
from jax.experimental.pallas import tpu as pltpu  # noqa: E402
from jax.sharding import Mesh, NamedSharding, PartitionSpec  # noqa: E402

import _timing  # noqa: E402
import lowbit_jax as lowbit  # noqa: E402

_UPDATE = flags.DEFINE_bool('update', False, 'Write the committed figures.')
_CHECK = flags.DEFINE_bool('check', False, 'Compare with them.')
_TABLE = pathlib.Path(__file__).with_suffix('.json')
_TOPOLOGY = 'v5e:2x2'
_RISE = 1.1

M, N, K = 256, 1024, 2048
BM, BN, TILE = 256, 512, 512
WEIGHTS = (
  'int8_channel', 'int8_g128', 'int4_g128', 'int4_g32', 'mxfp4', 'nvfp4',
  'mxfp8_e4m3', 'mxfp6_e2m3', 'nf4_g64', 'int3_g32', 'int2_g32', 'uint4_g128',
)  # fmt: skip
ROWS, COLUMNS = 8, 4096


class Cost(NamedTuple):
  """Bundles of a kernel body, and the share of them that feed the MXU."""

  bundles: int
  mxu: float


def compiled_cost(name: str, f: Callable, *arguments) -> Cost:
  """Compiles `f`, which holds the kernel `name`, and reads its schedule."""
  shutil.rmtree(_DUMP, ignore_errors=True)
  os.makedirs(_DUMP)
  topology = topologies.get_topology_desc(
    platform='tpu', topology_name=_TOPOLOGY
  )
  mesh = Mesh(np.array(topology.devices)[:1], ('x',))
  sharding = NamedSharding(mesh, PartitionSpec())
  arguments = jax.tree.map(
    lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding),
    arguments,
  )
  jax.jit(f).lower(*arguments).compile()
  files = sorted(pathlib.Path(_DUMP).glob(f'*-{name}*'))

  def text(suffix: str) -> str:
    found = [p.read_text() for p in files if p.name.endswith(suffix)]
    if not found:
      raise RuntimeError(f'the compiler dumped no schedule of {name}')
    return found[-1]

  analysis = text('schedule-analysis_final_bundles.txt')
  bundles = int(re.search(r'total scheduled bundles:\s*(\d+)', analysis)[1])
  use = text('-final_hlo-static-per-bundle-utilization.txt')
  rows = [line.split() for line in use.split('UTILIZATION:')[1].splitlines()]
  matmuls = sum(int(row[0]) > 0 for row in rows if row)
  return Cost(bundles, matmuls / max(bundles, 1))


def bf16_product(x, w):
  """The plain tile product that a weight-quantized one is compared with."""

  def kernel(x, w, out, acc):
    @pl.when(pl.program_id(2) == 0)
    def _():
      acc[...] = jnp.zeros_like(acc)

    acc[...] += jnp.dot(x[...], w[...], preferred_element_type=jnp.float32)

    @pl.when(pl.program_id(2) == pl.num_programs(2) - 1)
    def _():
      out[...] = acc[...]

  return pl.pallas_call(
    kernel,
    grid=(M // BM, N // BN, K // TILE),
    in_specs=[
      pl.BlockSpec((BM, TILE), lambda i, j, k: (i, k)),
      pl.BlockSpec((TILE, BN), lambda i, j, k: (k, j)),
    ],
    out_specs=pl.BlockSpec((BM, BN), lambda i, j, k: (i, j)),
    out_shape=jax.ShapeDtypeStruct((M, N), jnp.float32),
    scratch_shapes=[pltpu.VMEM((BM, BN), jnp.float32)],
    name='bf16_product',
  )(x, w)


def weight_cost(name: str) -> Cost:
  from lowbit_jax.ops import _prepack
  from lowbit_pallas.wq_matmul import config, tpu

  x = jax.ShapeDtypeStruct((M, K), jnp.bfloat16)
  w = jax.ShapeDtypeStruct((K, N), jnp.float32)
  fmt = lowbit.formats.get(name)
  q = jax.eval_shape(functools.partial(lowbit.quantize, fmt=fmt, axis=-2), w)
  pack = functools.partial(_prepack.weight, implementation='tpu')
  planes = jax.eval_shape(pack, q)
  schedule = config.heuristic_schedule(planes.spec)
  sizes = tpu.Config(BM, BN, planes.tile, schedule)
  run = functools.partial(tpu.run, config=sizes, out_dtype=jnp.float32)
  return compiled_cost('wq_matmul', run, x, planes)


def softmax_cost(kind: str) -> Cost:
  from lowbit_pallas.softmax import tpu

  run = functools.partial(
    tpu.run,
    kind=kind,
    algorithm='pair',
    config=tpu.Config(ROWS, COLUMNS),
  )
  x = jax.ShapeDtypeStruct((ROWS, COLUMNS), jnp.float32)
  return compiled_cost(f'softmax_{kind}', run, x)


def all_costs() -> dict[str, Cost]:
  x = jax.ShapeDtypeStruct((M, K), jnp.bfloat16)
  w = jax.ShapeDtypeStruct((K, N), jnp.bfloat16)
  costs = {'bf16 product': compiled_cost('bf16_product', bf16_product, x, w)}
  costs |= {f'{name} product': weight_cost(name) for name in WEIGHTS}
  kinds = 'softmax', 'log_softmax', 'logsumexp'
  return costs | {kind: softmax_cost(kind) for kind in kinds}


def comparison(
  known: dict[str, int], figures: dict[str, int]
) -> tuple[list[list[str]], list[str]]:
  """Rows of (kernel, committed, now, ratio), and the kernels that fail.

  A kernel fails where its figure rose by more than 10 %, or where only one of
  the two knows it.
  """
  rows, failed = [], []
  for name in {**known, **figures}:
    old, new = known.get(name), figures.get(name)
    if old is None or new is None:
      ratio, fails = 'missing', True
    else:
      ratio, fails = f'{new / old:.2f}', new > _RISE * old
    if fails:
      failed.append(name)
    mark = f'{ratio} FAILED' if fails else ratio
    rows.append([name, str(old), str(new), mark])
  return rows, failed


def main(argv):
  del argv
  costs = all_costs()
  shutil.rmtree(_DUMP, ignore_errors=True)
  figures = {name: c.bundles for name, c in costs.items()}
  if _CHECK.value:
    rows, failed = comparison(json.loads(_TABLE.read_text()), figures)
    header = ['kernel', 'committed', 'now', 'ratio']
    print(_timing.table('bundles, TPU v5e', header, rows))
    if failed:
      sys.exit(
        f'costs rose by more than 10 %: {", ".join(failed)}; if that is wanted,'
        ' run benchmarks/static_cost.py --update'
      )
    return
  base = figures['bf16 product']
  rows = [
    [
      name,
      str(c.bundles),
      f'{c.bundles / base:.2f}' if 'product' in name else '',
      f'{c.mxu:.0%}',
    ]
    for name, c in costs.items()
  ]
  header = ['kernel', 'bundles', 'relative to bf16', 'bundles with MXU']
  title = (
    f'bundles of a {BM} x {BN} x {TILE} tile and of {ROWS} x {COLUMNS} entries'
    ' of softmax, TPU v5e'
  )
  print(_timing.table(title, header, rows))
  if _UPDATE.value:
    _TABLE.write_text(json.dumps(figures, indent=1) + '\n')


if __name__ == '__main__':
  app.run(main)
