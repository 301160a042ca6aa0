"""The projection scan in chunks, plain torch: every stacked memory of a chunk in batched products (SPEC 2.1).

Legend: B batch, H heads, S stacked memories, C chunk length, K head width; leading dimensions in the loop are B, H, S.
"""

import torch

from hope_kernels.chunk import chunk_terms, decay, end_weight
from hope_kernels.memory import read_memory, surprise
from hope_kernels.memory_scan.chunked import segments
from hope_kernels.projection_scan.generate import SOURCE, Generated, Inputs, Readout, generate
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
) -> tuple[Generated, MemoryState | None]:
    """See `hope_kernels.projection_scan.projection_scan`."""
    streams = {"k": inputs.k, "v": inputs.v, "q": inputs.q}
    if not stack:
        reads = {name: streams[source] for name, source in SOURCE.items()}
        return generate(reads, readout, live=inputs.live, normalize_v=rule.normalize_v), None
    given = tuple(t for t in (inputs.k, inputs.v, inputs.q, inputs.live, inputs.log_mu) if t is not None)
    cuts = segments(given[0].shape[2], chunk, save_every)
    outputs = []
    for first, end, size in cuts:
        window = slice(first, end)
        chunks = slice(first // chunk, -(-end // chunk))
        part = ChunkMasks(*(None if m is None else m[:, chunks] for m in (masks.commit_BN, masks.reset_BN)))
        start_tensors = () if part.reset_BN is None else start.tensors()

        def run(*tensors, form=state, size=size, part=part):
            return _segment(tensors, form, inputs, readout, rule=rule, stack=stack, size=size, masks=part)

        arguments = (*(t[:, :, window] for t in given), *readout.parameters(), *state.tensors(), *start_tensors)
        recompute = torch.is_grad_enabled() and len(cuts) > 1
        results = replay(run, *arguments) if recompute else run(*arguments)
        outputs.append(results[:5])
        state = state.like(tuple(results[5:]))
    joined = [torch.cat(parts, 2) if len(parts) > 1 else parts[0] for parts in zip(*outputs, strict=True)]
    return Generated(*joined), state


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
) -> tuple[torch.Tensor, ...]:
    """Whole chunks of length `size`; `tensors` are the given inputs (as in `which`), readout parameters, state and start tensors."""
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
