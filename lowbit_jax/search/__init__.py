"""Formulas for functions of one variable: programs, their constants, proofs.

`program` has straight-line programs as values, `fit` the constants of many at
once, `polish` their last digits, `certify` the error of a compiled function
over every float32 input, `timing` which of two compiled functions is faster;
`adopted` is the record of what `special` took over from the search.
"""
