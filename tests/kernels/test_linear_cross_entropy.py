"""Head and loss: blocks and kernels against all logits in float64, their pieces for a divided vocabulary, and what they keep in memory."""

import pytest
import torch

from hope_kernels.linear_cross_entropy import (
    chunked,
    cross_entropy,
    head_backend,
    linear_cross_entropy,
    reference,
    triton_,
    vocabulary_statistics,
)
from hope_pt.launch.allocations import AllocationCounter
from hope_pt.testing.scans import mismatches

EXACT = 1e-12
FP32 = 1e-5
BF16 = 5e-3
BF16_GRADIENT = 1.5e-2
SIZES = [(1, 5, 3), (7, 24, 37), (9, 20, 300), (3, 64, 128)]
IMPLEMENTATIONS = [("chunked", torch.float32), ("chunked", torch.bfloat16), ("triton", torch.float32), ("triton", torch.bfloat16)]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Several blocks of the vocabulary, the last one partial, and several passes of a kernel over a row."""
    monkeypatch.setattr(chunked, "CPU_BLOCK_BYTES", 1)
    monkeypatch.setattr(chunked, "BLOCK_BYTES", 1)
    monkeypatch.setattr(chunked, "LEAST_COLUMNS", 48)
    monkeypatch.setattr(triton_, "BLOCK", 32)


def leaves(tokens: int, width: int, vocabulary: int, *, scale: float = 1.0, dtype=torch.float64, device="cpu", seed=0) -> dict:
    """hidden, weight, targets (some to be ignored, some at the ends) and a gradient for every loss (some zero: masked tokens)."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, width, generator=generator, dtype=torch.float64)
    weight = torch.randn(vocabulary, width, generator=generator, dtype=torch.float64) * scale / width**0.5
    targets = torch.randint(vocabulary, (tokens,), generator=generator)
    upstream = torch.randn(tokens, generator=generator, dtype=torch.float64)
    if tokens > 5:
        targets[:4] = torch.tensor([-100, vocabulary - 1, 0, vocabulary])
        upstream[4:6] = 0.0
    return {
        "hidden": hidden.to(device, dtype),
        "weight": weight.to(device, dtype),
        "targets": targets.to(device),
        "upstream": upstream.to(device),
    }


def run(case: dict, backend: str) -> dict[str, torch.Tensor]:
    """Losses and both gradients."""
    hidden, weight = (case[name].detach().clone().requires_grad_() for name in ("hidden", "weight"))
    losses = linear_cross_entropy(hidden, weight, case["targets"], backend=backend)
    losses.backward(case["upstream"].to(losses.dtype))
    return {"losses": losses.detach().cpu(), "d_hidden": hidden.grad.cpu(), "d_weight": weight.grad.cpu()}


def truth(case: dict) -> dict[str, torch.Tensor]:
    """All logits in float64, from the values that the case holds."""
    return run({name: t.cpu().double() if t.is_floating_point() else t.cpu() for name, t in case.items()}, "reference")


def assert_near(got: dict, wanted: dict, dtype: torch.dtype) -> None:
    forward, gradients = (FP32, FP32) if dtype == torch.float32 else (BF16, BF16_GRADIENT)
    assert not mismatches({"losses": got["losses"]}, {"losses": wanted["losses"]}, tolerance=forward)
    assert not mismatches(got, wanted, tolerance=gradients)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_reference_is_torchs_cross_entropy(size):
    case = leaves(*size)
    valid = case["targets"].where(case["targets"] < size[2], -100)
    wanted = torch.nn.functional.cross_entropy(case["hidden"] @ case["weight"].T, valid, reduction="none")
    assert not mismatches({"losses": run(case, "reference")["losses"]}, {"losses": wanted}, tolerance=EXACT)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_blocks_are_exact_in_float64(size):
    case = leaves(*size)
    assert not mismatches(run(case, "chunked"), run(case, "reference"), tolerance=EXACT)


