"""Compiling for accelerators that this machine does not have.

`libtpu` compiles for TPUs and JAX's CUDA plug-in for GPUs without any device;
both come with the extra `aot`. Import this module before JAX starts a backend.
"""

import functools
import importlib.util
import os
import pathlib
import re
import tempfile

os.environ.setdefault('TPU_SKIP_MDS_QUERY', '1')
# Tests in several processes; nobody has a TPU to share.
os.environ.setdefault('ALLOW_MULTIPLE_LIBTPU_LOAD', '1')

import jax  # noqa: E402
import numpy as np  # noqa: E402
from jax.experimental import topologies  # noqa: E402
from jax.sharding import Mesh, NamedSharding, PartitionSpec  # noqa: E402

TPUS = {'v5e': 'v5e:2x2', 'v6e': 'v6e:2x2', 'tpu7x': 'tpu7x:2x2x1'}
GPUS = {
  'h100': (9, 132, 'NVIDIA H100 80GB HBM3'),
  'b200': (10, 148, 'NVIDIA B200'),
}
TARGETS = (*TPUS, *GPUS)

_GPU = """
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32
  shared_memory_per_block: 49152 shared_memory_per_core: 233472
  shared_memory_per_block_optin: 232448 threads_per_core_limit: 2048
  core_count: {cores} fpus_per_core: 128 registers_per_core_limit: 65536
  registers_per_block_limit: 65536 block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98
  device_memory_size: 84942979072 cuda_compute_capability {{ major: {major} }}
}}
platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 10 }}
device_description_str: "{name}"
"""


def why_not(target: str) -> str | None:
  """Why this machine cannot compile for `target`, or None."""
  package = 'libtpu' if target in TPUS else 'jax_cuda13_plugin'
  if importlib.util.find_spec(package) is None:
    return f"{package} is not installed: pip install '.[aot]'"
  return None


@functools.cache
def topology(target: str):
  """A description of the devices of a target."""
  if target in TPUS:
    return topologies.get_topology_desc(
      platform='tpu', topology_name=TPUS[target]
    )
  major, cores, name = GPUS[target]
  return topologies.get_topology_desc(
    platform='cuda',
    topology_name='',
    topology='1x1x1',
    target_config=_GPU.format(major=major, cores=cores, name=name),
  )


def compile_for(target: str, f, *arguments):
  """Compiles `f` for one device of a target.

  Args:
    target: a name from `TARGETS`.
    f: a function of arrays.
    *arguments: trees of arrays or `jax.ShapeDtypeStruct`.

  Returns:
    The compiled function; it cannot be called here.
  """
  mesh = Mesh(np.array(topology(target).devices)[:1], ('x',))
  sharding = NamedSharding(mesh, PartitionSpec())

  def abstract(a):
    return jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding)

  arguments = jax.tree.map(abstract, arguments)
  return jax.jit(f).lower(*arguments).compile()


def gpu_report(target: str, f, *arguments) -> tuple[str, dict[str, int]]:
  """The PTX of a Mosaic GPU kernel, and what its registers cost.

  Returns:
    PTX, and {'registers', 'spill_stores', 'spill_loads'}: the largest of each
    over the kernels of `f`.

  Raises:
    RuntimeError: if `ptxas` did not report each of them.
  """
  with tempfile.TemporaryDirectory() as directory:
    dump = {
      'MOSAIC_GPU_DUMP_TO': directory,
      'MOSAIC_GPU_DUMP_PTX': '1',
      'MOSAIC_GPU_DUMP_PTXAS': '1',
    }
    os.environ.update(dump)
    try:
      jax.clear_caches()
      compile_for(target, f, *arguments)
    finally:
      for name in dump:
        del os.environ[name]
    files = list(pathlib.Path(directory).rglob('*'))
    ptx = '\n'.join(p.read_text() for p in files if p.suffix == '.ptx')
    log = '\n'.join(p.read_text() for p in files if p.suffix == '.ptxas')

  def largest(pattern: str) -> int:
    found = [int(n) for n in re.findall(pattern, log)]
    if not found:
      raise RuntimeError(
        f'ptxas reported no {pattern!r}: nothing is known about the registers'
        ' of this kernel; one that a process compiles twice is reported once'
      )
    return max(found)

  return ptx, {
    'registers': largest(r'Used (\d+) registers'),
    'spill_stores': largest(r'(\d+) bytes spill stores'),
    'spill_loads': largest(r'(\d+) bytes spill loads'),
  }
