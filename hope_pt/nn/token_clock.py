"""The token clock: CMS levels that learn from the sequence they read (SPEC 3, NL eq. 71).

    moved_l <- moved_l - lr_l * sum_{t in interval} d(-log p(x_{t+1} | x_<=t)) / dW_l          after every C_l tokens of a document

A level's weight for row b is W_l + moved_l[b] (`fast_levels`). Tokens are counted from the start of the row's document. The interval
[m C, (m + 1) C) of the shortest period C is the unit: its losses are those of its own predictions, made with the weights that held in it,
and its gradient is taken when the target of its last token has arrived, before that token is read. The gradient does not reach back
beyond the interval: the memory's state at its start is a constant. Slower levels sum the gradients of their C_l / C units. A document start
gives back the trained weights.

The open unit is kept as its tokens and the memory at its start; at its end it is computed again, whole, with a graph. So every split of a
sequence into calls gives the same weights. Where a call has a whole unit, the graph belongs to the predictions themselves and nothing is
computed twice. docs/token_clock.md has the choices and their costs.
Legend: B rows, T tokens of a call, N tokens of a piece of it, C shortest period, V vocabulary.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from hope_pt.config.schema import TokenClockConfig
from hope_pt.errors import CheckpointError, ConfigError
from hope_pt.nn.fast_levels import FastLevels, Named, applied, level_matrices
from hope_pt.nn.lm import HopeLM
from hope_pt.nn.names import level_of
from hope_pt.nn.state import LMState

IGNORED = -100


@dataclass(frozen=True)
class ClockState:
    """What a model with a token clock carries between two calls.

    now: the memory after the last token. start: the memory before the open unit. tokens_BC: the tokens of the open unit, of which row b has
    open_B[b]. begins_B: the open unit begins a document, so `start` counts as a fresh memory there.
    """

    levels: FastLevels
    now: LMState
    start: LMState
    tokens_BC: torch.Tensor
    open_B: torch.Tensor
    begins_B: torch.Tensor

    @property
    def seen_B(self) -> torch.Tensor:
        """Tokens of each row's current document so far."""
        return self.now.seen_B

    def bytes(self) -> int:
        """Size of all tensors."""
        return sum(t.numel() * t.element_size() for t in self.to_tensors().values())

    def rows(self, index_B: torch.Tensor) -> "ClockState":
        """The state of selected rows, in order (rows may repeat)."""
        own = (t[index_B] for t in (self.tokens_BC, self.open_B, self.begins_B))
        return ClockState(self.levels.rows(index_B), self.now.rows(index_B), self.start.rows(index_B), *own)

    def freeze(self, frozen: bool = True) -> "ClockState":
        """The same weights, no longer changing: neither by updates nor at document starts; false: they change again from here on.

        Either way the open unit is dropped, and false does not bring it back: its tokens never count.
        """
        none = torch.zeros_like(self.open_B)
        return replace(self, levels=self.levels.freeze(frozen), start=self.now, open_B=none, begins_B=none.bool())

    def reset(self, rows_B: torch.Tensor) -> "ClockState":
        """Rows that are true have the trained weights again; the memory and the open unit stay."""
        return replace(self, levels=self.levels.reset(rows_B))

    def to_tensors(self) -> Named:
        """Flat named tensors, for a safetensors file."""
        parts = {"levels": self.levels.to_tensors(), "now": self.now.to_tensors(), "start": self.start.to_tensors()}
        flat = {f"clock.{part}.{name}": t for part, tensors in parts.items() for name, t in tensors.items()}
        return {**flat, "clock.tokens": self.tokens_BC, "clock.open": self.open_B, "clock.begins": self.begins_B}

    @staticmethod
    def from_tensors(tensors: Mapping[str, torch.Tensor]) -> "ClockState":
        """The inverse of `to_tensors`. Raises CheckpointError for names that are not such a state's."""
        parts: dict[str, Named] = {"levels": {}, "now": {}, "start": {}}
        own: Named = {}
        for key, tensor in tensors.items():
            part, _, name = key.removeprefix("clock.").partition(".")
            parts.get(part, own)[name or part] = tensor
        if sorted(own) != ["begins", "open", "tokens"]:
            raise CheckpointError(f"the state of a token clock has {sorted(own)} instead of begins, open and tokens; write it again")
        now, start = (LMState.from_tensors(parts[name]) for name in ("now", "start"))
        return ClockState(FastLevels.from_tensors(parts["levels"]), now, start, own["tokens"], own["open"], own["begins"])


