"""The memory scan in Triton kernels: the op `hope_kernels::memory_scan`, three launches a segment forward.

A segment is a run of whole chunks of about save_every tokens, the last chunk of the sequence perhaps partial. Its terms
(`chunk_terms`), the writes of its tiles one after the other (`memory_write`) and the reads of all its tiles at once (`memory_read`) are a
launch each. Between segments the fp32 state is kept and nothing else; backward takes the segments in reverse, computes terms, states and
signals of a segment anew and hands the gradient back through reads, writes and terms. README.md has the order. With momentum the terms
come from `chunk_terms.momentum` and its gradients from autograd, which an op cannot run: backward is an op a segment then.

Legend: B batch, H heads, L = B * H rows, T tokens, N chunks, NT tiles of a segment, K head width, F hidden width.
"""

from collections.abc import Sequence
from dataclasses import astuple, dataclass, replace
from typing import Any

import torch

from hope_kernels.chunk_terms.momentum import MomentumTerms, momentum_terms
from hope_kernels.chunk_terms.triton_ import Terms, chunk_terms, chunk_terms_backward
from hope_kernels.memory_read.triton_ import Momentum, read_backward, read_forward
from hope_kernels.memory_write import momentum_triton
from hope_kernels.memory_write.momentum_triton import MomentumSignals, MomentumStates
from hope_kernels.memory_write.triton_ import Signals, States, write_backward, write_forward
from hope_kernels.rule import ChunkMasks, MemoryRule, MemoryState
from hope_kernels.tiling import Tiling
from hope_kernels.tuning import tuning


