"""A full training step of HOPE, Titans and Transformer++ at equal parameters (`python -m tools.bench.step`, from the repository's root).

Forward, backward, clipping and AdamW on 131,072 tokens a step for T = 2K to 128K, kernels on ("triton") and, where that ends, off
("chunked"): tokens per second, MFU over the measured bf16 peak and over the data sheet's, peak memory. Every case keeps its activations
where they fit and recomputes blocks where they do not. `--parity` trains a small model 1,000 steps with kernels on and off and compares the
loss curves. Runs hope_pt.engine where megatron-core is installed, else a plain loop, and says which. Writes
tools/bench/results/step.json (step_parity.json). Needs a GPU; `--rehearse` runs tiny sizes on the CPU, whose times mean nothing.
"""

import argparse
import importlib.util
import os
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from tools.bench.common import RESULTS, ROOT, environment, write_results
from tools.bench.device import Bench, ceilings, data_sheet_flops

MODELS = ("hope", "titans", "transformer")
LENGTHS = (2048, 4096, 8192, 16384, 32768, 65536, 131072)
CHUNKED_LENGTHS = (4096, 8192)
"""The path without kernels starts thousands of small operations a step: longer sequences tell nothing new."""
TOKENS, MICRO_TOKENS = 131072, 32768
"""Of a step and of a forward pass; a longer sequence is one forward pass."""
SPEED_GOALS = {4096: 0.7, 16384: 1.5, 65536: 4.0}
"""Tokens per second of HOPE over Transformer++."""
SAME_SIZE = 0.02
PARITY_STEPS, PARITY_WINDOW, PARITY = 1000, 50, 0.01
"""The two curves differ by rounding only, which training amplifies step by step: means of 50 steps stay within 1 % of each other."""


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m tools.bench.step", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--size", default="760m", help="of configs/hope_SIZE.toml and its twins")
    parser.add_argument("--models", default=",".join(MODELS), help="comma-separated")
    parser.add_argument("--lengths", default=",".join(map(str, LENGTHS)), help="comma-separated, tokens of a sequence")
    parser.add_argument("--steps", type=int, default=5, help="timed steps of a case")
    parser.add_argument("--parity", action="store_true", help="compare the losses of 1,000 steps instead")
    parser.add_argument("--trainer", choices=["engine", "plain"], help="instead of what is installed")
    parser.add_argument("--rehearse", action="store_true", help="tiny sizes on the CPU in Triton's interpreter; times mean nothing")
    parser.add_argument("--out", type=Path, help="folder of the results; tools/bench/results if not given, no file for a rehearsal")
    found = parser.parse_args(arguments)
    found.models, found.lengths = found.models.split(","), [int(n) for n in found.lengths.split(",")]
    if unknown := set(found.models) - set(MODELS):
        parser.error(f"--models: unknown {', '.join(sorted(unknown))}; there are {', '.join(MODELS)}")
    if importlib.util.find_spec("pydantic") is None:
        parser.error("pydantic is missing; see requirements/gpu.txt")
    if not found.rehearse and not torch.cuda.is_available():
        parser.error("torch sees no CUDA device; --rehearse runs the program on the CPU")
    if found.rehearse:
        os.environ["TRITON_INTERPRET"] = "1"
        found.size, found.steps, found.lengths = "tiny", 1, [32]
    return found