class ClockedLM(nn.Module):
    """A HopeLM that is called as before and whose CMS levels follow a token clock.

    differentiable: where gradients are on, build the graph through the updates (second order) instead of cutting it; ConfigError for a
    model whose scans cannot be differentiated twice.
    """

    def __init__(self, lm: HopeLM, clock: TokenClockConfig, *, differentiable: bool = False):
        super().__init__()
        levels = len(lm.config.cms.periods)
        if clock.periods and len(clock.periods) != levels:
            raise ConfigError(f"token_clock.periods = {list(clock.periods)}: the model has {levels} CMS levels; give one period for each")
        if differentiable and lm.config.mixer == "titans" and lm.config.titans.backend != "reference":
            raise ConfigError(
                f'model.titans.backend = "{lm.config.titans.backend}" can be differentiated once only; training through the token clock '
                'needs model.titans.backend = "reference"'
            )
        self.lm, self.clock, self.differentiable = lm, clock, differentiable
        self.matrices = level_matrices(lm, clock.active)

    def init_state(self, batch: int) -> ClockState:
        """The state before the first token of `batch` fresh documents, with the trained weights."""
        return self.attach(self.lm.init_state(batch))

    def attach(self, memory: LMState) -> ClockState:
        """The trained weights with a memory that was carried without a clock; its next interval ends where the clock's would have."""
        batch, device = len(memory.seen_B), memory.seen_B.device
        fastest = self.clock.fastest if self.clock.active else 0
        slow = [name for name in self.matrices if self.clock.periods[_level(name)] > fastest]
        levels = FastLevels.start(self.matrices, batch=batch, slow=slow)
        tokens_BC = torch.zeros(batch, fastest, dtype=torch.long, device=device)
        none = torch.zeros_like(memory.seen_B)
        return ClockState(levels, memory, memory, tokens_BC, none, none.bool())

    def forward(
        self,
        tokens_BT: torch.Tensor,
        *,
        state: ClockState | LMState | None = None,
        doc_start_BT: torch.Tensor | None = None,
        mask_BT: torch.Tensor | None = None,
        return_state: bool = False,
    ) -> tuple[torch.Tensor, ClockState | None]:
        """(logits [B, T, V] as `HopeLM.forward`, state); zero at padding. The weights that a token meets know the tokens before it only.

        Without a level that changes, or with frozen ones, the call is the model's own, in one piece.
        """
        keep = return_state or state is not None
        with torch.set_grad_enabled(self.differentiable and torch.is_grad_enabled()):
            if not self.matrices and not keep:
                return self.lm(tokens_BT, doc_start_BT=doc_start_BT, mask_BT=mask_BT)
            if not isinstance(state, ClockState):
                state = self.init_state(len(tokens_BT)) if state is None else self.attach(state)
            if not self.matrices or state.levels.frozen:
                with applied(self.matrices, state.levels.moved):
                    logits, now = self.lm(tokens_BT, state=state.now, doc_start_BT=doc_start_BT, mask_BT=mask_BT)
                return logits, replace(state, now=now, start=now) if keep else None
            reader = _Reader(self, tokens_BT, state, doc_start_BT, mask_BT)
            while reader.advance():
                pass
            return reader.logits_BTV, reader.state if keep else None


