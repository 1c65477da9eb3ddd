"""Optimizers for low-bit training, as optax transformations.

Low-bit states (`quantized_state`, `adamw`), Muon (`muon`), StableSPAM,
treatment of oscillating weights, training of quantized weights without master
copies (`direct`), gradient codecs, and loss scaling.
"""

from lowbit_jax.training.optimizers._codecs import Companded as Companded
from lowbit_jax.training.optimizers._codecs import RankOne as RankOne
from lowbit_jax.training.optimizers._codecs import dynamic_map as dynamic_map
from lowbit_jax.training.optimizers._codecs import linear_map as linear_map
from lowbit_jax.training.optimizers._common import is_embedding as is_embedding
from lowbit_jax.training.optimizers._common import is_head as is_head
from lowbit_jax.training.optimizers._communication import ef_sign as ef_sign
from lowbit_jax.training.optimizers._communication import qsgd as qsgd
from lowbit_jax.training.optimizers._communication import (
  qsgd_encode as qsgd_encode,
)
from lowbit_jax.training.optimizers._direct import (
  apply_updates as apply_updates,
)
from lowbit_jax.training.optimizers._direct import dequantized as dequantized
from lowbit_jax.training.optimizers._direct import direct as direct
from lowbit_jax.training.optimizers._loss_scale import all_finite as all_finite
from lowbit_jax.training.optimizers._loss_scale import (
  dynamic_loss_scale as dynamic_loss_scale,
)
from lowbit_jax.training.optimizers._loss_scale import scale_loss as scale_loss
from lowbit_jax.training.optimizers._muon import (
  activation_cap as activation_cap,
)
from lowbit_jax.training.optimizers._muon import (
  hidden_matrices as hidden_matrices,
)
from lowbit_jax.training.optimizers._muon import muon as muon
from lowbit_jax.training.optimizers._muon import (
  mup_head_scale as mup_head_scale,
)
from lowbit_jax.training.optimizers._muon import mup_normal as mup_normal
from lowbit_jax.training.optimizers._muon import scale_by_muon as scale_by_muon
from lowbit_jax.training.optimizers._oscillation import (
  deoscillate as deoscillate,
)
from lowbit_jax.training.optimizers._oscillation import (
  ema_quantize as ema_quantize,
)
from lowbit_jax.training.optimizers._oscillation import (
  grid_neighbours as grid_neighbours,
)
from lowbit_jax.training.optimizers._oscillation import q_ema as q_ema
from lowbit_jax.training.optimizers._polar import COEFFICIENTS as COEFFICIENTS
from lowbit_jax.training.optimizers._polar import NewtonSchulz as NewtonSchulz
from lowbit_jax.training.optimizers._polar import newton_schulz as newton_schulz
from lowbit_jax.training.optimizers._polar import (
  randomized_polar as randomized_polar,
)
from lowbit_jax.training.optimizers._quantized import adamw as adamw
from lowbit_jax.training.optimizers._quantized import adamw_4bit as adamw_4bit
from lowbit_jax.training.optimizers._quantized import (
  quantized_state as quantized_state,
)
from lowbit_jax.training.optimizers._quantized import state_bytes as state_bytes
from lowbit_jax.training.optimizers._stable_spam import adaclip as adaclip
from lowbit_jax.training.optimizers._stable_spam import adagn as adagn
from lowbit_jax.training.optimizers._stable_spam import (
  momentum_reset as momentum_reset,
)
from lowbit_jax.training.optimizers._stable_spam import (
  stable_spam as stable_spam,
)
