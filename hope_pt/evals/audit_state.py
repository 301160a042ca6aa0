"""What a memory file holds: how far every memory is from its learned start, and the loss of a text with each of them back there.

A file of `hope generate --save-memory` has, per layer, the anchors of M_mem and of the generating memories (k, eta, alpha, ...), their
momentum, the open part of the chunk and the tail of the convolution. Undoing a memory sets its anchors to the learned start and its
momentum to zero; what has not been committed yet, and the tail, stay. With a token clock the file also has what the CMS levels have learnt;
undoing a level gives it the trained weights. The text is read without further learning of the levels.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hope_pt.errors import EvalError
from hope_pt.evals.generation import Memory
from hope_pt.evals.scoring import evaluating, target_losses
from hope_pt.nn import HopeLM, LMState
from hope_pt.nn.fast_levels import Named, applied
from hope_pt.nn.names import level_of
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
class LevelChange:
    """What a token clock has changed in one CMS level of one block (None: of all blocks), as in `MemoryChange`."""

    level: int
    block: int | None
    change: float
    loss: float | None = None
    difference: float | None = None


@dataclass(frozen=True)
class StateAudit:
    """tokens: seen by the memory. loss: nats per token of the text after them. fresh: the same by the model as trained, without them."""

    tokens: int
    text_tokens: int
    loss: float | None
    fresh: float | None
    changes: tuple[MemoryChange, ...]
    levels: tuple[LevelChange, ...]


def audit_state(lm: HopeLM, memory: Memory, *, text: Sequence[int] = ()) -> StateAudit:
    """The audit of a loaded memory; text: token ids that follow what it has seen. EvalError for a model without memories or levels."""
    moved = memory.learnt.state.levels.moved if memory.learnt else {}
    cores = [(layer, block.mixer.core) for layer, block in enumerate(lm.blocks) if isinstance(block.mixer.core, TitansCore)]
    if not cores and not moved:
        raise EvalError('a model with mixer = "attention" keeps what it has read as it is; it has no memory to audit')
    reader, state = _Reader(lm, memory.last, text), memory.state
    loss = reader.loss(state, moved)
    changes = []
    for layer, core in cores:
        start = _start(core)
        for name, places in _memories(core).items():
            now, before = _weights(state.layers[layer], places), _weights(start, places)
            length = float(before.norm())
            undone = reader.loss(_without(state, layer, start, places), moved)
            change, ratio = float((now - before).norm()) / length, float(now.norm()) / length
            changes.append(MemoryChange(layer, name, change, ratio, undone, _less(undone, loss)))
    levels = tuple(_levels(lm, moved, reader=reader, state=state, loss=loss))
    return StateAudit(int(state.seen_B[0]), len(text), loss, reader.loss(None, {}), tuple(changes), levels)


@dataclass(frozen=True)
class _Reader:
    """The loss of a text after a token, None without a text."""

    lm: HopeLM
    last: int
    text: Sequence[int]

    def loss(self, state: LMState | None, moved: Named) -> float | None:
        """Nats per token after `state`, with `moved` added to the trained weights of the levels."""
        if not self.text:
            return None
        matrices = {name: module for name, module in self.lm.named_modules() if isinstance(module, nn.Linear) and name in moved}
        with evaluating(self.lm) as device, applied(matrices, moved):
            tokens = torch.tensor([[self.last, *self.text[:-1]]], device=device)
            logits_BTV, _ = self.lm(tokens, state=state)
            return target_losses(logits_BTV, torch.tensor([list(self.text)], device=device)).mean().item()


def _less(undone: float | None, loss: float | None) -> float | None:
    return None if undone is None or loss is None else undone - loss


def _levels(lm: HopeLM, moved: Named, *, reader: _Reader, state: LMState, loss: float | None) -> Iterator[LevelChange]:
    """Every level over all blocks, then in each of them."""
    places = {name: place for name in moved if (place := level_of(name))}
    weights = dict(lm.named_parameters())
    for level in sorted({level for level, _ in places.values()}):
        blocks = sorted({block for other, block in places.values() if other == level})
        for block in (None, *blocks):
            names = [name for name, place in places.items() if place[0] == level and block in (None, place[1])]
            change = math.sqrt(_squares(moved[name] for name in names) / _squares(weights[f"{name}.weight"] for name in names))
            undone = reader.loss(state, {name: value for name, value in moved.items() if name not in names})
            yield LevelChange(level, block, change, undone, _less(undone, loss))


def _squares(values: Iterable[Tensor]) -> float:
    return sum(float(value.double().square().sum()) for value in values)


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
