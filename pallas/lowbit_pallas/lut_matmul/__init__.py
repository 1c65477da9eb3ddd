"""Table-lookup matrix product with integer weights, one bit plane at a time.

A reference to study fidelity and operation counts. There is no kernel: on a
matrix unit a lookup of one of 8 entries for 4 activations is a product with a
signed one-hot matrix, 2 K multiplications for each bit plane where decoding the
weight needs K in all, and TPU and GPU vector units have no faster gather of 8
entries than the selects that decode a code. `benchmarks/matmul.py` has figures.
"""
