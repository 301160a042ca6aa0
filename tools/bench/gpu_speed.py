"""The timed parts of the GPU benchmark: scans beside attention and fla, Newton-Schulz, head and loss, pointwise, and a profile by kernel.

Every function gives rows: what was measured, "ms" of the forward pass and of forward and backward, and what it took. A call that fails
is a row with "failed": the others still run, and the program ends with an error.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from hope_kernels import newton_schulz, pointwise
from hope_kernels.backend import CONV_WIDTH
from hope_kernels.linear_cross_entropy import linear_cross_entropy
from tools.bench.device import Bench
from tools.bench.gpu_ops import Op, Shape, floor_bytes, operations

Row = dict[str, Any]
EVERYWHERE = ("linear", "mlp", "self-modifying", "sdpa", "sdpa flash", "sdpa cudnn", "fla")
"""Measured at every length; the others at one."""
FULL = {"lengths": ((16, 2048), (4, 8192), (1, 32768), (1, 131072)), "heads": ((32, 64), (16, 128), (16, 96)), "one": (4, 8192)}
QUICK = {"lengths": ((4, 8192), (1, 32768)), "heads": ((32, 64),), "one": (4, 8192)}
REHEARSAL = {"lengths": ((1, 16), (1, 32)), "heads": ((1, 16),), "one": (1, 32)}
"""(rows, tokens) and (heads, head width): widths 2048 and, as in hope_760m, 1536. `one`: where all operations are measured."""


def guarded(row: Row, measure: Callable[[], Row]) -> Row:
    """The row with its measurement, or with why there is none."""
    try:
        return row | measure()
    except Exception as error:  # one broken kernel must not cost the lease of the machine
        torch.cuda.empty_cache()
        return row | {"failed": f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"[:300]}


def scan_rows(bench: Bench, plan: dict[str, Any]) -> Iterator[Row]:
    """Every operation at its lengths and widths."""
    found = operations(is_gpu=bench.is_gpu)
    for heads, width in plan["heads"]:
        for batch, tokens in plan["lengths"]:
            for name, op in found.items():
                if name not in EVERYWHERE and (batch, tokens) != plan["one"]:
                    continue
                shape = Shape(batch, heads, tokens, width)
                row = {"op": name, **vars(shape)}
                yield guarded(row, functools.partial(_scan, bench, op, shape))


def _scan(bench: Bench, op: Op, shape: Shape) -> Row:
    sets = bench.sets(lambda seed: op.inputs(shape, bench.device, seed))
    forward = bench.median(lambda leaves, upstream: op.forward(leaves, shape), sets)
    both = bench.median(lambda leaves, upstream: op.both(leaves, upstream, shape), sets)
    peak = bench.peak_bytes(lambda: op.both(sets[0][0], sets[0][1], shape))
    return {"forward": forward, "both": both, "peak_mib": round(peak / 2**20), "floor_bytes": floor_bytes(shape)}


def compile_scan(name: str, sizes: tuple[int, int, int, int], device: str) -> None:
    """Run an operation once, small, so that its kernels are in Triton's cache on disk when they are timed. sizes: those of `Shape`."""
    op, shape = operations(is_gpu=device != "cpu")[name], Shape(*sizes)
    leaves, upstream = op.inputs(shape, torch.device(device), 0)
    op.both(leaves, upstream, shape)


def newton_schulz_rows(bench: Bench, *, small: bool) -> Iterator[Row]:
    """Batches of square matrices as M3 orthogonalises them, bf16: Triton, plain torch, and torch.compile of that."""
    plain = functools.partial(newton_schulz.newton_schulz, backend="chunked")
    kinds: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {"triton": functools.partial(newton_schulz.newton_schulz, backend="triton")}
    kinds["chunked"] = plain
    if bench.is_gpu:
        kinds["compiled"] = torch.compile(plain, dynamic=False)
    for count, size in ((2, 32),) if small else ((8, 2048), (24, 1536), (384, 96)):
        for kind, call in kinds.items():
            row = {"op": "newton_schulz", "kind": kind, "count": count, "size": size}
            yield guarded(row, functools.partial(_newton_schulz, bench, call, count, size))


def _newton_schulz(bench: Bench, call: Callable[[torch.Tensor], torch.Tensor], count: int, size: int) -> Row:
    sets = bench.sets(lambda seed: (_normal((count, size, size), seed, bench.device),))
    forward = bench.median(call, sets)
    # 5 steps of three square products, counted whole although half of the symmetric ones is enough.
    return {"forward": forward, "tflops": round(5 * 3 * 2 * count * size**3 / forward["ms"] / 1e9, 1)}


