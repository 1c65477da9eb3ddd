"""Quantize and pack in one pass over the data, optionally after a rotation.

Contract. `x` is (rows, cols) in float32, bfloat16 or float16, with blocks of
`spec.block` along the columns. Columns are padded with zeros to whole blocks
and whole bytes. Per block

  amax -> scale           in closed form, `arith.block.stored_scale`
  y = x * (1 / scale)     `arith.block.inverse_factors`
  code = round(y)         `arith.codec.encode`, saturating

and codes are packed little end first, `arith.packing`. Results are the packed
codes, uint8 (rows, ceil(cols / block) * block * bits / 8), and the scales
(rows, ceil(cols / block)): uint8 codes, or float32. Both have the bits of
`lowbit_jax.quantize`. A NaN or Inf poisons its block: the scale is NaN and the
codes are those of zero.

With a rotation, blocks of `rotation` columns of x * signs are multiplied by
the orthonormal Hadamard matrix in float32 first. Sums may be taken in another
order than `arith.hadamard` does, so a code may be a neighbour where a number
lies next to a tie, and a scale where a maximum lies next to a power of two.

`reference`, `tpu` and `mosaic_gpu` take the same arguments.
"""
