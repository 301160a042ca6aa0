"""Elementwise parts of the memory mixer, each in one pass over memory: convolution with SiLU, and norm with gate (SPEC 2)."""
