"""How a memory computes and learns: the settings shared by both scans (SPEC 2, 2.3)."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class MemoryRule:
    """Form, inner objective and update of a memory.

    memory: "mlp" is z + W1 silu(W2 z) (NL eq. 89), "linear" is W z.
    objective: "huber" (bounded error), "l2" (half-squared) or "dot" (dot product with the target).
    update: "dgd" erases along the input (NL eq. 88), "gd" does not. dgd_scope: "first" or "layerwise" (W1 too, with normalised hidden).
    momentum: Titans eq. 13-14. self_target: the target is M(v) at the anchor (NL eq. 84), else v.
    """

    memory: str = "mlp"
    objective: str = "huber"
    huber_delta: float = 1.0
    update: str = "dgd"
    dgd_scope: str = "first"
    momentum: bool = False
    self_target: bool = True
    normalize_v: bool = False

    @property
    def num_layers(self) -> int:
        """Weight matrices of one memory."""
        return 2 if self.memory == "mlp" else 1

    def erases(self, layer: int) -> bool:
        """Whether the update of weight `layer` (0 = the first) has the factor alpha I - eta x x^T."""
        return self.update == "dgd" and (layer == 0 or self.dgd_scope == "layerwise")


@dataclass(frozen=True)
class MemoryState:
    """Weights of one memory or of a stack of S memories, and their momentum.

    weights: (W2 [B, H, F, K], W1 [B, H, K, F]) or (W [B, H, K, K],), a stack has [B, H, S, ...]. momentum: the same shapes, or ().
    """

    weights: tuple[torch.Tensor, ...]
    momentum: tuple[torch.Tensor, ...] = ()

    @staticmethod
    def start(weights: tuple[torch.Tensor, ...], *, batch: int, momentum: bool) -> "MemoryState":
        """The state at a document start: the learned weights [H, ...] for every row, and zero momentum."""
        expanded = tuple(w.unsqueeze(0).expand(batch, *w.shape) for w in weights)
        return MemoryState(expanded, tuple(torch.zeros_like(w) for w in expanded) if momentum else ())

    def tensors(self) -> tuple[torch.Tensor, ...]:
        """All tensors, weights first."""
        return self.weights + self.momentum

    def like(self, tensors: tuple[torch.Tensor, ...]) -> "MemoryState":
        """The same structure with other tensors."""
        count = len(self.weights)
        return MemoryState(tuple(tensors[:count]), tuple(tensors[count:]))

    def where(self, rows_B: torch.Tensor, other: "MemoryState") -> "MemoryState":
        """`other` in the rows where rows_B is true, self elsewhere."""
        pairs = zip(self.tensors(), other.tensors(), strict=True)
        return self.like(tuple(torch.where(rows_B.view(-1, *(1,) * (a.dim() - 1)), b, a) for a, b in pairs))


@dataclass(frozen=True)
class ChunkMasks:
    """Which rows commit the writes of a chunk and which return to the learned start before it; None = all commit, none returns.

    commit_BN, reset_BN: bool. A chunk that is not committed is read as usual and leaves the state as it was.
    """

    commit_BN: torch.Tensor | None = None
    reset_BN: torch.Tensor | None = None

    def window(self, chunks: slice) -> "ChunkMasks":
        """The masks of a run of chunks."""
        return ChunkMasks(*(None if m is None else m[:, chunks] for m in (self.commit_BN, self.reset_BN)))

    def repeat(self, count: int) -> "ChunkMasks":
        """Every row `count` times in a row, for heads folded into the batch."""
        return ChunkMasks(*(None if m is None else m.repeat_interleave(count, 0) for m in (self.commit_BN, self.reset_BN)))
