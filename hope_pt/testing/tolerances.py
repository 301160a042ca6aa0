"""Named tolerances of the tests, each with its reason. They are relative to the largest absolute value of the reference."""

LAYOUT = 1e-6
"""Same mathematics in fp32, another order of summation: data-parallel ranks, micro-batches, megatron's linear layers."""
EXACT = 0.0
"""Same operations on the same numbers: bit for bit."""
