"""Wrong arguments are refused by name, wherever they go.

Every function of the table is called with a valid argument replaced by each of
a battery of wrong ones. It may take the argument, or raise one of the errors
for bad input that names it: by its name, or by its value, shape or dtype.
Calls are traced, so nothing compiles; functions that run on the host are given
little to do.
"""

import contextlib
import re
import tempfile
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen
import flax.nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from absl.testing import absltest, parameterized

import lowbit_jax as lowbit
from lowbit_jax import (
  doctor,
  formats,
  io,
  lora,
  nn,
  numerics,
  ops,
  qarray,
  special,
  testing,
  training,
  transforms,
)
from lowbit_jax.nn import linen, nnx
from lowbit_jax.recipe import (
  GemmSpec,
  Policy,
  QuantSpec,
  Recipe,
  TensorScaling,
)
from lowbit_jax.special import von_mises_fisher
from lowbit_jax.training import (
  laws,
  micro_scaling,
  monitors,
  optimizers,
  qat,
  quantizers,
  recipes,
  s2ft,
  scaling,
  surrogates,
)

# The last one is what Python and JAX say of an int that no array holds.
ERRORS = (
  ValueError,
  TypeError,
  NotImplementedError,
  IndexError,
  OverflowError,
)
FILES = (FileExistsError, FileNotFoundError, IsADirectoryError, PermissionError)

TRACED = object()  # stands for a traced float32 scalar

BATTERY = {
  'string': 'nonsense',
  'list': [[1.0, 2.0], [3.0, 4.0]],
  'traced': TRACED,
  # The rest is left to the slow test.
  'none': None,
  'object': object(),
  'float': 3.5,
  'empty': [],
  'nan': float('nan'),
  'huge': 10**30,
  'negative': -1,
  'complex': 1j,
  'bool': True,
  'rank': np.ones((2, 1, 3, 1, 2), np.float32),
  'complex array': np.ones(3, np.complex64),
  'ints': np.arange(5, dtype=np.int32),
}
FEW = ('string', 'traced')


class Call(NamedTuple):
  """A valid call.

  Attributes:
    function: what is called.
    arguments: by the names of the parameters, each of which is replaced.
    host: whether it runs outside of JAX and is called as it is.
  """

  function: Callable
  arguments: dict[str, Any]
  host: bool = False


def _arrays():
  rng = np.random.default_rng(0)
  x, w = (rng.normal(size=s).astype(np.float32) for s in ((2, 64), (64, 32)))
  return x, w


X, W = _arrays()
KEY = np.array([0, 1], np.uint32)
CODES = np.zeros((2, 64), np.uint8)
MXFP4, NVFP4, UINT4 = formats.mxfp4, formats.nvfp4, formats.uint4_g32
SPEC = QuantSpec(MXFP4)
RECIPE = recipes.get('mxfp8')
HEADS = X.reshape(1, 2, 4, 16)
Q = jax.eval_shape(lambda: ops.quantize(X, MXFP4))
QW = jax.eval_shape(lambda: ops.quantize(W, MXFP4, axis=-2))
Q, QW = (jax.tree.map(lambda a: np.zeros(a.shape, a.dtype), q) for q in (Q, QW))
DIMS = (((1,), (0,)), ((), ()))
PARAMS = {'dense': {'kernel': W, 'bias': W[0]}}
ADAPTER = lora.Adapter(W[:, None, :4], W[None, :32, :4])
DIRECTORY = tempfile.mkdtemp()
LAW = laws.FloatLaw()
STATE = scaling.DotScales(None, None)
AMAX = (None, None)
ORIGIN = ((0, 0), (2, 64))
SLICE = {'start': 0, 'kind': 'sink'}


def _nnx_quantize(**k):
  return nnx.quantize(flax.nnx.Linear(64, 8, rngs=flax.nnx.Rngs(0)), **k)


def _nnx_train(**k):
  model = flax.nnx.Linear(64, 8, rngs=flax.nnx.Rngs(0))
  return training.nnx.quantize(model, **k)


def _save(**k):
  with contextlib.chdir(DIRECTORY):
    io.save(**k)


def _method(make, name):
  """A method of a valid object, as a function of its arguments."""
  return lambda **k: getattr(make, name)(**k)


