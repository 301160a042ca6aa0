"""Tests of the Triton kernels: on the GPU where there is one, else in the interpreter; memory that a kernel must fill starts as NaN."""

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")


@pytest.fixture(autouse=True)
def bfloat16():
    """The interpreter's bf16, corrected."""
    if not torch.cuda.is_available():
        from hope_pt.testing.interpreter import correct_bfloat16

        correct_bfloat16()


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """`torch.empty`, `torch.empty_like`, `Tensor.new_empty` give NaN (or the largest integer): what a kernel leaves out shows."""

    def poison(tensor):
        if tensor.dtype == torch.bool:
            return tensor.fill_(True)
        return tensor.fill_(float("nan") if tensor.is_floating_point() else torch.iinfo(tensor.dtype).max)

    empty, empty_like, new_empty = torch.empty, torch.empty_like, torch.Tensor.new_empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: poison(empty(*a, **k)))
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: poison(empty_like(*a, **k)))
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *a, **k: poison(new_empty(*a, **k)))


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where the kernels run."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