class _Reader:
    """One call, cut into pieces: a piece of a row ends at the end of its unit, before the next document, or with the call."""

    def __init__(self, model: ClockedLM, tokens_BT: torch.Tensor, state: ClockState, starts_BT, mask_BT):
        self.model, self.state, self.period = model, state, model.clock.fastest
        batch, length = tokens_BT.shape
        mask_BT = torch.ones_like(tokens_BT, dtype=torch.bool) if mask_BT is None else mask_BT
        starts_BT = torch.zeros_like(mask_BT) if starts_BT is None else starts_BT & mask_BT
        # real tokens first; from here on a row is a run of `count` tokens
        self.order_BT = (~mask_BT).int().argsort(dim=1, stable=True)
        self.count_B = mask_BT.sum(1)
        self.tokens_BT, self.starts_BT = tokens_BT.gather(1, self.order_BT), starts_BT.gather(1, self.order_BT)
        # the first document start after each token, or the end of the row
        place = torch.arange(length, device=tokens_BT.device).expand(batch, -1)
        at = torch.where(self.starts_BT & (place < self.count_B.unsqueeze(1)), place, self.count_B.unsqueeze(1))
        later = torch.cat([at[:, 1:], self.count_B.unsqueeze(1)], 1)
        self.next_start_BT = later.flip(1).cummin(1).values.flip(1)
        self.cursor_B = torch.zeros_like(self.count_B)
        weight = model.lm.embedding.weight
        dtype = torch.promote_types(weight.dtype, torch.float32)
        self.logits_BTV = torch.zeros(batch, length, model.lm.config.vocab_size, dtype=dtype, device=weight.device)

    def advance(self) -> bool:
        """Close the units whose last target has come, and read the next piece of every row. False where nothing is left."""
        live_B = self.cursor_B < self.count_B
        if not bool(live_B.any()):
            return False
        here_B1 = self.cursor_B.clamp(max=self.tokens_BT.shape[1] - 1).unsqueeze(1)
        begins_B = self.starts_BT.gather(1, here_B1).squeeze(1) & live_B
        full_B = (self.state.open_B > 0) & (self.state.now.seen_B % self.period == 0) & live_B & ~begins_B
        if bool(full_B.any()):
            self._close(full_B, self.tokens_BT.gather(1, here_B1).squeeze(1))
        if bool(begins_B.any()):
            state = _new_unit(self.state, begins_B)
            self.state = replace(state, levels=state.levels.reset(begins_B), begins_B=state.begins_B | begins_B)
        position_B = torch.where(begins_B, 0, self.state.now.seen_B) % self.period
        left_B = self.next_start_BT.gather(1, here_B1).squeeze(1) - self.cursor_B
        size_B = torch.where(live_B, torch.minimum(self.period - position_B, left_B), 0)
        # one token more of the same document: the unit's last target is here
        whole_B = (self.state.open_B == 0) & (position_B + size_B == self.period) & (left_B > size_B)
        self._read(size_B, begins_B, whole=bool((whole_B | (size_B == 0)).all()))
        return True

    def _read(self, size_B: torch.Tensor, begins_B: torch.Tensor, *, whole: bool) -> None:
        """The next size_B tokens of every row; whole: they are whole units with their targets."""
        state, longest = self.state, int(size_B.max())
        step_N = torch.arange(longest, device=size_B.device)
        mask_BN = step_N < size_B.unsqueeze(1)
        place_BN = (self.cursor_B.unsqueeze(1) + step_N).clamp(max=self.tokens_BT.shape[1] - 1)
        tokens_BN = self.tokens_BT.gather(1, place_BN)
        if whole:
            targets_BN = self.tokens_BT.gather(1, (place_BN + 1).clamp(max=self.tokens_BT.shape[1] - 1))
            logits, now, gradients = self._gradients(tokens_BN, targets_BN, state.now, begins_B, mask_BN)
            read_B = size_B > 0
            levels = self._update(gradients, read_B, now.seen_B)
            self.state = _new_unit(replace(state, levels=levels, now=now), read_B)
        else:
            with applied(self.model.matrices, state.levels.moved):
                logits, now = self.model.lm(
                    tokens_BN, state=state.now, doc_start_BT=_first(begins_B, longest), mask_BT=_unless_full(mask_BN)
                )
            slot_BN = (state.open_B.unsqueeze(1) + step_N).clamp(max=self.period)
            buffer = F.pad(state.tokens_BC, (0, 1)).scatter(1, torch.where(mask_BN, slot_BN, self.period), tokens_BN)
            self.state = replace(state, now=now, tokens_BC=buffer[:, :-1], open_B=state.open_B + size_B)
        row_BN = torch.arange(len(size_B), device=size_B.device).unsqueeze(1).expand_as(place_BN)
        self.logits_BTV[row_BN[mask_BN], self.order_BT.gather(1, place_BN)[mask_BN]] = logits[mask_BN]
        self.cursor_B = self.cursor_B + size_B

    def _close(self, full_B: torch.Tensor, next_B: torch.Tensor) -> None:
        """Update the rows whose unit is complete, from its kept tokens; next_B: the token after it."""
        state = self.state
        size_B = torch.where(full_B, state.open_B, 0)
        longest = int(size_B.max())
        mask_BN = torch.arange(longest, device=size_B.device) < size_B.unsqueeze(1)
        tokens_BN = state.tokens_BC[:, :longest]
        targets_BN = F.pad(tokens_BN[:, 1:], (0, 1)).scatter(1, (size_B - 1).clamp(min=0).unsqueeze(1), next_B.unsqueeze(1))
        _, end, gradients = self._gradients(tokens_BN, targets_BN, state.start, state.begins_B & full_B, mask_BN)
        levels = self._update(gradients, full_B, state.now.seen_B)
        # rows in step go on from the state of the unit in one piece: the same bits for every split
        now = end if bool(full_B.all()) else state.now
        self.state = _new_unit(replace(state, levels=levels, now=now), full_B)

    def _gradients(self, tokens_BN, targets_BN, memory: LMState, begins_B: torch.Tensor, mask_BN: torch.Tensor):
        """(logits, the memory after, gradients of the summed losses by layer name) of a unit; rows without tokens have zero gradients."""
        lm, graph = self.model.lm, torch.is_grad_enabled()
        moved = self.state.levels.moved
        # views in the graph, so that the inner gradient sees this unit's use of the weights and not how earlier units used them
        leaves = {name: t.clone() if graph and t.requires_grad else t.detach().requires_grad_() for name, t in moved.items()}
        # without a graph through the updates nobody asks for gradients of the trained weights, and nothing is kept for them
        parameters = {} if graph else {name: p.detach() for name, p in lm.named_parameters()}
        settings = {"state": memory, "doc_start_BT": _first(begins_B, mask_BN.shape[1]), "mask_BT": _unless_full(mask_BN)}
        with torch.enable_grad(), applied(self.model.matrices, leaves):
            logits, after = functional_call(lm, parameters, (tokens_BN,), settings)
            targets = torch.where(mask_BN, targets_BN, IGNORED)
            loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="sum")
            found = torch.autograd.grad(loss, list(leaves.values()), create_graph=graph)
        gradients = dict(zip(leaves, found, strict=True))
        if graph:
            return logits, after, gradients
        layers = tuple({name: t.detach() for name, t in layer.items()} for layer in after.layers)
        return logits.detach(), LMState(after.seen_B, layers), gradients

    def _update(self, gradients: Named, rows_B: torch.Tensor, seen_B: torch.Tensor) -> FastLevels:
        """The levels after a unit that ended in some rows, at seen_B tokens of their documents."""
        levels, clock = self.state.levels, self.model.clock
        moved, sums = dict(levels.moved), dict(levels.sums)
        for name, gradient in gradients.items():
            level = _level(name)
            if name in sums:
                sums[name] = gradient = sums[name] + gradient
            due_B11 = (rows_B & (seen_B % clock.periods[level] == 0)).view(-1, 1, 1)
            if not bool(due_B11.any()):
                continue
            stepped = _descend(moved[name], clock.lr[level] * gradient, weight=self.model.matrices[name].weight, clock=clock)
            moved[name] = torch.where(due_B11, stepped, moved[name])
            if name in sums:
                sums[name] = sums[name].masked_fill(due_B11, 0)
        return replace(levels, moved=moved, sums=sums)


