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
