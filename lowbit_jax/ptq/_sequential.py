"""Block after block: what a layer meets depends on those before it."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax

from lowbit_jax._typing import PyTree
from lowbit_jax.ptq._statistics import Selected, observe, recorder


def sequential(
  block: Callable[[PyTree, PyTree], PyTree],
  parameters: Iterable[PyTree],
  inputs: Sequence[PyTree],
  quantize: Callable[[PyTree, str, Mapping[str, Any]], PyTree],
  stages: Sequence[str],
  *,
  rounding: Callable[[jax.Array], jax.Array] | None = None,
) -> Iterator[PyTree]:
  """Quantizes blocks one by one, each on what the quantized ones before give.

  Within a block the layers of a stage are quantized together, on what they meet
  when those of the stages before are. Memory is that of the inputs, of one
  block and of the statistics of one stage.

  Args:
    block: `block(parameters, x)` gives what the next block takes.
    parameters: of the blocks, trees of the same structure and shapes, so that
      every stage is compiled once. Wrap them in a progress bar.
    inputs: batches of what the first block takes.
    quantize: `quantize(parameters, select, observed)` gives the parameters of a
      block in which the selected ones are stored, such as

        nn.quantize_params(
          parameters, select, fmt, method=ptq.method(step, observed)
        )

    stages: of a block, in the order in which it uses them: regular expressions
      that are searched in the paths of weights.
    rounding: as in `calibrate`.

  Yields:
    The quantized parameters of each block.

  Raises:
    ValueError: for inputs or stages that are empty, and as `calibrate`.
  """
  for name, values in (('inputs', inputs), ('stages', stages)):
    if not len(values):
      raise ValueError(f'{name} is empty: give one at least')
  runs = [recorder(block, Selected(stage, rounding)) for stage in stages]
  run, values = jax.jit(block), list(inputs)
  for own in parameters:
    for stage, recorded in zip(stages, runs, strict=True):
      own = quantize(own, stage, observe(recorded, own, values))
    yield own
    values = [run(own, x) for x in values]
