"""Elementary and special functions with known accuracy."""

from lowbit_jax.special import von_mises_fisher as von_mises_fisher
from lowbit_jax.special._bessel import log_iv as log_iv
from lowbit_jax.special._bessel import log_kv as log_kv
