"""CPU benchmark: a HOPE block beside a transformer block of equal parameters, forward and backward, batch 1, fp32 (`make bench`).

Speed: both blocks in one process, their iterations interleaved, median tokens per CPU-second. Memory: one fresh process a case, peak
resident memory added by one forward and backward. Linearity: HOPE alone at growing lengths, one fresh process each. Width 256, 4 heads;
HOPE with three CMS levels of 192; the transformer (SDPA, RoPE, one SwiGLU level) gets the hidden width that makes the sizes equal.
Writes tools/bench/results/cpu.json. `python -m tools.bench.cpu [--quick] [--threads N] [--check]`; --check exits 1 if a goal is missed.
"""

import argparse
import json
import statistics
import subprocess
import sys
from typing import Any

import torch
from torch import nn

from hope_pt.config import ModelConfig
from hope_pt.config.schema import CMSConfig, TitansConfig
from hope_pt.nn import HopeBlock
from hope_pt.nn.init import init_parameters
from tools.bench.common import ROOT, cpu_seconds, environment, peak_mib, write_results

WIDTH, HEADS = 256, 4
PRESETS = {"hope": (64, 256), "hope_16": (16, 16)}
LENGTHS = (512, 2048, 8192)
LONG = (2048, 4096, 8192, 16384, 32768)
GOAL_SPEED = {2048: 1.0, 8192: 2.0}
"""Times the transformer's tokens per CPU-second, by length; what has no entry is shown and not demanded."""
GOAL_MEMORY = {2048: 2.0}
GOAL_LINEAR = 1.25


def build(case: str) -> HopeBlock:
    """The block of a case: "hope" (chunks 64/256), "hope_16" (chunks 16/16) or "transformer", with a model's initial values."""
    config = _hope_config(case) if case in PRESETS else _transformer_config(8)
    block = HopeBlock(config)
    if case not in PRESETS:
        goal = _size(HopeBlock(_hope_config("hope")))
        config = _transformer_config(8 + round((goal - _size(block)) / (3 * WIDTH)))
        block = HopeBlock(config)
    init_parameters(block, config=config, seed=0)
    return block


def _hope_config(case: str) -> ModelConfig:
    chunk_mem, chunk_proj = PRESETS[case]
    titans = TitansConfig(chunk_mem=chunk_mem, chunk_proj=chunk_proj)
    cms = CMSConfig(hidden=192, periods=(1, 4, 16))
    return ModelConfig(vocab_size=1024, num_layers=1, width=WIDTH, num_heads=HEADS, titans=titans, cms=cms)


def _transformer_config(hidden: int) -> ModelConfig:
    cms = CMSConfig(hidden=hidden, periods=(1,))
    return ModelConfig(vocab_size=1024, num_layers=1, width=WIDTH, num_heads=HEADS, mixer="attention", cms=cms)


def _size(block: nn.Module) -> int:
    return sum(parameter.numel() for parameter in block.parameters())


def step(block: HopeBlock, x_BTD: torch.Tensor) -> None:
    """One forward and backward, with gradients of the input and of every parameter."""
    block.zero_grad(set_to_none=True)
    x_BTD.grad = None
    y_BTD, _ = block(x_BTD)
    y_BTD.square().mean().backward()


def inputs(length: int) -> torch.Tensor:
    """[1, length, WIDTH] fp32, reproducible."""
    return torch.randn(1, length, WIDTH, generator=torch.Generator().manual_seed(1), requires_grad=True)


def measure_speed(length: int, *, rounds: int) -> dict[str, dict[str, Any]]:
    """Per case: tokens per CPU-second of the median iteration, and of every iteration."""
    blocks = {case: build(case) for case in (*PRESETS, "transformer")}
    x_BTD = inputs(length)
    seconds: dict[str, list[float]] = {case: [] for case in blocks}
    for iteration in range(rounds + 1):
        for case, block in blocks.items():
            spent = cpu_seconds(lambda block=block: step(block, x_BTD))  # type: ignore[misc]
            if iteration:  # the first warms up
                seconds[case].append(spent)
    return {
        case: {
            "parameters": _size(blocks[case]),
            "tokens_per_cpu_s": round(length / statistics.median(spent)),
            "iterations_cpu_s": [round(s, 4) for s in spent],
        }
        for case, spent in seconds.items()
    }


def measure_memory(case: str, length: int) -> dict[str, float]:
    """Peak MiB and CPU seconds of one step; a short step before it loads what libraries allocate once."""
    block, x_BTD = build(case), inputs(length)
    step(block, inputs(256))
    seconds: list[float] = []
    mib = peak_mib(lambda: seconds.append(cpu_seconds(lambda: step(block, x_BTD))))
    return {"peak_mib": round(mib, 1), "cpu_s": round(seconds[0], 4)}


