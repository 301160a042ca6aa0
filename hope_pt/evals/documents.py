"""Long documents, each read from its first token in calls that carry the state on: what a model gains by reading on.

With `hope_pt.nn.token_clock.ClockedLM` the CMS levels learn from the document meanwhile; the plain model is the control.
Legend: B documents read side by side, T tokens of a call.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from hope_pt.errors import EvalError
from hope_pt.evals.language import bits_per_byte, by_context
from hope_pt.evals.scoring import evaluating, target_losses

if TYPE_CHECKING:
    from hope_pt.data import Source
    from hope_pt.nn import HopeLM
    from hope_pt.nn.token_clock import ClockedLM

READ_AT_ONCE = 256
"""Samples that are looked through together for documents."""


def documents(source: Source, *, count: int, least: int, most: int) -> list[torch.Tensor]:
    """The first `count` documents of the split with at least `least` tokens, each cut to `most` tokens; EvalError if there is none."""
    found: list[torch.Tensor] = []
    longest = 0
    for text in _each_document(source):
        longest = max(longest, len(text))
        if len(text) >= least:
            found.append(text[:most])
        if len(found) == count:
            return found
    if not found:
        raise EvalError(f"no held-out document has {least} tokens, the longest has {longest}; ask for shorter ones")
    return found


def _each_document(source: Source) -> Iterator[torch.Tensor]:
    """Token ids of every document, in the order of the split; samples follow each other without a gap."""
    parts: list[torch.Tensor] = []
    for first in range(0, source.num_samples, READ_AT_ONCE):
        batch = source.read(np.arange(first, min(first + READ_AT_ONCE, source.num_samples)))
        starts = batch.doc_start_BT.flatten().nonzero().flatten()
        rest, *begun = batch.tokens_BT.flatten().tensor_split(starts)
        parts.append(rest)
        for part in begun:
            yield torch.cat(parts)
            parts = [part]
    yield torch.cat(parts)


def read_documents(
    lm: HopeLM | ClockedLM, texts: list[torch.Tensor], *, bytes_per_token: float, window: int = 1024, name: str = "document_"
) -> dict[str, float]:
    """`eval/{name}loss` in nats per token, `_bits_per_byte`, `_tokens`, and the loss by context length as `language.by_context`.

    texts: token ids of documents, of any lengths, read side by side from a fresh state. window: tokens of a call; no value depends on it.
    """
    tokens_BT = pad_sequence(texts, batch_first=True)
    real_BT = pad_sequence([torch.ones(len(text), dtype=torch.bool) for text in texts], batch_first=True)
    losses, contexts, state = [], [], None
    for first in range(0, tokens_BT.shape[1] - 1, window):
        here = slice(first, min(first + window, tokens_BT.shape[1] - 1))
        with evaluating(lm) as device:
            logits_BTV, state = lm(tokens_BT[:, here].to(device), state=state, mask_BT=real_BT[:, here].to(device), return_state=True)
            found_BT = target_losses(logits_BTV, tokens_BT[:, here.start + 1 : here.stop + 1].to(device)).cpu()
        counted_BT = real_BT[:, here.start + 1 : here.stop + 1]
        losses.append(found_BT[counted_BT].double())
        contexts.append(torch.arange(first + 1, here.stop + 1).expand_as(found_BT)[counted_BT])
    loss_N, context_N = torch.cat(losses), torch.cat(contexts)
    loss = loss_N.mean().item()
    result = {f"eval/{name}loss": loss, f"eval/{name}tokens": float(len(loss_N))}
    if bytes_per_token > 0:
        result[f"eval/{name}bits_per_byte"] = bits_per_byte(loss, bytes_per_token=bytes_per_token)
    return result | by_context(loss_N, context_N, name=name)
