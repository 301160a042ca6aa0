"""The memory scan in chunks, plain torch: the fast path on a CPU and the fallback everywhere (SPEC 2.1).

Everything that depends on the keys only (Gram matrices, decays, triangular inverses) is computed for many chunks in one batched call; the
loop over chunks is left with thin products. A rule that `fused` supports runs as one autograd function with its backward pass by hand: up
to `save_every` tokens it keeps what a chunk left behind, of a longer sequence the state at every chunk's start, from which backward
computes the rest again. Any other rule is differentiated by autograd, in segments of `save_every` tokens that backward replays.
Legend: B batch, H heads, L = B * H, T tokens, N chunks, C chunk length, K head width, F hidden width, G chunks whose terms come together.
"""

from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from hope_kernels import fused
from hope_kernels.chunk import ChunkTerms, Decay, chunk_terms, decay, end_weight, read_inside
from hope_kernels.memory import read_memory, surprise
from hope_kernels.replay import Tensors, in_segments, take
from hope_kernels.rule import ChunkMasks, MemoryRule, MemoryState

TERMS_TOKENS = 512
"""Tokens whose terms are computed together: few calls, and what they work on stays in the cache."""


def memory_scan(
    qkv: tuple[torch.Tensor, ...],
    gates: tuple[torch.Tensor, ...],
    state: MemoryState,
    *,
    rule: MemoryRule,
    chunk: int,
    start: MemoryState | None,
    masks: ChunkMasks,
    read: str,
    save_every: int,
    keep_state: bool,
) -> tuple[torch.Tensor, MemoryState | None]:
    """See `hope_kernels.memory_scan.memory_scan`."""
    tokens, shared = (*qkv, *gates), () if masks.reset_BN is None else start.tensors()
    num_tokens = qkv[0].shape[2]
    recompute = torch.is_grad_enabled() and not fused.supports(rule)
    if fused.supports(rule):
        segment = partial(_fused_segment, rule=rule, read=read, keep=num_tokens <= save_every)
        save_every = num_tokens
    else:
        segment = partial(_segment, rule=rule, read=read)
    (y,), end = in_segments(
        segment, tokens, state.tensors(), shared,
        chunk=chunk, save_every=save_every, masks=masks, keep_state=keep_state, recompute=recompute,
    )  # fmt: skip
    return y, state.like(end) if keep_state else None


def _segment(
    tokens: Tensors, carried: Tensors, shared: Tensors, *, size: int, masks: ChunkMasks, writes_last: bool, rule: MemoryRule, read: str
) -> tuple[Tensors, Tensors]:
    """One segment, any rule: ((y [B, H, T, K],), state tensors). See `replay.Segment`."""
    cut = [t.unflatten(2, (-1, size)) for t in tokens]
    q, k, v = cut[:3]
    form = MemoryState(carried[: rule.num_layers], carried[rule.num_layers :])
    state, start = form, form.like(shared) if shared else None
    decays = decay(cut[3], cut[4], cut[5] if rule.momentum else None, reads=read == "causal")
    terms = chunk_terms(k, decays, erase=rule.erases(0), queries=q if read == "causal" else None)
    outputs = []
    each = zip(q.unbind(2), k.unbind(2), v.unbind(2), _unbind(terms), strict=True)
    for index, (q_c, k_c, v_c, terms_c) in enumerate(each):
        if start is not None:
            state = state.where(masks.reset_BN[:, index], start)
        y, after = chunk_step(state, q_c, k_c, v_c, terms_c, rule=rule, read=read)
        state = after if masks.commit_BN is None else state.where(masks.commit_BN[:, index], after)
        outputs.append(y)
    return (torch.stack(outputs, 2).flatten(2, 3),), state.tensors()


def _fused_segment(
    tokens: Tensors,
    carried: Tensors,
    shared: Tensors,
    *,
    size: int,
    masks: ChunkMasks,
    writes_last: bool,
    rule: MemoryRule,
    read: str,
    keep: bool,
) -> tuple[Tensors, Tensors]:
    """The same for a rule that `fused` supports, heads folded into the batch."""
    batch, heads = tokens[0].shape[:2]
    plan = _Plan(rule, size, read == "causal", masks.repeat(heads), writes_last, keep)
    y, *ends = _Scan.apply(plan, *(t.flatten(0, 1) for t in (*tokens, *carried, *shared)))
    return (y.unflatten(0, (batch, heads)),), tuple(t.unflatten(0, (batch, heads)) for t in ends) if writes_last else carried


