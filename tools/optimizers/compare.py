"""Loss against tokens and against seconds of every optimizer, on configs/hope_tiny.toml and its corpus (`make optimizers`).

Each run is `hope train` in a process of its own with one thread, two at a time. All see the same number of tokens, less than the corpus
has: every batch is new text. Rates, for every optimizer with the same care (tools/optimizers/common.py): a grid of four, 2 apart, around
twice hope_tiny's rate, with seed 0, scored by the training loss of the last tenth of the steps; at most two rates further where the best
lies on the edge; then the remaining seeds (initial weights and order of the data) at the best. AdamW comes first, and what is tuned is
`optim.lr`. The others keep AdamW's best `optim.lr` for their embeddings, norms and gates, and what is tuned is `optim.matrix_lr`.

A run that has all its steps, or has diverged, is not run again: the command continues where it was stopped. `--budget STEPS,BATCH`;
sequences have the corpus's 256 tokens. Writes compare.json and compare.png, and prints the table.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from hope_pt import config as configuration
from hope_pt.config import RunConfig
from hope_pt.report import metrics
from hope_pt.report.plots import running_mean
from tools.bench.common import ROOT, environment
from tools.optimizers import common
from tools.optimizers.common import OPTIMIZERS, RESULTS, Trial

CENTRES = dict.fromkeys(OPTIMIZERS, 6e-3)
"""Second of the four rates: twice hope_tiny's, whose runs are longer. The same for all, because every rule's updates have about the root
mean square of AdamW's."""
TIMED_STEPS = 32
"""M3's slow momentum in the slowest level moves every 8 * 4 steps."""


@dataclass(frozen=True)
class Budget:
    """Length of every run, and the held-out sequences of its evaluation."""

    steps: int
    batch: int
    heldout: int = 195

    @property
    def name(self) -> str:
        """Directory of the runs of this length."""
        return f"{self.steps}x{self.batch}"


