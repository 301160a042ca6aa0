"""Random batches for tests of the engine, and their division over data-parallel ranks."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class RandomBatch:
    """Fields of `hope_pt.data.Batch`: tokens, targets [B, T] int64, loss_mask [B, T] float32, doc_start [B, T] bool."""

    tokens_BT: Tensor
    targets_BT: Tensor
    loss_mask_BT: Tensor
    doc_start_BT: Tensor

    def part(self, *, dp_rank: int, dp_size: int) -> "RandomBatch":
        """The rows of one data-parallel rank: every dp_size-th, beginning with dp_rank."""
        return RandomBatch(*(field[dp_rank::dp_size] for field in vars(self).values()))


def random_batch(*, batch: int, length: int, vocab_size: int, seed: int) -> RandomBatch:
    """Random tokens; about a tenth of the positions start a document; rows have different numbers of counted tokens."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, vocab_size, (batch, length + 1), generator=generator)
    counted = torch.rand(batch, length, generator=generator) < torch.linspace(0.3, 0.9, batch).unsqueeze(1)
    starts = torch.rand(batch, length, generator=generator) < 0.1
    return RandomBatch(tokens[:, :-1], tokens[:, 1:], counted.float(), starts)
