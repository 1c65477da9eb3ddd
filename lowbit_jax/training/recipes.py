"""Published recipes for low-bit training, by name.

Each entry names its source. Sites are those of `lowbit_jax.recipe`: fwd (x, w),
dgrad (dy, w), wgrad (x, dy). Unless an entry says otherwise, both orientations
of a tensor are quantized from the high-precision one, and embeddings, the
output head, norms, softmax, attention products, master weights and optimizer
state stay in high precision; `Policy` decides which layers take part.

Methods with parameters or gradient transformations of their own are not recipes
but are used with them: learned steps and clips are in `training.qat`, optimizer
states, codecs for communication and loss scaling in `training.optimizers`.
`TAXONOMY` has an example of each branch of the field.
"""

import dataclasses

from lowbit_jax import formats
from lowbit_jax._quantize import check_format
from lowbit_jax.formats import BlockFormat
from lowbit_jax.recipe import (
  GemmSpec,
  Quantizer,
  QuantSpec,
  Recipe,
  TensorScaling,
)
from lowbit_jax.training import micro_scaling, quantizers


def get(name: str) -> Recipe:
  """The recipe of that name.

  Raises:
    ValueError: for unknown names, with those that exist.

  Examples:
    >>> get('mxfp8').fwd.lhs.fmt.name
    'mxfp8_e4m3'
  """
  if not isinstance(name, str) or name not in _RECIPES:
    raise ValueError(f'recipe={name!r} is not one of {", ".join(names())}')
  return dataclasses.replace(_RECIPES[name](), name=name)


def names() -> tuple[str, ...]:
  """Names of all recipes."""
  return tuple(_RECIPES)


def _spec(fmt, rule: str | None = None, **options) -> QuantSpec:
  fmt = check_format(formats.get(fmt)) if isinstance(fmt, str) else fmt
  return QuantSpec(fmt, rule, **options)


def _stochastic(spec: QuantSpec) -> QuantSpec:
  return dataclasses.replace(spec, rounding='stochastic')


def _everywhere(spec: QuantSpec | Quantizer) -> Recipe:
  gemm = GemmSpec(spec, spec)
  return Recipe('', gemm, gemm, gemm)


def _float32() -> Recipe:
  """No quantization."""
  return Recipe('')


def _mxfp8() -> Recipe:
  """NVIDIA 2025: E4M3 for gradients too, scales rounded up."""
  return _everywhere(_spec('mxfp8_e4m3', 'rceil'))


def _mxfp6() -> Recipe:
  """As mxfp8, with E2M3 elements."""
  return _everywhere(_spec('mxfp6_e2m3', 'rceil'))


def _mxint8() -> Recipe:
  """'INT v.s. FP' (2025): symmetric range, scales rounded up."""
  return _everywhere(_spec('mxint8', 'rceil'))


def _mxfp4_rtn() -> Recipe:
  """MXFP4 at all sites, rounded to nearest: the baseline."""
  return _everywhere(_spec('mxfp4', 'floor'))


def _mxfp4_forward() -> Recipe:
  """MXFP4 in the forward product only, straight through."""
  spec = _spec('mxfp4', 'floor')
  return Recipe('', GemmSpec(spec, spec))


def _mxfp4_sr_rht() -> Recipe:
  """MXFP4 with scales rounded up; gradients rounded stochastically after a
  random Hadamard rotation in both backward products."""
  spec = _spec('mxfp4', 'rceil')
  return Recipe(
    '',
    GemmSpec(spec, spec),
    GemmSpec(_stochastic(spec), spec, 32, 'fixed'),
    GemmSpec(spec, _stochastic(spec), 32, 'fixed'),
  )


def _mxfp4_rotated() -> Recipe:
  """MXFP4 at all six sites, every product rotated with fixed random signs.

  Operands that are rounded to nearest take the better of the neighbouring
  scales ('mse'); gradients are rounded stochastically, with scales that never
  saturate.
  """
  nearest = _spec('mxfp4', 'mse')
  gradient = _spec('mxfp4', 'rceil', rounding='stochastic')
  return Recipe(
    '',
    GemmSpec(nearest, nearest, 32, 'fixed'),
    GemmSpec(gradient, nearest, 32, 'fixed'),
    GemmSpec(nearest, gradient, 32, 'fixed'),
  )


def _mxfp4_centered() -> Recipe:
  """As mxfp4_rotated, activations relative to their mean over the tokens."""
  return dataclasses.replace(_mxfp4_rotated(), center=True)