def _descend(moved: torch.Tensor, step: torch.Tensor, *, weight: torch.Tensor, clock: TokenClockConfig) -> torch.Tensor:
    """What a step [B, O, I] makes of `moved`, within the caps; without a step nothing changes."""
    if not (clock.step_cap or clock.total_cap):
        return moved - step
    norm = weight.detach().to(moved.dtype).norm()
    if clock.step_cap:
        step = _shorten(step, clock.step_cap * norm)
    moved = moved - step
    return _shorten(moved, clock.total_cap * norm) if clock.total_cap else moved


def _shorten(x_BOI: torch.Tensor, longest: torch.Tensor) -> torch.Tensor:
    """Every row scaled down to a norm of at most `longest`; 0 is no limit, for a matrix of zeros has nothing to be relative to."""
    norm = x_BOI.norm(dim=(1, 2), keepdim=True)
    return torch.where((norm > longest) & (longest > 0), x_BOI * (longest / norm.clamp_min(1e-30)), x_BOI)


def _level(name: str) -> int:
    """The CMS level of one of its layers."""
    place = level_of(name)
    assert place, name
    return place[0]


def _first(rows_B: torch.Tensor, length: int) -> torch.Tensor | None:
    """A document start at the first token of some rows [B, N]; None where there is none."""
    return F.pad(rows_B.unsqueeze(1), (0, length - 1)) if bool(rows_B.any()) else None