@dataclass(frozen=True)
class _Plan:
    """What `_Scan` does: rule, chunk length, causal or anchor read, masks [L, N], whether the last chunk writes and all is kept."""

    rule: MemoryRule
    size: int
    causal: bool
    masks: ChunkMasks
    writes_last: bool
    keep: bool

    def blocks(self, length: int) -> list[tuple[int, range]]:
        """(first token, chunks) of every run of chunks whose terms come together."""
        step, count = max(1, TERMS_TOKENS // self.size), length // self.size
        return [(first * self.size, range(first, min(first + step, count))) for first in range(0, count, step)]

    def cut(self, tensors: Tensors, first: int, chunks: range) -> list[torch.Tensor]:
        """The chunks of a block, [G, L, C, ...], from tensors [L, T, ...]."""
        window = slice(first, first + len(chunks) * self.size)
        return [t[:, window].unflatten(1, (-1, self.size)).transpose(0, 1).contiguous() for t in tensors]

    def terms(self, tokens: list[torch.Tensor]) -> tuple[fused.ChunkDecays, torch.Tensor | None]:
        """`fused.terms_forward` of the q, k, v, eta and log_alpha of a block."""
        q, k, _, eta, log_alpha = tokens
        return fused.terms_forward(k, q if self.causal else None, eta, log_alpha, erase=self.rule.erases(0))

    def chunk(self, tokens: list[torch.Tensor], place: int, weights: fused.Weights, decays: fused.ChunkDecays, *, writes: bool):
        """(y, the weights after it or None, signals or None) of one chunk of a block."""
        q, k, v = (t[place] for t in tokens[:3])
        out = after = signals = None
        if self.causal or writes:
            queries = q if self.causal else None
            out, after, signals = fused.chunk_forward(k, v, queries, weights, fused.at(decays, place), rule=self.rule, writes=writes)
        return out if self.causal else fused.read(q, weights), after, signals

    def chunk_backward(self, d_y, d_ends, tokens, place, weights, decays, signals):
        """((d_q, d_k, d_v), gradients of the weights and of the decays) of one chunk; d_ends None where it did not write."""
        q, k, v = (t[place] for t in tokens[:3])
        if self.causal or d_ends is not None:
            d_out, queries = (d_y, q) if self.causal else (None, None)
            (d_k, d_v, d_q), d_weights, d_decays = fused.chunk_backward(
                d_out, d_ends, k, v, queries, weights, fused.at(decays, place), signals, rule=self.rule
            )
        else:
            d_k, d_v, d_decays = torch.zeros_like(k), torch.zeros_like(v), fused.ChunkDecays(*[None] * len(decays))
            d_weights = torch.zeros_like(weights[0]), torch.zeros_like(weights[1])
        if not self.causal:
            d_q, read = fused.read_backward(d_y, q, weights)
            d_weights = fused.plus(d_weights, read)
        return (d_q, d_k, d_v), d_weights, d_decays


class _Scan(torch.autograd.Function):
    """(y, W2, W1) after q, k, v [L, T, K], eta and log_alpha [L, T], from weights W2, W1 and, where rows are reset, their start."""

    @staticmethod
    def forward(ctx, plan, q, k, v, eta, log_alpha, w2, w1, *start):
        y, length = torch.empty(k.shape, dtype=k.dtype, device=k.device), k.shape[1]
        weights: fused.Weights = (w2, w1)
        kept: list[torch.Tensor | None] = []
        for first, chunks in plan.blocks(length):
            tokens = plan.cut((q, k, v, eta, log_alpha), first, chunks)
            decays, inverse = plan.terms(tokens)
            for place, index in enumerate(chunks):
                if start:
                    weights = fused.choose(plan.masks.reset_BN[:, index], start, weights)
                writes = plan.writes_last or index + 1 < length // plan.size
                out, after, signals = plan.chunk(tokens, place, weights, decays, writes=writes)
                y[:, index * plan.size : (index + 1) * plan.size] = out
                kept.extend((*weights, *(signals or fused.NO_SIGNALS)) if plan.keep else weights)
                if writes:
                    weights = after if plan.masks.commit_BN is None else fused.choose(plan.masks.commit_BN[:, index], after, weights)
            kept.extend((*decays, inverse) if plan.keep else ())
        ctx.plan, ctx.has_start = plan, bool(start)
        ctx.save_for_backward(q, k, v, eta, log_alpha, *kept)
        return y, *(weights if plan.writes_last else ())

    @staticmethod
    @once_differentiable
    def backward(ctx, d_y, *d_weights):
        plan, saved, length = ctx.plan, ctx.saved_tensors, d_y.shape[1]
        inputs, kept = saved[:5], list(saved[5:])
        grads = [torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in inputs]
        d_weights = tuple(t.clone() for t in d_weights) or None
        d_start = tuple(torch.zeros_like(t) for t in saved[5:7]) if ctx.has_start else ()
        for first, chunks in reversed(plan.blocks(length)):
            tokens, (d_out,) = plan.cut(inputs, first, chunks), plan.cut((d_y,), first, chunks)
            if plan.keep:
                *columns, inverse = take(kept, 8)
                decays = fused.ChunkDecays(*columns)
            else:
                decays, inverse = plan.terms(tokens)
            found, d_decays = [], []
            for place, index in reversed(list(enumerate(chunks))):
                signals = fused.Signals(*take(kept, len(fused.Signals._fields))) if plan.keep else None
                weights = tuple(take(kept, 2))
                if signals is None and (plan.causal or d_weights is not None):
                    q_c, k_c, v_c = (t[place] for t in tokens[:3])
                    queries, at = q_c if plan.causal else None, fused.at(decays, place)
                    _, _, signals = fused.chunk_forward(k_c, v_c, queries, weights, at, rule=plan.rule, writes=False)
                d_same = None
                if plan.masks.commit_BN is not None and d_weights is not None:
                    rows = plan.masks.commit_BN[:, index]
                    d_same, d_weights = fused.only(~rows, d_weights), fused.only(rows, d_weights)
                of_tokens, d_weights, of_decays = plan.chunk_backward(d_out[place], d_weights, tokens, place, weights, decays, signals)
                if d_same is not None:
                    d_weights = fused.plus(d_weights, d_same)
                if ctx.has_start:
                    rows = plan.masks.reset_BN[:, index]
                    d_start, d_weights = fused.plus(d_start, fused.only(rows, d_weights)), fused.only(~rows, d_weights)
                found.append(of_tokens)
                d_decays.append(of_decays)
            d_q, d_k, d_v = (torch.stack(parts[::-1]) for parts in zip(*found, strict=True))
            flow, queries = fused.joined(d_decays[::-1], decays), tokens[0] if plan.causal else None
            _, k_b, _, eta_b, log_alpha_b = tokens
            more_k, more_q, *d_gates = fused.terms_backward(flow, k_b, queries, eta_b, log_alpha_b, inverse, decays.y, decays.m)
            d_q = d_q if more_q is None else d_q.add_(more_q)
            window = slice(first, first + len(chunks) * plan.size)
            for grad, part in zip(grads, (d_q, d_k.add_(more_k), d_v, *d_gates), strict=True):
                grad[:, window].unflatten(1, (-1, plan.size)).copy_(part.transpose(0, 1))
        return None, *grads, *d_weights, *d_start


def _unbind(terms: ChunkTerms) -> list[ChunkTerms]:
    """Terms of N chunks [B, H, N, ...] -> N terms; unbind before the loop, since indexing inside it makes backward quadratic."""
    count = terms.y_delta.shape[2]
    decays = _columns(list(terms.decay.__dict__.values()), count, 2)
    rest = _columns([terms.y, terms.y_delta, terms.m, terms.m_delta, terms.momentum], count, 2)
    return [ChunkTerms(Decay(*d), *r) for d, r in zip(decays, rest, strict=True)]


def _columns(tensors: list[torch.Tensor | None], count: int, dim: int) -> list[tuple]:
    """Tensors (or None) with `count` entries along a dimension -> one tuple an entry."""
    return list(zip(*([None] * count if t is None else t.unbind(dim) for t in tensors), strict=True))


def chunk_step(
    state: MemoryState, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, terms: ChunkTerms, *, rule: MemoryRule, read: str
) -> tuple[torch.Tensor, MemoryState]:
    """Read one chunk and write it: q, k, v [B, H, C, K] -> (y [B, H, C, K], the state after it)."""
    signals = surprise(state.weights, k, v, rule)
    slow = state.momentum or (None,) * rule.num_layers
    if read == "anchor":
        y = read_memory(state.weights, q)
        layer_terms = [terms] if rule.num_layers == 1 else [terms, _hidden_terms(signals[1].x, terms, rule, None)]
    else:
        y = read_inside(terms, signals[0], q, q @ state.weights[0].mT, slow[0])
        layer_terms = [terms]
        if rule.memory == "mlp":
            hidden = F.silu(y)
            layer_terms.append(_hidden_terms(signals[1].x, terms, rule, hidden))
            y = q + read_inside(layer_terms[1], signals[1], hidden, hidden @ state.weights[1].mT, slow[1])
    ends = [end_weight(t, s, w, m) for t, s, w, m in zip(layer_terms, signals, state.weights, slow, strict=True)]
    return y, MemoryState(tuple(w for w, _ in ends), tuple(m for _, m in ends) if rule.momentum else ())


def _hidden_terms(hidden: torch.Tensor, terms: ChunkTerms, rule: MemoryRule, queries: torch.Tensor | None) -> ChunkTerms:
    return chunk_terms(hidden, terms.decay, erase=rule.erases(1), queries=queries)
