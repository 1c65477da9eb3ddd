"""softmax, log_softmax and logsumexp of the rows of a matrix.

All implementations share one contract, `reference.run`:

- `x`: float32, bfloat16 or float16, `(rows, columns)`; the arithmetic is
  float32 in every case and the result is rounded once, to `out_dtype`.
- `where`: bool, `(rows, columns)`, or None. Entries where it is false add
  nothing; they are 0 (softmax) or -inf (log_softmax) in the result.
- `kind`: 'softmax', 'log_softmax' or 'logsumexp'; the last gives `(rows,)`.
- `scale`: a number that multiplies x in float32 first.
- `algorithm`: 'pair', 'online' or 'auto', see `forms`. With 'auto' the form is
  chosen row by row, so a row's bits do not depend on its neighbours.

A row with a live NaN or +inf is NaN, and so is one whose live entries are all
-inf (its logsumexp is -inf); a row without live entries is 0, or -inf.
"""
