"""The same optimizers on a small vision transformer and the handwritten digits that scikit-learn ships (1,797 images of 8 x 8).

Plain torch: 16 patches of 2 x 2, learned positions, blocks of attention in both directions and an MLP, the mean of the patches, a linear
head. The matrices of the blocks have the rule, everything else AdamW. One fixed stratified split: 1,197 images train, 240 choose the
rate by their loss, 360 are reported. Rates as in tools/optimizers/compare.py. Writes digits.json and digits.png, and prints the table.
`python -m tools.optimizers.digits`.
"""

import argparse
import functools
import math
import multiprocessing
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.optim import Optimizer

from hope_pt.config.optim import OptimConfig, OptimizerName
from hope_pt.optim import learning_rate
from hope_pt.optim.deep import DeepOptimizer
from hope_pt.optim.matrices import Matrices, View
from hope_pt.optim.rules import make_rule
from tools.bench.common import environment
from tools.optimizers import common
from tools.optimizers.common import OPTIMIZERS, RESULTS, Trial

CENTRES = dict.fromkeys(OPTIMIZERS, 2e-3)
WEIGHT_DECAY = 0.1


class Block(nn.Module):
    """x [B, T, D] -> [B, T, D]: attention in both directions, then an MLP, each on the norm of what it is added to."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.q, self.k, self.v, self.out = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.up, self.down = nn.Linear(width, 4 * width, bias=False), nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        n = self.norms[0](x)
        q, k, v = (layer(n).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norms[1](x))))


class VisionTransformer(nn.Module):
    """Images [B, 8, 8] -> logits [B, 10]."""

    def __init__(self, *, width: int = 64, heads: int = 4, depth: int = 2):
        super().__init__()
        self.patch = nn.Linear(4, width)
        self.position = nn.Parameter(0.3 * torch.randn(16, width))
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)
        for name, param in self.blocks.named_parameters():
            if param.ndim == 2:
                branches = 2 * depth if name.endswith(("out.weight", "down.weight")) else 1
                nn.init.normal_(param, std=1 / math.sqrt(param.shape[1] * branches))

    def forward(self, images: Tensor) -> Tensor:
        patches = images.unflatten(1, (4, 2)).unflatten(3, (4, 2)).transpose(2, 3).flatten(3).flatten(1, 2)
        x = self.patch(patches) + self.position
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x).mean(1))


@dataclass(frozen=True)
class Digits:
    """Images [N, 8, 8] in [0, 1] and labels [N] of the three parts."""

    train: tuple[Tensor, Tensor]
    choose: tuple[Tensor, Tensor]
    report: tuple[Tensor, Tensor]


@functools.cache
def digits() -> Digits:
    """The fixed split."""
    found = load_digits()
    images, labels = torch.tensor(found.images / 16, dtype=torch.float32), torch.tensor(found.target)
    rest, report = train_test_split(np.arange(len(labels)), test_size=360, stratify=labels, random_state=0)
    train, choose = train_test_split(rest, test_size=240, stratify=labels[rest], random_state=0)
    parts = [(images[part], labels[part]) for part in (train, choose, report)]
    return Digits(*parts)


def optimizers(model: nn.Module, *, name: OptimizerName, rate: float, base_rate: float, optim: OptimConfig) -> list[Optimizer]:
    """AdamW for everything, or for everything but the matrices of the blocks, which the rule `name` gets at `rate`."""
    matrices = [param for key, param in model.named_parameters() if key.startswith("blocks.") and param.ndim == 2]
    chosen = {id(param) for param in matrices}
    rest = [param for param in model.parameters() if id(param) not in chosen]
    if name == "adamw":
        groups = [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": rest, "weight_decay": 0.0}]
        return [torch.optim.AdamW(groups, lr=rate, betas=optim.betas, eps=optim.eps)]
    shapes = {param.shape: [other for other in matrices if other.shape == param.shape] for param in matrices}
    deep = [{"params": params, "rule": name, "lr": rate, "weight_decay": WEIGHT_DECAY} for params in shapes.values()]
    rule = make_rule(name, optim=optim)
    return [
        torch.optim.AdamW(rest, lr=base_rate, betas=optim.betas, eps=optim.eps, weight_decay=0.0),
        DeepOptimizer(deep, rules={name: rule}, matrices=[Matrices(View(0)) for _ in deep]),
    ]


@torch.no_grad()
def measure(model: nn.Module, part: tuple[Tensor, Tensor]) -> tuple[float, float]:
    """(cross entropy in nats, accuracy)."""
    logits = model(part[0])
    return float(F.cross_entropy(logits, part[1])), float((logits.argmax(-1) == part[1]).float().mean())


@dataclass(frozen=True)
class Settings:
    """Length of a run. every: steps between points of its curve."""

    steps: int
    batch: int = 64
    every: int = 10


def run(trial: Trial, *, base_rate: float, settings: Settings) -> dict[str, Any]:
    """Train one model; curve: (step, reported loss, reported accuracy). choose_loss is infinite for a diverged run."""
    torch.set_num_threads(1)
    torch.manual_seed(trial.seed)
    data, model = digits(), VisionTransformer()
    special = common.VARIANTS[trial.optimizer][1] if trial.optimizer in common.VARIANTS else {}
    optim = OptimConfig.model_validate({"warmup_steps": max(1, settings.steps // 10), "lr": 1.0, **special})
    inner = optimizers(model, name=common.rule(trial.optimizer), rate=trial.rate, base_rate=base_rate, optim=optim)
    peaks = [[group["lr"] for group in optimizer.param_groups] for optimizer in inner]
    generator = torch.Generator().manual_seed(trial.seed)
    order = torch.cat([torch.randperm(len(data.train[0]), generator=generator) for _ in range(1 + settings.steps * settings.batch // 1197)])
    curve = []
    for step in range(settings.steps):
        share = learning_rate(step, optim=optim, num_steps=settings.steps)
        for optimizer, rates in zip(inner, peaks, strict=True):
            for group, peak in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = peak * share
            optimizer.zero_grad()
        rows = order[step * settings.batch : (step + 1) * settings.batch]
        F.cross_entropy(model(data.train[0][rows]), data.train[1][rows]).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), optim.clip)
        for optimizer in inner:
            optimizer.step()
        if (step + 1) % settings.every == 0 or step + 1 == settings.steps:
            curve.append((step + 1, *measure(model, data.report)))
    choose = measure(model, data.choose)[0]
    return {"choose_loss": choose if math.isfinite(choose) else math.inf, "curve": curve}


def compare(
    *, settings: Settings, names: Sequence[str], seeds: int, extend: int, workers: int
) -> tuple[dict[str, dict[float, float]], dict[str, list[dict[str, Any]]]]:
    """Scores of seed 0 by optimizer and rate, and the runs of all seeds at every optimizer's best rate."""
    base_rate, found = 0.0, dict[Trial, dict[str, Any]]()
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:

        def run_all(trials: Sequence[Trial]) -> list[float]:
            missing = [trial for trial in trials if trial not in found]
            results = pool.map(functools.partial(run, base_rate=base_rate, settings=settings), missing)
            found.update(zip(missing, results, strict=True))
            return [found[trial]["choose_loss"] for trial in trials]

        scores = common.tune({"adamw": common.grid(CENTRES["adamw"])}, run_all=run_all, extend=extend)
        base_rate = common.best_rate(scores["adamw"])
        others = [name for name in names if name != "adamw"]
        scores |= common.tune({name: common.grid(CENTRES[name]) for name in others}, run_all=run_all, extend=extend)
        trials = {name: [Trial(name, common.best_rate(scores[name]), seed) for seed in range(seeds)] for name in scores}
        run_all([trial for group in trials.values() for trial in group])
    return scores, {name: [found[trial] for trial in group] for name, group in trials.items()}


