"""What runs where: the table that dispatch, tests, benchmarks and docs read."""

from typing import Any, NamedTuple

import jax

TPUS = ('v5e', 'v6e', 'tpu7x')
GPUS = ('h100', 'b200')
PLATFORMS = {'tpu': 'tpu', 'mosaic_gpu': 'gpu'}

_DEVICE_KINDS = {
  'TPU v5 lite': 'v5e',
  'TPU v5e': 'v5e',
  'TPU v6 lite': 'v6e',
  'TPU v6e': 'v6e',
  'TPU7x': 'tpu7x',
}
_COMPUTE_CAPABILITIES = {'9.0': 'h100', '10.0': 'b200'}


class Kernel(NamedTuple):
  """One kernel and how far it has been proven.

  Attributes:
    op: folder of this package.
    implementation: 'tpu' or 'mosaic_gpu'.
    targets: what it compiles for.
    interpreted: whether it is run in interpret mode against its oracle.
    run_on: device kinds on which it ran and was checked.
  """

  op: str
  implementation: str
  targets: tuple[str, ...]
  interpreted: bool
  run_on: tuple[str, ...] = ()


KERNELS = (
  Kernel('softmax', 'tpu', TPUS, True),
  Kernel('softmax', 'mosaic_gpu', GPUS, True),
  Kernel('quantize', 'tpu', TPUS, True),
  Kernel('quantize', 'mosaic_gpu', ('h100',), False),
  Kernel('wq_matmul', 'tpu', TPUS, True),
  Kernel('wq_matmul', 'mosaic_gpu', ('h100',), False),
  Kernel('block_matmul', 'tpu', TPUS, True),
  Kernel('block_matmul', 'mosaic_gpu', GPUS, False),
)


def target_of(device: Any) -> str | None:
  """The name of a device in this table, None for one that has no kernels."""
  if device.platform == 'tpu':
    return _DEVICE_KINDS.get(device.device_kind)
  capability = getattr(device, 'compute_capability', '')
  return _COMPUTE_CAPABILITIES.get(capability)


def find(op: str, implementation: str) -> Kernel | None:
  """The entry of a kernel, None if it does not exist."""
  for kernel in KERNELS:
    if (kernel.op, kernel.implementation) == (op, implementation):
      return kernel
  return None


def why_elsewhere(implementation: str) -> str | None:
  """Why the default device's platform cannot run an implementation, or None."""
  device = jax.devices()[0]
  if device.platform == PLATFORMS.get(implementation, device.platform):
    return None
  return f'the default device is a {device.platform}'


def why_unavailable(implementation: str) -> str | None:
  """Why the default device does not take an implementation unasked, or None.

  Kernels must have been interpreted against their oracle, or have run there.
  """
  if implementation not in PLATFORMS:
    return None
  if (why := why_elsewhere(implementation)) is not None:
    return why
  device = jax.devices()[0]
  target = target_of(device)
  mine = [k for k in KERNELS if k.implementation == implementation]
  if not all(k.interpreted or target in k.run_on for k in mine):
    return f'not all of its kernels are proven on {device.device_kind}: name it'
  return None


def why_not(op: str, implementation: str) -> str | None:
  """Why a kernel is not for the default device, or None.

  A device of another platform is no reason: code for a platform can be compiled
  where it cannot run.
  """
  kernel = find(op, implementation)
  if kernel is None:
    return f'there is no {implementation} kernel for {op}'
  device = jax.devices()[0]
  if why_elsewhere(implementation):
    return None
  if target_of(device) not in kernel.targets:
    return f'{op} has no kernel for {device.device_kind}'
  return None
