"""Optimizers for low-bit training, as optax transformations.

Low-bit states (`quantized_state`, `adamw`), Muon (`muon`), StableSPAM,
treatment of oscillating weights, training of quantized weights without master
copies (`direct`), gradient codecs, and loss scaling.
"""

from lowbit_jax.training.optimizers._codecs import (
  Companded as Companded,
  RankOne as RankOne,
  dynamic_map as dynamic_map,
  linear_map as linear_map,
)
from lowbit_jax.training.optimizers._common import (
  is_embedding as is_embedding,
  is_head as is_head,
)
from lowbit_jax.training.optimizers._communication import (
  ef_sign as ef_sign,
  qsgd as qsgd,
  qsgd_encode as qsgd_encode,
)
from lowbit_jax.training.optimizers._direct import (
  apply_updates as apply_updates,
  dequantized as dequantized,
  direct as direct,
)
from lowbit_jax.training.optimizers._loss_scale import (
  all_finite as all_finite,
  dynamic_loss_scale as dynamic_loss_scale,
  scale_loss as scale_loss,
)
from lowbit_jax.training.optimizers._muon import (
  activation_cap as activation_cap,
  hidden_matrices as hidden_matrices,
  muon as muon,
  mup_head_scale as mup_head_scale,
  mup_normal as mup_normal,
  scale_by_muon as scale_by_muon,
)
from lowbit_jax.training.optimizers._oscillation import (
  deoscillate as deoscillate,
  ema_quantize as ema_quantize,
  grid_neighbours as grid_neighbours,
  q_ema as q_ema,
)
from lowbit_jax.training.optimizers._polar import (
  COEFFICIENTS as COEFFICIENTS,
  NewtonSchulz as NewtonSchulz,
  newton_schulz as newton_schulz,
  randomized_polar as randomized_polar,
)
from lowbit_jax.training.optimizers._quantized import (
  adamw as adamw,
  adamw_4bit as adamw_4bit,
  quantized_state as quantized_state,
  state_bytes as state_bytes,
)
from lowbit_jax.training.optimizers._stable_spam import (
  adaclip as adaclip,
  adagn as adagn,
  momentum_reset as momentum_reset,
  stable_spam as stable_spam,
)
