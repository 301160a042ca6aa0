"""What the optimizer experiments share: names and colours, the search for a rate, mean and range over seeds, tables, figures.

Every experiment tunes one learning rate per optimizer with seed 0 on a grid of equal ratios, goes on beyond the grid's edge where the
best rate lies on it, and runs the remaining seeds at the best rate. Results go to docs/results/optimizers.
"""

import argparse
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from hope_pt.config.optim import OptimizerName
from hope_pt.errors import ConfigError
from tools.bench.common import ROOT, write_results

RESULTS = ROOT / "docs" / "results" / "optimizers"
OPTIMIZERS = ("adamw", "muon", "m3", "m3_unscaled", "momentum", "delta_momentum", "deep_momentum")
VARIANTS: dict[str, tuple[OptimizerName, dict[str, dict[str, Any]]]] = {"m3_unscaled": ("m3", {"m3": {"second_moment": False}})}
"""Names that are no rule but one with other settings: the rule, and sections of OptimConfig."""
COLOURS = {
    "adamw": "#000000",
    "muon": "#0072b2",
    "m3": "#d55e00",
    "m3_unscaled": "#e69f00",
    "momentum": "#56b4e9",
    "delta_momentum": "#009e73",
    "deep_momentum": "#cc79a7",
}
"""Of Okabe and Ito's palette, which colour-blind readers can tell apart."""
STYLE = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e8eaee",
    "axes.axisbelow": True,
    "legend.frameon": False,
    "lines.linewidth": 1.5,
}


def optimizers(text: str) -> tuple[str, ...]:
    """Argument "NAME,NAME"; ArgumentTypeError for a name that is not of `OPTIMIZERS`."""
    names = tuple(text.split(","))
    unknown = [name for name in names if name not in OPTIMIZERS]
    if unknown:
        raise argparse.ArgumentTypeError(f"unknown optimizer {unknown[0]!r}; choose from {', '.join(OPTIMIZERS)}")
    return names


def rule(name: str) -> OptimizerName:
    """The update rule behind a name of `OPTIMIZERS`."""
    found: Any = VARIANTS[name][0] if name in VARIANTS else name
    return found


def overrides(name: str) -> list[str]:
    """The overrides of a configuration that choose a name of `OPTIMIZERS`."""
    sections = VARIANTS[name][1] if name in VARIANTS else {}
    settings = [f"optim.{section}.{key}={json.dumps(value)}" for section, found in sections.items() for key, value in found.items()]
    return [f"optim.name={rule(name)}", *settings]


@dataclass(frozen=True)
class Trial:
    """One run: the rule of the matrices, the rate that is tuned, and the seed."""

    optimizer: str
    rate: float
    seed: int


RunAll = Callable[[Sequence[Trial]], Sequence[float]]
"""Runs trials, some at once, and gives the score of each; lower is better, infinite is diverged."""


def grid(centre: float, *, size: int = 4, ratio: float = 2.0) -> tuple[float, ...]:
    """`size` rates of equal ratio, ascending; `centre` is the second: a rate too high costs more than one too low."""
    return tuple(centre * ratio ** (index - 1) for index in range(size))


def best_rate(scores: Mapping[float, float]) -> float:
    """The rate of the lowest score. ConfigError where every rate diverged."""
    finite = {rate: score for rate, score in scores.items() if math.isfinite(score)}
    if not finite:
        raise ConfigError(f"all rates diverged: {', '.join(f'{rate:.3g}' for rate in scores)}; give lower ones")
    return min(finite, key=lambda rate: finite[rate])


def at_edge(scores: Mapping[float, float]) -> bool:
    """Whether the best rate is the lowest or the highest that was tried."""
    return best_rate(scores) in (min(scores), max(scores))


def beyond_edge(scores: Mapping[float, float]) -> float | None:
    """The next rate beyond the edge that the best rate lies on; None where it lies inside."""
    if len(scores) < 2 or not at_edge(scores):
        return None
    ascending = sorted(scores)
    if best_rate(scores) == ascending[0]:
        return ascending[0] ** 2 / ascending[1]
    return ascending[-1] ** 2 / ascending[-2]


def tune(grids: Mapping[str, Sequence[float]], *, run_all: RunAll, extend: int) -> dict[str, dict[float, float]]:
    """Scores of seed 0 by optimizer and rate: the grids, then at most `extend` rates beyond an edge each."""
    scores: dict[str, dict[float, float]] = {name: {} for name in grids}
    trials = [Trial(name, rate, 0) for name, rates in grids.items() for rate in rates]
    for _ in range(extend + 1):
        for trial, score in zip(trials, run_all(trials), strict=True):
            scores[trial.optimizer][trial.rate] = score
        further = {name: beyond_edge(found) for name, found in scores.items()}
        trials = [Trial(name, rate, 0) for name, rate in further.items() if rate is not None]
        if not trials:
            break
    return {name: dict(sorted(found.items())) for name, found in scores.items()}


def spread(values: Sequence[float]) -> dict[str, float]:
    """Mean, lowest and highest."""
    return {"mean": float(np.mean(values)), "min": float(np.min(values)), "max": float(np.max(values))}


def spread_text(found: Mapping[str, float], *, digits: int = 3) -> str:
    """The text "mean (lowest to highest)"."""
    return f"{found['mean']:.{digits}f} ({found['min']:.{digits}f} to {found['max']:.{digits}f})"


def rate_text(scores: Mapping[float, float]) -> str:
    """The best rate, and whether it lies at the edge of what was tried."""
    return f"{best_rate(scores):.2g}{' (edge)' if at_edge(scores) else ''}"


def markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def band(axes: Axes, x: np.ndarray, values: np.ndarray, *, name: str) -> None:
    """Mean over the first axis of `values` [seeds, points] as a line, their range as a band; `x` [points]."""
    axes.plot(x, values.mean(0), color=COLOURS[name], label=name)
    axes.fill_between(x, values.min(0), values.max(0), color=COLOURS[name], alpha=0.2, linewidth=0)


def save_figure(draw: Callable[[Sequence[Axes]], None], *, path: Path, panels: int, size: tuple[float, float]) -> None:
    """A PNG of `panels` panels in a row, the same bytes every time."""
    style: Any = STYLE
    with matplotlib.rc_context(style):
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.subplots(1, panels, squeeze=False)[0]
        draw(list(axes))
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=110, metadata={"Software": None})


def write(name: str, results: dict[str, Any], *, folder: Path) -> Path:
    """FOLDER/NAME.json; numbers that are not finite become null."""
    return write_results(name, _finite(results), folder=folder)


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