def _unless_full(mask_BN: torch.Tensor) -> torch.Tensor | None:
    return None if bool(mask_BN.all()) else mask_BN


def _new_unit(state: ClockState, rows_B: torch.Tensor) -> ClockState:
    """A unit begins in some rows, at the present state."""
    start = state.now if bool(rows_B.all()) else _choose(rows_B, state.now, state.start)
    return replace(state, start=start, open_B=state.open_B.masked_fill(rows_B, 0), begins_B=state.begins_B & ~rows_B)


def _choose(rows_B: torch.Tensor, new: LMState, old: LMState) -> LMState:
    """Rows of `new` where true, else of `old`. A key-value cache grows, and its entries beyond an older one's end are not valid there."""

    def pick(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        missing = [size - other for size, other in zip(a.shape, b.shape, strict=True)]
        b = F.pad(b, [n for size in reversed(missing) for n in (0, size)]) if any(missing) else b
        return torch.where(rows_B.view(-1, *(1,) * (a.dim() - 1)), a, b)

    layers = tuple({name: pick(t, b[name]) for name, t in a.items()} for a, b in zip(new.layers, old.layers, strict=True))
    return LMState(torch.where(rows_B, new.seen_B, old.seen_B), layers)


def meta_loss(
    model: ClockedLM, tokens_BT: torch.Tensor, targets_BT: torch.Tensor, *, doc_start_BT: torch.Tensor | None = None
) -> torch.Tensor:
    """Loss of every token [B, T] in nats of sequences read with the clock on, as a function of the trained weights, through the updates.

    model: differentiable. targets: the tokens that follow; one outside the vocabulary, such as -100, has loss 0.
    """
    with sdpa_kernel(SDPBackend.MATH):
        logits, _ = model(tokens_BT, doc_start_BT=doc_start_BT)
    losses = F.cross_entropy(logits.flatten(0, 1), targets_BT.flatten(), ignore_index=IGNORED, reduction="none")
    return losses.view_as(targets_BT)
