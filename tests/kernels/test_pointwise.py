"""Convolution with SiLU and norm with gate: every implementation against torch's own operations in float64, with all gradients."""

import pytest
import torch

from hope_kernels.pointwise import conv_silu, norm_gate, triton_
from hope_pt.testing.scans import mismatches, with_gradients

EXACT = 1e-12
"""Two orders of the same float64 operations."""
FP32 = 1e-5
BF16 = 5e-3
"""Roundings of inputs and outputs to 8 bits; sums are fp32."""
BF16_GRADIENT = 1.5e-2
DTYPES = [torch.float32, torch.bfloat16]
EPS = 1e-3
SIZES = [(2, 1, 1, 16), (1, 3, 2, 5), (1, 150, 1, 24), (2, 37, 2, 64)]
"""B, T, H, K: one token, fewer than the taps, three blocks of a width that is padded, several heads and rows with runs cut short."""


def leaves(name: str, size: tuple[int, int, int, int], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Leaves of an operation: activations in `dtype`, parameters in fp32 (float64 for the twin's)."""
    batch, tokens, heads, width = size
    generator = torch.Generator().manual_seed(0)
    if name == "conv_silu":
        shapes = {"x": (batch, tokens, heads, 3 * width), "weight": (heads, 3 * width, 4)}
    else:
        shapes = {"y": (batch, heads, tokens, width), "weight": (heads, width), "gate": (batch, tokens, heads, width)}
    drawn = {key: torch.randn(shape, generator=generator, dtype=torch.float64) for key, shape in shapes.items()}
    return {key: t.to(torch.promote_types(dtype, torch.float32) if key == "weight" else dtype) for key, t in drawn.items()}


def run(name: str, given: dict[str, torch.Tensor], backend: str, *, view=lambda t: t, dtype: torch.dtype | None = None):
    """Outputs and gradients with respect to the leaves; `view` of the activations is what the operation sees."""
    given = {key: t.detach().clone().requires_grad_() for key, t in given.items()}
    seen = {key: t if key == "weight" else view(t) for key, t in given.items()}
    if name == "conv_silu":
        outputs = conv_silu(seen["x"], seen["weight"], dtype=dtype or seen["x"].dtype, backend=backend)
        return with_gradients(dict(zip(("q", "k", "v"), outputs, strict=True)), given)
    return with_gradients({"out": norm_gate(seen["y"], seen["weight"], seen["gate"], eps=EPS, backend=backend)}, given)


def scattered(t: torch.Tensor) -> torch.Tensor:
    """The same values at other strides, none of them 1."""
    return torch.stack([t, t + 1], -1).transpose(0, 1).contiguous().transpose(0, 1)[..., 0]


def agree(got: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor], dtype: torch.dtype) -> None:
    outputs = {key for key in got if not key.startswith("d")}
    limits = (FP32, FP32) if dtype == torch.float32 else (BF16, BF16_GRADIENT)
    got = {key: t.cpu() for key, t in got.items()}
    for keys, limit in ((outputs, limits[0]), (got.keys() - outputs, limits[1])):
        assert not mismatches({k: got[k] for k in keys}, {k: wanted[k] for k in keys}, tolerance=limit)


@pytest.fixture(autouse=True)
def short_runs(monkeypatch):
    """Runs of 4 tokens instead of 16, so that a short sequence has many of them and several blocks."""
    monkeypatch.setattr(triton_, "RUN", 4)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("name", ["conv_silu", "norm_gate"])
def test_torch_by_hand_is_torch(name, size):
    given = leaves(name, size, torch.float64)
    wanted = run(name, given, "reference")
    assert not mismatches(run(name, given, "chunked"), wanted, tolerance=EXACT)
    assert not mismatches(run(name, given, "chunked", view=scattered), wanted, tolerance=EXACT)


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("name", ["conv_silu", "norm_gate"])
def test_kernels(name, size, dtype, device):
    given = leaves(name, size, dtype)
    wanted = run(name, {key: t.double() for key, t in given.items()}, "reference")
    on_device = {key: t.to(device) for key, t in given.items()}
    got = run(name, on_device, "triton")
    agree(got, wanted, dtype)
    assert all(t.is_contiguous() and t.dtype == dtype for key, t in got.items() if not key.startswith("d"))
    agree(run(name, on_device, "triton", view=scattered), wanted, dtype)


@pytest.mark.parametrize("backend", ["chunked", "triton"])
def test_columns_of_the_projection(backend, device):
    """As the mixer calls them: q, k, v, gate and a logit interleaved by head, and the output of a scan."""
    batch, tokens, heads, width = 2, 37, 2, 16
    projected = torch.randn(batch, tokens, heads, 4 * width + 1, device=device)
    given = leaves("conv_silu", (batch, tokens, heads, width), torch.float32)
    weight = given["weight"].to(device)
    norm_weight = torch.randn(heads, width, device=device)

    def mixer(chosen, to):
        x = projected.to(to).requires_grad_()
        qkv, gate, _ = x.split([3 * width, width, 1], -1)
        q, k, v = conv_silu(qkv, weight.to(to), dtype=to, backend=chosen)
        out = norm_gate(q * k + v, norm_weight.to(to), gate, eps=EPS, backend=chosen)
        return with_gradients({"out": out}, {"projected": x})

    assert not mismatches(mixer(backend, torch.float32), mixer("reference", torch.float64), tolerance=FP32)


@pytest.mark.parametrize("backend", ["chunked", "triton"])
def test_mixed_dtypes(backend, device):
    """Results in another dtype than the inputs: fp32 streams of a bf16 projection, and the gate of an fp32 scan."""
    size = (1, 21, 2, 16)
    given = leaves("conv_silu", size, torch.bfloat16)
    wanted = run("conv_silu", {key: t.double() for key, t in given.items()}, "reference")
    got = run("conv_silu", {key: t.to(device) for key, t in given.items()}, backend, dtype=torch.float32)
    assert got["q"].dtype == torch.float32 and got["dx"].dtype == torch.bfloat16
    assert not mismatches({"q": got["q"].cpu()}, {"q": wanted["q"]}, tolerance=FP32)
    agree(got, wanted, torch.bfloat16)
    given = leaves("norm_gate", size, torch.float32)
    given["gate"] = given["gate"].bfloat16()
    wanted = run("norm_gate", {key: t.double() for key, t in given.items()}, "reference")
    got = run("norm_gate", {key: t.to(device) for key, t in given.items()}, backend)
    assert got["out"].dtype == got["dgate"].dtype == torch.bfloat16 and got["dy"].dtype == torch.float32
    agree(got, wanted, torch.bfloat16)


@pytest.mark.parametrize("name", ["conv_silu", "norm_gate"])
def test_operators(name, device):
    given = {key: t.to(device).requires_grad_() for key, t in leaves(name, (2, 5, 2, 6), torch.float32).items()}
    last = torch.float32 if name == "conv_silu" else EPS
    torch.library.opcheck(getattr(torch.ops.hope_kernels, name).default, (*given.values(), last))


def test_runs_of_the_shipped_length(device, monkeypatch):
    monkeypatch.setattr(triton_, "RUN", 16)
    given = leaves("conv_silu", (1, 261, 1, 20), torch.float32)
    wanted = run("conv_silu", {key: t.double() for key, t in given.items()}, "reference")
    agree(run("conv_silu", {key: t.to(device) for key, t in given.items()}, "triton"), wanted, torch.float32)


def test_results_repeat_bit_for_bit(device):
    for name in ("conv_silu", "norm_gate"):
        given = {key: t.to(device) for key, t in leaves(name, (2, 70, 1, 24), torch.float32).items()}
        first, second = run(name, given, "triton"), run(name, given, "triton")
        assert all(torch.equal(first[key], second[key]) for key in first)


def test_block_holds_the_largest_widths():
    assert triton_.rows_of(128, warps=4, elements=8) == 8
    assert triton_.rows_of(4096, warps=4, elements=8) == 1


def test_refusals(device):
    x, weight = torch.ones(1, 2, 1, 6, device=device), torch.ones(1, 6, 4, device=device)
    with pytest.raises(ValueError, match="width 3"):
        conv_silu(x, weight[..., :3], dtype=x.dtype, backend="triton")
    with pytest.raises(ValueError, match="float64"):
        conv_silu(x.double(), weight, dtype=x.dtype, backend="triton")
    with pytest.raises(ValueError, match="3 K"):
        conv_silu(x[..., :5], weight, dtype=x.dtype)
    with pytest.raises(ValueError, match="weight"):
        norm_gate(x, torch.ones(1, 6), x, eps=EPS)
    conv_silu(x, weight[..., :3], dtype=x.dtype)
