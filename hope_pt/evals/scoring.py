"""From a model to nats per token without side effects: evaluation mode, no gradients, fresh memory for every call.

`TokenLosses` is what every loss evaluation asks for: `Batch -> [B, T]` float32 nats of each target. A `HopeLM` becomes one through
`lm_losses`; `TrainEngine.token_losses` and the n-gram baselines already are. Letters: B sequences, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from hope_pt.errors import EvalError

if TYPE_CHECKING:
    from hope_pt.data import Batch, Source
    from hope_pt.nn import HopeLM
    from hope_pt.nn.token_clock import ClockedLM

TokenLosses = Callable[["Batch"], Tensor]


@contextmanager
def evaluating(lm: torch.nn.Module) -> Iterator[torch.device]:
    """Evaluation mode without gradients on the model's device; the former mode of every submodule comes back."""
    modes = [(module, module.training) for module in lm.modules()]
    lm.eval()
    try:
        with torch.no_grad():
            yield next(lm.parameters()).device
    finally:
        for module, training in modes:
            module.training = training


def lm_losses(lm: HopeLM | ClockedLM, *, document_reset: bool = True) -> TokenLosses:
    """A `TokenLosses` of `lm`: every call starts from the learned memory; documents inside a sequence reset it if asked."""

    def losses(batch: Batch) -> Tensor:
        with evaluating(lm) as device:
            doc_start_BT = batch.doc_start_BT.to(device) if document_reset else None
            logits_BTV, _ = lm(batch.tokens_BT.to(device), doc_start_BT=doc_start_BT)
            return target_losses(logits_BTV, batch.targets_BT.to(device)).cpu()

    return losses


def target_losses(logits_BTV: Tensor, targets_BT: Tensor) -> Tensor:
    """Cross-entropy [B, T] in nats, float32."""
    return torch.nn.functional.cross_entropy(logits_BTV.float().flatten(0, 1), targets_BT.flatten(), reduction="none").view_as(targets_BT)


def batches(source: Source, *, sequences: int, batch_size: int) -> Iterator[Batch]:
    """The same `sequences` samples every time, evenly spread over the source, `batch_size` at once; all of them if there are fewer."""
    if source.num_samples == 0:
        raise EvalError("the held-out split has no samples; tokenise more text, or hold out a larger share of it")
    count = min(sequences, source.num_samples)
    indices = np.arange(count, dtype=np.int64) * source.num_samples // count
    for start in range(0, count, batch_size):
        yield source.read(indices[start : start + batch_size])
