"""The stream clock of the continuum memory system (SPEC 3, NL eq. 70-71): parameter groups that step less often.

A group with `period` n takes one step of the inner optimizer every n calls of `step`, with the *sum* of the gradients of those n calls,
and is frozen between: no update, no weight decay, no moment. Calls count from 1, so the group steps at calls n, 2n, 3n ...; a parameter
whose `.grad` is None (a step that was skipped for a non-finite gradient) contributes nothing while the clock goes on.

`Clocked` stands around any torch optimizers, which share its clock (AdamW of some groups, `DeepOptimizer` of the others), and has the
interface of one. megatron-core's wrappers take it as their inner optimizer: they read and replace parameters in `param_groups`, which are
the inner optimizers' own groups, set `.grad`, and call `step`. The accumulated gradients are optimizer state: they live in `state_dict`
beside the moments, one "accumulated" tensor per parameter of a slow group.
"""

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from hope_pt.errors import CheckpointError

PERIOD = "period"
ACCUMULATED = "accumulated"


class Inner(Protocol):
    """What runs under a clock: a torch optimizer, or what has its interface."""

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """As torch's."""

    @property
    def state(self) -> Mapping[Tensor, Any]:
        """As torch's."""

    def step(self) -> Any:
        """Update the parameters that have a gradient."""

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear `.grad` of all parameters."""

    def state_dict(self) -> dict[str, Any]:
        """As torch's."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The inverse."""


class Clocked:
    """Runs `inner` with each parameter group on its own clock; every group has an integer key "period" (default 1).

    Groups and parameters are counted over all inner optimizers, in the order in which these are given.
    """

    def __init__(self, *inner: Inner):
        self.inner = inner
        self.num_calls = 0
        self._accumulated: dict[Tensor, Tensor] = {}
        for group in self.param_groups:
            group.setdefault(PERIOD, 1)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The groups of all inner optimizers: a new list of their own dictionaries."""
        return [group for optimizer in self.inner for group in optimizer.param_groups]

    @property
    def state(self) -> dict[Tensor, Any]:
        """The state of all inner optimizers, by parameter, without the accumulated gradients: a new dictionary of their own entries."""
        return {param: entry for optimizer in self.inner for param, entry in optimizer.state.items()}

    @torch.no_grad()
    def step(self) -> None:
        """Advance all clocks by one; step the groups whose interval ends with the gradients of the interval, which `.grad` completes.

        Parameters of a group in mid-interval are left with `.grad` None.
        """
        self.num_calls += 1
        for group in self.param_groups:
            if group[PERIOD] > 1:
                self._accumulate(group, due=self.num_calls % group[PERIOD] == 0)
        for optimizer in self.inner:
            optimizer.step()

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
        for optimizer in self.inner:
            optimizer.zero_grad(set_to_none=set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """The inner optimizers' as one, with "num_calls", and "accumulated" in the entries of slow parameters in mid-interval."""
        state: dict[int, dict[str, Any]] = {}
        groups: list[dict[str, Any]] = []
        first = 0
        for optimizer in self.inner:
            found = optimizer.state_dict()
            state |= {first + index: dict(entry) for index, entry in found["state"].items()}
            groups += [{**group, "params": [first + index for index in group["params"]]} for group in found["param_groups"]]
            first += _num_params(optimizer)
        for index, param in enumerate(self.params()):
            if param in self._accumulated:
                state.setdefault(index, {})[ACCUMULATED] = self._accumulated[param]
        return {"state": state, "param_groups": groups, "num_calls": self.num_calls}

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
        groups, first = iter(state_dict["param_groups"]), 0
        for optimizer in self.inner:
            count = _num_params(optimizer)
            own = [next(groups) for _ in optimizer.param_groups]
            optimizer.load_state_dict(
                {
                    "state": {index - first: entries[index] for index in range(first, first + count) if entries.get(index)},
                    "param_groups": [{**group, "params": [index - first for index in group["params"]]} for group in own],
                }
            )
            first += count
        for group, period in zip(self.param_groups, periods, strict=True):
            group[PERIOD] = period
        params = self.params()
        self._accumulated = {params[i]: total.detach().to(params[i].device, copy=True) for i, total in pending.items()}
        self.num_calls = int(state_dict["num_calls"])

    def params(self) -> list[Tensor]:
        """All parameters, in the order that `state_dict` numbers them."""
        return [param for group in self.param_groups for param in group["params"]]


def _num_params(optimizer: Inner) -> int:
    return sum(len(group["params"]) for group in optimizer.param_groups)
