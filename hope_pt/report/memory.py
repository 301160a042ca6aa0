"""The heat maps of a report: what the memories do per layer, and what the optimizer does to each CMS level and block."""

import re
from collections.abc import Mapping
from html import escape

from hope_pt.report import plots
from hope_pt.report.curves import Curve

MEMORY_MEASURES = {
    "eta_mean": "Inner learning rate, mean",
    "alpha_mean": "Retention, mean",
    "surprise": "Surprise (norm of the error at the anchor), mean",
    "surprise_p95": "Surprise, exceeded by 1 token in 20",
    "norm_ratio_max": "Memory norm, largest over its start",
    "drift": "Drift from the learned start",
}
UPDATE_MEASURES = {
    "update_ratio": ("relative update", "Length of one update over the length of the weights before it; logarithmic colours."),
    "drift": ("drift from the start", "Distance from the weights that the run began with, over their length; known to 1.6 %."),
    "cosine": ("cosine with the update before", "1: the same direction again; 0: unrelated; below 0: back. Known to 0.022."),
    "residual": ("distance from an isometry", "Of rules that orthogonalise: 0 where an update turns all directions by as much."),
}
_ROW = re.compile(r"^optim/(?:level(\d+)/block(\d+)|([a-z-]+))/(\w+)$")


def memory(run: Curve) -> str:
    """Memory diagnostics, layer over step; "" for a run without them."""
    maps = [plots.heat_map(run, rows=_layers(run, measure), title=title) for measure, title in MEMORY_MEASURES.items()]
    losses = [
        plots.lines([run], key="memory/token_loss", title="Loss of the same tokens, mean", unit="nats"),
        plots.lines([run], key="memory/token_loss_p95", title="Loss of the same tokens, exceeded by 1 in 20", unit="nats"),
    ]
    return row(*maps, *losses)


def updates(run: Curve) -> str:
    """Measurements of updates, block over step, a panel for each level; "" for a run without them."""
    parts = []
    for measure, (title, caption) in UPDATE_MEASURES.items():
        log = measure == "update_ratio"
        levels, others = _levels(run, measure)
        maps = [
            plots.heat_map(run, rows=rows, title=f"Level {level}: {title}", unit="block", log=log) for level, rows in sorted(levels.items())
        ]
        maps.append(plots.heat_map(run, rows=others, title=f"Others: {title}", unit="class", log=log))
        if any(maps):
            parts.append(f'<p class="sub">{escape(caption)}</p>{row(*maps)}')
    since = {key.removeprefix("optim/").removesuffix("/since"): key for key in run.keys("optim/level") if key.endswith("/since")}
    waiting = plots.heat_map(run, rows=since, title="Steps since the last update", unit="")
    if waiting:
        parts.append(f'<p class="sub">How long each level had been unchanged when a line was written.</p>{row(waiting)}')
    return "".join(parts)


def row(*pictures: str) -> str:
    """Pictures side by side; "" ones are left out."""
    shown = [f"<div>{picture}</div>" for picture in pictures if picture]
    return f'<div class="row">{"".join(shown)}</div>' if shown else ""


def _layers(run: Curve, measure: str) -> dict[str, str]:
    keys = {int(key.split("/")[1].removeprefix("layer")): key for key in run.keys("memory/layer") if key.endswith(f"/{measure}")}
    return {str(layer): keys[layer] for layer in sorted(keys)}


def _levels(run: Curve, measure: str) -> tuple[Mapping[int, dict[str, str]], dict[str, str]]:
    """Keys of a measure: by level and block, and by class."""
    levels: dict[int, dict[int, str]] = {}
    others = {}
    for key in run.keys("optim/"):
        found = _ROW.match(key)
        if found and found.group(4) == measure:
            if found.group(3):
                others[found.group(3)] = key
            else:
                levels.setdefault(int(found.group(1)), {})[int(found.group(2))] = key
    return {level: {str(block): keys[block] for block in sorted(keys)} for level, keys in levels.items()}, others