@dataclass(frozen=True)
class Run:
    """What is kept of a run: the training loss at every step, and the held-out loss; a diverged run has neither."""

    loss: np.ndarray
    heldout: float

    @property
    def score(self) -> float:
        """Mean training loss of the last tenth of the steps, infinite for a diverged run."""
        return float(self.loss[-max(1, len(self.loss) // 10) :].mean()) if len(self.loss) else math.inf


def run_config(trial: Trial, *, budget: Budget, base_rate: float, out: Path) -> RunConfig:
    """hope_tiny with the trial's rule, rate and seed; `base_rate`: of what has AdamW in every run."""
    name, rates = f"{trial.optimizer}-{trial.rate:.4g}", [f"optim.lr={trial.rate!r}"]
    if trial.optimizer != "adamw":
        name, rates = f"{name}-lr{base_rate:.4g}", [f"optim.lr={base_rate!r}", f"optim.matrix_lr={trial.rate!r}"]
    overrides = [
        f"name={name}-seed{trial.seed}",
        f'out="{out / budget.name}"',
        *common.overrides(trial.optimizer),
        *rates,
        f"optim.warmup_steps={max(1, budget.steps // 10)}",
        f"train.steps={budget.steps}",
        f"train.global_batch_size={budget.batch}",
        f"engine.micro_batch_size={budget.batch}",
        f"train.seed={trial.seed}",
        f"data.seed={trial.seed}",
        f'data.path="{ROOT / "data" / "tiny"}"',
        f"eval.sequences={budget.heldout}",
        "eval.every=0",
        "eval.at_start=false",
        "eval.passkey=false",
        "eval.diagnostics_every=0",
        "checkpoint.every=0",
    ]
    return configuration.load(ROOT / "configs" / "hope_tiny.toml", overrides)


def ended(config: RunConfig) -> str | None:
    """How the run of exactly this configuration ended, "done" or "diverged"; None if it has not."""
    directory = Path(config.out) / config.name
    try:
        state = json.loads((directory / "status.json").read_text())["state"]
        stored = configuration.loads((directory / "config.toml").read_text(), source=str(directory))
    except FileNotFoundError:
        return None
    return state if state in ("done", "diverged") and stored == config else None


def train(config: RunConfig) -> None:
    """The run in its own process, unless it has ended. RuntimeError with its last words if it fails, which divergence is not."""
    if ended(config):
        return
    file = Path(config.out) / f"{config.name}.toml"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(configuration.to_toml(config))
    began = time.perf_counter()
    done = _python("hope_pt", "train", str(file))
    state = ended(config)
    if state is None:
        raise RuntimeError(f"{config.name} failed: {done.stderr.strip()[-2000:]}")
    print(f"{config.name}: {state} after {time.perf_counter() - began:.0f} s, {load_run(config).score:.4f}", flush=True)


def _python(module: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, "-m", module, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True)


def load_run(config: RunConfig) -> Run:
    """What an ended run wrote."""
    if ended(config) == "diverged":
        return Run(loss=np.empty(0), heldout=math.inf)
    records = metrics.read(Path(config.out) / config.name / "metrics.jsonl")
    return Run(loss=np.array(metrics.series(records, key="loss")[1]), heldout=metrics.series(records, key="eval/loss")[1][-1])


def compare(
    *, budget: Budget, names: Sequence[str], seeds: int, extend: int, workers: int, out: Path
) -> tuple[dict[str, dict[float, float]], dict[str, list[Run]]]:
    """Scores of seed 0 by optimizer and rate, and the runs of all seeds at every optimizer's best rate."""
    base_rate = 0.0

    def run_all(trials: Sequence[Trial]) -> list[float]:
        configs = [run_config(trial, budget=budget, base_rate=base_rate, out=out) for trial in trials]
        with ThreadPoolExecutor(workers) as pool:
            list(pool.map(train, configs))
        return [load_run(config).score for config in configs]

    scores = common.tune({"adamw": common.grid(CENTRES["adamw"])}, run_all=run_all, extend=extend)
    base_rate = common.best_rate(scores["adamw"])
    others = [name for name in names if name != "adamw"]
    scores |= common.tune({name: common.grid(CENTRES[name]) for name in others}, run_all=run_all, extend=extend)
    trials = {name: [Trial(name, common.best_rate(scores[name]), seed) for seed in range(seeds)] for name in scores}
    run_all([trial for group in trials.values() for trial in group])
    runs = {
        name: [load_run(run_config(trial, budget=budget, base_rate=base_rate, out=out)) for trial in group]
        for name, group in trials.items()
    }
    return scores, runs


def time_optimizer(name: str, *, budget: Budget) -> dict[str, float]:
    """Seconds of a training step and of its optimizer (norm to update), means over `TIMED_STEPS` steps after two, in this process."""
    from hope_pt import data, engine

    config = run_config(Trial(name, 1e-4, 0), budget=budget, base_rate=1e-4, out=Path("runs"))
    plan = engine.start(config, launch=engine.Launch())
    trainer = engine.TrainEngine(config, plan)
    source = data.open_source(config.data, split="train", vocab_size=config.model.vocab_size)
    batch = source.read(np.arange(budget.batch))
    spent: list[float] = []

    def timed(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(**arguments: Any) -> Any:
            began = time.perf_counter()
            result = function(**arguments)
            spent.append(time.perf_counter() - began)
            return result

        return call

    trainer.optimizer.prepare = timed(trainer.optimizer.prepare)  # type: ignore[method-assign]
    trainer.optimizer.step = timed(trainer.optimizer.step)  # type: ignore[method-assign]
    for step in range(2 + TIMED_STEPS):
        if step == 2:
            spent.clear()
            began = time.perf_counter()
        trainer.step(batch)
    whole = time.perf_counter() - began
    engine.stop(plan)
    return {"step_s": whole / TIMED_STEPS, "optimizer_s": sum(spent) / TIMED_STEPS}


def timings(names: Sequence[str], *, budget: Budget) -> dict[str, dict[str, float]]:
    """`time_optimizer` of every optimizer, one process after another."""
    found = {}
    for name in names:
        done = _python("tools.optimizers.compare", "--time", name, "--budget", f"{budget.steps},{budget.batch}")
        if done.returncode:
            raise RuntimeError(f"timing of {name} failed: {done.stderr.strip()[-2000:]}")
        found[name] = json.loads(done.stdout.splitlines()[-1])
    return found


def rows(
    scores: Mapping[str, Mapping[float, float]], runs: Mapping[str, Sequence[Run]], times: Mapping[str, Mapping[str, float]]
) -> list[dict[str, Any]]:
    """What the table and compare.json say of every optimizer."""
    return [
        {
            "optimizer": name,
            "heldout_loss": common.spread([run.heldout for run in found]),
            "training_loss": common.spread([run.score for run in found]),
            "rates": [{"rate": rate, "training_loss": score} for rate, score in scores[name].items()],
            "best_rate": common.best_rate(scores[name]),
            "at_edge": common.at_edge(scores[name]),
            **times[name],
        }
        for name, found in runs.items()
    ]


def table(found: Sequence[Mapping[str, Any]], *, scores: Mapping[str, Mapping[float, float]]) -> str:
    """Markdown, best held-out loss first."""
    columns = ["optimizer", "held-out loss", "training loss, last tenth", "best rate", "rates tried", "ms of a step", "of the optimizer"]
    lines = []
    for row in sorted(found, key=lambda row: row["heldout_loss"]["mean"]):
        tried = " ".join(f"{rate:.2g}" for rate in scores[row["optimizer"]])
        losses = [common.spread_text(row[key]) for key in ("heldout_loss", "training_loss")]
        times = [f"{1000 * row[key]:.1f}" for key in ("step_s", "optimizer_s")]
        lines.append([row["optimizer"], *losses, common.rate_text(scores[row["optimizer"]]), tried, *times])
    return common.markdown(columns, lines)


def smooth(runs: Sequence[Run]) -> np.ndarray:
    """Running means of the training losses, [seeds that did not diverge, steps]."""
    losses = [run.loss for run in runs if len(run.loss)]
    return np.array([running_mean(loss.tolist(), window=max(1, len(loss) // 15)) for loss in losses], ndmin=2)


def draw(axes: Sequence[Axes], runs: Mapping[str, Sequence[Run]], *, step_s: Mapping[str, float], tokens_per_step: int) -> None:
    """Loss against tokens and against seconds: steps times `step_s`, which was measured with nothing beside it."""
    lows, highs = [], []
    for name, found in runs.items():
        losses = smooth(found)
        if not losses.size:
            continue
        start = losses.shape[1] // 12
        steps = np.arange(1, losses.shape[1] + 1)
        common.band(axes[0], (steps * tokens_per_step / 1e6)[start:], losses[:, start:], name=name)
        common.band(axes[1], (steps * step_s[name])[start:], losses[:, start:], name=name)
        lows.append(losses.min())
        highs.append(losses[:, losses.shape[1] // 6].max())
    for panel, label in zip(axes, ("million tokens", "seconds of training, one thread")):
        panel.set(xlabel=label, ylabel="training loss, nats a token (running mean)")
        panel.set_ylim(min(lows) - 0.05, max(highs))
    axes[0].legend()


def budget_of(text: str) -> Budget:
    """Argument "STEPS,BATCH"; ArgumentTypeError unless these are two numbers above 0."""
    parts = text.split(",")
    if len(parts) != 2 or not all(part.isdecimal() and int(part) for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r} is not STEPS,BATCH, two numbers above 0; for example 220,8")
    return Budget(int(parts[0]), int(parts[1]))


def main() -> int:
    """All runs that are missing, then table, JSON and figure."""
    parser = argparse.ArgumentParser(description="Loss of every optimizer on the small configuration, equal tokens, tuned rates.")
    parser.add_argument("--budget", type=budget_of, default=Budget(220, 8), help="steps,sequences in a step")
    parser.add_argument("--optimizers", type=common.optimizers, default=OPTIMIZERS, help="AdamW always runs")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--extend", type=int, default=2, help="rates beyond the edge of the grid, where the best lies on it")
    parser.add_argument("--workers", type=int, default=2, help="runs at once, one thread each")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "optimizers")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--time", choices=OPTIMIZERS, help="only time this optimizer, here, and print JSON")
    arguments = parser.parse_args()
    budget = arguments.budget
    if arguments.time:
        print(json.dumps(time_optimizer(arguments.time, budget=budget)))
        return 0
    names = ["adamw", *(name for name in arguments.optimizers if name != "adamw")]
    scores, runs = compare(
        budget=budget, names=names, seeds=arguments.seeds, extend=arguments.extend, workers=arguments.workers, out=arguments.runs
    )
    found = rows(scores, runs, timings(names, budget=budget))
    tokens = budget.batch * 256
    print(f"\n{budget.steps} steps of {tokens:,} tokens, {arguments.seeds} seeds\n\n{table(found, scores=scores)}")
    setting = {"steps": budget.steps, "tokens_per_step": tokens, "seeds": arguments.seeds, "workers": arguments.workers}
    curves = {name: [row.round(4).tolist() for row in smooth(group)[:, :: max(1, budget.steps // 50)]] for name, group in runs.items()}
    results = {"environment": environment(), **setting, "optimizers": found, "smoothed_training_loss": curves}
    common.write("compare", results, folder=arguments.out)
    path = arguments.out / "compare.png"
    step_s = {row["optimizer"]: row["step_s"] for row in found}
    common.save_figure(lambda axes: draw(axes, runs, step_s=step_s, tokens_per_step=tokens), path=path, panels=2, size=(11, 4.2))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
