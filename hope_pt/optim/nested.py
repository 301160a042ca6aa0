"""Nested levels of the continuum memory system (SPEC 3, NL eq. 72): fast weights that return to an initial state which learns.

A group with `restart` r > 0 is a level whose next slower one has period r. Its weights W take the steps of its own clock from an initial
state Phi, and every r calls return to it:

    within an interval      W   <- step(W, gradients of the own period, summed)
    at its end              Phi <- step(Phi, sum of all gradients of the interval);  W <- Phi

The gradients are those at the W that were in use, taken as gradients of Phi: first order, no derivative of the inner steps. Both steps are
the inner optimizer's, each with moments of its own; the moments of W outlive a restart, for they hold the scale of the gradients and not
what a level knows. The last step of W in an interval would be undone at once and is not taken.

`Nested` stands between `Clocked` and a torch optimizer and has the interface of one: a call with `.grad` None is one within the level's own
period. r must be a multiple of that period. Phi and the sum are kept within an interval only: at its ends Phi is W, and the sum is zero.
All of it is optimizer state of the parameter, under keys that begin with "initial"; numbers are tensors without dimensions, as torch's
"step".
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

RESTART = "restart"
INITIAL = "initial"
INITIAL_SUM = "initial_sum"
INITIAL_CALLS = "initial_calls"
# Before the names of the inner optimizer's tensors.
INITIAL_STATE = "initial_state_"


@dataclass
class _Start:
    """The initial state of one parameter: calls since the last restart, its value and gradients since then, and its optimizer state."""

    calls: int = 0
    value: Tensor | None = None
    total: Tensor | None = None
    state: dict[str, Any] = field(default_factory=dict)

    def entry(self) -> dict[str, Any]:
        """As it is stored; what is not there, or is zero, is left out."""
        own = {INITIAL: self.value, INITIAL_SUM: self.total, INITIAL_CALLS: torch.tensor(float(self.calls)) if self.calls else None}
        state = {INITIAL_STATE + key: value for key, value in self.state.items()}
        return {**{key: value for key, value in own.items() if value is not None}, **state}


class Nested:
    """Runs `inner`; groups whose key "restart" is positive (default 0) return to their initial states."""

    def __init__(self, inner: Optimizer):
        self.inner = inner
        self._starts: dict[Tensor, _Start] = {}

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The inner optimizer's groups."""
        return self.inner.param_groups

    @property
    def state(self) -> dict[Tensor, Any]:
        """The inner optimizer's state of the weights in use."""
        return self.inner.state

    @torch.no_grad()
    def step(self) -> None:
        """One step of all groups with `.grad`; of those whose interval ends here, the step is the initial state's."""
        ending = []
        for group in self.param_groups:
            restart = group.get(RESTART, 0)
            for param in group["params"] if restart else ():
                start = self._starts.setdefault(param, _Start())
                _collect(param, start, restart=restart)
                if not start.calls:
                    ending.append((param, start, self._exchange(param, start.state)))
        self.inner.step()
        for param, start, fast in ending:
            start.state = self._exchange(param, fast)

    def origin(self, param: Tensor) -> Tensor | None:
        """What the coming step of a parameter begins from where that is not its value: its initial state, at the end of an interval."""
        start = self._starts.get(param)
        restart = next((group.get(RESTART, 0) for group in self.param_groups if any(one is param for one in group["params"])), 0)
        return start.value if start is not None and start.calls + 1 == restart else None

    def _exchange(self, param: Tensor, state: dict[str, Any]) -> dict[str, Any]:
        """Give the inner optimizer this state of `param`; returns the one that it had."""
        before = self.inner.state.pop(param, {})
        if state:
            self.inner.state[param] = state
        return before

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear `.grad` of all parameters; sums of an interval stay."""
        self.inner.zero_grad(set_to_none=set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """The inner optimizer's state dict with what belongs to the initial states beside what belongs to the weights."""
        result = self.inner.state_dict()
        result["state"] = {index: dict(entry) for index, entry in result["state"].items()}
        for index, param in enumerate(self._params()):
            entry = self._starts[param].entry() if param in self._starts else {}
            if entry:
                result["state"].setdefault(index, {}).update(entry)
        return result

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` gave, within an interval too."""
        entries = {index: dict(entry) for index, entry in state_dict["state"].items()}
        own = {index: {key: entry.pop(key) for key in list(entry) if key.startswith(INITIAL)} for index, entry in entries.items()}
        states = {
            index: {key.removeprefix(INITIAL_STATE): value for key, value in entry.items() if key.startswith(INITIAL_STATE)}
            for index, entry in own.items()
        }
        groups = [dict(group) for group in state_dict["param_groups"]]
        # Loaded as if they were those of the weights, so that they get the types and the device that the optimizer wants.
        self._load(states, groups)
        params = self._params()
        self._starts = {}
        for index, entry in own.items():
            param = params[index]
            value, total = (entry[key].detach().to(param.device, copy=True) if key in entry else None for key in (INITIAL, INITIAL_SUM))
            self._starts[param] = _Start(int(entry.get(INITIAL_CALLS, 0)), value, total, self._exchange(param, {}))
        self._load(entries, groups)

    def _load(self, entries: dict[int, dict[str, Any]], groups: list[dict[str, Any]]) -> None:
        self.inner.load_state_dict({"state": {index: entry for index, entry in entries.items() if entry}, "param_groups": groups})

    def _params(self) -> list[Tensor]:
        return [param for group in self.param_groups for param in group["params"]]


def _collect(param: Tensor, start: _Start, *, restart: int) -> None:
    """Add `.grad` to the sum of the interval. At its end `param` becomes its initial state, with that sum as its gradient."""
    start.calls = (start.calls + 1) % restart
    if param.grad is not None:
        start.total = param.grad.detach().clone() if start.total is None else start.total.add_(param.grad)
        if start.value is None and start.calls:
            start.value = param.detach().clone()
    if not start.calls:
        param.grad = start.total
        if start.value is not None:
            param.copy_(start.value)
        start.total = start.value = None
