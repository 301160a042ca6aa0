"""Per-sequence weights of the CMS levels: what the token clock changes, as a value (SPEC 3).

    row b of a batch uses W + moved[b] where the model was trained to W

Only the change is kept, in at least fp32: the trained matrix stays one for all rows and may be bf16 without rounding small changes away, a
row is reset by zeros, and how far a level has moved can be read off. A level's three matrices change; its norm, whose gain is a scaling
of the columns of two of them, does not.
Legend: B rows, O outputs, I inputs of a matrix.
"""

import contextlib
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import nn

from hope_pt.errors import CheckpointError
from hope_pt.nn.names import level_of

Named = dict[str, torch.Tensor]


def level_matrices(model: nn.Module, levels: Collection[int]) -> dict[str, nn.Linear]:
    """The linear layers of some CMS levels of all blocks, by module name."""
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    return {name: layer for name, layer in linears.items() if (place := level_of(name)) and place[0] in levels}


@dataclass(frozen=True)
class FastLevels:
    """What a batch of sequences has changed in a model's CMS levels.

    moved: layer name -> [B, O, I], to be added to the trained weight. sums: the same for the layers of slower levels: gradients of the
    tokens since their last update. frozen: neither updates nor document starts change anything any more.
    """

    moved: Named
    sums: Named
    frozen: bool = False

    @staticmethod
    def start(matrices: Mapping[str, nn.Linear], *, batch: int, slow: Collection[str]) -> "FastLevels":
        """As trained, for `batch` rows; slow: the names that collect gradients."""
        moved = {name: _zeros(layer.weight, batch) for name, layer in matrices.items()}
        return FastLevels(moved, {name: torch.zeros_like(moved[name]) for name in slow})

    def freeze(self, frozen: bool = True) -> "FastLevels":
        """The same weights, which no longer change (or do so again)."""
        return replace(self, frozen=frozen)

    def reset(self, rows_B: torch.Tensor) -> "FastLevels":
        """Rows that are true are as trained again, also in a frozen state."""
        rows = rows_B.view(-1, 1, 1)
        moved, sums = ({name: t.masked_fill(rows, 0) for name, t in named.items()} for named in (self.moved, self.sums))
        return replace(self, moved=moved, sums=sums)

    def rows(self, index_B: torch.Tensor) -> "FastLevels":
        """Selected rows, in order (rows may repeat)."""
        moved, sums = ({name: t[index_B] for name, t in named.items()} for named in (self.moved, self.sums))
        return replace(self, moved=moved, sums=sums)

    def drift(self, matrices: Mapping[str, nn.Linear]) -> Named:
        """|moved| / |trained weight| of every row: layer name -> [B]. From a weight of zeros: 0 where nothing moved, else infinite."""
        moved = {name: t.norm(dim=(1, 2)) for name, t in self.moved.items()}
        return {name: torch.where(t > 0, t / matrices[name].weight.to(t.dtype).norm(), 0) for name, t in moved.items()}

    def to_tensors(self) -> Named:
        """Flat named tensors, for a safetensors file."""
        flat = {f"{kind}.{name}": t for kind, named in (("moved", self.moved), ("sums", self.sums)) for name, t in named.items()}
        return {**flat, "frozen": torch.tensor(self.frozen)}

    @staticmethod
    def from_tensors(tensors: Mapping[str, torch.Tensor]) -> "FastLevels":
        """The inverse of `to_tensors`. Raises CheckpointError for names that are not of per-sequence levels."""
        parts: dict[str, Named] = {"moved": {}, "sums": {}}
        for key, tensor in tensors.items():
            kind, _, name = key.partition(".")
            if kind in parts and level_of(name):
                parts[kind][name] = tensor
            elif key != "frozen":
                raise CheckpointError(
                    f'"{key}" is not a tensor of per-sequence levels; give a file that --save-memory wrote with a token clock'
                )
        if "frozen" not in tensors or not parts["moved"]:
            raise CheckpointError(
                "the per-sequence levels are missing or incomplete; give a file that --save-memory wrote with a token clock"
            )
        return FastLevels(parts["moved"], parts["sums"], bool(tensors["frozen"]))


def _zeros(weight: torch.Tensor, batch: int) -> torch.Tensor:
    dtype = torch.promote_types(weight.dtype, torch.float32)
    return torch.zeros(batch, *weight.shape, dtype=dtype, device=weight.device)


@contextlib.contextmanager
def applied(matrices: Mapping[str, nn.Linear], moved: Named) -> Iterator[None]:
    """While it lasts, row b of what enters a layer [B, T, I] meets W + moved[b]. With moved = 0 every result is the same bit for bit."""

    def add(moved_BOI: torch.Tensor):
        def hook(_module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
            return output + torch.bmm(inputs[0], moved_BOI.to(output.dtype).mT)

        return hook

    handles = [matrices[name].register_forward_hook(add(t)) for name, t in moved.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
