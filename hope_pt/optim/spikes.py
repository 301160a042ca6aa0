"""The skip rule: which updates are dropped, from the loss and the gradient norm of a step and the history of those that were taken.

    drop where   the loss L or the gradient norm n is not finite,
    or, for a history of `window` steps taken and sigmas s > 0,   L > mean(L) + s std(L)   or   n > mean(n) + s std(n).

A dropped step leaves no trace in the history that later steps are compared with. Too many dropped steps, in a row or among the last
`window`, are a run that has diverged. Plain numbers, summed without rounding in between: equal values give equal decisions wherever and
whenever they are made.

Flow: `engine.TrainEngine.step` asks after the backward pass and before any parameter moves; the state is part of its checkpoint.
"""

import math
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from hope_pt.config.schema import SkipConfig


@dataclass(frozen=True)
class Verdict:
    """What becomes of one step.

    dropped: no gradient of it is used. spike: it is dropped although its loss and gradient norm are finite. reason: why, "" where it is
    taken. diverged: why the run should end here, "" while it should not.
    """

    dropped: bool = False
    spike: bool = False
    reason: str = ""
    diverged: str = ""


class SkipRule:
    """The rule with its memory. skips: steps dropped since the run began."""

    def __init__(self, config: SkipConfig):
        self._config = config
        self._losses: deque[float] = deque(maxlen=config.window)
        self._norms: deque[float] = deque(maxlen=config.window)
        self._dropped: list[int] = []  # numbers, from 1, of the dropped ones of the last `window` steps
        self._num_steps, self._in_a_row = 0, 0
        self.skips = 0

    def judge(self, *, loss: float, norm: float) -> Verdict:
        """What becomes of the next step, which then belongs to the past. loss: nats per token; norm: of the gradient before clipping."""
        reason = _not_finite("loss", loss) or _not_finite("gradient norm", norm)
        finite = not reason
        if finite and self._config.sigmas:
            reason = self._spike("loss", loss, self._losses) or self._spike("gradient norm", norm, self._norms)
        self._num_steps += 1
        self._dropped = [step for step in self._dropped if step > self._num_steps - self._config.window]
        if not reason:
            self._losses.append(loss)
            self._norms.append(norm)
            self._in_a_row = 0
            return Verdict()
        self._dropped.append(self._num_steps)
        self._in_a_row += 1
        self.skips += 1
        return Verdict(dropped=True, spike=finite, reason=reason, diverged=self._diverged())

    def state_dict(self) -> dict[str, Any]:
        """JSON-able, and exact there."""
        return {
            "losses": list(self._losses),
            "norms": list(self._norms),
            "dropped": list(self._dropped),
            "steps": self._num_steps,
            "in_a_row": self._in_a_row,
            "skips": self.skips,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse. Under a shorter window the oldest values are forgotten; under a longer one the history fills up first."""
        self._losses.clear()
        self._norms.clear()
        self._losses.extend(state["losses"])
        self._norms.extend(state["norms"])
        self._dropped = list(state["dropped"])
        self._num_steps, self._in_a_row = state["steps"], state["in_a_row"]
        self.skips = state["skips"]

    def _spike(self, what: str, value: float, history: deque[float]) -> str:
        if len(history) < self._config.window:
            return ""
        mean, deviation = _mean_and_deviation(history)
        if value <= mean + self._config.sigmas * deviation:
            return ""
        return (
            f"{what} {value:.6g} is more than train.skip.sigmas = {self._config.sigmas:g} standard deviations ({deviation:.3g}) above the "
            f"mean {mean:.6g} of the last {len(history)} steps taken"
        )

    def _diverged(self) -> str:
        config = self._config
        if self._in_a_row >= config.in_a_row:
            return f"{self._in_a_row} steps in a row were dropped (train.skip.in_a_row = {config.in_a_row})"
        if len(self._dropped) >= config.in_window:
            return f"{len(self._dropped)} of the last {config.window} steps were dropped (train.skip.in_window = {config.in_window})"
        return ""


def _not_finite(what: str, value: float) -> str:
    return "" if math.isfinite(value) else f"{what} is {value}"


def _mean_and_deviation(values: Iterable[float]) -> tuple[float, float]:
    """Mean and population standard deviation."""
    values = list(values)
    mean = math.fsum(values) / len(values)
    return mean, math.sqrt(math.fsum((value - mean) ** 2 for value in values) / len(values))
