"""The projection scan as the token recurrence of SPEC 2: every stacked memory alone, one token after the other, gradients by autograd."""

import torch

from hope_kernels.memory import read_memory
from hope_kernels.memory_scan.reference import token_signals, write_token
from hope_kernels.projection_scan.generate import SOURCE, Generated, Inputs, Readout, generate
from hope_kernels.rule import ChunkMasks, MemoryRule, MemoryState


def _memory(state: MemoryState, index: int) -> MemoryState:
    return MemoryState(tuple(w[:, :, index] for w in state.weights), tuple(m[:, :, index] for m in state.momentum))


def _stack(memories: list[MemoryState]) -> MemoryState:
    weights = zip(*(m.weights for m in memories), strict=True)
    momenta = zip(*(m.momentum for m in memories), strict=True)
    return MemoryState(tuple(torch.stack(w, 2) for w in weights), tuple(torch.stack(m, 2) for m in momenta))


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
    outputs = []
    anchor = state
    for token in range(inputs.k.shape[2]):
        index = token // chunk
        if stack and token % chunk == 0:
            if index and masks.commit_BN is not None:
                state = anchor.where(masks.commit_BN[:, index - 1], state)
            if masks.reset_BN is not None:
                state = state.where(masks.reset_BN[:, index], start)
            anchor = state
        here = inputs.window(slice(token, token + 1))
        streams = {"k": here.k, "v": here.v, "q": here.q}
        reads = {name: streams[source] for name, source in SOURCE.items()}
        for place, name in enumerate(stack):
            reads[name] = read_memory(_memory(anchor, place).weights, streams[SOURCE[name]])
        generated = generate(reads, readout, live=here.live, normalize_v=rule.normalize_v)
        outputs.append(generated.tensors())
        if not stack:
            continue
        gates = (generated.eta, generated.log_alpha.exp()) + (() if here.log_mu is None else (here.log_mu.exp(),))
        gates = tuple(g.unsqueeze(-1) for g in gates)
        memories = []
        for place in range(len(stack)):
            signals = token_signals(_memory(anchor, place).weights, generated.k, generated.v, rule)
            memories.append(write_token(_memory(state, place), signals, gates, rule))
        state = _stack(memories)
    if stack and masks.commit_BN is not None:
        state = anchor.where(masks.commit_BN[:, -1], state)
    return Generated(*(torch.cat(parts, 2) for parts in zip(*outputs, strict=True))), state if keep_state else None
