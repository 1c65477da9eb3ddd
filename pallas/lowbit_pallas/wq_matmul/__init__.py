"""Products with block-quantized weights: y = x @ dequantize(w).

x is (M, K) in bfloat16, float16 or float32; w is (K, N) in blocks along K, of
any element of 1 to 8 bits, without its tensor scale. Sums are float32.

Two schedules, each a contract of its own; c is the value of a code minus its
zero point, s the scale of its block:

  pre   w = float32(c * s), y = sum_k x w.
  post  y = sum over blocks of s * (sum_k x c).

For bfloat16 x the weight that meets x, w or c, is rounded to bfloat16 once
more; for wider x it is not. Rounding changes nothing where 8 significant bits
suffice: for c of at most 8 bits in 'post', and in 'pre' where the scale is E8M0
or so narrow that the product has no more (E2M1 with E4M3 scales). Products are
exact in float32 then, whatever the dtype of x: wider x is cut into bfloat16
parts. One scale for a whole column always multiplies the sum at the end.

  prepack     the layout of the weight that kernels read, and back
  reference   the contract in jnp, and the arithmetic of a tile
  tpu         compiles for TPU v5e, v6e and 7x
  mosaic_gpu  compiles for Hopper, whose WGMMA it uses
  *_config    sizes of these two, without importing their back ends
"""