def _mxfp4_row_scaled() -> Recipe:
  """As mxfp4_rotated, with a float32 scale for each token and each output in
  the forward product, applied to its result."""
  scaled = quantizers.RowScaled(_spec('mxfp4', 'mse'))
  forward = GemmSpec(scaled, scaled, 32, 'fixed')
  return dataclasses.replace(_mxfp4_rotated(), fwd=forward)


def _mxfp4_unbiased() -> Recipe:
  """As mxfp4_centered, with all operands rounded to nearest and unbiased by a
  factor for each row, gradients after new rotations in every call."""
  spec = quantizers.Eden(_spec('mxfp4', 'even'))
  backward = GemmSpec(spec, spec, 32, 'per_call')
  return Recipe(
    '', GemmSpec(spec, spec, 32, 'fixed'), backward, backward, center=True
  )


def _mxfp4_lowbit() -> Recipe:
  """Ours: mxfp4_unbiased with eight directions of the activations multiplied
  in high precision."""
  return dataclasses.replace(_mxfp4_unbiased(), principal=8)


def _mxfp4_nv() -> Recipe:
  """NVIDIA 2025, the MXFP4 that NVFP4 is compared with: weights in tiles,
  stochastic gradients, a rotation in the weight gradient."""
  spec, tile = _spec('mxfp4', 'rceil'), _spec('mxfp4_32x32', 'rceil')
  return Recipe(
    '',
    GemmSpec(spec, tile),
    GemmSpec(_stochastic(spec), tile),
    GemmSpec(spec, _stochastic(spec), 32, 'fixed'),
  )


def _nvfp4() -> Recipe:
  """NVIDIA 2025, 'Pretraining LLMs with NVFP4': weights in 16 x 16 tiles,
  stochastic gradients, rotations of 16 in the weight gradient. The source
  keeps about 15 % of the blocks, the last ones, in BF16: see `Policy`."""
  spec, tile = _spec('nvfp4'), _spec('nvfp4_16x16')
  return Recipe(
    '',
    GemmSpec(spec, tile),
    GemmSpec(_stochastic(spec), tile),
    GemmSpec(spec, _stochastic(spec), 16, 'fixed'),
  )


def _nvfp4_rtn() -> Recipe:
  """NVFP4 at all sites, rounded to nearest."""
  return _everywhere(_spec('nvfp4'))


def _nvfp4_lowbit() -> Recipe:
  """Ours: mxfp4_unbiased in NVFP4, with rotations of 16 and scales that map the
  largest element of a block to 4 or 6."""
  spec = quantizers.Eden(_spec('nvfp4', 'four_over_six'))
  backward = GemmSpec(spec, spec, 16, 'per_call')
  return Recipe(
    '', GemmSpec(spec, spec, 16, 'fixed'), backward, backward, center=True
  )


def _fp4_all_the_way() -> Recipe:
  """Intel 2025, 'FP4 All the Way': blocks of 16 with E4M3 scales, stochastic
  rounding of gradients and of the activations of the weight gradient."""
  spec = _spec('nvfp4')
  return Recipe(
    '',
    GemmSpec(spec, spec),
    GemmSpec(_stochastic(spec), spec),
    GemmSpec(_stochastic(spec), _stochastic(spec)),
  )


def _ue5m3_hold50() -> Recipe:
  """UE5M3 report (2026): tensor scale of activations and weights renewed every
  50 steps with headroom, stochastic gradients of 8 random bits, no rotation.
  Gradients take the current tensor scale."""
  held = {'target': 448.0, 'tensor_scaling': TensorScaling(every=50)}
  row, tile = _spec(_UE5M3, **held), _spec(_UE5M3_TILE, **held)
  gradient = _spec(_UE5M3, target=448.0, rounding='stochastic', random_bits=8)
  return Recipe(
    '',
    GemmSpec(row, tile),
    GemmSpec(gradient, tile),
    GemmSpec(row, gradient),
  )


def _mxfp4_bwd() -> Recipe:
  """Tseng et al. 2025, 'Training LLMs with MXFP4': both backward products in
  MXFP4 with stochastic rounding of 3/4 x, unbiased, after random rotations."""
  spec = _spec('mxfp4', 'floor', rounding='stochastic', prescale=0.75)
  gemm = GemmSpec(spec, spec, 64, 'per_call')
  return Recipe('', dgrad=gemm, wgrad=gemm)


