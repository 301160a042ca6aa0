"""Guard rails and measurements around every step of the outer optimizer.

    weights before -> inner.step() -> Guards.act -> Measures.take -> whoever reads the weights

`Watched` has the interface of `Clocked`, which it stands around, and of the optimizers in it: megatron-core's wrappers take it as their
inner optimizer and copy masters to bf16 weights after its `step`. Only what a step is about to move and somebody asks for is copied, and
only for the length of that step.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hope_pt.optim.clocks import Clocked
from hope_pt.optim.guards import Guards
from hope_pt.optim.held import Held
from hope_pt.optim.measure import Measures
from hope_pt.optim.sketch import BUCKETS


class Watched:
    """Runs `inner` under `guards`, and under `measures` where there are any.

    origin: the value that the step of a parameter begins from, where that is not the weight itself (an initial state), else None.
    """

    def __init__(
        self,
        inner: Clocked,
        *,
        held: Sequence[Held],
        guards: Guards,
        measures: Measures | None,
        origin: Callable[[Tensor], Tensor | None] = lambda main: None,
    ):
        self.inner, self.guards, self.measures = inner, guards, measures
        self._mains = {one.name: one.main for one in held}
        self._origin = origin
        self.skipped = False
        """Whether the gradients of the coming step were dropped; whoever drops them says so before it."""
        self.measured: dict[str, float] = {}
        """Values of the last step by their names in metrics.jsonl, where it was one to report."""

    @torch.no_grad()
    def step(self) -> None:
        """One step of `inner`, watched. A collective of the job where a cap or a measurement is due."""
        call = self.inner.num_calls + 1
        if call == 1:
            self.guards.begin()
            if self.measures:
                self.measures.begin()
        names = {*self.guards.needs(call), *(self.measures.needs(call) if self.measures else ())}
        before = {name: self._before(self._mains[name]) for name in names}
        self.inner.step()
        self.guards.act(before, call=call)
        self.measured = self.measures.take(before, call=call, skipped=self.skipped) if self.measures else {}
        if self.measured:
            self.measured |= self.guards.counts()

    def keeps(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What a later session needs beside the optimizers' states, the same on every rank: fp32 tensors and JSON-able scalars."""
        tensors, scalars = self.measures.state() if self.measures else ({}, None)
        return tensors, {"acted": {str(level): list(acted) for level, acted in self.guards.acted.items()}, "measures": scalars}

    def empty(self, scalars: Mapping[str, Any]) -> dict[str, Tensor]:
        """Tensors like those that `keeps` gave with these scalars."""
        rows = {name: len(scalars["measures"][name]) for name in ("start", "last")} if scalars["measures"] else {}
        return {name: torch.empty(count, BUCKETS) for name, count in rows.items() if count}

    def take_over(self, tensors: Mapping[str, Tensor], scalars: Mapping[str, Any]) -> None:
        """The inverse of `keeps`."""
        self.guards.acted |= {int(level): list(acted) for level, acted in scalars["acted"].items()}
        if self.measures and scalars["measures"]:
            self.measures.load(tensors, scalars["measures"])

    def _before(self, main: Tensor) -> Tensor:
        origin = self._origin(main)
        return main.detach().clone() if origin is None else origin

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The inner optimizers' groups."""
        return self.inner.param_groups

    @property
    def state(self) -> dict[Tensor, Any]:
        """The inner optimizers' state."""
        return self.inner.state

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear `.grad` of all parameters."""
        self.inner.zero_grad(set_to_none=set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """The inner optimizer's; what guards and measures keep is stored by `hope_pt.engine.state`."""
        return self.inner.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The inner optimizer's."""
        self.inner.load_state_dict(state_dict)
