"""Test suites for quantizers and dot products, of this library or of others.

A kernel passes `check_quantizer` and `check_dot` if it computes what the
formats define; `quantizer_mutants`, `stochastic_mutants` and `dot_mutants` hold
implementations with one planted fault each, which a suite must reject. Nothing
here needs more than NumPy, JAX and chex.

`SHAPES` are products of every kind, `SMALL_SHAPES` those for tests and
`LARGE_SHAPES` those for benchmarks.

- `MatmulShape`: (m, k) times (k, n).
- `assert_bits_equal`: Asserts that two arrays, or two QArrays, are the same
  bits.
- `assert_trees_bits_equal`: Asserts that two trees have one structure and
  leaves of the same bits.
- `assert_within_ulp`: Asserts that at most `ulp - 1` floats lie between the two
  arrays.
- `check_dot`: Asserts that a product agrees with float64 up to float32
  accumulation.
- `check_quantizer`: Asserts that a quantizer computes what the format defines,
  bit for bit.
- `check_stochastic`: Asserts that a stochastic quantizer is unbiased,
  independent and keyed.
- `dot_cases`: Shapes to test or time.
- `dot_mutants`: Faulty products `(x, q) -> array` by name; those that fit
  `fmt`.
- `dot_tolerance`: The tolerance of `check_dot` for a float32 result.
- `quantizer_cases`: Named float32 matrices to quantize along the last axis (the
  last two).
- `quantizer_mutants`: Faulty quantizers `x -> QArray` by name; those that make
  sense for `fmt`.
- `stochastic_mutants`: Faulty stochastic quantizers `(x, key) -> QArray |
  array` by name.
"""

from lowbit_jax.testing._asserts import (
  assert_bits_equal as assert_bits_equal,
  assert_trees_bits_equal as assert_trees_bits_equal,
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
