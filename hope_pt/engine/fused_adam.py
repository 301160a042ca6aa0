"""What transformer-engine's and apex's FusedAdam lack beside torch's AdamW: a count of updates that belongs to a parameter.

Both keep one `step` in each parameter group and raise it whenever they are called, whether or not the group has gradients. The bias
correction of a CMS level that sleeps between its ticks would be that of the wrong update, and a checkpoint, which stores updates by
parameter, would have none. Groups here have one period, so that all parameters of a group have had the same number of updates.
"""

from typing import Any

import torch

from hope_pt.errors import CheckpointError

_STEP = "step"


def step_per_parameter(fused: Any) -> Any:
    """A subclass of the class `fused` whose `state_dict` is that of torch's AdamW, and whose sleeping groups do not count."""

    class Adam(fused):
        """`fused` with torch's interface."""

        param_groups: list[dict[str, Any]]

        def step(self, closure: Any = None) -> None:
            """Updates the groups that have gradients; the others do not count this call."""
            groups = self.param_groups
            self.param_groups = [group for group in groups if any(param.grad is not None for param in group["params"])]
            try:
                super().step(closure)
            finally:
                self.param_groups = groups

        def zero_grad(self, set_to_none: bool = True) -> None:
            """Drops all gradients; apex's own takes no argument."""
            for group in self.param_groups:
                for param in group["params"]:
                    param.grad = None

        def state_dict(self) -> dict[str, Any]:
            """As torch's AdamW gives it: every entry has a "step"."""
            result = super().state_dict()
            for group in result["param_groups"]:
                for index in group["params"]:
                    if index in result["state"]:
                        result["state"][index] = {**result["state"][index], _STEP: torch.tensor(float(group[_STEP]))}
            return result

        def load_state_dict(self, state_dict: dict[str, Any]) -> None:
            """The inverse. CheckpointError if parameters of one group have had different numbers of updates, which FusedAdam cannot do."""
            state = {index: dict(entry) for index, entry in state_dict["state"].items()}
            groups = [dict(group) for group in state_dict["param_groups"]]
            for number, group in enumerate(groups):
                group.pop(_STEP, None)
                steps = {int(state[index].pop(_STEP)) for index in group["params"] if index in state}
                if len(steps) > 1:
                    raise CheckpointError(
                        f"parameters of optimizer group {number} have had {min(steps)} to {max(steps)} updates in the checkpoint, and "
                        'FusedAdam counts by group; resume with engine.provider = "local"'
                    )
                if steps:
                    group[_STEP] = steps.pop()
            super().load_state_dict({**state_dict, "state": state, "param_groups": groups})

    return Adam
