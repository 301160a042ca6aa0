"""The optimizer that runs the deep rules (SPEC 4): a torch optimizer whose parameter groups name their rule.

    gradients -> rule.update -> W <- (1 - lr * weight_decay) W + lr * direction

`Clocked` stands around it and decides when a group steps. All parameters of a group have one shape and one view; they are stacked in
batches of bounded size, so that small matrices share the batched products of Newton-Schulz and large ones do not double their memory.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from hope_pt.optim.matrices import Matrices
from hope_pt.optim.rules.base import Step, UpdateRule

BATCH_BYTES = 64 * 2**20
"""Most bytes of one stacked tensor; a rule has about ten of them at a time. A larger parameter is updated alone, without a copy."""


class DeepOptimizer(Optimizer):
    """Runs `rules`, by name, on its groups.

    groups: each with "params" (one shape), "rule", "lr", "lr_scale" (multiplies lr), "weight_decay", and what others keep there, such as
    "period". matrices: one for each group. State of a parameter: "step" (its updates) and the tensors of its rule, at least fp32.
    """

    def __init__(
        self,
        groups: Sequence[dict[str, Any]],
        *,
        rules: Mapping[str, UpdateRule],
        matrices: Sequence[Matrices],
        batch_bytes: int = BATCH_BYTES,
    ):
        super().__init__(groups, {"lr": 1e-3, "lr_scale": 1.0, "weight_decay": 0.0})
        self._rules, self._matrices, self._batch_bytes = dict(rules), list(matrices), batch_bytes

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update the parameters that have a gradient."""
        for group, matrices in zip(self.param_groups, self._matrices, strict=True):
            rule = self._rules[group["rule"]]
            for params in self._batches(group["params"]):
                self._update(params, rule=rule, matrices=matrices, lr=group["lr"] * group["lr_scale"], decay=group["weight_decay"])

    def own_shapes(self, group: int) -> dict[str, tuple[int, ...]]:
        """The state tensors of each parameter of group number `group` that have a shape of their own, by name."""
        shape = self.param_groups[group]["params"][0].shape
        return _own_shapes(self._rules[self.param_groups[group]["rule"]], self._matrices[group], shape)

    def state_of(self, param: Tensor, *, group: int) -> dict[str, Tensor]:
        """State of a parameter of group number `group`; zeros where it has had no update."""
        return self._state_of(param, rule=self._rules[self.param_groups[group]["rule"]], matrices=self._matrices[group])

    def _batches(self, params: Sequence[Tensor]) -> Iterator[list[Tensor]]:
        """Parameters with a gradient that have had the same number of updates, in batches of at most `batch_bytes` or of one."""
        alike: dict[int, list[Tensor]] = {}
        for param in params:
            if param.grad is not None:
                alike.setdefault(int(self.state[param].get("step", 0)), []).append(param)
        for members in alike.values():
            size = max(1, self._batch_bytes // (4 * max(1, members[0].numel())))
            yield from (members[first : first + size] for first in range(0, len(members), size))

    def _update(self, params: list[Tensor], *, rule: UpdateRule, matrices: Matrices, lr: float, decay: float) -> None:
        states = [self._state_of(param, rule=rule, matrices=matrices) for param in params]
        names = [name for name in states[0] if name != "step"]
        state = {name: _stack([entry[name] for entry in states]) for name in names}
        grads = _stack([_wide(param.grad) for param in params if param.grad is not None])
        values = _stack([param.detach() for param in params]) if rule.reads_params else None
        number = int(states[0]["step"]) + 1
        direction = rule.update(grads, state, Step(number, lr, matrices, values))
        for index, entry in enumerate(states):
            entry["step"] += 1
            for name in names:
                if entry[name].data_ptr() != state[name][index].data_ptr():
                    entry[name].copy_(state[name][index])
        if decay:
            torch._foreach_mul_(params, 1.0 - lr * decay)
        torch._foreach_add_(params, list(direction.to(params[0].dtype).unbind()), alpha=lr)

    def _state_of(self, param: Tensor, *, rule: UpdateRule, matrices: Matrices) -> dict[str, Tensor]:
        state = self.state[param]
        if "step" not in state:
            # On the CPU, as in torch.optim: reading it must not wait for the device.
            state["step"] = torch.zeros(())
        shapes: dict[str, tuple[int, ...]] = dict.fromkeys(rule.keys, tuple(param.shape))
        for name, shape in {**shapes, **_own_shapes(rule, matrices, param.shape)}.items():
            if name not in state:
                state[name] = torch.zeros(shape, dtype=torch.promote_types(param.dtype, torch.float32), device=param.device)
        return state


def _own_shapes(rule: UpdateRule, matrices: Matrices, shape: Sequence[int]) -> dict[str, tuple[int, ...]]:
    lead, whole = matrices.view.lead(shape), matrices.whole_shape(shape)
    rows = max(matrices.view.rows(whole))
    return {name: (*lead, *size) for name, size in rule.matrix_keys(rows, whole[-1]).items()}


def _wide(tensor: Tensor) -> Tensor:
    return tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32))


def _stack(tensors: list[Tensor]) -> Tensor:
    """[N, ...]; one tensor is a view of itself."""
    return tensors[0].unsqueeze(0) if len(tensors) == 1 else torch.stack(tensors)
