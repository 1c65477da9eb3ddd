"""Elementary and special functions with known accuracy.

`MAX_ULP` has the accuracy tier of every elementary function in float32: the
largest error in units in the last place. `lowbit_jax/special/certificates` has
the measurements, over every float32 argument.
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
