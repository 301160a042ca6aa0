"""The toy problem of NL section 4.4, "long context in optimizers" (eq. 53, figure 4): momentum with and without the delta term.

    psi(r, theta) = r^2 + k (r - theta + a sin(w r))^2        from (r, theta) = (-3.5, 2), until it converges; minimum 0 at (0, 0)

Given there: the function, the start, the two methods, and that delta momentum "finds the solution faster". Not given: k, a, w, the rates,
the decay, and how the gradient enters the delta term. So a grid of k, a and w is run, every method at its best rate for each (with
c = 0.9, and with c tuned too), with the methods

    gradient descent   W += -lr g                                                  the control: no momentum at all
    momentum           m <- c m - lr g                          W += m
    delta (scalar)     m <- m (c - lr g.g) - lr g                                  eq. 49 with the inner step size that its derivation has
    delta (unit)       m <- m (c I - d u^T u) - lr g, u = g / |g|                  this project's form (optim.name = "delta_momentum")
    delta (literal)    m <- m (c - g.g) - lr g                                     eq. 49 as printed

A run has converged at the first step from which psi stays below 1e-3. Writes toy.json and toy.png. `python -m tools.optimizers.toy`.
"""

import argparse
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from tools.bench.common import environment
from tools.optimizers.common import RESULTS, markdown, save_figure, write

START = (-3.5, 2.0)
BELOW = 1e-3
RATES = np.geomspace(1e-5, 1.0, 76)
DECAYS = (0.9, 0.5, 0.8, 0.95)
"""c: the first is the usual one."""
SETTINGS = tuple(itertools.product((1.0, 5.0, 20.0), (0.25, 0.5, 1.0), (1.0, 3.0, 6.0)))
"""k, a and w. Ours: the paper names none."""
SHOWN = (1.0, 0.5, 1.0)
"""Drawn: one where the delta term helps at c = 0.9."""

Method = Callable[[np.ndarray, np.ndarray, np.ndarray, np.ndarray], np.ndarray]
"""(momentum [R, 2], gradient [R, 2], rates [R, 1], decays [R, 1]) -> the new momentum, which is added to the parameters."""


def psi(point: np.ndarray, setting: Sequence[float]) -> np.ndarray:
    """NL eq. 53 at points [..., 2] -> [...]."""
    k, a, w = setting
    r, theta = point[..., 0], point[..., 1]
    return r**2 + k * (r - theta + a * np.sin(w * r)) ** 2


def gradient(point: np.ndarray, setting: Sequence[float]) -> np.ndarray:
    """The gradient of `psi`, [..., 2]."""
    k, a, w = setting
    r, theta = point[..., 0], point[..., 1]
    inner = 2 * k * (r - theta + a * np.sin(w * r))
    return np.stack([2 * r + inner * (1 + a * w * np.cos(w * r)), -inner], -1)