@dataclass(frozen=True)
class Settings:
    """What is constant in a scan; the trailing arguments of the ops, in this order."""

    memory: str
    objective: str
    huber_delta: float
    update: str
    self_target: bool
    normalize_v: bool
    read: str
    chunk: int
    tile: int
    save_every: int
    keep_state: bool

    @property
    def rule(self) -> MemoryRule:
        """The rule of the memory."""
        return MemoryRule(
            memory=self.memory, objective=self.objective, huber_delta=self.huber_delta, update=self.update,
            self_target=self.self_target, normalize_v=self.normalize_v,
        )  # fmt: skip

    def segments(self, tokens: int) -> range:
        """First tokens of the segments."""
        return range(0, tokens, self.chunk * max(1, self.save_every // self.chunk))


@dataclass(frozen=True)
class Segment:
    """The inputs of a run of chunks: q, k, v [L, t, K], eta, log_alpha and perhaps log_mu [L, t], and the masks of its chunks, uint8."""

    settings: Settings
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    eta: torch.Tensor
    log_alpha: torch.Tensor
    log_mu: torch.Tensor | None
    commit: torch.Tensor | None
    reset: torch.Tensor | None
    start: tuple[torch.Tensor, ...]

    @staticmethod
    def cut(settings: Settings, first: int, streams: Sequence[torch.Tensor], masks: Sequence[torch.Tensor | None], start) -> "Segment":
        """The segment that begins at token `first` of the streams; copied, unless it is the only one."""
        tokens = streams[0].shape[1]
        end = min(first + settings.segments(tokens).step, tokens)
        chunks = slice(first // settings.chunk, -(-end // settings.chunk))
        q, k, v, eta, log_alpha, *log_mu = (t[:, first:end].contiguous() for t in streams)
        commit, reset = (None if m is None else m[:, chunks].contiguous() for m in masks)
        return Segment(settings, q, k, v, eta, log_alpha, log_mu[0] if log_mu else None, commit, reset, start)

    @property
    def tiling(self) -> Tiling:
        """Its tiles."""
        return Tiling(self.k.shape[1], self.settings.chunk, self.settings.tile)

    @property
    def same(self) -> dict[str, Any]:
        """What reads and writes of the segment are told alike."""
        rule = replace(self.settings.rule, momentum=self.log_mu is not None)
        return {"rule": rule, "tiling": self.tiling, "tiles": range(self.tiling.num_tiles)}

    @property
    def queries(self) -> torch.Tensor | None:
        """The queries, where they read inside the chunk."""
        return self.q if self.settings.read == "causal" else None

    def run(self, state: tuple[torch.Tensor, ...], *, backward: bool) -> tuple[Terms, torch.Tensor | None, States, Signals]:
        """(terms, their inverse, states, signals) of the segment, written from `state` on, whose memory is taken over.

        backward: whether the backward of the writes follows.
        """
        rule, tiling = self.settings.rule, self.tiling
        terms, inverse = chunk_terms(self.k, self.queries, self.eta, self.log_alpha, tiling=tiling, erase=rule.erases(0))
        states = States.at(state, tiles=tiling.num_tiles, dtype=self.k.dtype, backward=backward)
        hidden, width = state[0].shape[1:]
        rows, tokens, _ = self.k.shape
        signals = Signals.empty(rule, rows, tokens, width=width, hidden=hidden, dtype=self.k.dtype, device=self.k.device)
        write_forward(self.k, self.v, terms, states, signals, **self.same, commit=self.commit, reset=self.reset, start=self.start)
        return terms, inverse, states, signals

    def momentum_terms(self, q: torch.Tensor, k: torch.Tensor, *gates: torch.Tensor) -> MomentumTerms:
        """Terms from fp32 q, k, eta, log_alpha and log_mu of the segment, all fp32; autograd may follow."""
        queries = q if self.settings.read == "causal" else None
        return momentum_terms(k, queries, *gates, tiling=self.tiling, erase=self.settings.rule.erases(0))

    def run_momentum(
        self, terms: MomentumTerms, state: tuple[torch.Tensor, ...], *, backward: bool
    ) -> tuple[MomentumTerms, MomentumStates, MomentumSignals]:
        """(terms, states, signals) as operands of the kernels, written from `state` on; backward: whether that of the writes follows."""
        k = self.k
        operands = ("y", "m", "n", "y_delta", "m_delta")
        given = {name: t.to(k.dtype if name in operands else t.dtype) for name, t in terms._asdict().items() if t is not None}
        terms = terms._replace(**{name: t.contiguous() for name, t in given.items()})
        states = MomentumStates.at(state, tiles=self.tiling.num_tiles, dtype=k.dtype, backward=backward)
        signals = MomentumSignals.empty(self.same["rule"], k, memories=len(k), hidden=state[0].shape[1])
        start = momentum_triton.stacked(self.start) if self.start else None
        momentum_triton.write_forward(k, self.v, terms, states, signals, **self.same, commit=self.commit, reset=self.reset, start=start)
        return terms, states, signals

    def read_operands(self, terms: MomentumTerms, states: MomentumStates, signals: MomentumSignals) -> dict[str, Any]:
        """What the reads are told with momentum."""
        weights, momenta = states.seen()
        momentum = Momentum(momenta, signals.delta, terms.kappa, terms.m_delta) if self.settings.read == "causal" else None
        seen = Signals(signals.residual, signals.error, signals.hidden)
        shown = Terms(terms.g, None, None, None, None, terms.m, terms.n)
        return {"states": weights, "signals": seen, "terms": shown, "momentum": momentum, "read": self.settings.read, **self.same}

    def answer(self, state: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        """(y of the segment, the state after it) from the state before it, whose memory is taken over."""
        if self.log_mu is None:
            terms, _, states, signals = self.run(state, backward=False)
            return read_forward(self.q, states, signals, terms, **self.same, read=self.settings.read), states.current
        wide = self.momentum_terms(self.q.float(), self.k.float(), self.eta, self.log_alpha, self.log_mu)
        ran = self.run_momentum(wide, state, backward=False)
        return read_forward(self.q, **self.read_operands(*ran)), ran[1].split(ran[1].current)


@torch.library.custom_op("hope_kernels::memory_scan", mutates_args=())
def scan(
    streams: Sequence[torch.Tensor],
    state: Sequence[torch.Tensor],
    start: Sequence[torch.Tensor],
    commit: torch.Tensor | None,
    reset: torch.Tensor | None,
    memory: str,
    objective: str,
    huber_delta: float,
    update: str,
    self_target: bool,
    normalize_v: bool,
    read: str,
    chunk: int,
    tile: int,
    save_every: int,
    keep_state: bool,
) -> list[torch.Tensor]:
    """The whole scan: streams q, k, v [L, T, K] and eta, log_alpha [L, T] fp32; state and start [L, ...] fp32; masks uint8 [L, N].

    With momentum log_mu [L, T] is a sixth stream, and state and start have the momenta after the weights.

    Returns y [L, T, K], the state after the last chunk [L, ...] where it is kept, and those at the starts of all segments but the first
    [segments - 1, L, ...].
    """
    settings = Settings(memory, objective, huber_delta, update, self_target, normalize_v, read, chunk, tile, save_every, keep_state)
    firsts = settings.segments(streams[0].shape[1])
    parts = []
    state = tuple(w.clone() for w in state)
    saved = [torch.empty(len(firsts) - 1, *w.shape, dtype=w.dtype, device=w.device) for w in state]
    for index, first in enumerate(firsts):
        for kept, now in zip(saved, state, strict=True):
            if index:
                kept[index - 1].copy_(now)
        segment = Segment.cut(settings, first, streams, (commit, reset), tuple(start))
        y, state = segment.answer(state)
        parts.append(y)
    y = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
    return [y, *(state if keep_state else ()), *saved]


@scan.register_fake
def _(
    streams, state, start, commit, reset, memory, objective, huber_delta, update, self_target, normalize_v, read, chunk, tile, save_every,
    keep_state,
):  # fmt: skip
    step = chunk * max(1, save_every // chunk)
    cuts = -(-streams[0].shape[1] // step) - 1
    ends = [torch.empty_like(w) for w in state] if keep_state else []
    return [torch.empty_like(streams[0]), *ends, *(w.new_empty(cuts, *w.shape) for w in state)]


@torch.library.custom_op("hope_kernels::memory_scan_backward", mutates_args=())
def scan_backward(
    d_y: torch.Tensor,
    d_ends: Sequence[torch.Tensor],
    saved: Sequence[torch.Tensor],
    streams: Sequence[torch.Tensor],
    state: Sequence[torch.Tensor],
    start: Sequence[torch.Tensor],
    commit: torch.Tensor | None,
    reset: torch.Tensor | None,
    memory: str,
    objective: str,
    huber_delta: float,
    update: str,
    self_target: bool,
    normalize_v: bool,
    read: str,
    chunk: int,
    tile: int,
    save_every: int,
    keep_state: bool,
) -> list[torch.Tensor]:
    """Gradients of streams, state and start, in this order and like them, from those of y and of the end state (none if not kept)."""
    settings = Settings(memory, objective, huber_delta, update, self_target, normalize_v, read, chunk, tile, save_every, keep_state)
    d_streams = [torch.empty_like(t) for t in streams]
    d_state = tuple(t.clone() for t in d_ends) if keep_state else tuple(torch.zeros_like(w) for w in state)
    d_start = [torch.zeros_like(w) for w in start]
    for index, first in reversed(list(enumerate(settings.segments(d_y.shape[1])))):
        segment = Segment.cut(settings, first, streams, (commit, reset), tuple(start))
        at_first = tuple(w.clone() for w in state) if index == 0 else tuple(t[index - 1].clone() for t in saved)
        tokens = slice(first, first + segment.k.shape[1])
        parts, d_state, from_start = _segment_backward(segment, d_y[:, tokens].contiguous(), at_first, d_state)
        for whole, summands in zip(d_streams, parts, strict=True):
            whole[:, tokens].copy_(sum(summands[1:], summands[0]))
        for whole, share in zip(d_start, from_start, strict=True):
            whole.add_(share)
    return [*d_streams, *d_state, *d_start]


def _segment_backward(
    segment: Segment, d_y: torch.Tensor, state: tuple[torch.Tensor, ...], d_state: tuple[torch.Tensor, ...]
) -> tuple[list[tuple[torch.Tensor, ...]], tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]:
    """Backward of a segment, from the gradients of y and of the state after it.

    Returns the summands, fp32, of the gradients of q, k, v, eta and log_alpha; that of the state before the segment; its share in that of
    the start, or (). state: that before the segment, whose memory is taken over.
    """
    settings = segment.settings
    terms, inverse, states, signals = segment.run(state, backward=True)
    reads = read_backward(d_y, segment.q, states, signals, terms, **segment.same, read=settings.read)
    writes = write_backward(
        segment.k, segment.v, terms, states, signals, d_state, **segment.same, read=settings.read,
        commit=segment.commit, reset=segment.reset, d_signals=Signals(reads.residual, reads.error, reads.hidden), d_reads=reads.weights,
    )  # fmt: skip
    d_terms = reads.terms._replace(g_prev=writes.g_prev, w=writes.w, g_end=writes.g_end, y=writes.y)
    if terms.n is not None and d_terms.n is None:  # a linear memory has no use for n
        d_terms = d_terms._replace(n=torch.zeros_like(terms.n, dtype=torch.float32))
    d_k, d_q, d_eta, d_log_alpha = chunk_terms_backward(
        d_terms,
        segment.k,
        segment.queries,
        segment.eta,
        segment.log_alpha,
        terms,
        inverse,
        tiling=segment.tiling,
        erase=settings.rule.erases(0),
    )
    d_queries = (reads.q,) if d_q is None else (reads.q, d_q)
    return [d_queries, (writes.k, d_k), (writes.v,), (d_eta,), (d_log_alpha,)], writes.current, writes.start


@scan_backward.register_fake
def _(d_y, d_ends, saved, streams, state, start, *settings):
    return [torch.empty_like(t) for t in (*streams, *state, *start)]


def _term_names(settings: Settings) -> list[str]:
    """The fields of `MomentumTerms` that a scan has."""
    absent = {"y", "m"} if not settings.rule.erases(0) else set()
    if settings.read == "anchor":
        absent |= {"m", "n", "m_delta"}
    return [name for name in MomentumTerms._fields if name not in absent]


@torch.library.custom_op("hope_kernels::memory_scan_momentum_backward", mutates_args=())
def momentum_backward(
    d_y: torch.Tensor,
    d_ends: Sequence[torch.Tensor],
    terms: Sequence[torch.Tensor],
    streams: Sequence[torch.Tensor],
    state: Sequence[torch.Tensor],
    start: Sequence[torch.Tensor],
    commit: torch.Tensor | None,
    reset: torch.Tensor | None,
    memory: str,
    objective: str,
    huber_delta: float,
    update: str,
    self_target: bool,
    normalize_v: bool,
    read: str,
    chunk: int,
    tile: int,
    save_every: int,
    keep_state: bool,
) -> list[torch.Tensor]:
    """Backward of one segment with momentum: gradients of q, k and v past the terms, of the terms, of state and start; all fp32.

    d_y, streams, state and masks are those of the segment, d_ends the gradient of the state after it, terms those named by `_term_names`.
    """
    settings = Settings(memory, objective, huber_delta, update, self_target, normalize_v, read, chunk, tile, save_every, keep_state)
    q, k, v, eta, log_alpha, log_mu = streams
    segment = Segment(settings, q, k, v, eta, log_alpha, log_mu, commit, reset, tuple(start))
    names = _term_names(settings)
    given = MomentumTerms(**dict.fromkeys(MomentumTerms._fields) | dict(zip(names, terms, strict=True)))
    ran = segment.run_momentum(given, tuple(state), backward=True)
    reads = read_backward(d_y, segment.q, **segment.read_operands(*ran))
    carried = reads.momentum
    writes = momentum_triton.write_backward(
        segment.k, segment.v, *ran, momentum_triton.stacked(tuple(d_ends)), **segment.same, read=read, commit=commit, reset=reset,
        d_signals=MomentumSignals(reads.residual, None if carried is None else carried.delta, reads.error, reads.hidden),
        d_reads=reads.weights + (() if carried is None else carried.slots),
    )  # fmt: skip
    found = {name: getattr(writes, name, None) for name in names}
    found |= {name: t for name, t in reads.terms._asdict().items() if t is not None}
    if carried is not None:
        found |= {"kappa": carried.kappa, "m_delta": carried.m_delta}
    d_terms = [torch.zeros_like(t) if found[name] is None else found[name] for name, t in zip(names, terms, strict=True)]
    d_start = () if writes.start is None else ran[1].split(writes.start)
    return [reads.q, writes.k, writes.v, *d_terms, *ran[1].split(writes.current), *d_start]


@momentum_backward.register_fake
def _(d_y, d_ends, terms, streams, state, start, *settings):
    return [torch.empty_like(t, dtype=torch.float32) for t in (*streams[:3], *terms, *state, *start)]


def _momentum_scan_backward(d_y, d_ends, saved, streams, state, start, masks, settings: Settings) -> list[torch.Tensor]:
    """`scan_backward` with momentum: the terms of a segment and their gradients by autograd, which does not run inside an op."""
    d_streams = [torch.empty_like(t) for t in streams]
    d_state = list(d_ends) if settings.keep_state else [torch.zeros_like(w) for w in state]
    d_start = [torch.zeros_like(w) for w in start]
    for index, first in reversed(list(enumerate(settings.segments(d_y.shape[1])))):
        segment = Segment.cut(settings, first, streams, masks, tuple(start))
        q, k, v, *gates = parts = (segment.q, segment.k, segment.v, segment.eta, segment.log_alpha, segment.log_mu)
        tokens = slice(first, first + k.shape[1])
        leaves = [t.detach().float().requires_grad_() for t in (q, k, *gates)]
        with torch.enable_grad():
            terms = [t for t in segment.momentum_terms(*leaves) if t is not None]
        at_first = state if index == 0 else [t[index - 1] for t in saved]
        low = [t.detach().contiguous() for t in terms]
        found = momentum_backward(
            d_y[:, tokens].contiguous(), d_state, low, parts, at_first, start, segment.commit, segment.reset, *astuple(settings)
        )
        past, d_terms, rest = found[:3], found[3 : 3 + len(terms)], found[3 + len(terms) :]
        d_state = rest[: len(state)]
        flows = torch.autograd.grad(terms, leaves, d_terms, allow_unused=True)
        summands = [(past[0], flows[0]), (past[1], flows[1]), (past[2], None), *((None, t) for t in flows[2:])]
        for whole, pair in zip(d_streams, summands, strict=True):
            given = [t for t in pair if t is not None]
            whole[:, tokens].copy_(sum(given[1:], given[0]))
        for total, share in zip(d_start, rest[len(state) :], strict=True):
            total.add_(share)
    return [*d_streams, *d_state, *d_start]


def _save(ctx, inputs, output):
    streams, state, start, commit, reset, *settings = inputs
    ctx.counts = len(streams), len(state), len(start)
    ctx.settings = settings
    ctx.save_for_backward(*streams, *state, *start, commit, reset, *output[len(output) - len(state) :])


def _backward(ctx, gradients):
    saved = iter(ctx.saved_tensors)
    streams, state, start = ([next(saved) for _ in range(count)] for count in ctx.counts)
    commit, reset, *starts = saved
    keep_state = ctx.settings[-1]
    d_y, d_ends = gradients[0].contiguous(), [t.contiguous() for t in gradients[1 : 1 + len(state) * keep_state]]
    if len(streams) == 6:
        found = iter(_momentum_scan_backward(d_y, d_ends, starts, streams, state, start, (commit, reset), Settings(*ctx.settings)))
    else:
        found = iter(scan_backward(d_y, d_ends, starts, streams, state, start, commit, reset, *ctx.settings))
    d_streams, d_state, d_start = ([next(found) for _ in part] for part in (streams, state, start))
    return d_streams, d_state, d_start, None, None, *(None for _ in ctx.settings)


scan.register_autograd(_backward, setup_context=_save)


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
    tile: int | None = None,
) -> tuple[torch.Tensor, MemoryState | None]:
    """See `hope_kernels.memory_scan.memory_scan`; q, k, v fp32 or bf16, everything else is computed in fp32.

    tile: tokens of a tile, 16, 32 or 64; by default the tuned one, which a shorter chunk shortens. Raises ValueError for another dtype.
    """
    batch, heads, _, width = qkv[0].shape
    if qkv[0].dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f'memory scans in Triton compute in float32 or bfloat16, not {qkv[0].dtype}; use backend "chunked"')
    tuned = tuning(width=width, hidden=state.weights[0].shape[-2])
    assert tuned is not None  # what the choice of the backend has seen to
    streams = [t.flatten(0, 1).contiguous() for t in (*qkv, *(t.float() for t in gates))]
    weights, from_start = _rows(state), [] if masks.reset_BN is None else _rows(start)
    commit, reset = (None if m is None else m.to(torch.uint8).repeat_interleave(heads, 0) for m in (masks.commit_BN, masks.reset_BN))
    settings = Settings(
        rule.memory, rule.objective, rule.huber_delta, rule.update, rule.self_target, rule.normalize_v,
        read, chunk, tile or tuned.tile_of(chunk), save_every, keep_state,
    )  # fmt: skip
    y, *rest = scan(streams, weights, from_start, commit, reset, *astuple(settings))
    ends = state.like(tuple(t.unflatten(0, (batch, heads)) for t in rest[: len(weights)])) if keep_state else None
    return y.unflatten(0, (batch, heads)), ends


def _rows(state: MemoryState) -> list[torch.Tensor]:
    """The state's tensors [B, H, ...], expanded perhaps, as fp32 [L, ...]."""
    return [t.to(torch.float32).flatten(0, 1).contiguous() for t in state.tensors()]
