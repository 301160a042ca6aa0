"""What a checkpoint stores of the engine, under names that no layout and no megatron version changes.

Tensors: `model.<name>` are the weights in fp32 under HopeLM's names (the masters where the model is bf16, of which the bf16 values are
the rounding). `optim.<name>.<key>` are the optimizer's tensors of the same parameter: exp_avg, exp_avg_sq, and `accumulated` for a
parameter whose CMS level is within an interval. Scalars: the number of calls of the clock, and the updates that each parameter has had.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hope_pt.config.schema import ModelConfig
from hope_pt.engine.optimizer import assign, master
from hope_pt.errors import CheckpointError
from hope_pt.nn.init import init_tensor
from hope_pt.optim import Clocked

# torch's name for the number of updates of one parameter.
_UPDATES = "step"


def initialize(parameters: Mapping[str, nn.Parameter], *, model: ModelConfig, seed: int) -> None:
    """Set every parameter to its initial value of `seed`, which is HopeLM's."""
    for name, parameter in parameters.items():
        assign(parameter, init_tensor(name, tuple(parameter.shape), config=model, seed=seed))


def export(parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """fp32 CPU copies of the weights by canonical name."""
    return {name: _cpu(master(parameter)) for name, parameter in parameters.items()}


def save(parameters: Mapping[str, nn.Parameter], *, optimizer: Clocked) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors, scalars) of the weights and the optimizer; CPU copies."""
    tensors = {f"model.{name}": weight for name, weight in export(parameters).items()}
    updates: dict[str, int] = {}
    stored = optimizer.state_dict()
    for index, name in enumerate(_names(optimizer)):
        for key, value in stored["state"].get(index, {}).items():
            if key == _UPDATES:
                updates[name] = int(value)
            else:
                tensors[f"optim.{name}.{key}"] = _cpu(value)
    return tensors, {"clock": stored["num_calls"], "updates": updates}


@torch.no_grad()
def load(parameters: Mapping[str, nn.Parameter], *, optimizer: Clocked, tensors: Mapping[str, Tensor], scalars: Mapping[str, Any]) -> None:
    """The inverse of `save`, bit for bit. CheckpointError if a weight is missing, unknown or of another shape."""
    check(parameters, tensors=tensors)
    for name, parameter in parameters.items():
        assign(parameter, tensors[f"model.{name}"])
    names = _names(optimizer)
    index_of = {name: index for index, name in enumerate(names)}
    entries: dict[int, dict[str, Tensor]] = {}
    for full_name, value in tensors.items():
        if full_name.startswith("optim."):
            name, _, key = full_name.removeprefix("optim.").rpartition(".")
            entries.setdefault(index_of[name], {})[key] = value.clone()
    for name, count in scalars["updates"].items():
        entries[index_of[name]][_UPDATES] = torch.tensor(float(count))
    optimizer.load_state_dict({**optimizer.state_dict(), "state": entries, "num_calls": scalars["clock"]})


def check(parameters: Mapping[str, nn.Parameter], *, tensors: Mapping[str, Tensor]) -> None:
    """CheckpointError unless `tensors` has exactly the weights of `parameters`, and optimizer tensors of their shapes only."""
    weights = {name.removeprefix("model."): value for name, value in tensors.items() if name.startswith("model.")}
    missing, unknown = sorted(parameters.keys() - weights.keys()), sorted(weights.keys() - parameters.keys())
    if missing or unknown:
        raise CheckpointError(
            f"the checkpoint is of another model: {len(missing)} weights are missing ({', '.join(missing[:3])}) and "
            f"{len(unknown)} are unknown ({', '.join(unknown[:3])}); resume with the configuration that wrote it"
        )
    for full_name, value in tensors.items():
        root, _, rest = full_name.partition(".")
        name = rest if root == "model" else rest.rpartition(".")[0]
        if name not in parameters:
            raise CheckpointError(f"the checkpoint has an optimizer tensor {full_name} of no parameter of this model; it is damaged")
        if value.shape != parameters[name].shape:
            raise CheckpointError(
                f"{full_name} is {tuple(value.shape)} in the checkpoint and {tuple(parameters[name].shape)} in this model; "
                "resume with the configuration that wrote it"
            )


def _names(optimizer: Clocked) -> list[str]:
    return [name for group in optimizer.param_groups for name in group["names"]]


def _cpu(tensor: Tensor) -> Tensor:
    return tensor.detach().to(device="cpu", dtype=torch.float32, copy=True).contiguous()
