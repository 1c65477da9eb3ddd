"""Test suites for quantizers and dot products, of this library or of others.

A kernel passes `check_quantizer` and `check_dot` if it computes what the
formats define; `quantizer_mutants`, `stochastic_mutants` and `dot_mutants` hold
implementations with one planted fault each, which a suite must reject. Nothing
here needs more than NumPy and JAX.
"""

from lowbit_jax.testing._asserts import (
  assert_bits_equal as assert_bits_equal,
  assert_within_ulp as assert_within_ulp,
)
from lowbit_jax.testing._blocks import quantizer_cases as quantizer_cases
from lowbit_jax.testing._dots import (
  check_dot as check_dot,
  dot_tolerance as dot_tolerance,
)
from lowbit_jax.testing._mutants import (
  dot_mutants as dot_mutants,
  quantizer_mutants as quantizer_mutants,
  stochastic_mutants as stochastic_mutants,
)
from lowbit_jax.testing._quantizers import (
  check_quantizer as check_quantizer,
  check_stochastic as check_stochastic,
)
from lowbit_jax.testing._shapes import (
  LARGE_SHAPES as LARGE_SHAPES,
  SHAPES as SHAPES,
  SMALL_SHAPES as SMALL_SHAPES,
  MatmulShape as MatmulShape,
  dot_cases as dot_cases,
)
