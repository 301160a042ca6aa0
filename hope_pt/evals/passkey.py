"""Passkey probe: a five-digit key is stated once inside real text, far from the question that asks for it.

    <held-out text> The pass key is 73914. Remember it. <held-out text> What is the pass key? The pass key is 7...

Each sample has its own text, key and distractors. The haystack is cut so that all prompts have the same number of tokens. Scored two
ways: is the key's log-probability above that of all distractors (chance 1 / candidates), and would greedy decoding write the key exactly.
The prompt is read once; each candidate continues from a copy of that memory state, so nothing leaks between candidates or samples.
Letters: S samples, A candidates (the right one first), L tokens of a candidate, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch

from hope_pt.errors import EvalError
from hope_pt.evals.scoring import evaluating

if TYPE_CHECKING:
    from hope_pt.data import Source
    from hope_pt.nn import HopeLM

NEEDLE = " The pass key is {key}. Remember it."
QUESTION = " What is the pass key? The pass key is"
DEPTHS = (0.0, 0.25, 0.5, 0.75)


class Encode(Protocol):
    """Text to token ids."""

    def __call__(self, text: str) -> list[int]:
        """Ids without control tokens."""


@dataclass(frozen=True)
class Probe:
    """The prompts and candidates of one probe."""

    prompt_ST: torch.Tensor
    """int64, all of the same length."""
    candidates_SAL: torch.Tensor
    """int64, the right key first."""
    depth_S: np.ndarray
    """Place of the needle in the haystack, 0 = start."""
    distance_S: np.ndarray
    """Tokens between the end of the needle and the end of the prompt."""


def sentencepiece_encode(path: Path) -> Encode:
    """The encoder of a `tokenizer.model`."""
    from sentencepiece import SentencePieceProcessor

    processor = SentencePieceProcessor(model_file=str(path))
    return lambda text: processor.encode(text, out_type=int)


def build(source: Source, encode: Encode, *, samples: int, context: int, candidates: int = 10, seed: int = 0) -> Probe:
    """Deterministic prompts of exactly `context` tokens from the held-out text; raises `EvalError` if it is too short for them."""
    rng = np.random.default_rng(seed)
    longest = max(len(encode(NEEDLE.format(key=key))) for key in ("10000", "73914", "99999"))
    if context < 2 * (longest + len(encode(QUESTION))):
        raise EvalError(f"passkey probe: context = {context} tokens is too short for the needle and the question; use a longer one")
    prompts, answers, depths, distances = [], [], [], []
    for sample in range(samples):
        keys = _keys(encode, rng=rng, count=candidates)
        needle, question = encode(NEEDLE.format(key=keys[0][0])), encode(QUESTION)
        filler = _filler(source, rng=rng, length=context - len(needle) - len(question))
        depth = DEPTHS[sample % len(DEPTHS)]
        at = int(depth * len(filler))
        prompts.append([*filler[:at], *needle, *filler[at:], *question])
        answers.append([ids for _, ids in keys])
        depths.append(depth)
        distances.append(context - at - len(needle))
    return Probe(torch.tensor(prompts), torch.tensor(answers), np.array(depths), np.array(distances))


def score(lm: HopeLM, probe: Probe, *, batch_size: int = 8) -> dict[str, float]:
    """`eval/passkey_accuracy` (also by depth), `_exact`, `_chance`, `_margin`, `_samples` and `_min_distance` (tokens).

    `_margin` is the log-probability of the right key over the mean of the distractors, in nats: it moves before the accuracy does.
    """
    parts = [_score_batch(lm, probe, rows=slice(start, start + batch_size)) for start in range(0, len(probe.prompt_ST), batch_size)]
    logprob_SA, exact_S = torch.cat([logprob for logprob, _ in parts]), torch.cat([exact for _, exact in parts])
    right_S = (logprob_SA[:, :1] > logprob_SA[:, 1:]).all(dim=1).double().numpy()
    result = {
        "eval/passkey_accuracy": float(right_S.mean()),
        "eval/passkey_exact": exact_S.double().mean().item(),
        "eval/passkey_chance": 1.0 / logprob_SA.shape[1],
        "eval/passkey_margin": (logprob_SA[:, 0] - logprob_SA[:, 1:].mean(dim=1)).mean().item(),
        "eval/passkey_samples": float(len(right_S)),
        "eval/passkey_min_distance": float(probe.distance_S.min()),
    }
    for depth in np.unique(probe.depth_S):
        result[f"eval/passkey_accuracy_at_depth/{depth:.2f}"] = float(right_S[probe.depth_S == depth].mean())
    return result


def passkey(
    lm: HopeLM, source: Source, *, samples: int = 64, context: int | None = None, batch_size: int = 8, seed: int = 0
) -> dict[str, float]:
    """Build the probe on the source's own tokenizer and text, and score it; `context` defaults to the training length."""
    if source.tokenizer_path is None:
        raise EvalError("passkey probe: this source has no tokenizer, so no text can be asked; set eval.passkey = false")
    probe = build(source, sentencepiece_encode(source.tokenizer_path), samples=samples, context=context or source.seq_len, seed=seed)
    return score(lm, probe, batch_size=batch_size)


def _score_batch(lm: HopeLM, probe: Probe, *, rows: slice) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probability [S, A] of every candidate and whether greedy decoding gives the right one [S]."""
    candidates_SAL = probe.candidates_SAL[rows]
    num_samples, num_candidates, length = candidates_SAL.shape
    with evaluating(lm) as device:
        logits_STV, state = lm(probe.prompt_ST[rows].to(device), return_state=True)
        flat_NL = candidates_SAL.reshape(-1, length).to(device)
        first_NV = logits_STV[:, -1].repeat_interleave(num_candidates, dim=0)
        copies = state.rows(torch.arange(num_samples, device=device).repeat_interleave(num_candidates))
        logits_NLV = torch.cat([first_NV[:, None], lm(flat_NL[:, :-1], state=copies)[0]], dim=1) if length > 1 else first_NV[:, None]
        logprob_NL = logits_NLV.log_softmax(-1).gather(-1, flat_NL[..., None])[..., 0]
        exact_N = (logits_NLV.argmax(-1) == flat_NL).all(dim=1)
    return logprob_NL.sum(1).view(num_samples, num_candidates).cpu(), exact_N.view(num_samples, num_candidates)[:, 0].cpu()


def _keys(encode: Encode, *, rng: np.random.Generator, count: int) -> list[tuple[str, list[int]]]:
    """`count` different keys of five digits whose continuation has the same number of tokens."""
    found: dict[str, list[int]] = {}
    prefix = len(encode(QUESTION))
    for _ in range(200 * count):
        key = str(rng.integers(10_000, 100_000))
        # Encoded in place, since a tokenizer may join the space with the first digit.
        ids = encode(f"{QUESTION} {key}")[prefix:]
        if not found or len(ids) == len(next(iter(found.values()))):
            found[key] = ids
        if len(found) == count:
            return list(found.items())
    raise EvalError(f"passkey probe: the tokenizer does not give {count} five-digit keys of equal length; use one that splits digits")


def _filler(source: Source, *, rng: np.random.Generator, length: int) -> list[int]:
    """`length` consecutive held-out tokens from a random sample on, wrapping at the end of the split."""
    needed = -(-length // source.seq_len)
    start = int(rng.integers(source.num_samples))
    tokens = source.read((start + np.arange(needed, dtype=np.int64)) % source.num_samples).tokens_BT
    return tokens.flatten()[:length].tolist()
