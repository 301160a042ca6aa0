"""Stability trial (`make stability`): does the memory stay bounded at the peak learning rate, for both chunk presets and three seeds?

Trains the model of configs/hope_tiny.toml for 1,000 steps, learning rate at its peak after the warm-up,
then reads one sequence of 8,192 tokens. Each trial is a process of its own. Recorded: losses that are not finite, the largest loss
after warm-up, and the largest norm of any memory at any chunk end over its start (measured every 20 steps on held-out text, and over
the long sequence, before and after training). The bounded objective must stay finite and below 10; the literal one (`objective = "l2"`)
runs beside it with the first seed, whatever it does.
Writes tools/bench/results/stability.json; exit 1 if the bounded objective failed.
"""

import argparse
import json
import math
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch

from hope_pt import engine, nn
from hope_pt.config import RunConfig, load
from hope_pt.data import Batch, Source, open_source
from tools.bench.common import ROOT, environment, write_results

PRESETS = {"16/16": (16, 16), "64/256": (64, 256)}
OBJECTIVES = ("huber", "l2")
MAX_RATIO = 10.0
MEASURE_EVERY = 20


def _model(trainer: engine.TrainEngine) -> nn.HopeLM:
    """The plain model of a run in one process."""
    lm = trainer.to_lm()
    assert lm is not None
    return lm


def trial_config(arguments: argparse.Namespace) -> RunConfig:
    """hope_tiny with the trial's chunks, objective, seed and length."""
    chunk_mem, chunk_proj = PRESETS[arguments.preset]
    overrides = [
        f"name=stability-{arguments.objective}-{chunk_mem}-{chunk_proj}-{arguments.seed}",
        f"model.titans.chunk_mem={chunk_mem}",
        f"model.titans.chunk_proj={chunk_proj}",
        f"model.titans.objective={arguments.objective}",
        f"train.seed={arguments.seed}",
        f"train.steps={arguments.steps}",
        f"train.global_batch_size={arguments.batch}",
        f"engine.micro_batch_size={arguments.batch}",
        "engine.threads=1",
        "optim.min_lr_ratio=1.0",
        *arguments.set,
    ]
    return load(ROOT / "configs" / "hope_tiny.toml", overrides)


def windows(source: Source, *, first: np.ndarray, samples: int) -> Batch:
    """Rows of `samples` consecutive samples each, joined: [len(first), samples * seq_len] tokens."""
    rows = source.read((first[:, None] + np.arange(samples)).flatten())
    parts = (rows.tokens_BT, rows.targets_BT, rows.loss_mask_BT, rows.doc_start_BT)
    return Batch(*(part.reshape(len(first), -1) for part in parts))


def train_batches(source: Source, *, batch: int, samples: int, seed: int) -> Iterator[Batch]:
    """Endless random windows, reproducible."""
    rng = np.random.default_rng(seed)
    while True:
        yield windows(source, first=rng.integers(source.num_samples - samples, size=batch), samples=samples)


def norm_ratio(lm: nn.HopeLM, tokens_BT: torch.Tensor) -> float:
    """Largest norm of any memory, at any chunk end, over its start; infinite where it is not a number."""
    ratios = [value for key, value in nn.diagnostics(lm, tokens_BT).items() if key.endswith("/norm_ratio_max")]
    return max(ratio if math.isfinite(ratio) else math.inf for ratio in ratios)