def in_fresh_process(case: str, length: int, *, threads: int) -> dict[str, float]:
    """`measure_memory` in its own process."""
    command = [sys.executable, "-m", "tools.bench.cpu", "--case", case, "--length", str(length), "--threads", str(threads)]
    return json.loads(subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout)


def run(*, threads: int, quick: bool) -> dict[str, Any]:
    """All measurements, with the ratios and whether each goal is met."""
    results: dict[str, Any] = {"environment": environment(), "threads": threads, "width": WIDTH, "heads": HEADS, "speed": {}, "memory": {}}
    for length in LENGTHS:
        results["speed"][length] = measure_speed(length, rounds=3 if quick or length > 2048 else 9)
        samples = 1 if quick else 3
        results["memory"][length] = {
            case: statistics.median(in_fresh_process(case, length, threads=threads)["peak_mib"] for _ in range(samples))
            for case in (*PRESETS, "transformer")
        }
    lengths = LONG[:3] if quick else LONG
    results["linearity"] = {length: in_fresh_process("hope", length, threads=threads) for length in lengths}
    results["goals"] = goals(results)
    return results


def goals(results: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Name -> value, limit, met. The goals hold for the fast preset ("hope")."""
    found: dict[str, dict[str, Any]] = {}
    for length in LENGTHS:
        speed, memory = results["speed"][length], results["memory"][length]
        ratio = speed["hope"]["tokens_per_cpu_s"] / speed["transformer"]["tokens_per_cpu_s"]
        if length in GOAL_SPEED:
            goal = GOAL_SPEED[length]
            found[f"speed ratio at {length}"] = {"value": round(ratio, 3), "at_least": goal, "met": ratio >= goal}
        ratio = memory["hope"] / memory["transformer"]
        if length in GOAL_MEMORY:
            goal = GOAL_MEMORY[length]
            found[f"memory ratio at {length}"] = {"value": round(ratio, 3), "at_most": goal, "met": ratio <= goal}
    per_token = {length: row["cpu_s"] / length for length, row in results["linearity"].items()}
    ratio = per_token[max(per_token)] / per_token[min(per_token)]
    name = f"time per token at {max(per_token)} over {min(per_token)}"
    found[name] = {"value": round(ratio, 3), "at_most": GOAL_LINEAR, "met": ratio <= GOAL_LINEAR}
    return found


def show(results: dict[str, Any]) -> None:
    """Tables on standard output."""
    print(f"width {WIDTH}, {HEADS} heads, batch 1, fp32, {results['threads']} thread(s), {results['environment']['cpu']}")
    print(f"{'case':<12} {'T':>6} {'parameters':>11} {'tokens/CPU-s':>13} {'x transformer':>14} {'peak MiB':>9} {'x transformer':>14}")
    for length in LENGTHS:
        speed, memory = results["speed"][length], results["memory"][length]
        for case, row in speed.items():
            faster = row["tokens_per_cpu_s"] / speed["transformer"]["tokens_per_cpu_s"]
            larger = memory[case] / memory["transformer"]
            figures = f"{row['tokens_per_cpu_s']:>13,} {faster:>14.2f} {memory[case]:>9.0f} {larger:>14.2f}"
            print(f"{case:<12} {length:>6} {row['parameters']:>11,} {figures}")
    print("\nhope at growing length")
    for length, row in results["linearity"].items():
        print(f"  T {length:>6}: {1e6 * row['cpu_s'] / length:>7.1f} us/token {1024 * row['peak_mib'] / length:>7.1f} KiB/token")
    print("\ngoals")
    for name, goal in results["goals"].items():
        limit = f">= {goal['at_least']}" if "at_least" in goal else f"<= {goal['at_most']}"
        print(f"  {'met   ' if goal['met'] else 'MISSED'} {name}: {goal['value']} ({limit})")


def main() -> int:
    """Run all, or one case in this process (how the runner calls itself)."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of torch")
    parser.add_argument("--quick", action="store_true", help="fewer rounds, shorter lengths, no results file")
    parser.add_argument("--check", action="store_true", help="exit 1 if a goal is missed")
    parser.add_argument("--case", choices=[*PRESETS, "transformer"], help="measure the memory of one case and print JSON")
    parser.add_argument("--length", type=int, default=2048, help="tokens, with --case")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.case:
        print(json.dumps(measure_memory(arguments.case, arguments.length)))
        return 0
    results = run(threads=arguments.threads, quick=arguments.quick)
    show(results)
    if not arguments.quick:
        print(f"\nwritten to {write_results('cpu', results).relative_to(ROOT)}")
    return int(arguments.check and not all(goal["met"] for goal in results["goals"].values()))


if __name__ == "__main__":
    raise SystemExit(main())
