"""Transformer-XL in JAX and Flax, trained data-parallel over many hosts."""
