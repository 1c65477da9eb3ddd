"""Invertible maps of an axis that leave a matrix product unchanged.

A transform changes what a quantizer sees, not what is computed:

  x @ w = t.apply(x) @ t.apply_dual(w)

| transform           | activation     | weight          |
|---------------------|----------------|-----------------|
| Hadamard            | H (s x)        | H (s w)         |
| Permutation         | x[order]       | w[order]        |
| DiagonalSmoothing   | x / s          | s w             |
| BlockAffine         | x_b P_b        | inv(P_b) w_b    |
| Chain               | one by one     | in the same order |

- `BlockAffine`: Multiplies every block b of an axis, as a row, by its own
  matrix P_b.
- `Chain`: The composition of transforms of one axis, the first one applied
  first.
- `DiagonalSmoothing`: Divides the activation by a scale per channel, multiplies
  the weight.
- `Hadamard`: Rotation of every block along an axis by a Walsh-Hadamard matrix.
- `Permutation`: Reorders an axis: ``apply(x)[..., i] = x[..., order[i]]``.
- `Transform`: An invertible linear map T of the entries along one axis of an
  array.
- `random_hadamard`: Returns a Hadamard rotation with `size` random signs.
- `smooth_quant`: Returns the smoothing that shares out the range of each
  channel.
"""

from lowbit_jax.transforms._affine import BlockAffine as BlockAffine
from lowbit_jax.transforms._base import Transform as Transform
from lowbit_jax.transforms._chain import Chain as Chain
from lowbit_jax.transforms._hadamard import (
  Hadamard as Hadamard,
  random_hadamard as random_hadamard,
)
from lowbit_jax.transforms._permutation import Permutation as Permutation
from lowbit_jax.transforms._smoothing import (
  DiagonalSmoothing as DiagonalSmoothing,
  smooth_quant as smooth_quant,
)