ROUND = {'rounding': 'nearest_even', 'key': None, 'random_bits': 23}
QUANTIZE = {
  'axis': -1,
  'scale_rule': None,
  **ROUND,
  'tensor_scale': None,
  'origin': None,
}
RUN = {'implementation': None}
KINDS = {
  'axis': -1,
  'where': None,
  'temperature': 1.0,
  'out_dtype': None,
  'algorithm': 'auto',
  **RUN,
}
ADAM = {
  'learning_rate': 1e-3,
  'b1': 0.9,
  'b2': 0.999,
  'eps': 1e-8,
  'weight_decay': 0.0,
}
CALLS = {
  # formats
  'formats.BlockFormat': Call(formats.BlockFormat, {
    'name': 'n', 'element': formats.e2m1, 'block': (32,),
    'scale': formats.e8m0, 'tensor_scale': False, 'zero_point': False,
    'scale_rule': 'floor'}, True),
  'formats.FloatFormat': Call(formats.FloatFormat, {
    'name': 'n', 'exponent_bits': 2, 'mantissa_bits': 1, 'bias': 1,
    'special': 'none', 'signed': True, 'zero': True}, True),
  'formats.IntFormat': Call(formats.IntFormat, {
    'name': 'n', 'width': 4, 'signed': True, 'fraction_bits': 0}, True),
  'formats.CodebookFormat': Call(formats.CodebookFormat, {
    'name': 'n', 'table': (0.0, 1.0)}, True),
  'formats.bfp': Call(formats.bfp, {'precision': 4, 'block': 32}, True),
  'formats.from_dict': Call(formats.from_dict, {
    'description': formats.to_dict(MXFP4)}, True),
  'formats.get': Call(formats.get, {'name': 'mxfp4'}, True),
  'formats.grouped': Call(formats.grouped, {
    'element': formats.int4, 'block': 32, 'scale': formats.float32}, True),
  'formats.minifloat': Call(formats.minifloat, {
    'exponent_bits': 2, 'mantissa_bits': 1, 'special': 'none'}, True),
  'formats.names': Call(formats.names, {'kind': 'block'}, True),
  'formats.per_channel': Call(formats.per_channel, {
    'element': formats.int4, 'scale': formats.float32,
    'scale_rule': 'absmax'}, True),
  'formats.per_tensor': Call(formats.per_tensor, {
    'element': formats.int4, 'scale_rule': 'absmax'}, True),
  'formats.register': Call(formats.register, {'fmt': MXFP4}, True),
  'formats.to_dict': Call(formats.to_dict, {'fmt': MXFP4}, True),
  # numerics
  'numerics.all_float32': Call(numerics.all_float32, {
    'start': 0, 'stop': 4}, True),
  'numerics.decode': Call(numerics.decode, {
    'codes': CODES, 'element': formats.e2m1, 'dtype': jnp.float32}),
  'numerics.dither': Call(numerics.dither, {
    'key': KEY, 'shape': (2, 64), 'origin': None}),
  'numerics.encode': Call(numerics.encode, {
    'x': X, 'element': formats.e2m1, 'overflow': 'saturate', **ROUND,
    'origin': None}),
  'numerics.next_float': Call(numerics.next_float, {
    'x': X, 'toward': X}, True),
  'numerics.pack': Call(numerics.pack, {
    'codes': CODES, 'bits': 4, 'axis': -1}),
  'numerics.random_words': Call(numerics.random_words, {
    'key': KEY, 'shape': (2, 64), 'origin': ORIGIN}),
  'numerics.round_to': Call(numerics.round_to, {
    'x': X, 'element': formats.e2m1, 'overflow': 'saturate', **ROUND,
    'origin': None}),
  'numerics.scale_rules': Call(numerics.scale_rules, {'fmt': MXFP4}, True),
  'numerics.ulp_distance': Call(numerics.ulp_distance, {
    'a': X, 'b': X}, True),
  'numerics.unpack': Call(numerics.unpack, {
    'packed': CODES, 'bits': 4, 'axis': -1}),
  # ops
  'ops.quantize': Call(ops.quantize, {
    'x': X, 'fmt': MXFP4, **QUANTIZE, 'rotation': None, **RUN}),
  'ops.quantize_with': Call(ops.quantize_with, {
    'x': X, 'scale': np.ones((2, 2), np.float32), 'fmt': MXFP4, 'axis': -1,
    'tensor_scale': None, 'zero_point': None, **ROUND, 'origin': None}),
  'ops.dequantize': Call(ops.dequantize, {
    'q': Q, 'dtype': None, 'dither': None}),
  'ops.fake_quant': Call(ops.fake_quant, {
    'x': X, 'fmt': MXFP4, **QUANTIZE, 'backward': 'identity'}),
  'ops.fake_quant_with': Call(ops.fake_quant_with, {
    'x': X, 'scale': np.ones((2, 2), np.float32), 'fmt': MXFP4, 'axis': -1,
    'tensor_scale': None, 'zero_point': None, **ROUND, 'origin': None,
    'backward': 'identity'}),
  'ops.decode_attention': Call(ops.decode_attention, {
    'query': HEADS, 'keys': HEADS, 'values': HEADS, 'lengths': 2,
    'layer': None, 'scale': None, 'window': None, **RUN}),
  'ops.dot': Call(ops.dot, {
    'lhs': X, 'rhs': QW, 'preferred_element_type': None, **RUN}),
  'ops.dot_general': Call(ops.dot_general, {
    'lhs': X, 'rhs': QW, 'dimension_numbers': DIMS, 'precision': None,
    'preferred_element_type': None, **RUN}),
  'ops.einsum': Call(ops.einsum, {
    'subscripts': 'mk,kn->mn', 'lhs': X, 'rhs': QW,
    'preferred_element_type': None, **RUN}),
  'ops.implementations': Call(ops.implementations, {'op': 'dot'}, True),
  'ops.lmul': Call(ops.lmul, {
    'x': X, 'y': X, 'fmt': None, 'mantissa_bits': None}),
  'ops.lmul_dot': Call(ops.lmul_dot, {
    'x': X, 'y': W, 'fmt': None, 'mantissa_bits': None}),
  'ops.softmax': Call(ops.softmax, {'x': X, **KINDS, 'exp': 'degree5'}),
  'ops.log_softmax': Call(ops.log_softmax, {'x': X, **KINDS}),
  'ops.logsumexp': Call(ops.logsumexp, {'x': X, **KINDS}),
  'ops.prepack': Call(ops.prepack, {'q': QW, 'implementation': 'tpu'}),
  'ops.unpack': Call(ops.unpack, {'p': None}),
  'ops.qdot': Call(ops.qdot, {
    'x': X, 'w': W, 'recipe': RECIPE, 'key': None, 'tensor_amax': AMAX,
    'precision': None, **RUN}),
  'ops.select_implementation': Call(
    lambda op, **k: ops.select_implementation(op, X, QW, **k), {
    'op': 'dot', 'implementation': None, 'platform': None}),
  'ops.take': Call(ops.take, {
    'table': Q, 'indices': np.zeros(3, np.int32), 'dtype': None}),
  'ops.update_slice': Call(ops.update_slice, {
    'q': Q, 'x': X, 'start': (0, 0), 'scale_rule': None, **ROUND}),
  # lora
  'LowRank': Call(ops.LowRank, {
    'weight': QW, 'a': W[:, None, :4], 'b': W[None, :32, :4], 'scale': 1.0}),
  'lora.init': Call(lora.init, {
    'key': KEY, 'params': PARAMS, 'select': 'kernel', 'rank': 4, 'alpha': 8.0,
    'stacked': None}),
  'lora.attach': Call(lambda adapter: lora.attach(
    PARAMS, {'dense/kernel': adapter}), {'adapter': ADAPTER}),
  'lora.merge': Call(lambda scale_rule: lora.merge(
    {'w': QW}, {'w': ADAPTER}, scale_rule=scale_rule), {'scale_rule': None}),
  # arrays and trees
  'QArray.from_codes': Call(lowbit.QArray.from_codes, {
    'codes': CODES, 'scale': np.ones((2, 2), np.uint8), 'fmt': MXFP4,
    'axis': -1, 'tensor_scale': None, 'zero_point': None,
    'dtype': jnp.float32}),
  'QArray.astype': Call(_method(Q, 'astype'), {'dtype': jnp.float32}),
  'QArray.reshape': Call(lambda shape: Q.reshape(shape), {'shape': (2, 64)}),
  'QArray[]': Call(lambda index: Q[index], {'index': 0}),
  'validate': Call(qarray.validate, {'q': Q}),
  'partition': Call(lowbit.partition, {'tree': Q, 'scales': False}),
  'combine': Call(lambda a, b: lowbit.combine(a, b), {'a': X, 'b': None}),
  'shardings': Call(lowbit.shardings, {
    'tree': Q, 'sharding': jax.sharding.PartitionSpec()}, True),
  # recipe
  'TensorScaling': Call(TensorScaling, {'window': 1, 'every': 1}, True),
  'QuantSpec': Call(QuantSpec, {
    'fmt': NVFP4, 'scale_rule': None, 'rounding': 'nearest_even',
    'backward': 'identity', 'random_bits': 23, 'prescale': 1.0,
    'target': 256.0, 'tensor_scaling': None}, True),
  'GemmSpec': Call(GemmSpec, {
    'lhs': SPEC, 'rhs': None, 'hadamard': 32, 'signs': 'none'}, True),
  'Recipe': Call(Recipe, {
    'name': 'n', 'fwd': GemmSpec(), 'dgrad': GemmSpec(), 'wgrad': GemmSpec(),
    'residuals': 'high_precision', 'center': False, 'principal': 0,
    'switches': ()}, True),
  'Recipe.at': Call(RECIPE.at, {'fraction': 0.5}, True),
  'Policy': Call(Policy, {
    'recipe': RECIPE, 'rules': (), 'first': 0, 'last': 0, 'blocks': 4}, True),
  'Policy.at': Call(Policy(RECIPE).at, {'path': 'a', 'fraction': 0.5}, True),
  'Policy.check_rules': Call(Policy(RECIPE).check_rules, {
    'paths': ('a',)}, True),
  # transforms
  'transforms.Hadamard': Call(transforms.Hadamard, {
    'block': 32, 'axis': -1, 'signs': None}),
  'transforms.Permutation': Call(transforms.Permutation, {
    'order': [1, 0], 'axis': -1}),
  'transforms.BlockAffine': Call(transforms.BlockAffine, {
    'matrix': np.eye(4, dtype=np.float32), 'axis': -1}),
  'transforms.DiagonalSmoothing': Call(transforms.DiagonalSmoothing, {
    'scale': X[0] ** 2 + 1, 'axis': -1}),
  'transforms.Chain': Call(transforms.Chain, {
    'transforms': (transforms.Hadamard(4),)}),
  'transforms.random_hadamard': Call(transforms.random_hadamard, {
    'key': KEY, 'size': 64, 'block': 32, 'axis': -1}),
  'transforms.smooth_quant': Call(transforms.smooth_quant, {
    'activation_amax': X[0] ** 2, 'weight_amax': X[1] ** 2, 'strength': 0.5,
    'floor': 1e-5, 'axis': -1}),
  **{
    f'{type(t).__name__}.{name}': Call(
      _method(t, name), {'w': W, 'axis': -2} if 'dual' in name else {'x': X})
    for t in (
      transforms.Hadamard(32),
      transforms.Permutation(np.arange(64)),
      transforms.BlockAffine(np.eye(4, dtype=np.float32)),
      transforms.DiagonalSmoothing(np.ones(64, np.float32)),
      transforms.Chain((transforms.Hadamard(32),)),
    )
    for name in ('apply', 'inverse', 'apply_dual', 'inverse_dual')
  },
  # special
  **{
    f'special.{name}': Call(getattr(special, name), {'x': X})
    for name in ('cos', 'erf', 'exp', 'exp2', 'gelu', 'log2', 'sigmoid',
                 'sin', 'softplus', 'tanh')
  },
  'special.log_iv': Call(special.log_iv, {'v': 1.0, 'x': X[0]}),
  'special.log_kv': Call(special.log_kv, {'v': 1.0, 'x': X[0]}),
  'von_mises_fisher.log_prob': Call(von_mises_fisher.log_prob, {
    'x': X, 'mean': X[0], 'kappa': 1.0}),
  'von_mises_fisher.fit': Call(von_mises_fisher.fit, {'x': X}),
  'von_mises_fisher.sample': Call(von_mises_fisher.sample, {
    'key': KEY, 'mean': X[0], 'kappa': 1.0, 'shape': (2,)}),
  # nn
  'nn.dot_general': Call(nn.dot_general, {'lhs': None, 'rhs': SPEC}, True),
  'nn.dot_general()': Call(nn.dot_general(rhs=SPEC), {
    'lhs': X, 'rhs': W, 'dimension_numbers': DIMS, 'precision': None,
    'preferred_element_type': None}),
  'nn.einsum': Call(nn.einsum, {'lhs': None, 'rhs': SPEC}, True),
  'nn.einsum()': Call(nn.einsum(rhs=SPEC), {
    'subscripts': 'mk,kn->mn', 'lhs': X, 'rhs': W, 'precision': None,
    'preferred_element_type': None}),
  'nn.promote_dtype': Call(
    lambda dtype: nn.promote_dtype(X, dtype=dtype), {'dtype': None}),
  'nn.quantize_params': Call(nn.quantize_params, {
    'params': PARAMS, 'select': None, 'fmt': MXFP4, 'axis': None,
    'stacked': None, 'scale_rule': None, 'method': None}),
  'nn.trainable_mask': Call(nn.trainable_mask, {'params': PARAMS}),
  'nn.unbox': Call(nn.unbox, {'tree': PARAMS}),
  'nn.linen.Dense': Call(
    lambda lhs, rhs: jax.eval_shape(
      linen.Dense(8, lhs=lhs, rhs=rhs).init, jax.random.key(0), X), {
    'lhs': None, 'rhs': SPEC}, True),
  'nn.linen.DotGeneral': Call(
    lambda lhs, rhs: linen.DotGeneral(lhs, rhs).apply({}, X, W, DIMS), {
    'lhs': None, 'rhs': SPEC}),
  'nn.linen.Einsum': Call(
    lambda lhs, rhs: jax.eval_shape(
      linen.Einsum((64, 8), 'mk,kn->mn', lhs=lhs, rhs=rhs).init,
      jax.random.key(0), X), {'lhs': None, 'rhs': SPEC}, True),
  'nn.linen.Embed': Call(
    lambda lhs, rhs: jax.eval_shape(
      linen.Embed(8, 64, lhs=lhs, rhs=rhs).init, jax.random.key(0),
      np.zeros(3, np.int32)), {'lhs': None, 'rhs': SPEC}, True),
  'nn.nnx.DotGeneral': Call(
    lambda lhs, rhs: nnx.DotGeneral(lhs, rhs, rngs=flax.nnx.Rngs(0)), {
    'lhs': None, 'rhs': SPEC}),
  'nn.nnx.Embed': Call(
    lambda lhs, rhs: nnx.Embed(
      8, 64, lhs=lhs, rhs=rhs, rngs=flax.nnx.Rngs(0)), {
    'lhs': None, 'rhs': SPEC}),
  'nn.nnx.quantize': Call(_nnx_quantize, {
    'select': None, 'fmt': MXFP4, 'axis': None, 'scale_rule': None,
    'method': None}),
  'nn.nnx.quantize of': Call(
    lambda model: nnx.quantize(model, None, MXFP4), {'model': None}),
  # training
  'training.linen.dot_general_cls': Call(training.linen.dot_general_cls, {
    'recipe': RECIPE, 'fraction': 0.0, 'watch': False}, True),
  'training.linen.quantized': Call(
    lambda **k: training.linen.quantized(**k).__enter__(), {
    'recipe': RECIPE, 'fraction': 0.0}, True),
  'training.linen.QDotGeneral': Call(
    lambda **k: training.linen.QDotGeneral(**k).apply({}, X, W, DIMS), {
    'recipe': RECIPE, 'fraction': 0.0}),
  'training.linen.recipe_at': Call(training.linen.recipe_at, {
    'recipe': RECIPE, 'path': ('a',), 'fraction': 0.0}, True),
  'training.nnx.quantize': Call(_nnx_train, {
    'recipe': RECIPE, 'rngs': None, 'fraction': 0.0}),
  'training.nnx.quantize of': Call(
    lambda model: training.nnx.quantize(model, RECIPE), {'model': None}),
  'training.nnx.QDotGeneral': Call(training.nnx.QDotGeneral, {
    'recipe': RECIPE, 'rngs': None}),
  'training.nnx.advance': Call(training.nnx.advance, {'model': None}),
  'recipes.get': Call(recipes.get, {'name': 'mxfp8'}, True),
  'scaling.init': Call(scaling.init, {'scaling': TensorScaling()}),
  'scaling.init_dot': Call(scaling.init_dot, {'recipe': RECIPE}),
  'scaling.qdot': Call(scaling.qdot, {
    'x': X, 'w': W, 'recipe': RECIPE, 'state': STATE, 'key': None}),
  'scaling.record': Call(scaling.record, {'x': X, 'w': W, 'state': STATE}),
  'scaling.largest': Call(scaling.largest, {'x': X}),
  'scaling.merge': Call(scaling.merge, {'a': STATE, 'b': STATE}),
  'scaling.advance': Call(scaling.advance, {'states': STATE}),
  'monitors.lost': Call(monitors.lost, {
    'x': X, 'w': W, 'dy': X[:, :32], 'recipe': RECIPE, 'key': None,
    'tensor_amax': AMAX}),
  'monitors.tap': Call(monitors.tap, {
    'recipe': RECIPE, 'y': X[:, :32], 'x': X, 'w': W, 'key': None,
    'tensor_amax': AMAX, 'probe': monitors.Lost(X[0, :6], X[0, :6])}),
  'qat.Lsq': Call(qat.Lsq, {
    'bits': 4, 'signed': True, 'axis': None, 'parameter': 'log'}, True),
  'qat.Lsq()': Call(qat.Lsq(4), {'params': {'log_step': X[0, 0]}, 'x': X}),
  'qat.Lsq.init': Call(qat.Lsq(4, axis=-1).init, {'x': X}),
  'qat.Pact': Call(qat.Pact, {'bits': 4, 'decay': 1e-3}, True),
  'qat.Pact()': Call(qat.Pact(4), {
    'params': {'alpha': np.float32(1)}, 'x': X}),
  'qat.decay_mask': Call(qat.decay_mask, {'params': PARAMS}),
  **{
    f'quantizers.{cls.__name__}': Call(cls, arguments, True)
    for cls, arguments in (
      (quantizers.DoReFaWeight, {'bits': 4}),
      (quantizers.DoReFaActivation, {'bits': 4}),
      (quantizers.DoReFaGradient, {'bits': 4}),
      (quantizers.Sign, {'scale': 'one'}),
      (quantizers.Quartet, {'block': 32}),
      (quantizers.Quest, {'bits': 4, 'trust': None}),
      (quantizers.OutlierCompensated, {'inner': SPEC, 'quantile': 0.9}),
      (quantizers.RowScaled, {'inner': SPEC, 'candidates': 4}),
      (quantizers.Eden, {'inner': SPEC}),
      (quantizers.FixedPoint, {
        'integer_bits': 2, 'fraction_bits': 4, 'rounding': 'nearest_even'}),
    )
  },
  **{
    f'quantizers.{type(q).__name__}()': Call(q, {
      'x': X, 'axis': -1, 'key': KEY})
    for q in (
      quantizers.DoReFaWeight(4),
      quantizers.DoReFaGradient(4),
      quantizers.Sign('mean'),
      quantizers.Quartet(),
      quantizers.Quest(),
      quantizers.OutlierCompensated(SPEC),
      quantizers.RowScaled(SPEC, 2),
      quantizers.Eden(SPEC),
      quantizers.FixedPoint(2, 4),
      micro_scaling.MicroScaling(),
    )
  },
  'quantizers.apply': Call(quantizers.apply, {
    'quantizer': SPEC, 'x': X, 'axis': -1, 'key': None}),
  'micro_scaling.MicroScaling': Call(micro_scaling.MicroScaling, {
    'element': formats.e2m1, 'block': 16, 'scale': formats.e4m3fn,
    'scale_form': 'decode', 'scale_round': 'nearest_even',
    'zero_scale': 'to_one', 'payload': 'rounded', 'tensor_scale': 'current',
    'tensor_scale_grad': 'ignore', 'rounding': 'nearest_even',
    'step_grad': 'identity', 'stat_grad': 'ignore', 'scale_grad': 'identity',
    'alpha': 1.0}, True),
  'surrogates.Dge': Call(surrogates.Dge, {
    'power': 5.0, 'ceiling': 3.0}, True),
  'surrogates.Sigmoid': Call(surrogates.Sigmoid, {
    'temperature': 1.0, 'low': 0.3, 'high': 1.5}, True),
  'surrogates.Spline': Call(surrogates.Spline, {
    'points': 40, 'low': 0.3, 'high': 1.5}, True),
  'laws.FloatLaw': Call(laws.FloatLaw, {'n': 1.0, 'alpha': 0.2}, True),
  'laws.FloatLaw.loss': Call(LAW.loss, {
    'N': 1e6, 'D': 1e9, 'E': 2, 'M': 1, 'B': 32}, True),
  'laws.FloatLaw.critical_data': Call(LAW.critical_data, {
    'N': 1e6, 'E': 2, 'M': 1, 'B': 32}, True),
  'laws.FloatLaw.split': Call(LAW.split, {'bits': 4}, True),
  'laws.FloatLaw.optimal_mantissa': Call(LAW.optimal_mantissa, {
    'bits': 4}, True),
  's2ft.select': Call(s2ft.select, {
    'key': KEY, 'layers': 2, 'units': 8, 'ratio': 0.5, 'multiple': 1}, True),
  's2ft.arrange': Call(s2ft.arrange, {
    'units': 8, 'sink': (1,), 'source': (2,)}, True),
  's2ft.expand': Call(s2ft.expand, {'order': (1, 0), 'width': 2}, True),
  's2ft.co_permute': Call(s2ft.co_permute, {
    'sources': X[:, :2], 'sinks': W[:2], 'order': (1, 0), 'width': 1}),
  's2ft.co_permute_heads': Call(s2ft.co_permute_heads, {
    'q': W[:, :4], 'k': W[:, :4], 'v': W[:, :4], 'o': W[:4], 'order': (1, 0),
    'head_dim': 2}),
  's2ft.split': Call(s2ft.split, {
    'w': W, 'fmt': MXFP4, 'start': 0, 'stop': 32, 'kind': 'sink',
    'scale_rule': None}),
  's2ft.s2ft_dot': Call(s2ft.s2ft_dot, {
    'x': X, 'slice_': W[:32], 'frozen': QW, **SLICE, 'rounded_x': None}),
  's2ft.merge': Call(s2ft.merge, {
    'slice_': W[:32], 'frozen': QW, **SLICE, 'scale_rule': None}),
  's2ft.make_adapter': Call(s2ft.make_adapter, {
    'slice_': W[:32], 'frozen': QW, 'base': W, 'order': np.arange(64),
    **SLICE, 'width': 1}),
  's2ft.fuse': Call(s2ft.fuse, {
    'w': W,
    'adapter': s2ft.Adapter(np.arange(64), W[:32], 0, 'sink')}),
  # optimizers
  'optimizers.dynamic_map': Call(optimizers.dynamic_map, {
    'bits': 4, 'signed': True}, True),
  'optimizers.linear_map': Call(optimizers.linear_map, {'bits': 4}, True),
  'optimizers.adamw': Call(optimizers.adamw, ADAM, True),
  'optimizers.quantized_state': Call(optimizers.quantized_state, {
    'inner': optax.adam(1e-3), 'first': 'dyn8', 'second': 'dyn8',
    'block': None, 'min_size': 4096, 'exclude': None}, True),
  'optimizers.grid_neighbours': Call(optimizers.grid_neighbours, {
    'w': W, 'fmt': MXFP4, 'axis': -1, 'scale_rule': None}),
  'optimizers.ema_quantize': Call(optimizers.ema_quantize, {
    'w': W, 'ema': W, 'fmt': MXFP4, 'axis': -1, 'scale_rule': None}),
  # doctor, io, testing
  'doctor.report': Call(doctor.report, {
    'params': X, 'fmt': MXFP4, 'select': None, 'scale_rule': None,
    'axis': None, 'reference': None}, True),
  'doctor.audit_gradients': Call(
    lambda fn, argnums: doctor.audit_gradients(fn, X, argnums=argnums), {
    'fn': lambda x: jnp.sum(x * x), 'argnums': 0}, True),
  'doctor.energy': Call(
    lambda fn: doctor.energy(fn, X), {'fn': jnp.sum}, True),
  'io.save': Call(_save, {
    'path': f'{DIRECTORY}/a.lowbit', 'tree': PARAMS, 'overwrite': True}, True),
  'io.load': Call(io.load, {'path': f'{DIRECTORY}/none'}, True),
  'testing.assert_bits_equal': Call(testing.assert_bits_equal, {
    'actual': X, 'expected': X}, True),
  'testing.assert_within_ulp': Call(testing.assert_within_ulp, {
    'actual': X, 'expected': X, 'ulp': 1}, True),
  'testing.dot_tolerance': Call(testing.dot_tolerance, {
    'lhs': X, 'rhs': W, 'operand_unit': 0.0}, True),
  'testing.quantizer_cases': Call(testing.quantizer_cases, {
    'fmt': MXFP4}, True),
  'testing.quantizer_mutants': Call(testing.quantizer_mutants, {
    'fmt': MXFP4}, True),
  'testing.stochastic_mutants': Call(testing.stochastic_mutants, {
    'fmt': MXFP4}, True),
  'testing.dot_mutants': Call(testing.dot_mutants, {'fmt': MXFP4}, True),
}  # fmt: skip


