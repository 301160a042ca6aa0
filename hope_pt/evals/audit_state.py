"""What a memory file holds: how far every memory is from its learned start, and the loss of a text with each of them back there.

A file of `hope generate --save-memory` has, per layer, the anchors of M_mem and of the generating memories (k, eta, alpha, ...), their
momentum, the open part of the chunk and the tail of the convolution. Undoing a memory sets its anchors to the learned start and its
momentum to zero; what has not been committed yet, and the tail, stay.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hope_pt.errors import EvalError
from hope_pt.evals.generation import Memory
from hope_pt.evals.scoring import evaluating, target_losses
from hope_pt.nn import HopeLM, LMState
from hope_pt.nn.state import LayerState
from hope_pt.nn.titans import TitansCore, pack


@dataclass(frozen=True)
class MemoryChange:
    """One memory of one layer: |W - W_start| / |W_start| over all heads, |W| / |W_start|, and the loss of the text with it undone.

    difference: that loss less the one with everything in place; both None without a text.
    """

    layer: int
    memory: str
    change: float
    norm_ratio: float
    loss: float | None = None
    difference: float | None = None


@dataclass(frozen=True)
class StateAudit:
    """tokens: seen by the memory. loss: nats per token of the text after them. fresh: the same without any memory of them."""

    tokens: int
    text_tokens: int
    loss: float | None
    fresh: float | None
    changes: tuple[MemoryChange, ...]


def audit_state(lm: HopeLM, memory: Memory, *, text: Sequence[int] = ()) -> StateAudit:
    """The audit of a loaded memory; text: token ids that follow what it has seen. EvalError for a model without memories."""
    cores = [(layer, block.mixer.core) for layer, block in enumerate(lm.blocks) if isinstance(block.mixer.core, TitansCore)]
    if not cores:
        raise EvalError('a model with mixer = "attention" keeps what it has read as it is; it has no memory to audit')
    state = memory.state
    loss = _loss(lm, memory, state, text) if text else None
    fresh = _loss(lm, memory, None, text) if text else None
    found = []
    for layer, core in cores:
        start = _start(core)
        for name, places in _memories(core).items():
            now, before = _weights(state.layers[layer], places), _weights(start, places)
            length = float(before.norm())
            undone = _loss(lm, memory, _without(state, layer, start, places), text) if text else None
            change, ratio = float((now - before).norm()) / length, float(now.norm()) / length
            found.append(MemoryChange(layer, name, change, ratio, undone, None if undone is None or loss is None else undone - loss))
    return StateAudit(int(state.seen_B[0]), len(text), loss, fresh, tuple(found))


@dataclass(frozen=True)
class _Places:
    """Tensors of one memory in a layer's state: weights, then all; `member` of a stack, None for M_mem."""

    weights: tuple[str, ...]
    every: tuple[str, ...]
    member: int | None = None

    def part(self, value: Tensor) -> Tensor:
        """Of [B, H, ...] the memory itself, of [B, H, S, ...] the member."""
        return value if self.member is None else value[:, :, self.member]


def _memories(core: TitansCore) -> dict[str, _Places]:
    weights, times = len(core.mem_weights), 2 if core.rule.momentum else 1
    names = {prefix: tuple(f"{prefix}.{index}" for index in range(weights * times)) for prefix in ("mem", "proj")}
    found = {"mem": _Places(names["mem"][:weights], names["mem"])}
    return found | {name: _Places(names["proj"][:weights], names["proj"], member) for member, name in enumerate(core.stack)}


def _start(core: TitansCore) -> LayerState:
    with torch.no_grad():
        return pack(*core.starts(1, torch.float32))


def _weights(layer: Mapping[str, Tensor], places: _Places) -> Tensor:
    return torch.cat([places.part(layer[name]).double().flatten() for name in places.weights])


def _without(state: LMState, layer: int, start: LayerState, places: _Places) -> LMState:
    changed = {name: value.clone() for name, value in state.layers[layer].items()}
    for name in places.every:
        places.part(changed[name]).copy_(places.part(start[name]).expand_as(places.part(changed[name])))
    return LMState(state.seen_B, tuple(changed if index == layer else other for index, other in enumerate(state.layers)))


def _loss(lm: HopeLM, memory: Memory, state: LMState | None, text: Sequence[int]) -> float:
    """Nats per token of the text after the memory's last token."""
    with evaluating(lm) as device:
        tokens = torch.tensor([[memory.last, *text[:-1]]], device=device)
        logits_BTV, _ = lm(tokens, state=state)
        return target_losses(logits_BTV, torch.tensor([list(text)], device=device)).mean().item()