@pytest.mark.parametrize(("backend", "dtype"), IMPLEMENTATIONS, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_losses_and_gradients(size, backend, dtype, device):
    case = leaves(*size, dtype=dtype, device=device)
    got = run(case, backend)
    assert got["losses"].dtype == torch.float32 and got["d_hidden"].dtype == got["d_weight"].dtype == dtype
    assert_near(got, truth(case), dtype)


@pytest.mark.parametrize("backend", ["chunked", "triton"])
def test_large_logits_do_not_overflow(backend, device):
    """Logits to 700: exp of one overflows. They are rounded at 3e-5, which is an error of their exponentials as large."""
    case = leaves(9, 20, 300, scale=200.0, dtype=torch.float32, device=device)
    got, wanted = run(case, backend), truth(case)
    assert (case["hidden"] @ case["weight"].T).max() > 500
    assert not mismatches(got, wanted, tolerance=1e-4)


@pytest.mark.parametrize("backend", ["chunked", "triton"])
def test_ignored_tokens_count_nothing(backend, device):
    case = leaves(9, 20, 300, dtype=torch.float32, device=device)
    got = run(case, backend)
    for token in (0, 3):
        assert got["losses"][token] == 0 and not got["d_hidden"][token].any()
    kept = torch.tensor([1, 2, *range(4, 9)], device=device)
    rest = run({name: t if name == "weight" else t[kept] for name, t in case.items()}, backend)
    assert not mismatches({"d_weight": got["d_weight"]}, {"d_weight": rest["d_weight"]}, tolerance=FP32)
    nothing = run({**case, "targets": torch.full_like(case["targets"], -100)}, backend)
    assert not any(t.any() for t in nothing.values())


def test_backward_is_the_derivative():
    case = leaves(7, 5, 100)
    inputs = [case[name].requires_grad_() for name in ("hidden", "weight")]
    assert torch.autograd.gradcheck(lambda h, w: chunked.vocabulary_statistics(h, w, case["targets"]), inputs)


@pytest.mark.parametrize(("backend", "dtype"), IMPLEMENTATIONS, ids=str)
def test_parts_of_a_vocabulary_join(backend, dtype, device):
    """Two holders of rows of W, as under tensor parallelism: each gives statistics of its own, their gradients add up."""
    case = leaves(9, 20, 300, dtype=dtype, device=device)
    hidden, weight = (case[name].detach().clone().requires_grad_() for name in ("hidden", "weight"))
    parts = [
        vocabulary_statistics(hidden, rows, case["targets"] - first, backend=backend)
        for first, rows in ((0, weight[:140]), (140, weight[140:]))
    ]
    lse, at_target = torch.logaddexp(parts[0][0], parts[1][0]), parts[0][1] + parts[1][1]
    losses = cross_entropy(lse, at_target, case["targets"], vocabulary=300)
    losses.backward(case["upstream"].to(losses.dtype))
    got = {"losses": losses.detach().cpu(), "d_hidden": hidden.grad.cpu(), "d_weight": weight.grad.cpu()}
    assert_near(got, truth(case), dtype)


def test_operator_keeps_torchs_rules(device):
    case = leaves(3, 8, 60, dtype=torch.float32, device=device)
    hidden, weight = (case[name].requires_grad_() for name in ("hidden", "weight"))
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(torch.ops.hope_kernels.vocabulary_statistics, (hidden, weight, case["targets"]), test_utils=checks)
    vector = case["upstream"].float()
    arguments = (hidden.detach(), weight.detach(), case["targets"], vector, vector, vector)
    torch.library.opcheck(torch.ops.hope_kernels.vocabulary_statistics_backward, arguments, test_utils=checks)


def test_choice_of_the_implementation():
    assert head_backend("auto", device=torch.device("cuda")) == "triton"
    assert head_backend("auto", device=torch.device("cpu")) == head_backend("auto", device=torch.device("meta")) == "chunked"
    with pytest.raises(ValueError, match='no backend "fused"'):
        head_backend("fused", device=torch.device("cpu"))
    with pytest.raises(ValueError, match="the device is xpu"):
        head_backend("triton", device=torch.device("xpu"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_memory_is_a_fifth_of_all_logits(monkeypatch, dtype):
    """Most bytes alive beside the arguments, gradients included, of 8,192 tokens with 32,768 words."""
    monkeypatch.undo()
    peaks = {}
    for name, function in (("chunked", chunked.vocabulary_statistics), ("reference", reference.vocabulary_statistics)):
        hidden, weight = (torch.empty(n, 1536, device="meta", dtype=dtype, requires_grad=True) for n in (8192, 32768))
        targets = torch.empty(8192, device="meta", dtype=torch.int64)
        with AllocationCounter([hidden, weight, targets]) as counter:
            lse, at_target = function(hidden, weight, targets)
            (lse - at_target).sum().backward()
        peaks[name] = counter.peak
    assert peaks["chunked"] <= 0.2 * peaks["reference"]
