"""Races that Pallas' interpreters find, whatever the version of JAX."""

import contextlib
from collections.abc import Iterator
from unittest import mock

from jax._src.pallas.mosaic.interpret import interpret_pallas_call as tpu
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks as gpu
from jax.experimental.pallas import mosaic_gpu as plgpu, tpu as pltpu

TPU = pltpu.InterpretParams(detect_races=True)
# JAX 0.10 interprets no kernel of ours for GPUs.
GPU = None
if hasattr(plgpu, 'InterpretGPUParams'):
  GPU = plgpu.InterpretGPUParams(detect_races=True)

_STATES = [
  (module, name, getattr(module, name))
  for module, name in (
    (tpu, 'RaceDetectionState'),
    (gpu, 'RaceDetectionState'),
    (gpu, 'GPURaceDetectionState'),
  )
  if hasattr(module, name)
]


@contextlib.contextmanager
def recorded() -> Iterator[list]:
  """The findings of every kernel interpreted inside, whose `races_found` says
  whether there was a race, if it ran with `TPU` or `GPU`. Of nested calls the
  innermost records."""
  found = []

  def recording(make):
    def state(**kwargs):
      found.append(make(**kwargs))
      return found[-1]

    return state

  with contextlib.ExitStack() as stack:
    for module, name, make in _STATES:
      stack.enter_context(mock.patch.object(module, name, recording(make)))
    yield found
