"""The layer inputs of delta gradient descent under parallel layouts (hope_pt.optim.inputs).

Every rank ends a step with the same sum of x x^T over all tokens of the global batch:

* a column-parallel layer sees whole inputs: of all tokens, or with sequence parallelism of its share, which the tensor group then adds up;
* a row-parallel layer sees a slice of the features, which the tensor group puts together before the sum (one all-gather of the inputs in
  every forward pass);
* data- and context-parallel ranks have different tokens, and add up once a step.
"""

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hope_pt.engine.plan import Plan
from hope_pt.engine.sharding import shard_axis
from hope_pt.optim.inputs import LayerInputs


class SharedInputs:
    """Sums of the inputs of the layers in `models` that have the given weights, by the weights' names."""

    def __init__(self, weights: Mapping[str, nn.Parameter], *, models: Sequence[nn.Module], plan: Plan):
        self._groups, self._by_sequence = plan.groups, plan.mesh.sequence_parallel
        name_of = {id(weight): name for name, weight in weights.items()}
        modules = (module for model in models for module in model.modules())
        layers = {name_of[id(module.weight)]: module for module in modules if id(getattr(module, "weight", None)) in name_of}
        self.collected = LayerInputs(layers, whole=self._whole if plan.mesh.tensor > 1 else None)

    def take(self) -> dict[str, Tensor]:
        """The sums [C, C] of the whole batch since the last call; a collective."""
        return self.collected.take(self._reduce)

    def _whole(self, name: str, inputs: Tensor) -> Tensor:
        if shard_axis(name) == 0:
            return inputs
        group = self._groups.tensor
        parts = inputs.new_empty(group.size() * len(inputs), *inputs.shape[1:])
        dist.all_gather_into_tensor(parts, inputs.contiguous(), group=group)
        return torch.cat(parts.chunk(group.size()), -1)

    def _reduce(self, name: str, gram: Tensor) -> None:
        dist.all_reduce(gram, group=self._groups.data_context)
        if self._by_sequence and shard_axis(name) == 0:
            dist.all_reduce(gram, group=self._groups.tensor)