def head_rows(bench: Bench, *, small: bool) -> Iterator[Row]:
    """Head and loss, forward and backward in bf16, and the memory they add."""
    tokens, width, vocabulary = (8, 16, 64) if small else (32768, 1536, 32768)
    kinds: dict[str, Callable[..., torch.Tensor]] = {
        kind: functools.partial(linear_cross_entropy, backend=kind) for kind in ("triton", "chunked")
    }
    kinds["unfused"] = lambda h, w, t: torch.nn.functional.cross_entropy((h @ w.T).float(), t, reduction="none")

    def inputs(seed: int) -> tuple[torch.Tensor, ...]:
        hidden = _normal((tokens, width), seed, bench.device)
        weight = _normal((vocabulary, width), seed + 1, bench.device) / width**0.5
        targets = torch.randint(vocabulary, (tokens,), device=bench.device)
        return hidden.requires_grad_(), weight.requires_grad_(), targets, torch.rand(tokens, device=bench.device)

    for kind, call in kinds.items():

        def step(h: torch.Tensor, w: torch.Tensor, t: torch.Tensor, upstream: torch.Tensor, call=call) -> None:
            torch.autograd.grad(call(h, w, t), (h, w), upstream)

        def measure(step=step) -> Row:
            sets = bench.sets(inputs)
            peak = bench.peak_bytes(lambda: step(*sets[0]))
            return {"both": bench.median(step, sets), "peak_mib": round(peak / 2**20)}

        yield guarded({"op": "head", "kind": kind, "tokens": tokens, "width": width, "vocabulary": vocabulary}, measure)


def pointwise_rows(bench: Bench, *, small: bool) -> Iterator[Row]:
    """Convolution with SiLU, and norm with gate: forward and backward in bf16, and the bandwidth they reach."""
    batch, tokens, heads, width = (1, 16, 2, 16) if small else (8, 4096, 16, 96)
    size, unit = (batch, tokens, heads), batch * tokens * heads * width * 2

    def conv(seed: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        leaves = [_normal((*size, 3 * width), seed, bench.device), torch.randn(heads, 3 * width, CONV_WIDTH, device=bench.device)]
        return leaves, [_normal((batch, heads, tokens, width), seed + i, bench.device) for i in range(3)]

    def norm(seed: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        y = _normal((batch, heads, tokens, width), seed, bench.device)
        leaves = [y, torch.randn(heads, width, device=bench.device), _normal((*size, width), seed + 1, bench.device)]
        return leaves, [_normal((*size, width), seed + 2, bench.device)]

    # Forward reads its inputs and writes its outputs once; backward reads both and writes the gradients of the inputs.
    operations = {
        "conv_silu": (conv, lambda b: lambda x, w: pointwise.conv_silu(x, w, dtype=x.dtype, backend=b), 6 + 9),
        "norm_gate": (norm, lambda b: lambda y, w, g: pointwise.norm_gate(y, w, g, eps=1e-6, backend=b), 3 + 5),
    }
    for name, (make, calls, units) in operations.items():
        for kind in ("triton", "chunked"):

            def measure(make=make, calls=calls, kind=kind, units=units) -> Row:
                call = calls(kind)
                sets = bench.sets(lambda seed: tuple([t.requires_grad_() for t in part] for part in make(seed)))

                def both(leaves: list[torch.Tensor], upstream: list[torch.Tensor]) -> None:
                    outputs = call(*leaves)
                    torch.autograd.grad(outputs if isinstance(outputs, tuple) else (outputs,), leaves, upstream)

                found = bench.median(both, sets)
                return {"both": found, "tb_s": round(units * unit / found["ms"] / 1e9, 3)}

            yield guarded({"op": name, "kind": kind, "batch": batch, "heads": heads, "tokens": tokens, "width": width}, measure)


def _normal(size: tuple[int, ...], seed: int, device: torch.device) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator(device).manual_seed(seed), device=device).bfloat16()


def profile_rows(bench: Bench, plan: dict[str, Any]) -> Iterator[Row]:
    """Where the time of forward and backward goes: milliseconds by kernel, the twelve longest."""
    activity = ProfilerActivity.CUDA if bench.is_gpu else ProfilerActivity.CPU
    heads, width = plan["heads"][-1]
    shape = Shape(plan["one"][0], heads, plan["one"][1], width)
    for name in ("linear", "mlp", "self-modifying"):

        def measure(name: str = name) -> Row:
            op = operations(is_gpu=bench.is_gpu)[name]
            leaves, upstream = op.inputs(shape, bench.device, 0)
            op.both(leaves, upstream, shape)
            bench.wait()
            with profile(activities=[activity]) as seen:
                op.both(leaves, upstream, shape)
                bench.wait()
            events = [(e.key, (e.self_device_time_total if bench.is_gpu else e.self_cpu_time_total) / 1e3) for e in seen.key_averages()]
            longest = sorted(events, key=lambda event: -event[1])[:12]
            return {"total_ms": round(sum(ms for _, ms in events), 3), "kernels": {key: round(ms, 3) for key, ms in longest}}

        yield guarded({"op": name, **vars(shape)}, measure)
