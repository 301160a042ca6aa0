"""Which implementation of the scans is chosen, and what a forced one that cannot run says."""

import pytest
import torch

from hope_kernels.backend import choose, scan_backend, scan_obstacle, triton_obstacle
from hope_kernels.rule import MemoryRule

CPU, CUDA, META = (torch.device(name) for name in ("cpu", "cuda", "meta"))
SIZE = {"width": 64, "hidden": 64}


def test_auto_takes_kernels_on_a_gpu_only():
    pytest.importorskip("triton", reason="triton is not installed")
    assert scan_backend("auto", rule=MemoryRule(), device=CUDA, **SIZE) == ("triton", "")
    for device in (CPU, META):
        name, reason = scan_backend("auto", rule=MemoryRule(), device=device, **SIZE)
        assert name == "chunked" and device.type in reason


@pytest.mark.parametrize(
    ("rule", "size", "reason"),
    [
        (MemoryRule(objective="dot", self_target=False), SIZE, "dot"),
        (MemoryRule(momentum=True), SIZE, "momentum"),
        (MemoryRule(dgd_scope="layerwise"), SIZE, "layerwise"),
        (MemoryRule(), {"width": 256, "hidden": 256}, "256x256 are larger than the largest kernel, 128x128"),
    ],
)
def test_what_has_no_kernel_runs_in_torch_and_says_why(rule, size, reason):
    name, why = scan_backend("auto", rule=rule, device=CUDA, **size)
    assert name == "chunked" and reason in why
    with pytest.raises(ValueError, match="cannot run here"):
        scan_backend("triton", rule=rule, device=CUDA, **size)


def test_a_linear_memory_has_no_hidden_width():
    assert scan_obstacle(MemoryRule(memory="linear"), width=64, hidden=10**6) == ""


def test_forced_backends():
    for name in ("chunked", "reference"):
        assert scan_backend(name, rule=MemoryRule(), device=CPU, **SIZE)[0] == name
    with pytest.raises(ValueError, match="available: triton, chunked, reference"):
        choose("memory scans", backend="cuda", obstacle="")
    with pytest.raises(ValueError, match="the device is xpu, not cuda"):
        scan_backend("triton", rule=MemoryRule(), device=torch.device("xpu"), **SIZE)


def test_kernels_can_be_followed_on_the_meta_device():
    pytest.importorskip("triton", reason="triton is not installed")
    assert scan_backend("triton", rule=MemoryRule(), device=META, **SIZE) == ("triton", "")


def test_without_triton(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert triton_obstacle(CUDA) == "triton is not installed"
