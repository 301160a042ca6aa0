"""Nested levels of the continuum memory system (SPEC 3, NL eq. 72): fast weights that return to an initial state which learns.

A group with `restart` r > 0 is a level whose next slower one has period r. Its weights W take the steps of its own clock from an initial
state Phi, and every r calls return to it:

    within an interval      W   <- step(W, gradients of the own period, summed)
    at its end              Phi <- step(Phi, sum of all gradients of the interval);  W <- Phi

The gradients are those at the W that were in use, taken as gradients of Phi: first order, no derivative of the inner steps. Both steps are
the inner optimizer's, each with moments of its own; the moments of W outlive a restart, for they hold the scale of the gradients and not
what a level knows. The last step of W in an interval would be undone at once and is not taken.

`Nested` stands between `Clocked` and a torch optimizer and has the interface of one: a call with `.grad` None is one within the level's own
period. r must be a multiple of that period. Phi and the sum exist only within an interval, where they differ from W and from nothing. All
of it is optimizer state of the parameter, under keys that begin with "initial".
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

RESTART = "restart"
INITIAL = "initial"
INITIAL_SUM = "initial_sum"
_MOMENT = "initial_state_"


@dataclass
class _Start:
    """The initial state of one parameter: its value and gradients within an interval, and its optimizer state."""

    value: Tensor | None = None
    total: Tensor | None = None
    state: dict[str, Any] = field(default_factory=dict)


class Nested:
    """Runs `inner`; groups whose key "restart" is positive (default 0) return to their initial states."""

    def __init__(self, inner: Optimizer):
        self.inner = inner
        self.num_calls = 0
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
        self.num_calls += 1
        ending = []
        for group in self.param_groups:
            restart = group.get(RESTART, 0)
            for param in group["params"] if restart else ():
                start = self._collect(param, ends=self.num_calls % restart == 0)
                if self.num_calls % restart == 0:
                    ending.append((param, start, self._exchange(param, start.state)))
        self.inner.step()
        for param, start, fast in ending:
            start.state = self._exchange(param, fast)

    def _collect(self, param: Tensor, *, ends: bool) -> _Start:
        """Add `.grad` to the sum of the interval. At its end `param` becomes its initial state, with that sum as its gradient."""
        start = self._starts.setdefault(param, _Start())
        if param.grad is not None:
            start.total = param.grad.detach().clone() if start.total is None else start.total.add_(param.grad)
            if start.value is None and not ends:
                start.value = param.detach().clone()
        if ends:
            param.grad = start.total
            if start.value is not None:
                param.copy_(start.value)
            start.total = start.value = None
        return start

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
        """The inner optimizer's state dict with the initial states' tensors beside those of the weights, and "num_calls"."""
        result = self.inner.state_dict()
        result["state"] = {index: dict(entry) for index, entry in result["state"].items()}
        for index, param in enumerate(self._params()):
            start = self._starts.get(param)
            if start is not None:
                named = {INITIAL: start.value, INITIAL_SUM: start.total, **{_MOMENT + key: value for key, value in start.state.items()}}
                found = {key: value for key, value in named.items() if value is not None}
                if found:
                    result["state"].setdefault(index, {}).update(found)
        result["num_calls"] = self.num_calls
        return result

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` gave, within an interval too."""
        entries = {index: dict(entry) for index, entry in state_dict["state"].items()}
        values = {index: (entry.pop(INITIAL, None), entry.pop(INITIAL_SUM, None)) for index, entry in entries.items()}
        moments = {
            index: {key.removeprefix(_MOMENT): entry.pop(key) for key in list(entry) if key.startswith(_MOMENT)}
            for index, entry in entries.items()
        }
        groups = [dict(group) for group in state_dict["param_groups"]]
        # Loaded as if they were those of the weights, so that they get the types and the device that the optimizer wants.
        self._load(moments, groups)
        params = self._params()
        self._starts = {}
        for index, (value, total) in values.items():
            param = params[index]
            copies = (None if tensor is None else tensor.detach().to(param.device, copy=True) for tensor in (value, total))
            self._starts[param] = _Start(*copies, self.inner.state.pop(param, {}))
        self._load(entries, groups)
        self.num_calls = int(state_dict["num_calls"])

    def _load(self, entries: dict[int, dict[str, Any]], groups: list[dict[str, Any]]) -> None:
        self.inner.load_state_dict({"state": {index: entry for index, entry in entries.items() if entry}, "param_groups": groups})

    def _params(self) -> list[Tensor]:
        return [param for group in self.param_groups for param in group["params"]]
