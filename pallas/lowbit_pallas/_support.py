"""What runs where: the table that dispatch, tests, benchmarks and docs read."""

import importlib
from collections.abc import Sequence
from types import ModuleType
from typing import Any, NamedTuple

import jax

# What an implementation's kernels are lowered for.
PLATFORMS = {'tpu': 'tpu', 'mosaic_gpu': 'cuda'}
# The kinds of devices that JAX reports, and the compute capabilities of GPUs.
TPUS = {
  'v5e': ('TPU v5 lite', 'TPU v5e'),
  'v6e': ('TPU v6 lite', 'TPU v6e'),
  'tpu7x': ('TPU7x',),
}
GPUS = {'h100': '9.0', 'b200': '10.0'}


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

  @property
  def has_rules(self) -> bool:
    """As the function of that name."""
    return has_rules(self.implementation)

  def load(self) -> ModuleType:
    """The module with `why_not`, `choose` and `run`; imports the back end."""
    return importlib.import_module(self._name)

  def load_config(self) -> ModuleType:
    """The module with `Config`, `heuristic` and `choose`; no back end.

    That of `wq_matmul` has the layout and the tile of a weight as well.
    """
    return importlib.import_module(f'{self._name}_config')

  @property
  def _name(self) -> str:
    return f'lowbit_pallas.{self.op}.{self.implementation}'


KERNELS = (
  Kernel('softmax', 'tpu', tuple(TPUS), True),
  Kernel('softmax', 'mosaic_gpu', tuple(GPUS), True),
  Kernel('quantize', 'tpu', tuple(TPUS), True),
  Kernel('quantize', 'mosaic_gpu', ('h100',), False),
  Kernel('wq_matmul', 'tpu', tuple(TPUS), True),
  Kernel('wq_matmul', 'mosaic_gpu', ('h100',), False),
  Kernel('block_matmul', 'tpu', tuple(TPUS), True),
  Kernel('block_matmul', 'mosaic_gpu', tuple(GPUS), False),
)


def target_of(device: Any) -> str | None:
  """The name of a device in this table, None for one that has no kernels."""
  if device.platform == 'tpu':
    matches = [t for t, kinds in TPUS.items() if device.device_kind in kinds]
  else:
    own = getattr(device, 'compute_capability', '')
    matches = [t for t, capability in GPUS.items() if capability == own]
  return matches[0] if matches else None


def has_rules(implementation: str) -> bool:
  """Whether XLA splits it over devices; on TPU it splits no kernel."""
  return implementation != 'tpu'


def find(op: str, implementation: str) -> Kernel | None:
  """The entry of a kernel, None if it does not exist."""
  for kernel in KERNELS:
    if (kernel.op, kernel.implementation) == (op, implementation):
      return kernel
  return None


def require(op: str, implementation: str) -> Kernel:
  """The entry of a kernel that the device here may have.

  Raises:
    NotImplementedError: with the reason of `why_not`.
  """
  kernel, why = find(op, implementation), why_not(op, implementation)
  if kernel is None or why is not None:
    raise NotImplementedError(why)
  return kernel


def platform(name: str | None = None) -> str:
  """A platform as JAX's lowering calls it; the default device's for None.

  Raises:
    ValueError: for a name that is no platform of JAX.
  """
  name = jax.default_backend() if name is None else name
  if name not in ('cpu', 'cuda', 'gpu', 'rocm', 'tpu'):
    raise ValueError(f"platform={name!r} is not one of 'cpu', 'gpu', 'tpu'")
  return 'cuda' if name == 'gpu' else name


def devices(implementation: str) -> Sequence[Any]:
  """The devices here that an implementation is for."""
  try:
    return jax.devices(PLATFORMS.get(implementation, 'cpu'))
  except RuntimeError:  # JAX has no such platform here
    return ()


def device_of(implementation: str) -> Any:
  """The first of `devices`, or None."""
  return next(iter(devices(implementation)), None)


def why_elsewhere(implementation: str, platform: str) -> str | None:
  """Why an implementation is not for a platform, or None."""
  if PLATFORMS.get(implementation, platform) == platform:
    return None
  return f'the program is for {platform}'


def why_unproven(implementation: str) -> str | None:
  """Why the device here does not take an implementation unasked, or None.

  Kernels must have been interpreted against their oracle, or have run there.
  Without a device to ask, as in an export, interpretation decides.
  """
  if implementation not in PLATFORMS:
    return None
  device = device_of(implementation)
  target = device and target_of(device)
  entries = [k for k in KERNELS if k.implementation == implementation]
  if not all(k.interpreted or target in k.run_on for k in entries):
    place = device.device_kind if device else 'a device'
    return f'not all of its kernels are proven on {place}: name it'
  return None


def why_not(op: str, implementation: str) -> str | None:
  """Why the device here has no such kernel, or None.

  The lack of a device is no reason: code can be compiled where it cannot run.
  """
  kernel = find(op, implementation)
  if kernel is None:
    return f'there is no {implementation} kernel for {op}'
  device = device_of(implementation)
  if device is None or target_of(device) in kernel.targets:
    return None
  return f'{op} has no kernel for {device.device_kind}'
