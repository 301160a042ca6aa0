"""What the outer optimizer does to each CMS level and block, seen from outside of its rules: a line of numbers every N steps.

Rows are "level{l}/block{b}" and, for all other parameters, their class ("matrix", "memory", "gate", "norm", "embedding"). For a row with
weights W, over all its parameters and ranks:

    update_norm   |d|, d = W - W_before            update_ratio  |d| / |W_before|
    cosine        <d, d'> / (|d| |d'|) with the update d' before it
    drift         |W - W_start| / |W_start|, W_start as the run began
    residual      |O O^T - I| / sqrt(n) of its matrices with n singular values, where the rule orthogonalises: O is d, decay included,
                  scaled so that the mean of its squared singular values is 1, so 0 is an isometry

Norms of updates are exact. No copy of d' or W_start is kept but their sketches (`hope_pt.optim.sketch`), which are linear and therefore
add up over shards: a cosine c has an error of (1 - c^2) 0.022, a drift one of 1.6 % of itself (one standard deviation).

A row with period n is measured at one of its own updates in every window of N steps (at each where n >= N), a pure function of the step.
The sums and sketches of all rows go through one all-reduce.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hope_pt.config.schema import ModelConfig
from hope_pt.nn.names import level_of
from hope_pt.optim.groups import rule_of
from hope_pt.optim.guards import is_frozen
from hope_pt.optim.held import Held, Total, dot, period_of
from hope_pt.optim.sketch import BUCKETS, sketch

# In front of the sketches: |d|^2, |W_before|^2, elements of d that are not finite, elements; residual times elements, such elements.
_SUMS = 6
# A drift below this is rounding of the sketch.
_LEAST = 1e-12


@dataclass
class _Clock:
    """Updates of the rows with one period: their number, the call of the last, and whether the open interval has any gradient."""

    updates: int = 0
    last: int = 0
    fed: bool = False


def row_of(name: str, *, ndim: int, model: ModelConfig) -> str:
    """The row of the parameter with canonical name `name`."""
    place = level_of(name)
    return f"level{place[0]}/block{place[1]}" if place else rule_of(name, ndim=ndim, config=model).kind


class Measures:
    """The rows of the parameters with the given whole shapes, of which this rank holds `held`; every: N."""

    def __init__(
        self,
        held: Sequence[Held],
        *,
        shapes: Mapping[str, tuple[int, ...]],
        model: ModelConfig,
        frozen: Sequence[int],
        every: int,
        total: Total,
        device: torch.device,
    ):
        self._every, self._total, self._device = every, total, device
        self._by_block = bool(model.cms.depth_periods)
        self.periods: dict[str, int] = {}
        row: dict[str, str] = {}
        for name, shape in shapes.items():
            if not is_frozen(name, frozen):
                row[name] = row_of(name, ndim=len(shape), model=model)
                self.periods[row[name]] = period_of(name, model)
        self._held: dict[str, list[Held]] = {}
        for one in held:
            if one.counted and one.name in row:
                self._held.setdefault(row[one.name], []).append(one)
        self._clocks = {period: _Clock() for period in sorted(set(self.periods.values()))}
        self._start: dict[str, Tensor] = {}
        self._last: dict[str, tuple[int, Tensor]] = {}
        self.skipped = 0
        """Calls so far whose gradients were dropped."""

    @torch.no_grad()
    def begin(self) -> None:
        """Before the first step of a run: the sketches of where every row starts. A collective."""
        start = torch.zeros(len(self.periods), BUCKETS, dtype=torch.float64, device=self._device)
        for index, row in enumerate(self.periods):
            for one in self._held.get(row, []):
                start[index] += sketch(one, one.main)[0]
        self._total(start)
        self._start = _rows(self.periods, start.float().cpu())

    def needs(self, call: int) -> list[str]:
        """Parameters whose value before step number `call` (from 1) `take` wants to see."""
        return [one.name for row in self._rows(call) for one in self._held.get(row, [])]

    def is_measured(self, row: str, call: int) -> bool:
        """Whether the update of a row at step `call` is one that is reported."""
        period = self.periods[row]
        return call % period == 0 and call // self._every > (call - period) // self._every

    def _rows(self, call: int) -> list[str]:
        """Rows whose update at `call` is reported, or is the one before a reported update and needed for its cosine."""
        return [
            row
            for row, period in self.periods.items()
            if call % period == 0 and (self.is_measured(row, call) or self.is_measured(row, call + period))
        ]

    @torch.no_grad()
    def take(self, before: Mapping[str, Tensor], *, call: int, skipped: bool) -> dict[str, float]:
        """Values of step `call` by their names in metrics.jsonl, {} where nothing is reported. A collective where anything is."""
        self.skipped += skipped
        moved = self._tick(call, skipped=skipped)
        rows = [row for row in self._rows(call) if self.periods[row] in moved]
        if not rows:
            return {}
        sums = torch.zeros(len(rows), _SUMS + 2 * BUCKETS, dtype=torch.float64, device=self._device)
        for index, row in enumerate(rows):
            for one in self._held.get(row, []):
                self._add(sums[index], one, before[one.name])
        self._total(sums)
        found: dict[str, float] = {}
        for row, values in zip(rows, sums.cpu(), strict=True):
            reported = self._row(row, values, call=call)
            if self.is_measured(row, call):
                found |= {f"optim/{row}/{name}": value for name, value in reported.items()}
        if found:
            bad, elements = sums[:, 2:4].sum(0).tolist()
            found |= {"optim/nonfinite_share": bad / elements, "optim/skipped_share": self.skipped / call} | self._counts(call)
        # The last bits of a sum depend on where its operands lie in memory, and a continued session must report the same.
        return {name: float(f"{value:.6g}") if isinstance(value, float) else value for name, value in found.items()}

    def _tick(self, call: int, *, skipped: bool) -> set[int]:
        """Advance the clocks; the periods whose rows have an update at this call."""
        moved = set()
        for period, clock in self._clocks.items():
            clock.fed |= not skipped
            if call % period == 0 and clock.fed:
                clock.updates, clock.last, clock.fed = clock.updates + 1, call, False
                moved.add(period)
        return moved

    def _add(self, sums: Tensor, one: Held, before: Tensor) -> None:
        step = one.main - before
        bad = (~step.isfinite()).sum(dtype=torch.float64)
        sums[:4] += torch.stack([dot(step, step), dot(before, before), bad, torch.full_like(bad, step.numel())])
        if one.matrices:
            stack = step.float().unsqueeze(0)
            # Every rank of a matrix gets the same residual, as the value of each of its elements.
            (residuals,) = one.matrices.apply(_residuals, stack, constants=[one.matrices.rows(stack)])
            sums[4:_SUMS] += torch.stack([residuals.sum(dtype=torch.float64), torch.full_like(bad, step.numel())])
        sums[_SUMS:] += sketch(one, step, one.main).flatten()

    def _row(self, row: str, values: Tensor, *, call: int) -> dict[str, float]:
        """What one row reports; the sketch of its update is kept where the next one is reported."""
        step, weight = values[0].item(), values[1].item()
        update, now = (value.clone() for value in values[_SUMS:].float().view(2, BUCKETS))
        before, last = self._last.get(row, (0, update))
        self._last.pop(row, None)
        if self.is_measured(row, call + self.periods[row]):
            self._last[row] = (call, update)
        found = {"update_norm": math.sqrt(step)}
        if weight > 0:
            found["update_ratio"] = math.sqrt(step / weight)
        lengths = float(update.norm() * last.norm())
        if before and before == call - self.periods[row] and lengths > 0:
            found["cosine"] = float(update @ last) / lengths
        if values[5] > 0:
            found["residual"] = float(values[4] / values[5])
        start = self._start.get(row)
        if start is not None and float(start.norm()) > _LEAST:
            found["drift"] = float((now - start).norm() / start.norm())
        return found

    def _counts(self, call: int) -> dict[str, float]:
        """Updates and steps since the last one, per level or, where blocks have periods of their own, per block."""
        found: dict[str, float] = {}
        for row, period in self.periods.items():
            if row.startswith("level"):
                name, clock = row if self._by_block else row.partition("/")[0], self._clocks[period]
                found |= {f"optim/{name}/updates": clock.updates, f"optim/{name}/since": call - clock.last}
        return found

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What a later session needs, the same on every rank: tensors [rows, BUCKETS] and JSON-able scalars."""
        rows = [row for row in self.periods if row in self._start]
        # A list: JSON files may sort the keys of a dictionary, and the tensors have an order.
        last = [[row, call] for row, (call, _) in self._last.items()]
        tensors = {"start": [self._start[row] for row in rows], "last": [value for _, value in self._last.values()]}
        clocks = {str(period): [clock.updates, clock.last, clock.fed] for period, clock in self._clocks.items()}
        scalars = {"start": rows, "last": last, "clocks": clocks, "skipped": self.skipped}
        return {name: torch.stack(found) for name, found in tensors.items() if found}, scalars

    def load(self, tensors: Mapping[str, Tensor], scalars: Mapping[str, Any]) -> None:
        """The inverse of `state`."""
        calls = dict(scalars["last"])
        last = _rows(calls, tensors["last"].cpu()) if calls else {}
        self._start = _rows(scalars["start"], tensors["start"].cpu()) if scalars["start"] else {}
        self._last = {row: (calls[row], value) for row, value in last.items()}
        for period, (updates, last, fed) in scalars["clocks"].items():
            self._clocks[int(period)] = _Clock(updates, last, fed)
        self.skipped = scalars["skipped"]


def _residuals(x_MRC: Tensor, rows_M: Tensor) -> tuple[Tensor]:
    """The residual of every matrix, of which `rows` [M, 1, 1] are not padding, at all of its places [M, R, C].

    With squared singular values l: |O O^T - I|^2 / n = n sum(l^2) / (sum l)^2 - 1.
    """
    tall = x_MRC.shape[-2] > x_MRC.shape[-1]
    gram = x_MRC.mT @ x_MRC if tall else x_MRC @ x_MRC.mT
    total = x_MRC.square().sum((-2, -1), keepdim=True).clamp_min(torch.finfo(x_MRC.dtype).tiny)
    spread = (gram / total).square().sum((-2, -1), keepdim=True) * rows_M.clamp(max=x_MRC.shape[-1])
    return ((spread - 1).clamp_min(0).sqrt().expand_as(x_MRC).contiguous(),)


def _rows(names: Iterable[str], values: Tensor) -> dict[str, Tensor]:
    """The rows of `values` by name, each in memory of its own."""
    return {name: value.clone() for name, value in zip(names, values, strict=True)}
