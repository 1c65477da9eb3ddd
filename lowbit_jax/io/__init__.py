"""Files: trees of arrays and QArrays, saved and loaded with their formats."""

from lowbit_jax.io._native import load as load, save as save
