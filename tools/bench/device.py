"""Timing on a GPU: CUDA events, medians, inputs that rotate so that none is still in the cache, and the ceilings of the machine.

On a CPU the same functions run with the wall clock, so that a benchmark can be rehearsed; such times mean nothing.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

ROTATE_BYTES = 120 * 2**20
"""Twice the 60 MB of an H200's L2: when an input comes round again, nothing of it is left."""
PEAK_BF16 = {"NVIDIA H100": 989e12, "NVIDIA H200": 989e12, "NVIDIA B200": 2250e12, "NVIDIA A100": 312e12}
"""FLOP/s of dense bf16 products by the data sheets, by the beginning of the device's name."""


@dataclass(frozen=True)
class Bench:
    """Where and how often to measure.

    repetitions: of a call shorter than `patience` seconds / repetitions; a longer one is repeated as often as fits, 3 times at least.
    """

    device: torch.device
    repetitions: int = 30
    patience: float = 6.0

    @property
    def is_gpu(self) -> bool:
        """Whether times mean something."""
        return self.device.type == "cuda"

    def wait(self) -> None:
        """Until the device has done everything."""
        if self.is_gpu:
            torch.cuda.synchronize()

    def seconds(self, calls: Sequence[Callable[[], object]]) -> list[float]:
        """Of each call: from the end of the one before to its own end on the device."""
        if not self.is_gpu:
            spent = []
            for call in calls:
                began = time.perf_counter()
                call()
                spent.append(time.perf_counter() - began)
            return spent
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(len(calls) + 1)]
        marks[0].record()
        for call, mark in zip(calls, marks[1:], strict=True):
            call()
            mark.record()
        self.wait()
        return [a.elapsed_time(b) / 1e3 for a, b in zip(marks[:-1], marks[1:], strict=True)]

    def median(self, work: Callable[..., object], sets: Sequence[tuple[Any, ...]]) -> dict[str, float]:
        """Median milliseconds of work(*inputs) over rotating input sets, with the 10th and 90th percentile and the repetitions."""
        calls = [lambda inputs=inputs: work(*inputs) for inputs in sets]
        self.seconds([calls[i % len(calls)] for i in range(3 if self.is_gpu else 1)])  # compiles, fills caches and pools
        estimate = statistics.median(self.seconds(calls[:2]))
        count = max(3 if self.is_gpu else 1, min(self.repetitions, int(self.patience / max(estimate, 1e-9))))
        spent = sorted(1e3 * s for s in self.seconds([calls[i % len(calls)] for i in range(count)]))
        low, high = spent[len(spent) // 10], spent[-1 - len(spent) // 10]
        return {"ms": round(statistics.median(spent), 4), "p10": round(low, 4), "p90": round(high, 4), "repetitions": count}

    def sets(self, make: Callable[[int], tuple[Any, ...]]) -> list[tuple[Any, ...]]:
        """As many input sets make(seed) as together pass ROTATE_BYTES; two at least, 64 at most."""
        made = [make(0), make(1)]
        size = max(1, sum(t.numel() * t.element_size() for t in _tensors(made[0])))
        wanted = min(64, -(-ROTATE_BYTES // size)) if self.is_gpu else 2
        return made + [make(seed) for seed in range(2, wanted)]

    def peak_bytes(self, work: Callable[[], object]) -> int:
        """Bytes of device memory that a call needs at its peak beside what was there before; 0 on a CPU."""
        if not self.is_gpu:
            work()
            return 0
        self.wait()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        self.wait()
        return torch.cuda.max_memory_allocated() - before


def _tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [t for part in value for t in _tensors(part)] if isinstance(value, (list, tuple)) else []


def ceilings(bench: Bench) -> dict[str, float]:
    """What this machine can do at best, now: bf16 products in TFLOP/s, memory in TB/s (read and written), microseconds of a launch."""
    size, mib = (8192, 2048) if bench.is_gpu else (128, 1)

    def square(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        generator = torch.Generator(bench.device).manual_seed(seed)
        a, b = (torch.randn(size, size, generator=generator, device=bench.device).bfloat16() for _ in range(2))
        return a, b

    product = bench.median(torch.mm, bench.sets(square))["ms"]
    source = torch.randn(mib * 2**18, device=bench.device)
    target = torch.empty_like(source)
    copy = bench.median(lambda: target.copy_(source), [()])["ms"]
    tiny = torch.zeros(16, device=bench.device)
    launches = 100
    launch = bench.median(lambda: [tiny.add_(1) for _ in range(launches)], [()])["ms"] / launches
    return {
        "bf16_tflops": round(2 * size**3 / product / 1e9, 1),
        "copy_tb_s": round(2 * source.numel() * 4 / copy / 1e9, 3),
        "launch_us": round(1e3 * launch, 2),
    }


def data_sheet_flops(name: str | None) -> float | None:
    """bf16 FLOP/s by the data sheet of a device, or None where it is not known here."""
    return next((peak for prefix, peak in PEAK_BF16.items() if name and name.startswith(prefix)), None)
