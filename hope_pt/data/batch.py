"""What the model is trained on: a batch of token sequences with targets, loss mask and document starts. B rows, T positions."""

from dataclasses import dataclass

import numpy as np
import torch


@dataclass(frozen=True)
class Batch:
    """One batch; `tokens_BT` and `targets_BT` may be views of one [B, T + 1] tensor, so copy before writing into them."""

    tokens_BT: torch.Tensor
    """int64 input ids."""
    targets_BT: torch.Tensor
    """int64 what is to be predicted at each input id: the id that follows it, or the answer of a generated task."""
    loss_mask_BT: torch.Tensor
    """float32, 1 where the target counts in the loss, else 0."""
    doc_start_BT: torch.Tensor
    """bool, True at the first token of a document."""

    def __len__(self) -> int:
        return self.tokens_BT.shape[0]

    def slice(self, rows: slice) -> "Batch":
        """The batch of some rows (views, no copy)."""
        return Batch(self.tokens_BT[rows], self.targets_BT[rows], self.loss_mask_BT[rows], self.doc_start_BT[rows])


@dataclass(frozen=True)
class Rows:
    """The same as plain arrays, as readers make them and worker processes send them; small, because ids keep their stored dtype."""

    ids: np.ndarray
    """[B, T + 1] uint16 or uint32 ids (or int64)."""
    doc_start: np.ndarray
    """[B, T] bool."""
    loss_mask: np.ndarray | None = None
    """[B, T] bool; None counts every position."""
    targets: np.ndarray | None = None
    """[B, T] ids; None: the id that follows."""

    def to_batch(self) -> Batch:
        """Tensors of the contract's dtypes."""
        ids = torch.from_numpy(self.ids.astype(np.int64))
        starts = torch.from_numpy(self.doc_start)
        mask = torch.ones(1, 1).expand(*starts.shape) if self.loss_mask is None else torch.from_numpy(self.loss_mask.astype(np.float32))
        targets = ids[:, 1:] if self.targets is None else torch.from_numpy(self.targets.astype(np.int64))
        return Batch(ids[:, :-1], targets, mask, starts)