def configuration(name: str, *, length: int, backend: str, recompute: str, rehearse: bool) -> Any:
    """The run configuration of configs/NAME.toml for one case."""
    from hope_pt.config import load
    from tools.bench.trainers import with_backend

    tokens, micro = (32, 32) if rehearse else (TOKENS, MICRO_TOKENS)
    rows = max(1, tokens // length)
    changes = {
        "data.seq_len": length,
        "train.global_batch_size": rows,
        "engine.micro_batch_size": max(1, min(rows, micro // length)),
        "engine.recompute": recompute,
    }
    if rehearse:
        changes |= {"model.vocab_size": 64, "model.num_layers": 1, "model.width": 16, "model.num_heads": 1}
        if "transformer" not in name:
            changes |= {"model.titans.chunk_mem": 16, "model.titans.chunk_proj": 16}
    config = load(ROOT / "configs" / f"{name}.toml", [f"{key}={value}" for key, value in changes.items()])
    return config.model_copy(update={"model": with_backend(config.model, backend)})


def no_kernel(name: str, backend: str, *, rehearse: bool) -> str:
    """Why a configuration has no Triton scans, or ""."""
    from hope_kernels.backend import scan_obstacle
    from hope_pt.nn.titans import memory_rule

    model = configuration(name, length=64, backend=backend, recompute="none", rehearse=rehearse).model
    if model.mixer == "attention" or backend != "triton":
        return ""
    return scan_obstacle(memory_rule(model.titans), width=model.head_width, hidden=model.memory_hidden)


def measure(config: Any, *, steps: int, which: str, device: torch.device) -> dict[str, Any]:
    """Seconds of the median step and peak memory of one case."""
    from tools.bench.trainers import build

    rows, length = config.train.global_batch_size, config.data.seq_len
    generator = torch.Generator().manual_seed(0)
    trainer = build(config, which=which, device=device, lr=1e-4)
    try:
        seconds, losses = [], []
        bench = Bench(device)
        warmup = 2 if bench.is_gpu else 0  # the first step compiles, the second settles the allocator
        for index in range(steps + warmup):
            tokens = torch.randint(config.model.vocab_size, (rows, length + 1), generator=generator).to(device)
            if index == warmup and bench.is_gpu:
                torch.cuda.reset_peak_memory_stats()
            bench.wait()
            began = time.perf_counter()
            losses.append(trainer.step((tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())))
            bench.wait()
            seconds.append(time.perf_counter() - began)
        peak = torch.cuda.max_memory_allocated() if bench.is_gpu else 0
    finally:
        trainer.close()
    timed = sorted(seconds[warmup:])
    median = statistics.median(timed)
    return {
        "tokens_per_s": round(rows * length / median, 1),
        "step_s": round(median, 4),
        "spread_s": [round(timed[0], 4), round(timed[-1], 4)],
        "peak_gib": round(peak / 2**30, 2),
        "losses": [round(loss, 3) for loss in losses],
    }


def case(options: argparse.Namespace, model: str, length: int, backend: str, peaks: dict[str, float], which: str) -> dict[str, Any]:
    """One row: the measurement with activations kept or, where they do not fit, with blocks recomputed."""
    from hope_pt.nn import count_parameters, flops_per_token

    device = torch.device("cpu" if options.rehearse else "cuda")
    row: dict[str, Any] = {"model": model, "length": length, "backend": backend, "recompute": "none"}
    if obstacle := no_kernel(f"{model}_{options.size}", backend, rehearse=options.rehearse):
        return row | {"no_kernel": obstacle}
    for recompute in ("none", "block"):
        config = configuration(f"{model}_{options.size}", length=length, backend=backend, recompute=recompute, rehearse=options.rehearse)
        row |= {"recompute": recompute, "parameters": count_parameters(config.model)["total"]}
        try:
            row |= measure(config, steps=options.steps if backend == "triton" else 1, which=which, device=device)
            break
        except torch.cuda.OutOfMemoryError as error:
            row["failed"] = str(error).splitlines()[0][:200]
        except Exception as error:  # the other cases still run; the program ends with an error
            row["failed"] = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"[:300]
            return row
    else:
        return row
    row.pop("failed", None)
    work = flops_per_token(config.model, seq_len=length)
    # What recomputation and replay run twice is not counted: MFU is about the model's own operations.
    flops = row["tokens_per_s"] * (work["forward"] + work["backward"])
    row["tflops"] = round(flops / 1e12, 1)
    row["mfu"] = {name: round(flops / peak, 3) for name, peak in peaks.items() if peak}
    return row


def speed(options: argparse.Namespace, which: str) -> dict[str, Any]:
    """All cases, and the goals."""
    device = torch.device("cpu" if options.rehearse else "cuda")
    found: dict[str, Any] = {"environment": environment(), "rehearsal": options.rehearse, "trainer": which, "size": options.size}
    found["ceilings"] = ceilings(Bench(device, *(() if device.type == "cuda" else (1, 0.0))))
    sheet = data_sheet_flops(found["environment"]["gpu"])
    peaks = {"measured": found["ceilings"]["bf16_tflops"] * 1e12, "data sheet": sheet or 0.0}
    rows = found["rows"] = []
    for length in options.lengths:
        for model in options.models:
            backends = ("triton", "chunked") if model != "transformer" and (options.rehearse or length in CHUNKED_LENGTHS) else ("triton",)
            for backend in backends:
                rows.append(case(options, model, length, backend, peaks, which))
                print(line(rows[-1]), flush=True)
                found["goals"] = goals(rows)
                save("step", found, options)
    return found


def goals(rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Name -> value, at_least or at_most, met."""
    rate = {(row["model"], row["length"], row["backend"]): row["tokens_per_s"] for row in rows if "tokens_per_s" in row}
    found: dict[str, dict[str, Any]] = {}
    for length, bound in SPEED_GOALS.items():
        if ("hope", length, "triton") in rate and ("transformer", length, "triton") in rate:
            value = rate["hope", length, "triton"] / rate["transformer", length, "triton"]
            found[f"HOPE over Transformer++ at {length}"] = {"value": round(value, 3), "at_least": bound, "met": value >= bound}
    for (model, length, backend), slow in rate.items():
        if backend == "chunked" and (model, length, "triton") in rate:
            value = rate[model, length, "triton"] / slow
            found[f"{model} at {length}: kernels on over off"] = {"value": round(value, 3), "at_least": 1.0, "met": value >= 1.0}
    sizes = {row["model"]: row["parameters"] for row in rows if "parameters" in row}
    if len(sizes) > 1:
        value = max(sizes.values()) / min(sizes.values()) - 1
        found["equal parameters"] = {"value": round(value, 4), "at_most": SAME_SIZE, "met": value <= SAME_SIZE}
    return found


def line(row: dict[str, Any]) -> str:
    """One row of the table."""
    head = f"{row['model']:<12} T {row['length']:>6} {row['backend']:<8} recompute {row['recompute']:<6}"
    if "failed" in row or "no_kernel" in row:
        return f"{head} {'FAILED ' + row['failed'] if 'failed' in row else row['no_kernel']}"
    mfu = ", ".join(f"{share:.1%} of {name}" for name, share in row["mfu"].items())
    return f"{head} {row['tokens_per_s']:>10,.0f} tokens/s  {row['tflops']:>7.1f} TFLOP/s ({mfu})  {row['peak_gib']:.1f} GiB"


def markov(vocabulary: int, *, rows: int, length: int, generator: torch.Generator) -> torch.Tensor:
    """Text that can be learned: each token has four likely successors. [rows, length + 1]."""
    successors = torch.randint(vocabulary, (vocabulary, 4), generator=torch.Generator().manual_seed(7))
    tokens = [torch.randint(vocabulary, (rows,), generator=generator)]
    for _ in range(length):
        tokens.append(successors[tokens[-1], torch.randint(4, (rows,), generator=generator)])
    return torch.stack(tokens, 1)


def parity(options: argparse.Namespace, which: str) -> dict[str, Any]:
    """Loss curves of a small HOPE with kernels on and off: same start, same data."""
    from hope_pt.config import load
    from tools.bench.trainers import build, with_backend

    device = torch.device("cpu" if options.rehearse else "cuda")
    layers, width, heads, length, rows, steps = (1, 16, 1, 32, 1, 2) if options.rehearse else (4, 256, 4, 512, 16, PARITY_STEPS)
    sizes = {"vocab_size": 64 if options.rehearse else 256, "num_layers": layers, "width": width, "num_heads": heads}
    changes = {f"model.{name}": value for name, value in sizes.items()} | {"data.seq_len": length, "train.global_batch_size": rows}
    changes |= {"engine.micro_batch_size": rows, "model.titans.chunk_mem": 16 if options.rehearse else 64}
    changes |= {"model.titans.chunk_proj": 16 if options.rehearse else 256, "train.steps": steps}
    config = load(ROOT / "configs" / "hope_tiny.toml", [f"{key}={value}" for key, value in changes.items()])
    found: dict[str, Any] = {"environment": environment(), "rehearsal": options.rehearse, "trainer": which, "steps": steps, "losses": {}}
    for backend in ("triton", "chunked"):
        generator = torch.Generator().manual_seed(1)
        trainer = build(config.model_copy(update={"model": with_backend(config.model, backend)}), which=which, device=device, lr=1e-3)
        losses = found["losses"][backend] = []
        for _ in range(steps):
            tokens = markov(sizes["vocab_size"], rows=rows, length=length, generator=generator).to(device)
            losses.append(round(trainer.step((tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())), 5))
        trainer.close()
        print(f"{backend}: first {losses[0]}, last {losses[-1]}", flush=True)
    window = min(PARITY_WINDOW, steps)
    on, off = (torch.tensor(found["losses"][b])[: steps // window * window].view(-1, window).mean(1) for b in ("triton", "chunked"))
    worst = ((on - off).abs() / off).max().item()
    met = worst <= PARITY
    found["goals"] = {f"loss of {steps} steps, kernels on and off": {"value": round(worst, 5), "at_most": PARITY, "met": met}}
    save("step_parity", found, options)
    return found


def save(name: str, found: dict[str, Any], options: argparse.Namespace) -> None:
    """Where the options say; after every case, so that a machine that is taken away leaves what it has found."""
    folder = options.out or (None if options.rehearse else RESULTS)
    if folder:
        write_results(name, found, folder=folder)


def main() -> int:
    """Run; 1 if a case failed."""
    options = parse()
    if options.rehearse:
        from tools.bench.workers import prepare

        prepare(rehearse=True)
    from tools.bench import trainers

    which = options.trainer or ("plain" if options.rehearse else trainers.kind())
    print(f"trainer: {which}{'; REHEARSAL ON A CPU: times mean nothing' if options.rehearse else ''}")
    found = parity(options, which) if options.parity else speed(options, which)
    words = {True: "met", False: "MISSED"}
    for row in found.get("rows", []):
        print(line(row))
    for name, goal in found["goals"].items():
        limit = f">= {goal['at_least']}" if "at_least" in goal else f"<= {goal['at_most']}"
        print(f"goal {words[goal['met']]:<7} {name}: {goal['value']} {limit}")
    return int(any("failed" in row for row in found.get("rows", [])))


if __name__ == "__main__":
    raise SystemExit(main())
