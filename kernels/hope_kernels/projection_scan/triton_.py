"""The projection scan on a GPU: the op `hope_kernels::projection_scan`, three launches a chunk forward and four backward.

A chunk is generated (`generate_triton`), its terms are computed (`chunk_terms`) and it is written to every stacked memory (`memory_write`),
each in one launch over all rows. Chunks are taken in segments of save_every tokens; between segments only the states are kept, and backward
replays the writes of a segment, in one launch, from the k, v, eta and alpha that forward returned. README.md has the order of the backward.

Legend: B batch, H heads, L = B * H rows, S stacked memories, T tokens, N chunks, NT tiles, K head width, F hidden width.
"""

from collections.abc import Sequence
from dataclasses import astuple, dataclass, replace
from typing import Any

import torch
import triton
import triton.language as tl

from hope_kernels.chunk_terms.triton_ import Terms, chunk_terms, chunk_terms_backward, empty_terms
from hope_kernels.memory_write.triton_ import Signals, States, WriteGradients, write_backward, write_forward
from hope_kernels.projection_scan.generate import Generated, Inputs, Readout
from hope_kernels.projection_scan.generate_triton import (
    STREAMS,
    Anchors,
    Inner,
    Streams,
    empty_streams,
    generate_backward,
    generate_forward,
)
from hope_kernels.rule import ChunkMasks, MemoryRule, MemoryState
from hope_kernels.tiling import Tiling
from hope_kernels.triton_support import operator
from hope_kernels.tuning import padded, tuning

RUN = 8
"""Tiles that one program takes of the gradients of static streams."""