def _tetrajet() -> Recipe:
  """TetraJet (2025): the backward products quantize the quantized operands of
  the forward product again, stochastically."""
  spec = _spec('mxfp4', 'rceil')
  backward = GemmSpec(_stochastic(spec), _stochastic(spec))
  return Recipe(
    '', GemmSpec(spec, spec), backward, backward, residuals='requantized'
  )


def _ufp4() -> Recipe:
  """Uniform 4-bit grid with rotations in all products, stochastic gradients."""
  spec = _spec('mxint4', 'rceil')
  sides = (spec, spec), (_stochastic(spec), spec), (spec, _stochastic(spec))
  fwd, dgrad, wgrad = (GemmSpec(a, b, 32, 'fixed') for a, b in sides)
  return Recipe('', fwd, dgrad, wgrad)


def _fp8(element: BlockFormat, gradient: BlockFormat, **options) -> Recipe:
  e4m3, e5m2 = _spec(element, **options), _spec(gradient)
  return Recipe(
    '', GemmSpec(e4m3, e4m3), GemmSpec(e5m2, e4m3), GemmSpec(e4m3, e5m2)
  )


def _fp8_current() -> Recipe:
  """TransformerEngine: E4M3 and, for gradients, E5M2, one current scale per
  tensor."""
  return _fp8(formats.e4m3fn_tensor, formats.e5m2_tensor)


def _fp8_delayed() -> Recipe:
  """TransformerEngine: as fp8_current, scales of activations and weights from
  the largest magnitude of the last 1024 steps."""
  return _fp8(
    formats.e4m3fn_tensor,
    formats.e5m2_tensor,
    tensor_scaling=TensorScaling(window=1024),
  )


def _fp8_block() -> Recipe:
  """DeepSeek-V3: activations in blocks of 128, weights in 128 x 128 tiles."""
  row, tile = _spec('fp8_1x128'), _spec('fp8_128x128')
  forward = GemmSpec(row, tile)
  return Recipe('', forward, forward, GemmSpec(row, row))


def _jetfire_int8() -> Recipe:
  """Jetfire (2024): INT8 in 32 x 32 tiles whose codes serve both directions."""
  tile = _spec(_INT8_TILE)
  return Recipe(
    '',
    GemmSpec(tile, tile),
    GemmSpec(tile, None),
    GemmSpec(None, tile),
    residuals='forward',
  )


def _switchback() -> Recipe:
  """SwitchBack (2023): INT8 rows against an INT8 tensor; the weight gradient
  stays in high precision."""
  row, tensor = _spec('int8_channel'), _spec('int8_tensor')
  return Recipe('', GemmSpec(row, tensor), GemmSpec(row, tensor))


def _quartet() -> Recipe:
  """Quartet (2025): rotated operands with scales fitted to a Gaussian forward,
  stochastic rounding of 3/4 x with new signs backward."""
  forward = quantizers.Quartet(32)
  spec = _spec('mxfp4', 'floor', rounding='stochastic', prescale=0.75)
  backward = GemmSpec(spec, spec, 32, 'per_call')
  return Recipe('', GemmSpec(forward, forward, 32), backward, backward)


def _fp4_dge_occ() -> Recipe:
  """Wang et al. 2025: FP4 forward, with outliers of activations kept apart and
  a differentiable estimator for weights; gradients in high precision. Scales
  of blocks of 128 stand in for those of whole rows."""
  row = formats.grouped(formats.e2m1, 128)
  weight = micro_scaling.MicroScaling(
    block=128, scale=formats.float32, tensor_scale='off', step_grad='dge'
  )
  activation = quantizers.OutlierCompensated(QuantSpec(row))
  return Recipe('', GemmSpec(activation, weight))


def _forward(lhs, rhs, hadamard: int = 0, gradient=None) -> Recipe:
  """Quantization-aware training: the derivative of the quantized product."""
  return Recipe(
    '',
    GemmSpec(lhs, rhs, hadamard),
    GemmSpec(gradient, None),
    GemmSpec(None, gradient),
    residuals='forward',
  )


def _binaryconnect() -> Recipe:
  """BinaryConnect (2015): weights are their signs."""
  return _forward(None, quantizers.Sign())


def _xnor() -> Recipe:
  """XNOR-Net (2016): signs of both operands, times mean magnitudes."""
  return _forward(quantizers.Sign('mean'), quantizers.Sign('mean'))


