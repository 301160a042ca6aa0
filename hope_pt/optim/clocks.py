"""The stream clock of the continuum memory system (SPEC 3, NL eq. 70-71): parameter groups that step less often.

A group with `period` n takes one step of the inner optimizer every n calls of `step`, with the *sum* of the gradients of those n calls,
and is frozen between: no update, no weight decay, no moment. Calls count from 1, so the group steps at calls n, 2n, 3n ...; a parameter
whose `.grad` is None (a step that was skipped for a non-finite gradient) contributes nothing while the clock goes on.

`Clocked` stands around any torch optimizer and has its interface. megatron-core's wrappers take it as their inner optimizer: they read
and replace parameters in `param_groups`, which is the inner optimizer's own list, set `.grad`, and call `step`. The accumulated
gradients are optimizer state: they live in `state_dict` beside the moments, one "accumulated" tensor per parameter of a slow group.
"""

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from hope_pt.errors import CheckpointError

PERIOD = "period"
ACCUMULATED = "accumulated"


class Clocked:
    """Runs `inner` with each parameter group on its own clock; every group of `inner` has an integer key "period" (default 1)."""

    def __init__(self, inner: Optimizer):
        self.inner = inner
        self.num_calls = 0
        self._accumulated: dict[Tensor, Tensor] = {}
        for group in inner.param_groups:
            group.setdefault(PERIOD, 1)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The inner optimizer's groups."""
        return self.inner.param_groups

    @property
    def state(self) -> dict[Tensor, Any]:
        """The inner optimizer's state, without the accumulated gradients."""
        return self.inner.state

    @torch.no_grad()
    def step(self) -> None:
        """Advance all clocks by one; step the groups whose interval ends with the gradients of the interval, which `.grad` completes.

        Parameters of a group in mid-interval are left with `.grad` None.
        """
        self.num_calls += 1
        for group in self.param_groups:
            if group[PERIOD] > 1:
                self._accumulate(group, due=self.num_calls % group[PERIOD] == 0)
        self.inner.step()

    def _accumulate(self, group: dict[str, Any], *, due: bool) -> None:
        for param in group["params"]:
            total = self._accumulated.get(param)
            if param.grad is not None:
                if total is None:
                    total = self._accumulated[param] = param.grad.detach().clone()
                else:
                    total.add_(param.grad)
            param.grad = None
            if due and total is not None:
                param.grad = self._accumulated.pop(param)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear `.grad` of all parameters; accumulated gradients stay."""
        self.inner.zero_grad(set_to_none=set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """The inner optimizer's state dict with "accumulated" in the entries of slow parameters in mid-interval, and "num_calls"."""
        result = self.inner.state_dict()
        result["state"] = {index: dict(entry) for index, entry in result["state"].items()}
        for index, param in enumerate(self.params()):
            if param in self._accumulated:
                result["state"].setdefault(index, {})[ACCUMULATED] = self._accumulated[param]
        result["num_calls"] = self.num_calls
        return result

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` gave, mid-interval too. CheckpointError if a group's period changed within an open interval."""
        periods = [group[PERIOD] for group in self.param_groups]
        saved = [group.get(PERIOD, 1) for group in state_dict["param_groups"]]
        for index, (now, before) in enumerate(zip(periods, saved, strict=True)):
            if now != before and state_dict["num_calls"] % before:
                raise CheckpointError(f"parameter group {index} was saved within an interval of {before} steps and now has period {now}")
        entries = {index: dict(entry) for index, entry in state_dict["state"].items()}
        pending = {index: entry.pop(ACCUMULATED) for index, entry in entries.items() if ACCUMULATED in entry}
        self.inner.load_state_dict(
            {
                "state": {index: entry for index, entry in entries.items() if entry},
                "param_groups": [dict(group) for group in state_dict["param_groups"]],
            }
        )
        for group, period in zip(self.param_groups, periods, strict=True):
            group[PERIOD] = period
        params = self.params()
        self._accumulated = {params[i]: total.detach().to(params[i].device, copy=True) for i, total in pending.items()}
        self.num_calls = int(state_dict["num_calls"])

    def params(self) -> list[Tensor]:
        """All parameters, in the order that `state_dict` numbers them."""
        return [param for group in self.param_groups for param in group["params"]]
