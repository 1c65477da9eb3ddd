"""Kernels for lowbit_jax: arrays and static values in, arrays out.

A leaf package: it depends on JAX alone and never imports lowbit_jax.
"""
