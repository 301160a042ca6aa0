"""What the token clock costs and what it brings on a trained model (`python -m tools.bench.token_clock [RUN]`).

Cost: CPU seconds per token and peak memory of reading a document with the clock, whole intervals in a call and token by token, as ratios to
the frozen model; bytes of the state per sequence, also of the 170M and 1.3B configurations (counted, not allocated).
Worth, if RUN is given: bits per byte of long held-out documents for a grid of learning rates, each level alone and all together; 0 is the
control. Writes tools/bench/results/token_clock.json.
"""

import argparse
import os
import statistics
import subprocess
import sys
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import torch

from hope_pt import data
from hope_pt.config import load
from hope_pt.config.schema import RunConfig, TokenClockConfig
from hope_pt.evals import documents, read_documents
from hope_pt.nn import HopeLM, state_bytes
from hope_pt.nn.fast_levels import level_matrices
from hope_pt.nn.token_clock import ClockedLM
from hope_pt.train.trained import load_trained
from tools.bench.common import ROOT, cpu_seconds, environment, peak_mib, write_results

PERIODS = (64, 256, 1024)
GRID = (0.0, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
ALONE = 1e-3
REPEATS = 5
LENGTH = 1024


def cost(config: RunConfig) -> dict[str, Any]:
    """CPU milliseconds a token, frozen and with the clock."""
    lm = HopeLM(config.model).requires_grad_(False)
    tokens = torch.randint(0, config.model.vocab_size, (1, LENGTH), generator=torch.Generator().manual_seed(0))
    clock = ClockedLM(lm, TokenClockConfig(periods=PERIODS, lr=(1e-6,) * len(PERIODS)))

    def in_pieces(model: HopeLM | ClockedLM, size: int, count: int):
        state = None
        for piece in tokens[:, : size * count].split(size, 1):
            _, state = model(piece, state=state, return_state=True)

    cases = {"whole": (LENGTH, 1), f"pieces of {PERIODS[0]}": (PERIODS[0], LENGTH // PERIODS[0]), "token by token": (1, 2 * PERIODS[0])}
    found: dict[str, Any] = {}
    for name, (size, count) in cases.items():
        frozen, clocked = (partial(in_pieces, model, size, count) for model in (lm, clock))
        clocked()
        # alternating, so that both meet the same machine
        pairs = [(cpu_seconds(frozen), cpu_seconds(clocked)) for _ in range(REPEATS)]
        found[name] = {
            "frozen_ms_per_token": round(1e3 * statistics.median(without for without, _ in pairs) / size / count, 4),
            "clock_ms_per_token": round(1e3 * statistics.median(with_clock for _, with_clock in pairs) / size / count, 4),
            "time_ratio": round(statistics.median(with_clock / without for without, with_clock in pairs), 2),
        }
        print(name, found[name], flush=True)
    return found


def peak(model: str) -> float:
    """MiB that reading one document of LENGTH tokens in one call adds at its peak; to be called in a process of its own."""
    config = load(ROOT / "configs" / "hope_tiny.toml").model
    lm = HopeLM(config).requires_grad_(False)
    clock = ClockedLM(lm, TokenClockConfig(periods=PERIODS, lr=(1e-6,) * len(PERIODS)))
    tokens = torch.zeros(1, LENGTH, dtype=torch.long)
    reader = lm if model == "frozen" else clock
    reader(tokens[:, : 2 * PERIODS[0]], return_state=True)
    return peak_mib(lambda: reader(tokens, return_state=True))


def in_fresh_process(model: str) -> float:
    """`peak` with a malloc that gives memory back."""
    malloc = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tools.bench.token_clock", "--peak", model]
    done = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True, env={**os.environ, **malloc})
    return round(float(done.stdout), 1)


def bytes_per_sequence(name: str) -> dict[str, float]:
    """MiB of one sequence's state: the memory, which the clock keeps twice, and the levels' changes and gradient sums."""
    config = load(ROOT / "configs" / f"{name}.toml").model
    lm, levels = HopeLM(config, device=torch.device("meta")), range(len(config.cms.periods))
    moved, sums = (4 * sum(layer.weight.numel() for layer in level_matrices(lm, chosen).values()) for chosen in (levels, levels[1:]))
    memory = state_bytes(config)
    parts = {"memory": memory, "levels": moved, "sums": sums, "with_clock": 2 * memory + moved + sums}
    return {part: round(size / 2**20, 1) for part, size in parts.items()}


def worth(run: Path) -> dict[str, Any]:
    """Bits per byte of held-out documents, by learning rate."""
    trained = load_trained(run)
    with closing(data.open_source(trained.config.data, split="heldout", vocab_size=trained.config.model.vocab_size)) as source:
        texts = documents(source, count=6, least=1536, most=3072)
        bytes_per_token = source.bytes_per_token
    values: dict[str, Any] = {"documents": [len(text) for text in texts], "step": trained.step, "periods": PERIODS}

    def read(lm: HopeLM | ClockedLM) -> dict[str, float]:
        found = read_documents(lm, texts, bytes_per_token=bytes_per_token, name="")
        return {key.removeprefix("eval/"): round(value, 5) for key, value in found.items()}

    values["frozen"] = read(trained.lm)
    print("frozen", values["frozen"]["bits_per_byte"], flush=True)
    for levels in ((0, 1, 2), (0,), (1,), (2,)):
        for lr in GRID if len(levels) == 3 else (ALONE,):
            clock = TokenClockConfig(periods=PERIODS, lr=tuple(lr if level in levels else 0.0 for level in range(3)))
            key = f"levels {','.join(map(str, levels))} lr {lr:g}"
            values[key] = read(ClockedLM(trained.lm, clock))
            print(key, values[key]["bits_per_byte"], flush=True)
    return values


def main() -> int:
    """Cost, sizes, and with a run its worth."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("run", nargs="?", type=Path)
    arguments.add_argument("--threads", type=int, default=1)
    arguments.add_argument("--peak", choices=["frozen", "clock"], help="print the peak memory of one reading and do nothing else")
    options = arguments.parse_args()
    torch.set_num_threads(options.threads)
    if options.peak:
        print(peak(options.peak))
        return 0
    results: dict[str, Any] = {"environment": environment(), "threads": options.threads, "periods": PERIODS}
    results["mib_per_sequence"] = {name: bytes_per_sequence(name) for name in ("hope_tiny", "hope_170m", "hope_1p3b")}
    print(results["mib_per_sequence"], flush=True)
    results["peak_mib_hope_tiny"] = {model: in_fresh_process(model) for model in ("frozen", "clock")}
    print(results["peak_mib_hope_tiny"], flush=True)
    results["cost_hope_tiny"] = cost(load(ROOT / "configs" / "hope_tiny.toml"))
    write_results("token_clock", results)
    if options.run:
        results["worth"] = worth(options.run)
    print(f"written: {write_results('token_clock', results)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
