"""Held-out loss: nats per token, bits per byte, and how it falls with the context that a token has seen.

Works for anything that gives token losses: a model, the training engine, an n-gram baseline.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hope_pt.errors import EvalError
from hope_pt.evals.scoring import TokenLosses, batches

if TYPE_CHECKING:
    from hope_pt.data import Source


def heldout(
    losses: TokenLosses, source: Source, *, sequences: int = 64, batch_size: int = 8, name: str = "", by_position: bool = True
) -> dict[str, float]:
    """Mean loss over the counted tokens of `sequences` held-out sequences.

    Returns `eval/{name}loss` (nats per token), `eval/{name}bits_per_byte` where the source is text, `eval/{name}tokens`, and with
    `by_position` the keys of `by_context`. `name` keeps baselines apart, for example "trigram_".
    """
    pairs = []
    for batch in batches(source, sequences=sequences, batch_size=batch_size):
        counted_BT = batch.loss_mask_BT.cpu() > 0
        pairs.append((losses(batch).cpu()[counted_BT].double(), context_length(batch.doc_start_BT.cpu())[counted_BT]))
    loss_N, context_N = torch.cat([loss for loss, _ in pairs]), torch.cat([context for _, context in pairs])
    if not len(loss_N):
        raise EvalError("no held-out token is counted: every loss mask is zero; check the held-out shards")
    loss = loss_N.mean().item()
    result = {f"eval/{name}loss": loss, f"eval/{name}tokens": float(len(loss_N))}
    if source.bytes_per_token > 0:
        result[f"eval/{name}bits_per_byte"] = bits_per_byte(loss, bytes_per_token=source.bytes_per_token)
    return result | (by_context(loss_N, context_N, name=name) if by_position else {})


def bits_per_byte(loss: float, *, bytes_per_token: float) -> float:
    """Nats per token to bits per byte of the original text."""
    return loss / math.log(2) / bytes_per_token


def context_length(doc_start_BT: Tensor) -> Tensor:
    """Tokens [B, T] int64 seen when the target at t is predicted: from the last document start, or the sequence start, to t."""
    positions_BT = torch.arange(doc_start_BT.shape[1]).expand(doc_start_BT.shape)
    last_start_BT = torch.where(doc_start_BT, positions_BT, torch.zeros_like(positions_BT)).cummax(dim=1).values
    return positions_BT - last_start_BT + 1


def by_context(loss_N: Tensor, context_N: Tensor, *, name: str = "") -> dict[str, float]:
    """Mean loss where the context has 1, 2, 3-4, 5-8, 9-16, ... tokens: `eval/{name}loss_at_context/0009-0016`, empty ranges left out.

    A static network with a causal convolution stops falling at the convolution's reach; a working memory or attention does not.
    """
    bucket_N = torch.log2(context_N.double()).ceil().long()
    result = {}
    for bucket in bucket_N.unique().tolist():
        low, high = 2**bucket // 2 + 1, 2**bucket
        result[f"eval/{name}loss_at_context/{low:04d}-{high:04d}"] = loss_N[bucket_N == bucket].mean().item()
    return result