def trial(arguments: argparse.Namespace) -> dict[str, Any]:
    """One training run and one long read."""
    config = trial_config(arguments)
    samples = arguments.length // config.data.seq_len
    train, heldout = (open_source(config.data, split=split, vocab_size=config.model.vocab_size) for split in ("train", "heldout"))
    probe_BT = windows(heldout, first=np.array([0, heldout.num_samples // 2]), samples=samples).tokens_BT
    long_BT = windows(heldout, first=np.array([0]), samples=arguments.long // config.data.seq_len).tokens_BT
    long_config = config.model_copy(update={"data": config.data.model_copy(update={"seq_len": arguments.length})})
    plan = engine.start(long_config, launch=engine.Launch(master_port=29600 + arguments.port))
    trainer = engine.TrainEngine(long_config, plan)
    losses, ratios, skipped = [], [], 0
    long_at_start = norm_ratio(_model(trainer), long_BT)
    for step, batch in zip(range(arguments.steps), train_batches(train, batch=arguments.batch, samples=samples, seed=arguments.seed)):
        result = trainer.step(batch)
        losses.append(result.loss)
        skipped += result.skipped
        if (step + 1) % MEASURE_EVERY == 0 or step == 0:
            ratios.append(norm_ratio(_model(trainer), probe_BT))
    lm = _model(trainer)
    with torch.no_grad():
        long_finite = bool(lm(long_BT)[0].isfinite().all())
    engine.stop(plan)
    settled = [loss for loss in losses[config.optim.warmup_steps :] if math.isfinite(loss)] or losses
    return {
        "objective": arguments.objective,
        "preset": arguments.preset,
        "seed": arguments.seed,
        "first_loss": losses[0],
        "last_loss": sum(losses[-20:]) / len(losses[-20:]),
        "worst_loss_after_warmup": max(settled),
        "not_finite": sum(not math.isfinite(loss) for loss in losses),
        "skipped_steps": skipped,
        "norm_ratio_max": max(ratios),
        "long_norm_ratio_at_start": long_at_start,
        "long_norm_ratio_max": norm_ratio(lm, long_BT),
        "long_finite": long_finite,
    }


def stable(row: dict[str, Any]) -> bool:
    """Nothing that is not finite, no norm above the limit."""
    ratios = (row["norm_ratio_max"], row["long_norm_ratio_at_start"], row["long_norm_ratio_max"])
    return row["long_finite"] and not row["not_finite"] and max(ratios) <= MAX_RATIO


def in_fresh_process(job: tuple[int, str, str, int], *, arguments: argparse.Namespace) -> dict[str, Any]:
    """One trial in its own process; a crash is a failed trial with its last line."""
    port, objective, preset, seed = job
    command = [sys.executable, "-m", "tools.stability", "--one", "--objective", objective, "--preset", preset, "--seed", str(seed)]
    for name in ("steps", "batch", "length", "long"):
        command += [f"--{name}", str(getattr(arguments, name))]
    for override in arguments.set:
        command += ["--set", override]
    done = subprocess.run([*command, "--port", str(port)], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"trial {objective} {preset} seed {seed} failed: {done.stderr.strip()[-2000:]}")
    row = json.loads(done.stdout.splitlines()[-1])
    print(
        f"{objective:<6} {preset:<7} seed {seed}  loss {row['first_loss']:.3f} -> {row['last_loss']:.3f}, "
        f"worst {row['worst_loss_after_warmup']:.3f}  norm x{row['norm_ratio_max']:.2f}, at {arguments.long} tokens "
        f"x{row['long_norm_ratio_at_start']:.2f} -> x{row['long_norm_ratio_max']:.2f}  "
        f"not finite {row['not_finite']}, skipped {row['skipped_steps']}  {'stable' if stable(row) else 'NOT STABLE'}",
        flush=True,
    )
    return row


def main() -> int:
    """All trials, or one of them in this process."""
    parser = argparse.ArgumentParser(description="Stability trial of the memory at the peak learning rate.")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--batch", type=int, default=1, help="sequences in a step")
    parser.add_argument("--length", type=int, default=1024, help="tokens of a training sequence")
    parser.add_argument("--long", type=int, default=8192, help="tokens of the long read after training")
    parser.add_argument("--jobs", type=int, default=2, help="trials at once, one thread each")
    parser.add_argument("--one", action="store_true", help="run one trial here and print JSON")
    parser.add_argument("--objective", choices=OBJECTIVES, default="huber")
    parser.add_argument("--preset", choices=PRESETS, default="16/16")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="configuration override, repeatable")
    parser.add_argument("--port", type=int, default=0, help="offset of the rendezvous port")
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(trial(arguments)))
        return 0
    seeds = {"huber": arguments.seeds, "l2": 1}
    cases = [(objective, preset, seed) for objective in OBJECTIVES for preset in PRESETS for seed in range(seeds[objective])]
    jobs = [(port, *case) for port, case in enumerate(cases)]
    with ThreadPoolExecutor(arguments.jobs) as pool:
        rows = list(pool.map(lambda job: in_fresh_process(job, arguments=arguments), jobs))
    setting = {name: getattr(arguments, name) for name in ("steps", "batch", "length", "long", "set")}
    path = write_results("stability", {"environment": environment(), **setting, "trials": rows})
    failed = [row for row in rows if row["objective"] == "huber" and not stable(row)]
    print(f"written to {path.relative_to(ROOT)}; bounded objective: {len(failed)} trials not stable")
    return int(bool(failed))


if __name__ == "__main__":
    raise SystemExit(main())
