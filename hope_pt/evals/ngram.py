"""The baseline that a language model must beat: an interpolated modified Kneser-Ney token trigram, and a unigram.

Fitted on the tokens of the training split in their stored order, scored on the same held-out batches as the model, with the context
that the model has inside its window. Chen and Goodman 1999 (modified discounts from counts of counts, per order, continuation counts for
the lower orders); the bottom order is interpolated with the uniform distribution, so every token has a probability. Both classes offer
`losses(batch) -> [B, T]` nats, like a model. Letters: N distinct n-grams, B sequences, T tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from hope_pt.errors import EvalError
from hope_pt.evals.language import heldout

if TYPE_CHECKING:
    from hope_pt.data import Batch, Source


@dataclass(frozen=True)
class Order:
    """One n-gram order over sorted codes `context * V + token`: discounted counts, and what each context gives to the order below."""

    codes_N: np.ndarray
    discounted_N: np.ndarray
    contexts: np.ndarray
    totals: np.ndarray
    backoff: np.ndarray

    @staticmethod
    def of(codes_N: np.ndarray, counts_N: np.ndarray, *, vocab_size: int) -> Order:
        """Discount the counts of distinct sorted codes (Chen and Goodman eq. 17)."""
        discount_N = _discounts(counts_N)[np.minimum(counts_N, 3)]
        contexts, first = np.unique(codes_N // vocab_size, return_index=True)
        totals = np.add.reduceat(counts_N, first).astype(np.float64)
        return Order(codes_N, counts_N - discount_N, contexts, totals, np.add.reduceat(discount_N, first) / totals)

    def interpolate(self, context: np.ndarray, code: np.ndarray, *, lower: np.ndarray) -> np.ndarray:
        """p(token | context) from this order and the probabilities `lower` of the order below; unseen contexts give `lower`."""
        at, seen = _find(self.contexts, context)
        share = np.where(seen, self._discounted(code) / self.totals[at], 0.0)
        return share + np.where(seen, self.backoff[at], 1.0) * lower

    def _discounted(self, code: np.ndarray) -> np.ndarray:
        at, seen = _find(self.codes_N, code)
        return np.where(seen, self.discounted_N[at], 0.0)


@dataclass(frozen=True)
class Trigram:
    """Interpolated modified Kneser-Ney over tokens."""

    vocab_size: int
    unigram_V: np.ndarray
    bigram_start: Order
    bigram: Order
    trigram: Order

    @staticmethod
    def fit(source: Source, *, max_samples: int | None = None) -> Trigram:
        """Count the first `max_samples` training samples (all by default)."""
        before, last, target = _triples(source, max_samples=max_samples)
        size = source.vocab_size
        bigrams, bigram_counts = np.unique(last * size + target, return_counts=True)
        known = before >= 0
        trigrams, trigram_counts = np.unique((before[known] * size + last[known]) * size + target[known], return_counts=True)
        # Lower orders count in how many contexts a token was seen, not how often.
        continuations, continuation_counts = np.unique(trigrams % (size * size), return_counts=True)
        unigram_counts = np.bincount(continuations % size, minlength=size)
        discount_V = _discounts(unigram_counts)[np.minimum(unigram_counts, 3)]
        unigram_V = (unigram_counts - discount_V + discount_V.sum() / size) / unigram_counts.sum()
        return Trigram(
            vocab_size=size,
            unigram_V=unigram_V,
            bigram_start=Order.of(bigrams, bigram_counts, vocab_size=size),
            bigram=Order.of(continuations, continuation_counts, vocab_size=size),
            trigram=Order.of(trigrams, trigram_counts, vocab_size=size),
        )

    def probability(self, before: np.ndarray, last: np.ndarray, target: np.ndarray) -> np.ndarray:
        """p(target | before, last), elementwise; `before` = -1 where only one token is known."""
        size = self.vocab_size
        uni = self.unigram_V[target]
        pair = last * size + target
        bi = self.bigram.interpolate(last, pair, lower=uni)
        tri = self.trigram.interpolate(before * size + last, before * size * size + pair, lower=bi)
        return np.where(before >= 0, tri, self.bigram_start.interpolate(last, pair, lower=uni))

    def losses(self, batch: Batch) -> Tensor:
        """Nats [B, T] of every target."""
        last_BT = batch.tokens_BT.cpu().numpy()
        before_BT = np.concatenate([np.full_like(last_BT[:, :1], -1), last_BT[:, :-1]], axis=1)
        return torch.from_numpy(-np.log(self.probability(before_BT, last_BT, batch.targets_BT.cpu().numpy()))).float()


@dataclass(frozen=True)
class Unigram:
    """Token frequencies with half a count added to each."""

    probability_V: np.ndarray

    @staticmethod
    def fit(source: Source, *, max_samples: int | None = None) -> Unigram:
        """Count the first `max_samples` training samples (all by default)."""
        _, _, target = _triples(source, max_samples=max_samples)
        counts_V = np.bincount(target, minlength=source.vocab_size) + 0.5
        return Unigram(counts_V / counts_V.sum())

    def losses(self, batch: Batch) -> Tensor:
        """Nats [B, T] of every target."""
        return torch.from_numpy(-np.log(self.probability_V[batch.targets_BT.cpu().numpy()])).float()


def baselines(
    train: Source, source: Source, *, sequences: int = 64, batch_size: int = 8, max_samples: int | None = None
) -> dict[str, float]:
    """`eval/unigram_*` and `eval/trigram_*`: loss and bits per byte on the held-out sequences that `heldout` uses."""
    result: dict[str, float] = {}
    unigram, trigram = Unigram.fit(train, max_samples=max_samples), Trigram.fit(train, max_samples=max_samples)
    for name, losses in (("unigram_", unigram.losses), ("trigram_", trigram.losses)):
        result |= heldout(losses, source, sequences=sequences, batch_size=batch_size, name=name, by_position=False)
    return result


def _triples(source: Source, *, max_samples: int | None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Counted (token before, last token, target) of the training stream; before = -1 at the start of the stream."""
    count = min(source.num_samples, max_samples or source.num_samples)
    if count == 0:
        raise EvalError("the training split has no samples to fit the n-gram baselines on; tokenise some text first")
    parts, previous = [], -1
    for start in range(0, count, 256):
        batch = source.read(np.arange(start, min(start + 256, count), dtype=np.int64))
        tokens_BT, targets_BT = batch.tokens_BT.numpy(), batch.targets_BT.numpy()
        # Consecutive samples continue the same stream, so a window's first token follows the last token of the window before.
        before_BT = np.concatenate([np.concatenate([[previous], tokens_BT[:-1, -1]])[:, None], tokens_BT[:, :-1]], axis=1)
        counted_BT = batch.loss_mask_BT.numpy() > 0
        parts.append(np.stack([before_BT[counted_BT], tokens_BT[counted_BT], targets_BT[counted_BT]]))
        previous = int(tokens_BT[-1, -1])
    before, last, target = np.concatenate(parts, axis=1).astype(np.int64)
    return before, last, target


def _discounts(counts: np.ndarray) -> np.ndarray:
    """Discounts [4] for counts 0, 1, 2 and 3 or more; absolute 0.5 where the counts of counts are too thin for the estimate."""
    n1, n2, n3, n4 = (int((counts == c).sum()) for c in (1, 2, 3, 4))
    if min(n1, n2, n3, n4) == 0:
        return np.array([0.0, 0.5, 0.5, 0.5])
    y = n1 / (n1 + 2 * n2)
    estimate = np.array([0.0, 1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3])
    # A discount must leave something to the order below and never exceed its count.
    return np.clip(estimate, [0.0, 0.05, 0.05, 0.05], [0.0, 1.0, 2.0, 3.0])


def _find(sorted_values: np.ndarray, wanted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Positions of `wanted` in `sorted_values` (clipped into range) and whether each is really there."""
    at = np.minimum(np.searchsorted(sorted_values, wanted), len(sorted_values) - 1)
    return at, sorted_values[at] == wanted
