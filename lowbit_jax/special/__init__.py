"""Elementary and special functions with known accuracy.

`MAX_ULP` has the accuracy tier of every elementary function in float32: the
largest error in units in the last place. `lowbit_jax/special/certificates` has
the measurements, over every float32 argument.
"""

from lowbit_jax.special import von_mises_fisher as von_mises_fisher
from lowbit_jax.special._bessel import log_iv as log_iv
from lowbit_jax.special._bessel import log_kv as log_kv
from lowbit_jax.special._elementary import MAX_ULP as MAX_ULP
from lowbit_jax.special._elementary import cos as cos
from lowbit_jax.special._elementary import erf as erf
from lowbit_jax.special._elementary import exp as exp
from lowbit_jax.special._elementary import exp2 as exp2
from lowbit_jax.special._elementary import gelu as gelu
from lowbit_jax.special._elementary import log2 as log2
from lowbit_jax.special._elementary import sigmoid as sigmoid
from lowbit_jax.special._elementary import sin as sin
from lowbit_jax.special._elementary import softplus as softplus
from lowbit_jax.special._elementary import tanh as tanh
