"""Newton-Schulz as the rules use it: where the singular values end, on ill-conditioned matrices of all forms."""

import math

import pytest
import torch

from hope_pt.optim.rules import NewtonSchulz

RANGE = (0.7, 1.2)
"""Where singular values must end: 0.738 to 1.172 as computed from the polynomial, and as measured in bf16 too."""
SMALLEST = 1.6e-3
"""Share of the Frobenius norm from which on five steps reach the range."""
SHAPES = [(32, 32), (96, 24), (24, 96), (1, 40), (40, 1)]


def ill_conditioned(rows, columns, *, smallest, dtype=torch.float64):
    """A matrix with singular values from 1 to `smallest` of its Frobenius norm, spaced evenly in the logarithm."""
    generator = torch.Generator().manual_seed(rows)
    rank = min(rows, columns)
    left = torch.linalg.qr(torch.randn(rows, rank, generator=generator, dtype=torch.float64)).Q
    right = torch.linalg.qr(torch.randn(columns, rank, generator=generator, dtype=torch.float64)).Q
    least = smallest
    for _ in range(30):
        values = torch.logspace(0, math.log10(least) if rank > 1 else 0, rank, dtype=torch.float64)
        least = smallest * values.norm().item()
    return ((left * values) @ right.T).to(dtype)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("steps", [5, 6, 8])
def test_singular_values_end_in_the_range(shape, dtype, steps):
    x = ill_conditioned(*shape, smallest=SMALLEST, dtype=dtype)
    values = torch.linalg.svdvals(NewtonSchulz(steps)(1e-4 * x).double())
    assert RANGE[0] <= values.min() and values.max() <= RANGE[1]


@pytest.mark.parametrize("shape", SHAPES)
def test_bf16_keeps_the_range(shape):
    """As it runs on a GPU."""
    x = ill_conditioned(*shape, smallest=SMALLEST)
    values = torch.linalg.svdvals(NewtonSchulz(dtype=torch.bfloat16)(x))
    assert RANGE[0] <= values.min() and values.max() <= RANGE[1]


def test_smaller_singular_values_need_more_steps():
    """Each step multiplies a small one by 3.48, so a sixth step reaches down to 4.6e-4."""
    x = ill_conditioned(24, 24, smallest=4.7e-4)
    assert torch.linalg.svdvals(NewtonSchulz(5)(x)).min() < 0.4
    assert torch.linalg.svdvals(NewtonSchulz(6)(x)).min() > RANGE[0]


def test_muons_own_coefficients_leave_a_wider_range():
    """The reason for ours, at the same cost."""
    x = ill_conditioned(400, 400, smallest=2e-3)
    values = torch.linalg.svdvals(NewtonSchulz(coefficients=(3.4445, -4.7750, 2.0315))(x))
    assert 0.68 < values.min() < RANGE[0] and RANGE[1] < values.max() < 1.21


def test_a_gradient_of_any_size_gives_the_same():
    x = ill_conditioned(6, 4, smallest=0.01)
    torch.testing.assert_close(NewtonSchulz()(1e-9 * x), NewtonSchulz()(x), rtol=1e-9, atol=1e-9)
