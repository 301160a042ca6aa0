"""Guard rails of the slow levels (SPEC 3): how far one update may move a matrix, how far it may be from its start, and what never moves.

For a matrix W of a CMS level with a period above 1, with |.| over the whole matrix whatever the layout, after the rule and its decay:

    step cap s:   W <- W_before + d min(1, s n(W_before) / |d|),                          d = W - W_before
    total cap t:  W <- W_start + (W - W_start) min(1, t n(W_start) / |W - W_start|),      n(W) = max(|W|, expected |W| of new weights)

The second is the projection onto a ball that holds W_before, which makes no step longer: both caps hold. n counts a matrix that is smaller
than a new one as a new one: what begins at zero, as the copies of a stacked level do, could not move otherwise. Frozen levels are given no
gradient, so that neither rule, decay nor moments touch them.

Flow: `Watched` keeps the weights before a step, `Guards.act` comes after the step and before anybody reads the weights.
"""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from hope_pt.config.optim import OptimConfig
from hope_pt.config.schema import ModelConfig
from hope_pt.nn.init import init_norm
from hope_pt.nn.names import level_of
from hope_pt.optim.held import Held, Total, dot, period_of

START = "start"
"""Key of a matrix's start among the optimizer's tensors."""


class Guards:
    """The caps of the matrices with the given whole shapes, of which this rank holds `held`."""

    def __init__(
        self,
        held: Sequence[Held],
        *,
        shapes: Mapping[str, tuple[int, ...]],
        model: ModelConfig,
        optim: OptimConfig,
        total: Total,
        device: torch.device,
    ):
        self._step_cap, self._total_cap = optim.level_step_cap, optim.level_total_cap
        self._total, self._device = total, device
        self._periods: dict[str, int] = {}
        self._least: dict[str, float] = {}
        for name, shape in shapes.items():
            period = period_of(name, model)
            if (self._step_cap or self._total_cap) and len(shape) > 1 and period > 1 and not is_frozen(name, optim.freeze_levels):
                self._periods[name] = period
                self._least[name] = init_norm(name, shape, config=model)
        self._held = {one.name: one for one in held if one.name in self._periods}
        self.starts: dict[str, Tensor] = {}
        self.acted = {place[0]: [0, 0] for place in map(level_of, self._periods) if place}
        """Times that the step cap and the total cap have acted since the run began, by level."""

    def begin(self) -> None:
        """Before the first step of a run: remember where the matrices start, if the total cap needs it."""
        if self._total_cap:
            self.starts = {name: one.main.detach().clone() for name, one in self._held.items()}

    def counts(self) -> dict[str, float]:
        """How often the caps in force have acted, by their names in metrics.jsonl."""
        caps = {0: "step_caps"} if self._step_cap else {}
        caps |= {1: "total_caps"} if self._total_cap else {}
        return {f"optim/level{level}/{name}": acted[cap] for level, acted in self.acted.items() for cap, name in caps.items()}

    def needs(self, call: int) -> list[str]:
        """Parameters whose value before step number `call` (from 1) `act` wants to see."""
        return [name for name in self._held if call % self._periods[name] == 0]

    @torch.no_grad()
    def act(self, before: Mapping[str, Tensor], *, call: int) -> None:
        """Pull back what step `call` moved too far. A collective in the steps in which any matrix of the model is due."""
        due = [name for name, period in self._periods.items() if call % period == 0]
        if not due:
            return
        sums = torch.zeros(len(due), 5, dtype=torch.float64, device=self._device)
        for row, name in enumerate(due):
            if name in self._held and self._held[name].counted:
                sums[row] = self._sums(name, before[name])
        self._total(sums)
        for name, values in zip(due, sums.tolist(), strict=True):
            self._limit(name, before.get(name), *self._factors(*values, least=self._least[name]))

    def _sums(self, name: str, before: Tensor) -> Tensor:
        """|d|^2, |W_before|^2, |a|^2, <a, d> and |W_start|^2 of this rank's elements, with a = W_before - W_start."""
        step = self._held[name].main - before
        start = self.starts.get(name)
        if start is None:
            zero = step.new_zeros((), dtype=torch.float64)
            return torch.stack([dot(step, step), dot(before, before), zero, zero, zero])
        away = before - start
        return torch.stack([dot(step, step), dot(before, before), dot(away, away), dot(away, step), dot(start, start)])

    def _factors(self, step: float, weight: float, away: float, across: float, start: float, *, least: float) -> tuple[float, float]:
        """By how much to shorten the step, and then the distance from the start; 1 where there is no need. All but `least` squared."""
        shorter, closer = 1.0, 1.0
        if self._step_cap and math.sqrt(step) > (longest := self._step_cap * max(math.sqrt(weight), least)):
            shorter = longest / math.sqrt(step)
        if self._total_cap:
            distance = math.sqrt(max(0.0, away + 2 * shorter * across + shorter**2 * step))
            if distance > (farthest := self._total_cap * max(math.sqrt(start), least)):
                closer = farthest / distance
        return shorter, closer

    def _limit(self, name: str, before: Tensor | None, shorter: float, closer: float) -> None:
        place = level_of(name)
        assert place is not None
        for cap, factor in enumerate((shorter, closer)):
            self.acted[place[0]][cap] += factor < 1
        if before is None:
            return
        main = self._held[name].main
        if shorter < 1:
            main.copy_(before + (main - before) * shorter)
        if closer < 1:
            main.copy_(self.starts[name] + (main - self.starts[name]) * closer)


def frozen(held: Sequence[Held], *, levels: Sequence[int]) -> list[Tensor]:
    """What the optimizer holds of the given CMS levels, norms included."""
    return [one.main for one in held if is_frozen(one.name, levels)]


def is_frozen(name: str, levels: Sequence[int]) -> bool:
    """Whether the parameter belongs to one of these CMS levels."""
    place = level_of(name)
    return place is not None and place[0] in levels
