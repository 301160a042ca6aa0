"""Newton-Schulz: the iteration against the polynomial of the singular values in float64, and what the operator promises."""

import pytest
import torch

from hope_kernels.newton_schulz import QUINTIC, newton_schulz
from hope_kernels.newton_schulz import triton_ as kernels

EXACT = 1e-12
"""Iteration against singular value decomposition in float64, 1e-14 as measured."""
NO_WORSE = 1.1
"""Error of the kernels over that of plain torch: the same roundings in another order of summation."""
ROUNDINGS = 5e-7
"""Floor of that comparison: a few roundings of fp32, which chance decides where a matrix has one singular value."""
SHAPES = [(3, 16, 16), (2, 24, 40), (2, 40, 24), (1, 1, 7), (2, 5, 1), (1, 130, 70), (1, 70, 150)]


def matrices(*shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """Random matrices with singular values spread over two decades, one of the batch zero."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(*shape, generator=generator, dtype=torch.float64) * torch.logspace(0, -2, shape[-1], dtype=torch.float64)
    if shape[0] > 1:
        x[0] = 0.0
    return x.to(dtype)


def error(got: torch.Tensor, wanted: torch.Tensor) -> float:
    return ((got.double().cpu() - wanted).norm() / wanted.norm()).item()


@pytest.mark.parametrize("shape", SHAPES)
def test_iteration_is_the_polynomial_of_singular_values(shape):
    x = matrices(*shape)
    for settings in ({}, {"steps": 2, "coefficients": (2.0, -1.5, 0.5)}, {"steps": 0}, {"eps": 1.0}):
        wanted = newton_schulz(x, backend="reference", **settings)
        assert error(newton_schulz(x, backend="chunked", **settings), wanted) < EXACT


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("shape", SHAPES)
def test_kernels_are_no_worse_than_torch(shape, dtype, device):
    x = matrices(*shape, dtype=dtype)
    wanted = newton_schulz(x.double(), backend="reference")
    got = newton_schulz(x.to(device), backend="triton")
    assert got.shape == x.shape and got.dtype == dtype and got.is_contiguous()
    assert error(got, wanted) <= NO_WORSE * error(newton_schulz(x.to(device), backend="chunked"), wanted) + ROUNDINGS
    if shape[0] > 1:
        assert not got[0].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("rows", "depth"), [(33, 65), (64, 64), (129, 16)])
def test_symmetric_product(rows, depth, dtype, device):
    x, add = matrices(2, rows, depth, dtype=dtype).to(device), matrices(2, rows, rows, dtype=dtype).to(device)
    add = add + add.mT
    for view in (x, x.mT.contiguous().mT, x.repeat_interleave(2, 2)[:, :, ::2]):
        got = kernels.symmetric_product(view, scale=-0.5, add_BMM=add, add_scale=2.0)
        wanted = -0.5 * x.double() @ x.double().mT + 2.0 * add.double()
        assert error(got, wanted.cpu()) < (5e-3 if dtype == torch.bfloat16 else 1e-6)
        # Blocks on the diagonal are not mirrored, and fp32 products add the low parts of one operand before those of the other.
        torch.testing.assert_close(got, got.mT, rtol=0.0, atol=0.0 if dtype == torch.bfloat16 else 1e-6 * got.abs().max().item())


def test_more_rows_than_blocks_cover(device, monkeypatch):
    """Every block of a grid of 9 x 9: the place on the diagonal is found from a square root."""
    monkeypatch.setitem(kernels.MAX_BLOCK, torch.float32, (16, 16))
    x = torch.randn(1, 9 * 16 - 3, 8, device=device)
    torch.testing.assert_close(kernels.symmetric_product(x), x @ x.mT)


def test_leading_dimensions_and_strides(device):
    x = matrices(2, 3 * 16, 24, dtype=torch.float32).view(2, 3, 16, 24).to(device)
    for backend in ("chunked", "triton"):
        got = newton_schulz(x.mT, backend=backend)
        assert got.shape == (2, 3, 24, 16) and got.is_contiguous()
        torch.testing.assert_close(got, newton_schulz(x.mT.contiguous(), backend=backend))
        torch.testing.assert_close(got.mT, newton_schulz(x, backend=backend), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(newton_schulz(x[0, 1], backend=backend), newton_schulz(x, backend=backend)[0, 1])


def test_computation_in_bf16_of_fp32_matrices(device):
    x = matrices(1, 16, 24, dtype=torch.float32)
    for backend in ("chunked", "triton"):
        got = newton_schulz(x.to(device), dtype=torch.bfloat16, backend=backend)
        assert got.dtype == torch.float32 and torch.equal(got, got.bfloat16().float())
        assert 1e-4 < error(got, newton_schulz(x.double(), backend="reference")) < 5e-2


def test_operator(device):
    x = matrices(2, 5, 9, dtype=torch.float32).to(device)
    torch.library.opcheck(torch.ops.hope_kernels.newton_schulz.default, (x, 2, list(QUINTIC), 1e-7, torch.float32))


def test_refusals(device):
    with pytest.raises(ValueError, match="no gradient|without a gradient"):
        newton_schulz(torch.ones(2, 2, requires_grad=True))
    with torch.no_grad():
        newton_schulz(torch.ones(2, 2, requires_grad=True))
    with pytest.raises(ValueError, match="matrices"):
        newton_schulz(torch.ones(3))
    with pytest.raises(ValueError, match="float64"):
        newton_schulz(torch.ones(2, 2, dtype=torch.float64, device=device), backend="triton")
    with pytest.raises(ValueError, match="no backend"):
        newton_schulz(torch.ones(2, 2), backend="cublas")