def outcome(call: Call, name: str, value) -> str | None:
  """What is wrong with how a call takes a value, None if nothing is."""

  def run(traced):
    given = traced if value is TRACED else value
    call.function(**{**call.arguments, name: given})

  try:
    if call.host and value is not TRACED:
      run(None)
    else:
      jax.eval_shape(run, jax.ShapeDtypeStruct((), jnp.float32))
  except (*FILES, UserWarning):  # a warning of ours, which pytest raises
    return None
  except AssertionError as error:
    # The asserts of `testing` raise it; nothing else may.
    is_test = call.function.__module__.startswith('lowbit_jax.testing')
    return None if is_test else f'AssertionError: {error}'
  except ERRORS as error:
    if _names(str(error), name, value):
      return None
    return f'{type(error).__name__} without its name: {error}'
  except Exception as error:
    return f'{type(error).__name__}: {error}'
  return None


def _names(message: str, name: str, value) -> bool:
  """Whether a message says which argument was wrong."""
  if re.search(rf'\b{re.escape(name)}', message, re.IGNORECASE):
    return True
  array = np.asarray(value, object) if value is not TRACED else np.zeros(())
  words = [f'shape {array.shape}', f'shape={array.shape}', f'rank {array.ndim}']
  if isinstance(value, np.ndarray):
    words += [str(value.dtype), str(value.shape), repr(value)]
    words += ['truth value of an array']
    words += [f'length {n}' for n in value.shape]
  elif value is TRACED:
    words += ['trace', 'Trace', 'float32']
  else:
    words += [repr(value), type(value).__name__]
  if isinstance(value, list) and value:
    words += [repr(value[0]), repr(value[0][0])]
  message = message.replace(' ', '')
  return any(word.replace(' ', '') in message for word in words)


def faults(batteries) -> list[str]:
  found = []
  for label, call in CALLS.items():
    for name in call.arguments:
      for battery in batteries:
        fault = outcome(call, name, BATTERY[battery])
        if fault is not None:
          found.append(f'{label}({name}={battery}): {fault}')
  return found


class WrongCallsTest(parameterized.TestCase):
  def test_the_calls_themselves_are_valid(self):
    for label, call in CALLS.items():
      name, value = next(iter(call.arguments.items()))
      with self.subTest(label):
        self.assertIsNone(outcome(call, name, value))

  def test_few(self):
    self.assertEqual(faults(FEW), [])

  @parameterized.named_parameters(*((name, name) for name in BATTERY))
  @pytest.mark.slow
  def test_each(self, battery):
    self.assertEqual(faults((battery,)), [])


if __name__ == '__main__':
  absltest.main()