@dataclass(frozen=True)
class Settings:
    """What is constant in a scan; the trailing arguments of the ops, in this order. stack: names joined by commas."""

    memory: str
    objective: str
    huber_delta: float
    update: str
    self_target: bool
    normalize_v: bool
    stack: str
    chunk: int
    save_every: int
    keep_state: bool
    eta_max: float
    retention: bool
    writes: bool

    @property
    def rule(self) -> MemoryRule:
        """The rule of the memories."""
        return MemoryRule(
            memory=self.memory, objective=self.objective, huber_delta=self.huber_delta, update=self.update,
            self_target=self.self_target, normalize_v=self.normalize_v,
        )  # fmt: skip

    @property
    def names(self) -> tuple[str, ...]:
        """Streams with a memory, in the order of the stack."""
        return tuple(self.stack.split(",")) if self.stack else ()

    @property
    def static(self) -> Anchors:
        """The streams without one."""
        return Anchors(tuple(name for name in STREAMS if name not in self.names))

    def readout(self, parameters: Sequence[torch.Tensor]) -> Readout:
        """Parameters [H, K] and [H] with the switches."""
        return Readout(*parameters, eta_max=self.eta_max, retention=self.retention, writes=self.writes)

    def segment_tokens(self, tokens: int) -> int:
        """Tokens from one saved state to the next: whole chunks; everything where nothing is written."""
        return self.chunk * max(1, self.save_every // self.chunk) if self.stack else tokens


@dataclass(frozen=True)
class Segment:
    """A run of whole chunks, the last of the sequence perhaps partial, and the masks of its chunks [L, N] uint8."""

    settings: Settings
    tokens: slice
    tiling: Tiling
    writes_last: bool
    commit: torch.Tensor | None
    reset: torch.Tensor | None

    def window(self, tensors: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """The tokens of the segment of tensors [., T, ...]."""
        return tuple(t[:, self.tokens] for t in tensors)

    @property
    def chunks(self) -> list[range]:
        """The tiles of every chunk."""
        return [self.tiling.tiles_of(range(n, n + 1)) for n in range(self.tiling.num_chunks)]

    @property
    def written(self) -> range:
        """The tiles that are written."""
        return self.tiling.tiles_of(range(self.tiling.num_chunks - (not self.writes_last)))


def _segments(
    settings: Settings, xk: torch.Tensor, weights: Sequence[torch.Tensor], masks: tuple[torch.Tensor | None, ...], heads: int
) -> list[Segment]:
    """The segments of a static stream [L, T, K]; masks: commit and reset, bool [B, N] or None."""
    tokens, width = xk.shape[1:]
    chunk, step = settings.chunk, settings.segment_tokens(tokens)
    tuned = tuning(width=width, hidden=weights[0].shape[-2] if weights else width)
    assert tuned is not None
    tile = tuned.tile_of(chunk)
    by_row = [None if m is None else m.to(torch.uint8).repeat_interleave(heads, 0) for m in masks]
    found = []
    for first in range(0, tokens, step):
        end = min(first + step, tokens)
        commit, reset = (None if m is None else m[:, first // chunk : -(-end // chunk)].contiguous() for m in by_row)
        writes_last = settings.keep_state or end < tokens
        found.append(Segment(settings, slice(first, end), Tiling(end - first, chunk, tile), writes_last, commit, reset))
    return found


@triton.jit
def _sum_rows(parts, total, line, COUNT: tl.constexpr, length, offsets, mask):
    """Sum of COUNT tensors [length] that belong to a line, at some offsets, stored to the line of `total`."""
    value = tl.load(parts + line * COUNT * length + offsets, mask=mask, other=0.0)
    for part in tl.range(1, COUNT, num_stages=1):
        value += tl.load(parts + (line * COUNT + part) * length + offsets, mask=mask, other=0.0)
    tl.store(total + line * length + offsets, value, mask=mask)


@triton.jit(do_not_specialize=["first_tile"])
def _sum_memories(
    y, w, g_prev, g_end, sum_y, sum_w, sum_g_prev, sum_g_end, tokens, num_tiles, first_tile,
    S: tl.constexpr, K: tl.constexpr, BLOCK_K: tl.constexpr, CHUNK: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Gradients of the terms of a tile, summed over the memories of a row: y [L * S, T, K], w, g_prev [L * S, T], g_end [L * S, NT]."""
    tile, line = first_tile + tl.program_id(0), tl.program_id(1).to(tl.int64)
    PER_CHUNK: tl.constexpr = (CHUNK + TILE - 1) // TILE
    chunk = tile // PER_CHUNK
    token = chunk * CHUNK + (tile % PER_CHUNK) * TILE + tl.arange(0, TILE)
    exists = token < tl.minimum((chunk + 1) * CHUNK, tokens)
    column = tl.arange(0, BLOCK_K)
    mask = exists[:, None] & (column < K)[None, :]
    _sum_rows(y, sum_y, line, S, tokens * K, token[:, None] * K + column[None, :], mask)
    if w is not None:
        _sum_rows(w, sum_w, line, S, tokens, token, exists)
    if g_prev is not None:
        _sum_rows(g_prev, sum_g_prev, line, S, tokens, token, exists)
    _sum_rows(g_end, sum_g_end, line, S, num_tiles, tile, True)


def _room(segment: Segment, k: torch.Tensor, current: tuple[torch.Tensor, ...], *, backward: bool) -> tuple[States, Signals]:
    """States of a segment from its first on, [L * S, ...] fp32, which moves along, and the signals of its writes."""
    tiling, (memories, hidden, width) = segment.tiling, current[0].shape
    states = States.at(current, tiles=tiling.num_tiles, dtype=k.dtype, backward=backward)
    shape: dict[str, Any] = {"width": width, "hidden": hidden, "dtype": k.dtype, "device": k.device}
    return states, Signals.empty(segment.settings.rule, memories, tiling.tokens, **shape)


def _forward_segment(
    segment: Segment,
    streams: tuple[torch.Tensor, ...],
    live: torch.Tensor | None,
    readout: Readout,
    current: tuple[torch.Tensor, ...],
    start: tuple[torch.Tensor, ...],
) -> Streams:
    """The generated streams of a segment; `current`, the states [L * S, ...] at its start, becomes that at its end."""
    settings, tiling = segment.settings, segment.tiling
    rule, streams = settings.rule, segment.window(streams)
    live = None if live is None else live[:, segment.tokens]
    out, static = empty_streams(streams[0]), settings.static
    same: dict[str, Any] = {"normalize_v": rule.normalize_v, "tiling": tiling, "out": out}
    if static.names:
        generate_forward(streams, live, static, readout, chunks=range(tiling.num_chunks), **same)
    if not current:
        return out
    states, signals = _room(segment, out.k, current, backward=False)
    for slots, state in zip(states.weights, current, strict=True):
        slots[:, 0] = state
    anchors = Anchors(settings.names, states.weights, tuple(w.to(out.k.dtype) for w in start), segment.reset)
    room = empty_terms(out.k, tiling=tiling, queries=False, erase=rule.erases(0))
    for n, tiles in enumerate(segment.chunks):
        generate_forward(streams, live, anchors, readout, chunks=range(n, n + 1), **same)
        if tiles.start in segment.written:
            chunk_terms(out.k, None, out.eta, out.log_alpha, tiling=tiling, erase=rule.erases(0), tiles=tiles, out=room)
            write_forward(
                out.k, out.v, room[0], states, signals, rule=rule, tiling=tiling, tiles=tiles,
                commit=segment.commit, reset=segment.reset, start=start,
            )  # fmt: skip
    return out


def _rows(weights: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """Weights [B, H, S, ...], expanded perhaps, as a copy in fp32 [L * S, ...]."""
    return tuple(torch.empty(w.shape, dtype=torch.float32, device=w.device).copy_(w).flatten(0, 2) for w in weights)


@operator("projection_scan")
def scan(
    streams: Sequence[torch.Tensor],
    live: torch.Tensor | None,
    readout: Sequence[torch.Tensor],
    weights: Sequence[torch.Tensor],
    start: Sequence[torch.Tensor],
    commit: torch.Tensor | None,
    reset: torch.Tensor | None,
    memory: str,
    objective: str,
    huber_delta: float,
    update: str,
    self_target: bool,
    normalize_v: bool,
    stack: str,
    chunk: int,
    save_every: int,
    keep_state: bool,
    eta_max: float,
    retention: bool,
    writes: bool,
) -> list[torch.Tensor]:
    """The whole scan: streams k, v, q [L, T, K]; live [B, T] fp32; readout fp32; weights and start [B, H, S, ...]; masks bool [B, N].

    Returns k, v, q [L, T, K], eta, log_alpha [L, T] fp32, the scales of k, v, q [L, T], the states after the last chunk [B, H, S, ...]
    where they are kept, and those at the starts of all segments but the first [segments - 1, L * S, ...].
    """
    settings = Settings(
        memory, objective, huber_delta, update, self_target, normalize_v, stack, chunk, save_every, keep_state, eta_max, retention, writes
    )
    segments = _segments(settings, streams[0], weights, (commit, reset), len(readout[1]))
    current, start = _rows(weights), _rows(start)
    saved = [torch.empty(len(segments) - 1, *w.shape, dtype=torch.float32, device=w.device) for w in current]
    parts = []
    for index, segment in enumerate(segments):
        for kept, now in zip(saved, current, strict=True):
            if index:
                kept[index - 1] = now
        parts.append(_forward_segment(segment, tuple(streams), live, settings.readout(readout), current, start))
    generated = parts[0] if len(parts) == 1 else tuple(torch.cat(each, 1) for each in zip(*parts, strict=True))
    ends = [now.view(given.shape) for now, given in zip(current, weights, strict=True)] if keep_state else []
    return [*generated, *ends, *saved]


@scan.register_fake
def _(
    streams, live, readout, weights, start, commit, reset, memory, objective, huber_delta, update, self_target, normalize_v, stack, chunk,
    save_every, keep_state, eta_max, retention, writes,
):  # fmt: skip
    xk = streams[0]
    rows, tokens, _ = xk.shape
    step = chunk * max(1, save_every // chunk)
    cuts = -(-tokens // step) - 1
    gates = [xk.new_empty(rows, tokens, dtype=torch.float32) for _ in range(5)]
    ends = [w.new_empty(w.shape, dtype=torch.float32) for w in weights] if keep_state else []
    saved = [w.new_empty(cuts, w.shape[0] * w.shape[1] * w.shape[2], *w.shape[3:], dtype=torch.float32) for w in weights]
    return [*(xk.new_empty(xk.shape) for _ in range(3)), *gates, *ends, *saved]


@dataclass(frozen=True)
class Gradients:
    """What backward adds to as it walks the segments in reverse, fp32.

    states: of the state after what is still to come, [L * S, ...]; start: of the learned start, or (); readout [2, L, 1, K] and bias
    [2, L, 1] of eta and alpha by row.
    """

    states: tuple[torch.Tensor, ...]
    start: tuple[torch.Tensor, ...]
    readout: torch.Tensor
    bias: torch.Tensor


class _Writes:
    """The writes of a segment, replayed at once from what forward generated; `backward` then takes the chunks in reverse.

    gradients: its states move along. inner: gradients of the generated streams through the writes; zero where nothing is written.
    """

    def __init__(
        self, segment: Segment, generated: Streams, current: tuple[torch.Tensor, ...], start: tuple[torch.Tensor, ...], gradients: Gradients
    ):
        self.segment, self.d_states = segment, gradients.states
        tiling, rule, written = segment.tiling, segment.settings.rule, segment.written
        k, v, eta, log_alpha = (t.contiguous() for t in (generated.k, generated.v, generated.eta, generated.log_alpha))
        self.keys, self.values, self.gates = k, v, (eta, log_alpha)
        self.states, self.signals = _room(segment, k, current, backward=True)
        for slots, state in zip(self.states.weights, current, strict=True):
            slots[:, 0] = state
        self.room = empty_terms(k, tiling=tiling, queries=False, erase=rule.erases(0))
        out = WriteGradients.empty(k, gradients.states, rule=rule, tiling=tiling, resets=False)
        self.out = replace(out, current=gradients.states)
        shape: dict[str, Any] = {"dtype": torch.float32, "device": k.device}
        y, g = torch.empty(k.shape, **shape), [torch.empty(eta.shape, **shape) for _ in range(4)]
        self.d_terms = Terms(
            None, None if out.g_prev is None else g[0], None if out.w is None else g[1], torch.empty(len(k), tiling.num_tiles, **shape),
            y, None, None,
        )  # fmt: skip
        self.inner = Inner(out.k, out.v, torch.empty(k.shape, **shape), g[2], g[3])
        if len(written) < tiling.num_tiles:
            for t in self.inner:
                t[:, (tiling.num_chunks - 1) * tiling.chunk :] = 0
        if written:
            chunk_terms(k, None, eta, log_alpha, tiling=tiling, erase=rule.erases(0), tiles=written, out=self.room)
            write_forward(
                k, v, self.room[0], self.states, self.signals, rule=rule, tiling=tiling, tiles=written,
                commit=segment.commit, reset=segment.reset, start=start,
            )  # fmt: skip

    def backward(self, tiles: range) -> None:
        """Gradients of the writes of one chunk: moves the states' over it and fills `inner` at its tokens."""
        segment, tiling, rule, (terms, inverse) = self.segment, self.segment.tiling, self.segment.settings.rule, self.room
        rows, _, width = self.keys.shape
        write_backward(
            self.keys, self.values, terms, self.states, self.signals, self.d_states, rule=rule, tiling=tiling, tiles=tiles,
            commit=segment.commit, out=self.out,
        )  # fmt: skip
        parts, sums = self.out, self.d_terms
        _sum_memories[(len(tiles), rows)](
            parts.y, parts.w, parts.g_prev, parts.g_end, sums.y, sums.w, sums.g_prev, sums.g_end, tiling.tokens, tiling.num_tiles,
            tiles.start, S=len(segment.settings.names), K=width, BLOCK_K=padded(width), CHUNK=tiling.chunk, TILE=tiling.tile,
        )  # fmt: skip
        chunk_terms_backward(
            sums, self.keys, None, *self.gates, terms, inverse, tiling=tiling, erase=rule.erases(0), tiles=tiles,
            out=(self.inner.terms_k, None, self.inner.eta, self.inner.log_alpha),
        )  # fmt: skip


def _backward_segment(
    segment: Segment,
    upstream: Sequence[torch.Tensor],
    streams: Sequence[torch.Tensor],
    generated: Streams,
    readout: Readout,
    current: tuple[torch.Tensor, ...],
    start: tuple[torch.Tensor, ...],
    gradients: Gradients,
) -> torch.Tensor:
    """Gradients of the static streams of a segment by generated stream, [5, L, T, K] fp32; `current`: the states at its start."""
    settings, tiling = segment.settings, segment.tiling
    rule, tiles, static = settings.rule, range(segment.tiling.num_tiles), settings.static
    upstream, streams, generated = segment.window(upstream), segment.window(streams), Streams(*segment.window(generated))
    d_x = torch.empty(len(STREAMS), *streams[0].shape, dtype=torch.float32, device=streams[0].device)
    same: dict[str, Any] = {"normalize_v": rule.normalize_v, "tiling": tiling, "d_x": d_x}
    inner = None
    if current:
        writes = _Writes(segment, generated, current, start, gradients)
        inner = writes.inner
        anchors = Anchors(settings.names, writes.states.weights, tuple(w.to(streams[0].dtype) for w in start), segment.reset)
        for tiles_n in reversed(segment.chunks):
            if tiles_n.start in segment.written:
                writes.backward(tiles_n)
            generate_backward(
                upstream, inner, streams, anchors, readout, generated, tiles=tiles_n, run=len(tiles_n), d_weights=gradients.states,
                d_start=gradients.start, d_readout=gradients.readout, d_bias=gradients.bias, **same,
            )  # fmt: skip
    if static.names:
        rows, runs = len(streams[0]), -(-len(tiles) // RUN)
        d_readout, d_bias = (torch.zeros(2, rows, runs, *more, device=d_x.device) for more in ((d_x.shape[3],), ()))
        generate_backward(
            upstream, inner, streams, static, readout, generated, tiles=tiles, run=RUN, d_weights=(), d_start=(), d_readout=d_readout,
            d_bias=d_bias, **same,
        )  # fmt: skip
        gradients.readout.add_(d_readout.sum(2, keepdim=True))
        gradients.bias.add_(d_bias.sum(2, keepdim=True))
    return d_x


@operator("projection_scan_backward")
def scan_backward(
    upstream: Sequence[torch.Tensor],
    d_ends: Sequence[torch.Tensor],
    generated: Sequence[torch.Tensor],
    saved: Sequence[torch.Tensor],
    streams: Sequence[torch.Tensor],
    readout: Sequence[torch.Tensor],
    weights: Sequence[torch.Tensor],
    start: Sequence[torch.Tensor],
    commit: torch.Tensor | None,
    reset: torch.Tensor | None,
    memory: str,
    objective: str,
    huber_delta: float,
    update: str,
    self_target: bool,
    normalize_v: bool,
    stack: str,
    chunk: int,
    save_every: int,
    keep_state: bool,
    eta_max: float,
    retention: bool,
    writes: bool,
) -> list[torch.Tensor]:
    """Gradients of streams (3), readout (4), weights and start of `scan`, in their shapes and dtypes.

    upstream: of k, v, q, eta, log_alpha; d_ends: of the states after the last chunk, none where they are not kept; generated, saved: the
    results of `scan`.
    """
    settings = Settings(
        memory, objective, huber_delta, update, self_target, normalize_v, stack, chunk, save_every, keep_state, eta_max, retention, writes
    )
    rows, _, width = streams[0].shape
    heads, device = len(readout[1]), streams[0].device
    segments = _segments(settings, streams[0], weights, (commit, reset), heads)
    sums = (torch.zeros(2, rows, 1, *more, device=device) for more in ((width,), ()))
    first, learned = _rows(weights), _rows(start)
    d_states = _rows(d_ends) if keep_state else tuple(torch.zeros_like(w) for w in first)
    gradients = Gradients(d_states, tuple(torch.zeros_like(w) for w in learned), *sums)
    d_streams = [torch.empty_like(t) for t in streams]
    for index, segment in reversed(list(enumerate(segments))):
        current = first if index == 0 else tuple(w[index - 1].clone() for w in saved)
        d_x = _backward_segment(segment, upstream, streams, Streams(*generated), settings.readout(readout), current, learned, gradients)
        parts = d_x[:3].sum(0), d_x[3], d_x[4]
        for whole, part in zip(segment.window(d_streams), parts, strict=True):
            whole.copy_(part)
    d_readout = [sums[gate].unflatten(0, (-1, heads)).sum(0) for gate in (0, 1) for sums in (gradients.readout, gradients.bias)]
    given = [*readout, *weights, *start]
    found = [*d_readout, *gradients.states, *gradients.start]
    return [*d_streams, *(g.reshape(t.shape).to(t.dtype) for g, t in zip(found, given, strict=True))]


@scan_backward.register_fake
def _(upstream, d_ends, generated, saved, streams, readout, weights, start, *settings):
    return [t.new_empty(t.shape) for t in (*streams, *readout, *weights, *start)]


def _setup_context(ctx, inputs, output):
    streams, _, readout, weights, start, commit, reset, *settings = inputs
    ctx.settings = settings
    ctx.lengths = [len(group) for group in (output, streams, readout, weights, start)]
    ctx.save_for_backward(*output, *streams, *readout, *weights, *start, commit, reset)


def _autograd_backward(ctx, grads):
    tensors = iter(ctx.saved_tensors)
    output, streams, readout, weights, start = ([next(tensors) for _ in range(length)] for length in ctx.lengths)
    commit, reset = tensors
    ends = len(output) - 8 - len(weights)
    wanted = [torch.zeros_like(t) if g is None else g.contiguous() for g, t in zip(grads, output, strict=True)]
    found = iter(
        scan_backward(
            wanted[:5], wanted[8 : 8 + ends], output[:8], output[8 + ends :], streams, readout, weights, start, commit, reset, *ctx.settings
        )
    )
    streams, readout, weights, start = ([next(found) for _ in group] for group in (streams, readout, weights, start))
    return streams, None, readout, weights, start, None, None, *(None for _ in ctx.settings)


scan.register_autograd(_autograd_backward, setup_context=_setup_context)


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
    """See `hope_kernels.projection_scan.projection_scan`; k, v, q fp32 or bf16, everything else is computed in fp32.

    Raises ValueError for another dtype.
    """
    if inputs.k.dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f'projection scans in Triton compute in float32 or bfloat16, not {inputs.k.dtype}; use backend "chunked"')
    batch, heads = inputs.k.shape[:2]
    streams = [t.flatten(0, 1).contiguous() for t in (inputs.k, inputs.v, inputs.q)]
    live = None if inputs.live is None else inputs.live[:, 0].to(torch.float32).contiguous()
    weights = list(state.weights) if stack else []
    learned = list(start.weights) if stack and masks.reset_BN is not None else []
    commit, reset = (masks.commit_BN, masks.reset_BN) if stack else (None, None)
    settings = Settings(
        rule.memory, rule.objective, rule.huber_delta, rule.update, rule.self_target, rule.normalize_v,
        ",".join(stack), chunk, save_every, keep_state, readout.eta_max, readout.retention, readout.writes,
    )  # fmt: skip
    parameters = [t.to(torch.float32) for t in readout.parameters()]
    found = scan(streams, live, parameters, weights, learned, commit, reset, *astuple(settings))
    generated = Generated(*(t.unflatten(0, (batch, heads)) for t in found[:5]))
    return generated, MemoryState(tuple(found[8 : 8 + len(weights)])) if stack and keep_state else None
