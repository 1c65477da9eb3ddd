"""Optimizers for low-bit training, as optax transformations.

Low-bit states (`quantized_state`, `adamw`), Muon (`muon`), StableSPAM,
treatment of oscillating weights, training of quantized weights without master
copies (`direct`), gradient codecs, and loss scaling.

`COEFFICIENTS` has the Newton-Schulz iterations of `newton_schulz` by name.

- `Companded`: E4M3 codes of sign(x) c |x / c|^k with c and k per block.
- `NewtonSchulz`: Coefficients of a Newton-Schulz iteration.
- `RankOne`: Codes of x / s with s the least of one maximum per axis.
- `activation_cap`: An update that changes the output of a layer by a bounded
  share.
- `adaclip`: Scales down the elements of a gradient beyond its usual maximum.
- `adagn`: Gives each gradient the norm that its history suggests.
- `adamw`: AdamW with moments of 8 bits, as `optax.adamw` otherwise.
- `adamw_4bit`: AdamW with moments of 4 bits: 'de4', and 'rank1_lin4' for the
  second.
- `all_finite`: Whether no array of a tree holds NaN or Inf, as a boolean array.
- `apply_updates`: w + u, stochastically rounded to the format of w.
- `deoscillate`: Puts weights that oscillate between grid points onto one of
  them.
- `dequantized`: A tree with the values of its QArrays, at which gradients are
  taken.
- `direct`: Lets an optimizer see QArrays among the parameters as their values.
- `dynamic_loss_scale`: Wraps an optimizer that is given gradients of the scaled
  loss.
- `dynamic_map`: The dynamic tree of 2^bits numbers in [-1, 1], or in (0, 1].
- `ef_sign`: One bit per element, with error feedback.
- `ema_quantize`: Rounds each weight to the grid point beside it that is nearer
  to its mean.
- `grid_neighbours`: The two numbers of a block format that enclose each element
  of `w`.
- `hidden_matrices`: Which leaves Muon takes unless told otherwise, and as which
  matrices.
- `is_embedding`: Whether a path names an embedding: it holds 'embed', 'wte' or
  'wpe'.
- `is_head`: Whether a path names an output head.
- `linear_map`: k / 2^bits for k = 1 ... 2^bits: uniform numbers in (0, 1]
  without 0.
- `momentum_reset`: Starts a transformation again after every `every` steps.
- `muon`: Muon for hidden matrices, another optimizer for all other parameters.
- `muon_table`: What `muon` does with each leaf of a tree, as lines of text.
- `mup_head_scale`: Multiplies the updates of output heads by base_width / d_in.
- `mup_normal`: Initializer of hidden matrices for muP: N(0, sigma^2).
- `newton_schulz`: An approximate polar factor of each matrix.
- `q_ema`: Keeps the mean of each parameter for `ema_quantize`; changes no
  update.
- `qsgd`: Rounds gradients as QSGD does: unbiased, and different in every step.
- `qsgd_encode`: The message of a worker: integers in [-s, s] and a norm for
  each bucket.
- `quantized_state`: Keeps the moments of an optimizer in few bits: decode,
  update, encode.
- `randomized_polar`: The polar factor of a random low-rank approximation of
  each matrix.
- `scale_by_muon`: Momentum, polar factor and shape factor of `muon`; takes its
  arguments.
- `scale_loss`: The loss times the scale of an optimizer state, in the dtype of
  the loss.
- `stable_spam`: StableSPAM: `adaclip`, `adagn`, and Adam within
  `momentum_reset`.
- `state_bytes`: Bytes of all arrays of a state, or of its `jax.eval_shape`.
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
  muon_table as muon_table,
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
