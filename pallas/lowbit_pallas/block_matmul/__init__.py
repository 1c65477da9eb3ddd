"""Products of two operands that are quantized in blocks along the reduction.

Both operands are codes, packed along the axis of size K that is summed, with a
scale for each block of that axis. `layout` names the operands as BLAS does:

    layout  lhs     rhs
    'nt'    (M, K)  (N, K)
    'nn'    (M, K)  (K, N)
    'tn'    (K, M)  (K, N)
    'tt'    (K, M)  (N, K)

and scales have the shape of their operand with K / block in the place of K. The
result is float32 of shape (M, N). `mode` fixes the arithmetic:

    'exact'    Values element * scale, computed in float32 and rounded to
               bfloat16, then one product with float32 sums. The rounding does
               nothing where the value has at most 8 significant bits: for every
               MX format with scales 2^k, -124 <= k <= 119, and for NVFP4.
    'fp8_128'  FP8 elements with float32 scales, 1 x 128 for lhs and 128 x 128
               (or 1 x 128) for rhs. Blocks of 128 are multiplied without scales
               and summed in float32 in order: acc = acc + (sa * sb) * partial.
    'integer'  Signed integers with at most one scale per row of lhs and column
               of rhs: int32 sums of the codes, then float32 scales.

NaN scales (E8M0 code 255) and NaN or Inf elements follow IEEE rules: they reach
the whole row or column of the result and nothing else.
"""
