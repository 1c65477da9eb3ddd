"""Elementary and special functions with known accuracy.

`MAX_ULP` has the accuracy tier of every elementary function in float32: the
largest error in units in the last place. `lowbit_jax/special/certificates` has
the measurements, over every float32 argument.

- `cos`: cos(x), within 1 ULP for every x. As `sin`.
- `erf`: The error function, within 1.5 ULP.
- `exp`: e^x, within 1 ULP.
- `exp2`: 2^x, within 1 ULP; whole numbers give exact powers.
- `gelu`: x Phi(x) with the normal distribution function Phi, within 1.5 ULP.
- `log2`: log2(x), within 1 ULP; powers of two give whole numbers.
- `log_iv`: log I_v(x), the modified Bessel function of the first kind.
- `log_kv`: log K_v(x), the modified Bessel function of the second kind.
- `sigmoid`: 1 / (1 + e^-x), within 1.5 ULP.
- `sin`: sin(x), within 1 ULP for every x.
- `softplus`: log(1 + e^x), within 1.5 ULP.
- `tanh`: tanh(x), within 1.5 ULP.
- `von_mises_fisher`: The von Mises-Fisher distribution on the unit sphere in p
  dimensions.
"""

from lowbit_jax.special import von_mises_fisher as von_mises_fisher
from lowbit_jax.special._bessel import log_iv as log_iv, log_kv as log_kv
from lowbit_jax.special._elementary import (
  MAX_ULP as MAX_ULP,
  cos as cos,
  erf as erf,
  exp as exp,
  exp2 as exp2,
  gelu as gelu,
  log2 as log2,
  sigmoid as sigmoid,
  sin as sin,
  softplus as softplus,
  tanh as tanh,
)