def _dorefa() -> Recipe:
  """DoReFa-Net (2016): 4-bit weights and activations in [0, 1], 6-bit
  gradients with noise."""
  return _forward(
    quantizers.DoReFaActivation(4),
    quantizers.DoReFaWeight(4),
    gradient=quantizers.DoReFaGradient(6),
  )


def _bitnet158() -> Recipe:
  """BitNet b1.58 (2024): ternary weights, INT8 activations per token. The
  source puts an RMSNorm before each layer."""
  return _forward(_spec('int8_channel'), _spec('ternary_tensor'))


def _quest() -> Recipe:
  """QuEST (2025): 4 bits, rotated by 128, grids fitted to a Gaussian, trust."""
  return _forward(quantizers.Quest(4), quantizers.Quest(4), hadamard=128)


def _fixed_sr() -> Recipe:
  """Gupta et al. 2015: 16-bit fixed point with stochastic rounding; the source
  rounds the updates of the weights too, as `optimizers.direct` does."""
  return _everywhere(quantizers.FixedPoint(4, 12))


def _bfp8() -> Recipe:
  """Flexpoint and its kin: 8-bit integers with an exponent per 32."""
  return _everywhere(_spec(formats.bfp(8, 32)))


_UE5M3 = BlockFormat('e2m1_b16_ue5m3', formats.e2m1, (16,), formats.ue5m3, True)
_UE5M3_TILE = dataclasses.replace(
  _UE5M3, name='e2m1_b16x16_ue5m3', block=(16, 16)
)
_INT8_TILE = BlockFormat('int8_32x32', formats.int8, (32, 32), formats.float32)

_RECIPES = {
  'float32': _float32,
  'mxfp8': _mxfp8,
  'mxfp6': _mxfp6,
  'mxint8': _mxint8,
  'mxfp4_rtn': _mxfp4_rtn,
  'mxfp4_forward': _mxfp4_forward,
  'mxfp4_sr_rht': _mxfp4_sr_rht,
  'mxfp4_rotated': _mxfp4_rotated,
  'mxfp4_centered': _mxfp4_centered,
  'mxfp4_row_scaled': _mxfp4_row_scaled,
  'mxfp4_unbiased': _mxfp4_unbiased,
  'mxfp4_lowbit': _mxfp4_lowbit,
  'mxfp4_nv': _mxfp4_nv,
  'mxfp4_bwd': _mxfp4_bwd,
  'nvfp4': _nvfp4,
  'nvfp4_rtn': _nvfp4_rtn,
  'nvfp4_lowbit': _nvfp4_lowbit,
  'fp4_all_the_way': _fp4_all_the_way,
  'ue5m3_hold50': _ue5m3_hold50,
  'tetrajet': _tetrajet,
  'alto_mxfp4': _mxfp4_nv,
  'ufp4': _ufp4,
  'fp8_current': _fp8_current,
  'fp8_delayed': _fp8_delayed,
  'fp8_block': _fp8_block,
  'jetfire_int8': _jetfire_int8,
  'switchback': _switchback,
  'quartet': _quartet,
  'fp4_dge_occ': _fp4_dge_occ,
  'binaryconnect': _binaryconnect,
  'xnor': _xnor,
  'dorefa': _dorefa,
  'bitnet158': _bitnet158,
  'quest': _quest,
  'fixed_sr': _fixed_sr,
  'bfp8': _bfp8,
}

# Branch of the field -> recipes, and methods as 'module.name' of this package.
TAXONOMY = {
  'fixed point': ('fixed_sr', 'optimizers.direct'),
  'integer, general': ('jetfire_int8', 'switchback', 'dorefa', 'mxint8'),
  'integer, optimizer state': ('optimizers.adamw', 'optimizers.adamw_4bit'),
  'integer, communication': ('optimizers.qsgd', 'optimizers.ef_sign'),
  'binary': ('binaryconnect', 'xnor'),
  'floating point': (
    'fp8_delayed',
    'fp8_current',
    'fp8_block',
    'fp4_dge_occ',
    'optimizers.dynamic_loss_scale',
  ),
  'customized': ('mxfp8', 'mxfp4_nv', 'nvfp4', 'tetrajet', 'bfp8'),
  'quantization-aware': (
    'bitnet158',
    'quest',
    'qat.Lsq',
    'qat.Pact',
  ),
}
