"""The figures of a report as inline SVG: drawn by matplotlib's object interface, without global state, the same bytes every time."""

import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from hope_pt.report.curves import Curve

COLOURS = ("#0b6e6e", "#c8553d", "#5b5f97", "#d9a404", "#6a994e", "#8d6a9f", "#3a86c8", "#7f7f7f")
STYLE: dict[str, Any] = {
    "font.family": ["DejaVu Sans", "sans-serif"],
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#8a8f98",
    "axes.grid": True,
    "grid.color": "#e8eaee",
    "axes.axisbelow": True,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "legend.frameon": False,
    "lines.linewidth": 1.6,
    "svg.fonttype": "none",
}


def lines(curves: Sequence[Curve], *, key: str, title: str, unit: str, log: bool = False, smooth: bool = False, wide: bool = False) -> str:
    """`key` over steps, one line a curve; with `smooth` the raw line lies faintly behind its running mean. "" if nobody has the key."""
    shown = [(index, *curve.series(key)) for index, curve in enumerate(curves) if curve.series(key)[0]]
    if not shown:
        return ""

    def draw(axes: Axes) -> None:
        for index, steps, values in shown:
            colour = COLOURS[index % len(COLOURS)]
            if smooth and len(values) > 20:
                axes.plot(steps, values, color=colour, alpha=0.18, linewidth=0.8)
                values = running_mean(values, window=max(2, len(values) // 40)).tolist()
            axes.plot(steps, values, color=colour, label=curves[index].name, marker="o" if len(values) < 20 else None, markersize=3)
        if log:
            axes.set_yscale("log")
        axes.set_xlabel("step")
        axes.set_ylabel(unit)
        if len(curves) > 1:
            axes.legend()

    return _svg(draw, title=title, size=(9.6, 3.6) if wide else (4.7, 2.9))


def against_baselines(curves: Sequence[Curve], *, key: str, baselines: dict[str, float], title: str, unit: str) -> str:
    """Like `lines`, with a dashed horizontal line and its name for each baseline."""

    def draw(axes: Axes) -> None:
        for index, curve in enumerate(curves):
            steps, values = curve.series(key)
            if steps:
                axes.plot(steps, values, color=COLOURS[index % len(COLOURS)], label=curve.name, marker="o", markersize=3)
        for name, value in baselines.items():
            axes.axhline(value, color="#444", linestyle="--", linewidth=1)
            axes.annotate(f"{name} {value:.3f}", (1, value), xycoords=("axes fraction", "data"), ha="right", va="bottom", color="#444")
        axes.set_xlabel("step")
        axes.set_ylabel(unit)
        if axes.lines:
            axes.legend()

    return _svg(draw, title=title, size=(9.6, 3.6))


def by_context(curves: Sequence[Curve], *, title: str) -> str:
    """Final held-out loss against the number of tokens that the model has seen of the document."""
    prefix = "eval/loss_at_context/"
    shown = [(index, curve) for index, curve in enumerate(curves) if curve.keys(prefix)]
    if not shown:
        return ""

    def draw(axes: Axes) -> None:
        for index, curve in shown:
            points = []
            for key in sorted(curve.keys(prefix)):
                low, _, high = key.removeprefix(prefix).partition("-")
                points.append((math.sqrt(int(low) * int(high or low)), curve.last(key)))
            axes.plot(*zip(*points, strict=True), color=COLOURS[index % len(COLOURS)], label=curve.name, marker="o", markersize=3)
        axes.set_xscale("log", base=2)
        axes.set_xlabel("tokens of the document seen")
        axes.set_ylabel("nats / token")
        axes.legend()

    return _svg(draw, title=title, size=(9.6, 3.4))


def heat_map(curve: Curve, *, rows: Mapping[str, str], title: str, unit: str = "layer", log: bool = False) -> str:
    """Values of the keys `rows`, by the label of their row, as colour over row and step; "" where none of them was measured."""
    columns = {label: dict(zip(*curve.series(key), strict=True)) for label, key in rows.items()}
    columns = {label: column for label, column in columns.items() if column}
    if not columns:
        return ""
    steps = sorted(set().union(*columns.values()))
    # A value that was not finite was not written, and stays blank; so does zero where colours are logarithmic.
    values = np.array([[column.get(step, np.nan) for step in steps] for column in columns.values()])
    positive = values[values > 0]
    norm = LogNorm(positive.min(), positive.max()) if log and len(positive) else None

    def draw(axes: Axes) -> None:
        image = axes.imshow(values, aspect="auto", origin="lower", cmap="viridis", interpolation="nearest", norm=norm)
        axes.grid(visible=False)
        axes.set_yticks(range(len(columns)), list(columns))
        ticks = np.unique(np.linspace(0, len(steps) - 1, min(5, len(steps))).round().astype(int))
        axes.set_xticks(ticks, [f"{steps[tick]:,}" for tick in ticks])
        axes.set_xlabel("step")
        axes.set_ylabel(unit)
        axes.figure.colorbar(image, ax=axes, fraction=0.05, pad=0.02)

    return _svg(draw, title=title, size=(4.7, 1.6 + 0.12 * len(columns)))


def running_mean(values: Sequence[float], *, window: int) -> np.ndarray:
    """Mean of each value and the `window - 1` before it, as many as there are."""
    total = np.cumsum(np.concatenate([[0.0], np.asarray(values, dtype=float)]))
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(0, ends - window)
    return (total[ends] - total[starts]) / (ends - starts)


def _svg(draw, *, title: str, size: tuple[float, float]) -> str:
    """One figure with one pair of axes, drawn by `draw`."""
    # The salt makes the identifiers inside the picture differ between the pictures of a page, and repeat from page to page.
    style: Any = STYLE | {"svg.hashsalt": title}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.add_subplot()
        draw(axes)
        axes.set_title(title)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]
