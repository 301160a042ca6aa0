"""The memory scan in chunks, plain torch: the fast path on a CPU and the fallback everywhere (SPEC 2.1).

Chunks are taken in segments of `save_every` tokens. Within a segment everything that depends on the keys only (Gram matrices, decays,
triangular inverses) is computed for all its chunks in one batched call; the loop over chunks is left with thin products. Between
segments only the state is kept; backward replays a segment from it.
Legend: B batch, H heads, T tokens, N chunks, C chunk length, K head width, F hidden width; leading dimensions in the loop are B, H.
"""

import torch
import torch.nn.functional as F

from hope_kernels import fused
from hope_kernels.chunk import ChunkTerms, Decay, chunk_terms, decay, end_weight, read_inside
from hope_kernels.memory import read_memory, surprise
from hope_kernels.replay import replay
from hope_kernels.rule import ChunkMasks, MemoryRule, MemoryState


def segments(num_tokens: int, chunk: int, save_every: int) -> list[tuple[int, int, int]]:
    """Cut a sequence into (first token, end token, chunk length): runs of whole chunks, then a shorter last chunk if there is one."""
    whole = num_tokens - num_tokens % chunk
    step = chunk * max(1, save_every // chunk)
    cuts = [(first, min(first + step, whole), chunk) for first in range(0, whole, step)]
    return cuts + ([(whole, num_tokens, num_tokens - whole)] if whole < num_tokens else [])


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
    is_fused = fused.supports(rule)
    segment = _fused_segment if is_fused else _segment
    cuts = segments(qkv[0].shape[2], chunk, save_every)
    split = [t.split([end - first for first, end, _ in cuts], 2) for t in (*qkv, *gates)]
    recompute = torch.is_grad_enabled() and len(cuts) > 1
    outputs: list[torch.Tensor] = []
    for inputs, (first, end, size) in zip(zip(*split, strict=True), cuts, strict=True):
        part = masks.window(slice(first // chunk, -(-end // chunk)))
        writes_last = keep_state or end < cuts[-1][1]
        start_tensors = () if part.reset_BN is None else start.tensors()

        def run(*tensors, form=state, size=size, part=part, writes_last=writes_last):
            return segment(tensors, form, rule=rule, size=size, masks=part, read=read, writes_last=writes_last)

        arguments = (*inputs, *state.tensors(), *start_tensors)
        results = replay(run, *arguments) if recompute else run(*arguments)
        count = len(state.tensors())
        outputs.extend(results[:-count])
        state = state.like(tuple(results[-count:]))
    return torch.cat(outputs, 2) if len(outputs) > 1 else outputs[0], state if keep_state else None


def _segment(
    tensors: tuple[torch.Tensor, ...], form: MemoryState, *, rule: MemoryRule, size: int, masks: ChunkMasks, read: str, writes_last: bool
) -> tuple[torch.Tensor, ...]:
    """One segment of whole chunks of length `size`, any rule: (y [B, H, T, K], *state tensors)."""
    num_gates = 3 if rule.momentum else 2
    cut = [t.unflatten(2, (-1, size)) for t in tensors[: 3 + num_gates]]
    q, k, v = cut[:3]
    count = len(form.tensors())
    state = form.like(tensors[3 + num_gates : 3 + num_gates + count])
    start = form.like(tensors[3 + num_gates + count :]) if masks.reset_BN is not None else None
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
    return torch.stack(outputs, 2).flatten(2, 3), *state.tensors()


def _fused_segment(
    tensors: tuple[torch.Tensor, ...], form: MemoryState, *, rule: MemoryRule, size: int, masks: ChunkMasks, read: str, writes_last: bool
) -> tuple[torch.Tensor, ...]:
    """The same for a rule that `fused` supports, heads folded into the batch: (y [B, H, C, K] of every chunk, *state tensors)."""
    batch, heads = tensors[0].shape[:2]
    # chunk-major: every chunk is contiguous, and so are all chunks of the segment together
    q, k, v, eta, log_alpha = (t.flatten(0, 1).unflatten(1, (-1, size)).transpose(0, 1).contiguous() for t in tensors[:5])
    weights, start = tuple(t.flatten(0, 1) for t in tensors[5:7]), tuple(t.flatten(0, 1) for t in tensors[7:])
    masks = masks.repeat(heads)
    terms = fused.terms(k, q if read == "causal" else None, eta, log_alpha, erase=rule.erases(0))
    outputs = []
    each = zip(q.unbind(0), k.unbind(0), v.unbind(0), _columns(list(terms), len(k), 0), strict=True)
    for index, (q_c, k_c, v_c, terms_c) in enumerate(each):
        if start:
            weights = fused.choose(masks.reset_BN[:, index], start, weights)
        writes = writes_last or index + 1 < len(k)
        causal = q_c if read == "causal" else None
        y, after = fused.chunk(k_c, v_c, weights, fused.ChunkDecays(*terms_c), rule=rule, queries=causal, writes=writes)
        outputs.append(fused.read(q_c, *weights) if y is None else y)
        weights = after if masks.commit_BN is None else fused.choose(masks.commit_BN[:, index], after, weights)
    return tuple(t.unflatten(0, (batch, heads)) for t in (*outputs, *weights))


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
