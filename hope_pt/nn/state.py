"""The state of a model between two calls: what streaming inference carries, a cache holds and a memory file stores (SPEC 2.2).

`LMState` holds the number of tokens seen per row and one dictionary of named tensors per layer, batch first. For the memory mixer that
is the anchors (and their momentum), the convolution tail and the open part of the chunk: constant in context length. For attention it
is the key-value cache.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from hope_pt.errors import CheckpointError

LayerState = dict[str, torch.Tensor]


@dataclass(frozen=True)
class LMState:
    """seen_B [B] int64: tokens of each row's current document so far; layers: one LayerState a block."""

    seen_B: torch.Tensor
    layers: tuple[LayerState, ...]

    def bytes(self) -> int:
        """Size of all tensors."""
        return sum(t.numel() * t.element_size() for t in self.to_tensors().values())

    def rows(self, index_B: torch.Tensor) -> "LMState":
        """The state of selected rows, in order (rows may repeat)."""
        return LMState(self.seen_B[index_B], tuple({name: t[index_B] for name, t in layer.items()} for layer in self.layers))

    def to_tensors(self) -> dict[str, torch.Tensor]:
        """Flat named tensors, for a safetensors file."""
        flat = {f"layers.{i}.{name}": t.contiguous() for i, layer in enumerate(self.layers) for name, t in layer.items()}
        return {"seen": self.seen_B, **flat}

    @staticmethod
    def from_tensors(tensors: Mapping[str, torch.Tensor]) -> "LMState":
        """The inverse of `to_tensors`. Raises CheckpointError for names that are not a state's."""
        layers: dict[int, LayerState] = {}
        for key, tensor in tensors.items():
            head, _, rest = key.partition(".")
            index, _, name = rest.partition(".")
            if key == "seen":
                continue
            if head != "layers" or not index.isdigit() or not name:
                raise CheckpointError(f'"{key}" is not a tensor of a memory state; give a file written by --save-memory')
            layers.setdefault(int(index), {})[name] = tensor
        if "seen" not in tensors or sorted(layers) != list(range(len(layers))):
            raise CheckpointError('the memory state is incomplete ("seen" or a layer is missing); write it again')
        return LMState(tensors["seen"], tuple(layers[i] for i in range(len(layers))))