def rows(scores: Mapping[str, Mapping[float, float]], runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """What the table and digits.json say of every optimizer."""
    return [
        {
            "optimizer": name,
            "accuracy": common.spread([one["curve"][-1][2] for one in found]),
            "loss": common.spread([one["curve"][-1][1] for one in found]),
            "rates": [{"rate": rate, "choose_loss": score} for rate, score in scores[name].items()],
            "best_rate": common.best_rate(scores[name]),
            "at_edge": common.at_edge(scores[name]),
            "curves": [[[round(value, 4) for value in point] for point in one["curve"]] for one in found],
        }
        for name, found in runs.items()
    ]


def table(found: Sequence[Mapping[str, Any]], *, scores: Mapping[str, Mapping[float, float]]) -> str:
    """Markdown, lowest reported loss first."""
    lines = []
    for row in sorted(found, key=lambda row: row["loss"]["mean"]):
        percent = {key: 100 * value for key, value in row["accuracy"].items()}
        tried = " ".join(f"{rate:.2g}" for rate in scores[row["optimizer"]])
        texts = [common.spread_text(percent, digits=1), common.spread_text(row["loss"])]
        lines.append([row["optimizer"], *texts, common.rate_text(scores[row["optimizer"]]), tried])
    return common.markdown(["optimizer", "accuracy, %", "loss", "best rate", "rates tried"], lines)


def draw(axes: Sequence[Axes], runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    """Loss and accuracy over steps."""
    for name, found in runs.items():
        curves = np.array([one["curve"] for one in found])
        common.band(axes[0], curves[0, :, 0], curves[:, :, 1], name=name)
        common.band(axes[1], curves[0, :, 0], 100 * curves[:, :, 2], name=name)
    axes[0].set(xlabel="step", ylabel="loss on 360 images, nats", yscale="log")
    axes[1].set(xlabel="step", ylabel="accuracy, %", ylim=(80, 100.5))
    axes[0].legend()


def main() -> int:
    """All runs, table, JSON and figure."""
    parser = argparse.ArgumentParser(description="Optimizers on a small vision transformer and scikit-learn's digits.")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--optimizers", type=common.optimizers, default=OPTIMIZERS, help="AdamW always runs")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--extend", type=int, default=2, help="rates beyond the edge of the grid, where the best lies on it")
    parser.add_argument("--workers", type=int, default=2, help="runs at once, one thread each")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    names, settings = arguments.optimizers, Settings(steps=arguments.steps)
    scores, runs = compare(settings=settings, names=names, seeds=arguments.seeds, extend=arguments.extend, workers=arguments.workers)
    found = rows(scores, runs)
    print(f"{settings.steps} steps of {settings.batch} images, {arguments.seeds} seeds\n\n{table(found, scores=scores)}")
    results = {"environment": environment(), "steps": settings.steps, "batch": settings.batch, "seeds": arguments.seeds}
    common.write("digits", {**results, "optimizers": found}, folder=arguments.out)
    common.save_figure(lambda axes: draw(axes, runs), path=arguments.out / "digits.png", panels=2, size=(11, 4.2))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
