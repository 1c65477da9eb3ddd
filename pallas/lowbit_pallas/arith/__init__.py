"""Arithmetic that kernels and the XLA path share, in plain jnp.

Every function takes arrays and static values and returns arrays. There is one
home for each piece: `codec` (element codes), `scale` (exact scales), `packing`
(sub-byte storage), `block` (codes with their scales), `hashing` (counter-based
random bits), `hadamard`, `lmul` (products by integer addition), `exponential`
((mantissa, exponent) pairs that do not overflow), `softmax` (their sums and
quotients), and `elementary` (reductions of the range and cores of exp2, sin and
their kin).
"""