def dot(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """[R, 1]."""
    return (left * right).sum(-1, keepdims=True)


def delta_unit(m: np.ndarray, g: np.ndarray, lr: np.ndarray, c: np.ndarray) -> np.ndarray:
    """Delta momentum (d = 1) of a row vector with the gradient at length 1: what m holds along g is taken away, the rest decays."""
    unit = g / np.maximum(np.sqrt(dot(g, g)), 1e-30)
    return c * m - dot(m, unit) * unit - lr * g


METHODS: dict[str, Method] = {
    "gradient descent": lambda m, g, lr, c: -lr * g,
    "momentum": lambda m, g, lr, c: c * m - lr * g,
    "delta (scalar)": lambda m, g, lr, c: m * (c - lr * dot(g, g)) - lr * g,
    "delta (unit)": delta_unit,
    "delta (literal)": lambda m, g, lr, c: m * (c - dot(g, g)) - lr * g,
}
COLOURS = dict(zip(METHODS, ("#999999", "#000000", "#0072b2", "#009e73", "#d55e00"), strict=True))


def descend(method: Method, setting: Sequence[float], choices: Sequence[tuple[float, float]], *, steps: int) -> np.ndarray:
    """Paths [steps + 1, R, 2] from the start, one for each (rate, decay); a path that leaves the numbers ends in infinities."""
    lr, decay = (column[:, None] for column in np.array(choices).T)
    point, m = np.tile(START, (len(choices), 1)), np.zeros((len(choices), 2))
    path = [point]
    with np.errstate(all="ignore"):
        for _ in range(steps):
            m = method(m, gradient(point, setting), lr, decay)
            point = point + m
            path.append(point)
    return np.stack(path)


def steps_to_converge(values: np.ndarray) -> np.ndarray:
    """First step from which `values` [steps + 1, R] stay below the threshold; steps + 1 where they do not at the end."""
    with np.errstate(invalid="ignore"):
        above = ~(values < BELOW)
    return np.where(above.any(0), len(values) - above[::-1].argmax(0), 0)


def sweep(*, steps: int, decays: Sequence[float], settings: Sequence[Sequence[float]] = SETTINGS) -> list[dict[str, Any]]:
    """For every setting and method the steps at the best rate and decay, and these; None where none converges."""
    choices = list(itertools.product(RATES.tolist(), decays))
    rows = []
    for setting in settings:
        row: dict[str, Any] = dict(zip(("k", "a", "w"), setting, strict=True))
        for name, method in METHODS.items():
            with np.errstate(all="ignore"):
                taken = steps_to_converge(psi(descend(method, setting, choices, steps=steps), setting))
            best = int(taken.argmin())
            rate, decay = choices[best]
            found = {"steps": int(taken[best]), "rate": rate, "decay": decay}
            row[name] = found if found["steps"] <= steps else dict.fromkeys(found)
        rows.append(row)
    return rows


def counts(rows: Sequence[dict[str, Any]], *, method: str, other: str) -> tuple[int, int, int]:
    """In how many settings `method` needs fewer, as many and more steps than `other`; not converging is more."""
    pairs = [tuple(row[name]["steps"] or float("inf") for name in (method, other)) for row in rows]
    return sum(x < y for x, y in pairs), sum(x == y for x, y in pairs), sum(x > y for x, y in pairs)


def median_steps(rows: Sequence[dict[str, Any]], *, method: str) -> float:
    """Median over the settings; infinite where most do not converge."""
    return float(np.median([row[method]["steps"] or np.inf for row in rows]))


def table(rows: Sequence[dict[str, Any]]) -> str:
    """One line a method: where it converges, how fast, and beside momentum."""
    lines = []
    for name in METHODS:
        found = sum(row[name]["steps"] is not None for row in rows)
        compared = " / ".join(map(str, counts(rows, method=name, other="momentum")))
        lines.append([name, f"{found} of {len(rows)}", f"{median_steps(rows, method=name):g}", compared])
    return markdown(["method", "settings that converge", "median steps", "fewer / equal / more than momentum"], lines)


def draw(axes: Sequence[Axes], rows: Sequence[dict[str, Any]], *, steps: int) -> None:
    """Paths over the contours, psi over steps, and steps in every setting, sorted."""
    shown = next(row for row in rows if (row["k"], row["a"], row["w"]) == SHOWN)
    r, theta = np.meshgrid(np.linspace(-4, 2, 240), np.linspace(-4, 3, 240))
    axes[0].contour(r, theta, np.log1p(psi(np.stack([r, theta], -1), SHOWN)), levels=14, colors="#c8ccd2", linewidths=0.6)
    for name, method in METHODS.items():
        if shown[name]["steps"] is not None:
            choice = (shown[name]["rate"], shown[name]["decay"])
            path = descend(method, SHOWN, [choice], steps=steps)[: shown[name]["steps"] + 1, 0]
            axes[0].plot(*path.T, color=COLOURS[name], label=name, linewidth=1, marker=".", markersize=2)
            axes[1].semilogy(psi(path, SHOWN), color=COLOURS[name])
        taken = sorted(row[name]["steps"] or steps for row in rows)
        axes[2].semilogy(taken, color=COLOURS[name], label=name)
    axes[0].plot(0, 0, marker="*", color="#d5a400", markersize=10)
    axes[0].set(xlabel="r", ylabel="theta", title=f"k = {SHOWN[0]:g}, a = {SHOWN[1]:g}, w = {SHOWN[2]:g}, each at its best rate")
    axes[1].set(xlabel="step", ylabel="psi", title="until it converges")
    axes[2].set(xlabel="setting (sorted for each method)", ylabel=f"steps, {steps} = never", title=f"{len(rows)} settings, c = {DECAYS[0]}")
    axes[2].legend()


def main() -> int:
    """Run the sweep, print the table, write JSON and figure."""
    parser = argparse.ArgumentParser(description="The toy problem of NL eq. 53.")
    parser.add_argument("--steps", type=int, default=2000, help="steps after which a run counts as not converged")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    usual, tuned = sweep(steps=arguments.steps, decays=DECAYS[:1]), sweep(steps=arguments.steps, decays=DECAYS)
    print(f"c = {DECAYS[0]}:\n{table(usual)}\n\nc tuned too:\n{table(tuned)}")
    results = {"environment": environment(), "start": START, "below": BELOW, "steps": arguments.steps}
    write("toy", {**results, f"decay {DECAYS[0]}": usual, "decay tuned": tuned}, folder=arguments.out)
    save_figure(lambda axes: draw(axes, usual, steps=arguments.steps), path=arguments.out / "toy.png", panels=3, size=(13, 4))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
