"""The projection scan in chunks, plain torch: every stacked memory of a chunk in batched products (SPEC 2.1).

Legend: B batch, H heads, S stacked memories, C chunk length, K head width; leading dimensions in the loop are B, H, S.
"""

import torch

from hope_kernels import fused
from hope_kernels.chunk import chunk_terms, decay, end_weight
from hope_kernels.memory import read_memory, surprise
from hope_kernels.memory_scan.chunked import segments
from hope_kernels.projection_scan.generate import SOURCE, Generated, Inputs, Readout, gates, generate
from hope_kernels.replay import replay
from hope_kernels.rule import ChunkMasks, MemoryRule, MemoryState


def projection_scan(
    inputs: Inputs,
    readout: Readout,
    state: MemoryState | None,
    *,
    rule: MemoryRule,
    stack: tuple[str, ...],
    chunk: int,
    start: MemoryState | None,
    masks: ChunkMasks,
    save_every: int,
    keep_state: bool,
) -> tuple[Generated, MemoryState | None]:
    """See `hope_kernels.projection_scan.projection_scan`."""
    streams = {"k": inputs.k, "v": inputs.v, "q": inputs.q}
    if not stack:
        reads = {name: streams[source] for name, source in SOURCE.items()}
        return generate(reads, readout, live=inputs.live, normalize_v=rule.normalize_v), None
    is_fused = fused.supports(rule)
    segment = _fused_segment if is_fused else _segment
    given = tuple(t for t in (inputs.k, inputs.v, inputs.q, inputs.live, inputs.log_mu) if t is not None)
    cuts = segments(inputs.k.shape[2], chunk, save_every)
    split = [t.split([end - first for first, end, _ in cuts], 2) for t in given]
    recompute = torch.is_grad_enabled() and len(cuts) > 1
    outputs = []
    for window, (first, end, size) in zip(zip(*split, strict=True), cuts, strict=True):
        part = masks.window(slice(first // chunk, -(-end // chunk)))
        writes_last = keep_state or end < cuts[-1][1]
        start_tensors = () if part.reset_BN is None else start.tensors()

        def run(*tensors, form=state, size=size, part=part, writes_last=writes_last):
            return segment(tensors, form, inputs, readout, rule=rule, stack=stack, size=size, masks=part, writes_last=writes_last)

        arguments = (*window, *readout.parameters(), *state.tensors(), *start_tensors)
        results = replay(run, *arguments) if recompute else run(*arguments)
        outputs.append(results[:5])
        state = state.like(tuple(results[5:]))
    joined = [torch.cat(parts, 2) if len(parts) > 1 else parts[0] for parts in zip(*outputs, strict=True)]
    return Generated(*joined), state if keep_state else None


def _segment(
    tensors: tuple[torch.Tensor, ...],
    form: MemoryState,
    which: Inputs,
    readout: Readout,
    *,
    rule: MemoryRule,
    stack: tuple[str, ...],
    size: int,
    masks: ChunkMasks,
    writes_last: bool,
) -> tuple[torch.Tensor, ...]:
    """Whole chunks of length `size`, any rule; `tensors` are the inputs (as in `which`), readout parameters, state and start tensors."""
    rest = iter(tensors)
    streams = [None if t is None else next(rest) for t in (which.k, which.v, which.q, which.live, which.log_mu)]
    readout = readout.like(tuple(next(rest) for _ in range(4)))
    count = len(form.tensors())
    state = form.like(tuple(next(rest) for _ in range(count)))
    start = form.like(tuple(rest)) if masks.reset_BN is not None else None
    num_chunks = streams[0].shape[2] // size
    cut = [[None] * num_chunks if t is None else t.unflatten(2, (num_chunks, size)).unbind(2) for t in streams]
    outputs = []
    for index, (k, v, q, live, log_mu) in enumerate(zip(*cut, strict=True)):
        if start is not None:
            state = state.where(masks.reset_BN[:, index], start)
        generated = generate_chunk(state, {"k": k, "v": v, "q": q}, readout, live=live, stack=stack, rule=rule)
        after = write_chunk(state, generated, log_mu, rule=rule)
        state = after if masks.commit_BN is None else state.where(masks.commit_BN[:, index], after)
        outputs.append(generated.tensors())
    joined = [torch.stack(parts, 2).flatten(2, 3) if num_chunks > 1 else parts[0] for parts in zip(*outputs, strict=True)]
    return *joined, *state.tensors()


def generate_chunk(
    state: MemoryState,
    streams: dict[str, torch.Tensor],
    readout: Readout,
    *,
    live: torch.Tensor | None,
    stack: tuple[str, ...],
    rule: MemoryRule,
) -> Generated:
    """Read every stacked memory at its anchor: streams [B, H, C, K] -> the generated ones."""
    stacked = torch.stack([streams[SOURCE[name]] for name in stack], 2)
    answers = dict(zip(stack, read_memory(state.weights, stacked).unbind(2), strict=True))
    reads = {name: answers.get(name, streams[source]) for name, source in SOURCE.items()}
    return generate(reads, readout, live=live, normalize_v=rule.normalize_v)


def write_chunk(state: MemoryState, generated: Generated, log_mu: torch.Tensor | None, *, rule: MemoryRule) -> MemoryState:
    """The stacked memories after the chunk: one Gram matrix and one solve for all of them."""
    decays = decay(generated.eta, generated.log_alpha, log_mu, reads=False)
    terms = chunk_terms(generated.k, decays, erase=rule.erases(0)).unsqueeze(2)
    signals = surprise(state.weights, generated.k.unsqueeze(2), generated.v.unsqueeze(2), rule)
    slow = state.momentum or (None,) * rule.num_layers
    layer_terms = [terms]
    if rule.memory == "mlp":
        layer_terms.append(chunk_terms(signals[1].x, terms.decay, erase=rule.erases(1)))
    ends = [end_weight(t, s, w, m) for t, s, w, m in zip(layer_terms, signals, state.weights, slow, strict=True)]
    return MemoryState(tuple(w for w, _ in ends), tuple(m for _, m in ends) if rule.momentum else ())


def _fused_segment(
    tensors: tuple[torch.Tensor, ...],
    form: MemoryState,
    which: Inputs,
    readout: Readout,
    *,
    rule: MemoryRule,
    stack: tuple[str, ...],
    size: int,
    masks: ChunkMasks,
    writes_last: bool,
) -> tuple[torch.Tensor, ...]:
    """The same for a rule that `fused` supports: heads are folded into the batch and every memory of the stack is on its own."""
    batch, heads = tensors[0].shape[:2]
    k, v, q = (t.flatten(0, 1).split(size, 1) for t in tensors[:3])
    live = [None] * len(k) if which.live is None else tensors[3].split(size, 2)
    rest = tensors[3 if which.live is None else 4 :]
    readout, masks = readout.like(rest[:4]), masks.repeat(heads)
    memories = _memories(rest[4:6], stack)
    start = _memories(rest[6:], stack) if masks.reset_BN is not None else {}
    outputs = []
    for index, (k_c, v_c, q_c, live_c) in enumerate(zip(k, v, q, live, strict=True)):
        for name, weights in start.items():
            memories[name] = fused.choose(masks.reset_BN[:, index], weights, memories[name])
        k_c, v_c, q_c, *logits = _fused_reads({"k": k_c, "v": v_c, "q": q_c}, memories, readout, normalize_v=rule.normalize_v)
        rate, forget = (t.view(batch, heads, size) for t in logits)
        eta, log_alpha = gates(rate, forget, readout, live=live_c)
        outputs.append((*(t.unflatten(0, (batch, heads)) for t in (k_c, v_c, q_c)), eta, log_alpha))
        if index + 1 == len(k) and not writes_last:
            break
        terms = fused.terms(k_c, None, eta.flatten(0, 1), log_alpha.flatten(0, 1), erase=rule.erases(0))
        for name, weights in memories.items():
            _, after = fused.chunk(k_c, v_c, weights, terms, rule=rule)
            memories[name] = after if masks.commit_BN is None else fused.choose(masks.commit_BN[:, index], after, weights)
    joined = [torch.cat(parts, 2) if len(parts) > 1 else parts[0] for parts in zip(*outputs, strict=True)]
    ends = [torch.stack(each, 1).unflatten(0, (batch, heads)) for each in zip(*memories.values(), strict=True)]
    return *joined, *ends


def _memories(stacked: tuple[torch.Tensor, ...], stack: tuple[str, ...]) -> dict[str, tuple[torch.Tensor, ...]]:
    """Weights [B, H, S, ...] -> name: (W2, W1) [B * H, ...]."""
    return dict(zip(stack, zip(*(w.flatten(0, 1).unbind(1) for w in stacked), strict=True), strict=True))


def _fused_reads(
    streams: dict[str, torch.Tensor], memories: dict[str, tuple[torch.Tensor, ...]], readout: Readout, *, normalize_v: bool
) -> list[torch.Tensor]:
    """k, v, q [L, C, K] and the logits of eta and alpha [L, C, 1] from streams [L, C, K]."""
    reads = [fused.read(streams[name], *memories[name]) if name in memories else streams[name] for name in ("k", "v", "q")]
    reads = [fused.unit_length(reads[0]), fused.unit_length(reads[1]) if normalize_v else reads[1], fused.unit_length(reads[2])]
    for name, weight in (("eta", readout.weight_eta), ("alpha", readout.weight_alpha)):
        z = streams[SOURCE[name]]
        column = weight.unsqueeze(-1).repeat(len(z) // len(weight), 1, 1)
        w2, w1 = memories.get(name, (None, None))
        reads.append(z @ column if w2 is None else fused.readout(z, w2, w1, column))
    return reads
