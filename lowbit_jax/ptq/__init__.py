"""Post-training quantization: low bits for a model that is trained.

`calibrate` records what the weights of any function meet; a step says what is
done with each layer, alone or in a `chain`; `method` makes of both what
`nn.quantize_params` and `nn.nnx.quantize` take. What comes out are stored
weights like others, which `lowbit_jax.dot` and its kernels multiply.

  observed = ptq.calibrate(forward, params, batches)
  step = ptq.chain(ptq.hadamard(32), ptq.rtn('mse'), ptq.gptq())
  method = ptq.method(step, observed)
  params = nn.quantize_params(params, None, formats.mxfp4, method=method)

A `Step` is a function from `Layer` to `Layer`. Before weights are quantized,
ranges can move between float parameters, with the function of the model as it
was; after it biases can make up for what was lost.

  params, observed = ptq.smooth(params, observed, followers)

- `Layer`: A linear layer: activations (tokens, in) times a weight (in, out).
- `Statistics`: Of activations (tokens, in) of one layer, or of the members of
  one weight, whose axis is in front of the others; float32.
- `adaround`: Rounds weights up or down, as is learned for the outputs of a
  layer.
- `allocate`: The formats with the least sum of losses within an average of
  bits.
- `awq`: Scales inputs up whose activations are large, so that their weights
  lose less.
- `calibrate`: Records what the weights of a function meet, batch by batch.
- `chain`: One step after the other.
- `clip`: Scales that clip the largest magnitudes of each block.
- `correct_biases`: Adds to biases what quantized weights take from the mean of
  outputs.
- `duquant`: Rotates runs of inputs by a matrix that spreads the outliers of a
  layer.
- `equalize`: Gives outputs of a kernel and the rows that take them the same
  range.
- `fold`: Moves scales from the outputs of layers into the inputs of those
  behind.
- `gptq`: Rounds weights so that the outputs of a layer change least.
- `hadamard`: Rotates runs of inputs, so that outliers spread over a block.
- `masked`: A step that leaves other layers as they are.
- `method`: What `nn.quantize_params` and `nn.nnx.quantize` take as `method`.
- `permute`: Sorts inputs by their size, so that large ones share blocks.
- `refine`: Tries scales of blocks anew, each with the numbers that suit it
  best.
- `relative_error`: Mean square error of the outputs of a layer, as a share of
  their square.
- `rtn`: Rounds weights to the nearest number of the format.
- `scale_inputs`: Divides inputs so that activations and weights lose alike.
- `search_scales`: Scales for which the weights of a block change least.
- `sequential`: Quantizes blocks one by one, each on what the quantized ones
  before give.
- `smooth`: Moves ranges of activations into the weights that they meet.
"""

from lowbit_jax.ptq._adaround import adaround as adaround
from lowbit_jax.ptq._allocation import allocate as allocate
from lowbit_jax.ptq._awq import awq as awq
from lowbit_jax.ptq._bias import correct_biases as correct_biases
from lowbit_jax.ptq._equalization import equalize as equalize
from lowbit_jax.ptq._folding import fold as fold
from lowbit_jax.ptq._gptq import gptq as gptq
from lowbit_jax.ptq._layer import (
  Layer as Layer,
  Step as Step,
  chain as chain,
  masked as masked,
  method as method,
  relative_error as relative_error,
)
from lowbit_jax.ptq._permutation import permute as permute
from lowbit_jax.ptq._refinement import refine as refine
from lowbit_jax.ptq._rotation import (
  duquant as duquant,
  hadamard as hadamard,
)
from lowbit_jax.ptq._scales import (
  clip as clip,
  rtn as rtn,
  search_scales as search_scales,
)
from lowbit_jax.ptq._sequential import sequential as sequential
from lowbit_jax.ptq._smoothing import (
  scale_inputs as scale_inputs,
  smooth as smooth,
)
from lowbit_jax.ptq._statistics import (
  Statistics as Statistics,
  calibrate as calibrate,
)
