"""Kernels that generate k, v, q, eta and log alpha from the static streams: all stacked memories at their anchors, one launch a chunk.

Legend: L = B * H rows, S stacked memories, T tokens, K head width, F hidden width, NT tiles of at most TILE tokens (`Tiling`). A program
is one row, one tile (forward) or one run of tiles (backward) and one of the five generated streams, with its memory or, where it is
static, without. Tokens beyond the end of a tile's chunk or of the sequence count as x = 0 and are not stored. The mathematics is in
README.md.
"""

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from hope_kernels.blocks_triton import load_matrix
from hope_kernels.memory import L2_EPS
from hope_kernels.projection_scan.generate import MAX_FORGET, Readout
from hope_kernels.tiling import Tiling
from hope_kernels.tuning import padded, tuning

STREAMS = ("k", "eta", "alpha", "v", "q")
"""Generated streams by their number in the kernels: the first three are read from the static stream k, the others from their own."""
GATES = 2
READ_TILE = 64
"""Tokens of a tile forward: what one warp group multiplies at once. It need not be the tile of the writes: only anchors are read."""
UNIT_EPS: tl.constexpr = tl.constexpr(L2_EPS)
LN2: tl.constexpr = tl.constexpr(MAX_FORGET)


class Streams(NamedTuple):
    """Generated streams by row: k, v, q [L, T, K], eta, log_alpha [L, T] fp32; scale_k, scale_v, scale_q [L, T] fp32 made unit length."""

    k: torch.Tensor
    v: torch.Tensor
    q: torch.Tensor
    eta: torch.Tensor
    log_alpha: torch.Tensor
    scale_k: torch.Tensor
    scale_v: torch.Tensor
    scale_q: torch.Tensor


class Inner(NamedTuple):
    """Gradients of the generated streams through the writes, fp32.

    k, v [L * S, T, K]: of every memory's write, summed here; terms_k [L, T, K], eta, log_alpha [L, T]: of the terms.
    """

    k: torch.Tensor
    v: torch.Tensor
    terms_k: torch.Tensor
    eta: torch.Tensor
    log_alpha: torch.Tensor


@dataclass(frozen=True)
class Anchors:
    """The states that the memories of some streams are read at.

    weights: (W2 [L * S, NT + 1, F, K], W1 [L * S, NT + 1, K, F]) or (W [L * S, NT + 1, K, K],), S in the order of `names`, in the dtype of
    the streams; slot i is the state at the start of tile i. A chunk is read at the slot of its first tile, or where reset [L, N] uint8
    says so at `start`, the weights [L * S, ...]. Without weights the streams are static.
    """

    names: tuple[str, ...]
    weights: tuple[torch.Tensor, ...] = ()
    start: tuple[torch.Tensor, ...] = ()
    reset: torch.Tensor | None = None


@triton.jit
def _tokens_of(tile, tokens, CHUNK: tl.constexpr, TILE: tl.constexpr):
    """(tokens of a tile [TILE], which of them exist)."""
    PER_CHUNK: tl.constexpr = (CHUNK + TILE - 1) // TILE
    chunk = tile // PER_CHUNK
    token = chunk * CHUNK + (tile % PER_CHUNK) * TILE + tl.arange(0, TILE)
    return token, token < tl.minimum((chunk + 1) * CHUNK, tokens)


@triton.jit
def _at(row, column, exists, COLUMNS: tl.constexpr, BLOCK: tl.constexpr):
    """(offsets, mask) of rows of length COLUMNS in a block of BLOCK columns."""
    offsets = row[:, None] * COLUMNS + column[None, :]
    if COLUMNS == BLOCK:
        return offsets, exists[:, None]
    else:
        return offsets, exists[:, None] & (column < COLUMNS)[None, :]


@triton.jit
def _features(token, feature, exists, COLUMNS: tl.constexpr, BLOCK: tl.constexpr):
    """The same, features first: [BLOCK, tokens]."""
    offsets = token[None, :] * COLUMNS + feature[:, None]
    if COLUMNS == BLOCK:
        return offsets, exists[None, :]
    else:
        return offsets, exists[None, :] & (feature < COLUMNS)[:, None]


@triton.jit
def _vector(base, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """A vector [WIDTH], zero-padded to its block."""
    at = tl.arange(0, BLOCK)
    return tl.load(base + at, mask=at < WIDTH, other=0.0)


@triton.jit
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def _softplus_below_zero(x):
    """log(1 + exp(x)) for x <= 0 to fp32 precision: 2 artanh(s) with s = u / (2 + u), u = exp(x) <= 1; log(1 + u) itself loses small u."""
    u = tl.exp(x)
    s = u / (2.0 + u)
    s2 = s * s
    series = 1.0 / 13.0 + s2 / 15.0
    series = 1.0 / 11.0 + s2 * series
    series = 1.0 / 9.0 + s2 * series
    series = 1.0 / 7.0 + s2 * series
    series = 1.0 / 5.0 + s2 * series
    series = 1.0 / 3.0 + s2 * series
    return 2.0 * s * (1.0 + s2 * series)


@triton.jit
def _one_minus_exp(x):
    """1 - exp(x) for -ln 2 <= x <= 0 to fp32 precision, by its series: the difference itself loses small x."""
    y = -x
    series = 1.0 - y / 9.0
    series = 1.0 - y / 8.0 * series
    series = 1.0 - y / 7.0 * series
    series = 1.0 - y / 6.0 * series
    series = 1.0 - y / 5.0 * series
    series = 1.0 - y / 4.0 * series
    series = 1.0 - y / 3.0 * series
    series = 1.0 - y / 2.0 * series
    return y * series


@triton.jit
def _anchor(weights, start, reset, line, chunk, num_chunks, memory, slot, num_tiles, SIZE: tl.constexpr):
    """Where the anchor of a chunk lies: its slot, or the learned start where the row returns to it before this chunk."""
    base = weights + (memory * (num_tiles + 1) + slot) * SIZE
    if reset is not None:
        if tl.load(reset + line * num_chunks + chunk) != 0:
            base = start + memory * SIZE
    return base


@triton.jit
def _stream(place, PLACE_K: tl.constexpr, PLACE_ETA: tl.constexpr, PLACE_ALPHA: tl.constexpr, PLACE_V: tl.constexpr, PLACE_Q: tl.constexpr):
    """Number in STREAMS of the stream at a place of this launch."""
    stream = 0
    if place == PLACE_ETA:
        stream = 1
    if place == PLACE_ALPHA:
        stream = 2
    if place == PLACE_V:
        stream = 3
    if place == PLACE_Q:
        stream = 4
    return stream


@triton.jit(do_not_specialize=["first_tile"])
def _generate_forward(
    xk, xv, xq, live, w2, w1, start2, start1, reset, r_eta, b_eta, r_alpha, b_alpha, k, v, q, eta, log_alpha,
    scale_k, scale_v, scale_q, eta_max, tokens, row, heads, num_chunks, num_tiles, slots_per_chunk, first_tile,
    K: tl.constexpr, F: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_F: tl.constexpr, CHUNK: tl.constexpr, TILE: tl.constexpr,
    PLACE_K: tl.constexpr, PLACE_ETA: tl.constexpr, PLACE_ALPHA: tl.constexpr, PLACE_V: tl.constexpr, PLACE_Q: tl.constexpr,
    MEMORY: tl.constexpr, LINEAR: tl.constexpr, NORMALIZE_V: tl.constexpr, WRITES: tl.constexpr, RETENTION: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    tile, place, line = first_tile + tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    stream = _stream(place, PLACE_K, PLACE_ETA, PLACE_ALPHA, PLACE_V, PLACE_Q)
    source = xk
    if stream == 3:
        source = xv
    if stream == 4:
        source = xq
    token, exists = _tokens_of(tile, tokens, CHUNK, TILE)
    wide, wide_mask = _at(token, tl.arange(0, BLOCK_K), exists, K, BLOCK_K)
    x = tl.load(source + line * row * K + wide, mask=wide_mask, other=0.0)
    x32 = x.to(tl.float32)
    if MEMORY:
        PER_CHUNK: tl.constexpr = (CHUNK + TILE - 1) // TILE
        chunk = tile // PER_CHUNK
        memory, slot = line * tl.num_programs(1) + place, chunk * slots_per_chunk
        first = load_matrix(_anchor(w2, start2, reset, line, chunk, num_chunks, memory, slot, num_tiles, F * K), F, K, BLOCK_F, BLOCK_K)
        if not LINEAR:
            w1_at = _anchor(w1, start1, reset, line, chunk, num_chunks, memory, slot, num_tiles, F * K)
            second = load_matrix(w1_at, K, F, BLOCK_K, BLOCK_F)
            pre = tl.dot(x, tl.trans(first), input_precision=PRECISION)
            hidden = pre * _sigmoid(pre)
    if (stream == 1) | (stream == 2):
        weight, bias, gate_at = r_eta, b_eta, eta
        if stream == 2:
            weight, bias, gate_at = r_alpha, b_alpha, log_alpha
        r = _vector(weight + (line % heads) * K, K, BLOCK_K)
        logit = tl.load(bias + line % heads) + tl.zeros((TILE,), tl.float32)
        if MEMORY and LINEAR:
            logit += tl.sum(x32 * tl.sum(first.to(tl.float32) * r[:, None], 0)[None, :], 1)
        else:
            logit += tl.sum(x32 * r[None, :], 1)
        if MEMORY and not LINEAR:
            logit += tl.sum(hidden * tl.sum(second.to(tl.float32) * r[:, None], 0)[None, :], 1)
        if stream == 1:
            gate = eta_max * _sigmoid(logit)
            if not WRITES:
                gate = tl.zeros_like(logit)
        else:
            gate = -_softplus_below_zero(tl.minimum(logit, 0.0))
            gate = tl.where(logit < 0.0, gate, -LN2)
            if not (WRITES and RETENTION):
                gate = tl.zeros_like(logit)
        if live is not None:
            gate *= tl.load(live + (line // heads) * row + token, mask=exists, other=0.0)
        tl.store(gate_at + line * tokens + token, gate, mask=exists)
    else:
        value = x32
        if MEMORY and LINEAR:
            value = tl.dot(x, tl.trans(first), input_precision=PRECISION)
        if MEMORY and not LINEAR:
            value += tl.dot(hidden.to(x.dtype), tl.trans(second), input_precision=PRECISION)
        value_at, scale = k, scale_k
        if stream == 3:
            value_at, scale = v, scale_v
        if stream == 4:
            value_at, scale = q, scale_q
        factor = tl.rsqrt(tl.sum(value * value, 1) + UNIT_EPS)
        if not NORMALIZE_V:
            factor = tl.where(stream == 3, 1.0, factor)
        tl.store(value_at + line * tokens * K + wide, (value * factor[:, None]).to(value_at.dtype.element_ty), mask=wide_mask)
        tl.store(scale + line * tokens + token, factor, mask=exists)


@triton.jit
def _gate_gradient(
    eta, log_alpha, d_eta, d_log_alpha, in_eta, in_log_alpha, line, token, exists, row, tokens, stream, eta_max, INNER: tl.constexpr
):
    """Gradient of the logit of eta or alpha [TILE] from the value of the gate: zero where it is masked or at its bound."""
    value_at, upstream_at, inner_at = eta, d_eta, in_eta
    if stream == 2:
        value_at, upstream_at, inner_at = log_alpha, d_log_alpha, in_log_alpha
    value = tl.load(value_at + line * row + token, mask=exists, other=0.0)
    upstream = tl.load(upstream_at + line * row + token, mask=exists, other=0.0)
    if INNER:
        upstream += tl.load(inner_at + line * tokens + token, mask=exists, other=0.0)
    slope = value * (1.0 - value / eta_max)
    if stream == 2:
        slope = tl.where(value > -LN2, -_one_minus_exp(value), 0.0)
    return upstream * slope


@triton.jit
def _vector_gradient(
    k, v, q, scale_k, scale_v, scale_q, d_k, d_v, d_q, in_k, in_v, in_terms_k, line, token, exists, wide, wide_mask, row, tokens, stream,
    K: tl.constexpr, PARTS: tl.constexpr, NORMALIZE_V: tl.constexpr,
):  # fmt: skip
    """Gradient of M(x) [TILE, BLOCK_K] of k, v or q: of upstream and of the writes, through y = s M(x): s (G - y (y . G))."""
    value, scale, upstream, parts = k, scale_k, d_k, in_k
    if stream == 3:
        value, scale, upstream, parts = v, scale_v, d_v, in_v
    if stream == 4:
        value, scale, upstream = q, scale_q, d_q
    total = tl.load(upstream + line * row * K + wide, mask=wide_mask, other=0.0).to(tl.float32)
    if PARTS > 0:
        if stream == 0:
            total += tl.load(in_terms_k + line * tokens * K + wide, mask=wide_mask, other=0.0)
        if stream != 4:
            for part in tl.range(0, PARTS, num_stages=1):
                total += tl.load(parts + (line * PARTS + part) * tokens * K + wide, mask=wide_mask, other=0.0)
    y = tl.load(value + line * row * K + wide, mask=wide_mask, other=0.0).to(tl.float32)
    factor = tl.load(scale + line * row + token, mask=exists, other=0.0)
    along = tl.sum(y * total, 1)
    if not NORMALIZE_V:
        along = tl.where(stream == 3, 0.0, along)
    return (total - y * along[:, None]) * factor[:, None]


@triton.jit
def _hand_back(
    adjoint, d_start, returned, value, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr
):
    """Add the gradient of an anchor to its adjoint; where the row returned to the start before this chunk, all of it is the start's."""
    row, column = tl.arange(0, BLOCK_ROWS), tl.arange(0, BLOCK_COLUMNS)
    offsets = row[:, None] * COLUMNS + column[None, :]
    mask = (row < ROWS)[:, None] & (column < COLUMNS)[None, :]
    total = value + tl.load(adjoint + offsets, mask=mask, other=0.0)
    if d_start is not None:
        if returned:
            tl.store(d_start + offsets, total + tl.load(d_start + offsets, mask=mask, other=0.0), mask=mask)
            total = tl.zeros_like(total)
    tl.store(adjoint + offsets, total, mask=mask)


@triton.jit(do_not_specialize=["first_tile", "stop_tile", "run"])
def _generate_backward(
    xk, xv, xq, w2, w1, start2, start1, reset, r_eta, r_alpha, k, v, q, eta, log_alpha, scale_k, scale_v, scale_q,
    d_k, d_v, d_q, d_eta, d_log_alpha, in_k, in_v, in_terms_k, in_eta, in_log_alpha, d_x, d_w2, d_w1, d_start2, d_start1, d_readout, d_bias,
    eta_max, tokens, row, heads, num_chunks, num_tiles, first_tile, stop_tile, run,
    K: tl.constexpr, F: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_F: tl.constexpr, CHUNK: tl.constexpr, TILE: tl.constexpr,
    PLACE_K: tl.constexpr, PLACE_ETA: tl.constexpr, PLACE_ALPHA: tl.constexpr, PLACE_V: tl.constexpr, PLACE_Q: tl.constexpr,
    MEMORY: tl.constexpr, PARTS: tl.constexpr, LINEAR: tl.constexpr, NORMALIZE_V: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    place, line = tl.program_id(1), tl.program_id(2).to(tl.int64)
    stream = _stream(place, PLACE_K, PLACE_ETA, PLACE_ALPHA, PLACE_V, PLACE_Q)
    begin = first_tile + tl.program_id(0) * run
    source = xk
    if stream == 3:
        source = xv
    if stream == 4:
        source = xq
    is_gate = (stream == 1) | (stream == 2)
    weight = r_eta
    if stream == 2:
        weight = r_alpha
    r = _vector(weight + (line % heads) * K, K, BLOCK_K)
    end = tl.minimum(begin + run, stop_tile)
    at_k = tl.arange(0, BLOCK_K)
    source += line * row * K
    d_x += (stream * tl.num_programs(2) + line) * tokens * K
    read_x, read_one = tl.zeros((BLOCK_K,), tl.float32), 0.0  # sums over tokens of d_logit x and of d_logit
    for tile in tl.range(begin, end, num_stages=1):  # leaves the gradient of M(x) in d_x
        token, exists = _tokens_of(tile, tokens, CHUNK, TILE)
        wide, wide_mask = _at(token, at_k, exists, K, BLOCK_K)
        if is_gate:
            d_logit = _gate_gradient(
                eta, log_alpha, d_eta, d_log_alpha, in_eta, in_log_alpha, line, token, exists, row, tokens, stream, eta_max, PARTS > 0
            )
            x = tl.load(source + wide, mask=wide_mask, other=0.0).to(tl.float32)
            read_x += tl.sum(x * d_logit[:, None], 0)
            read_one += tl.sum(d_logit, 0)
            d_out = d_logit[:, None] * r[None, :]
        else:
            d_out = _vector_gradient(
                k, v, q, scale_k, scale_v, scale_q, d_k, d_v, d_q, in_k, in_v, in_terms_k, line, token, exists, wide, wide_mask, row,
                tokens, stream, K, PARTS, NORMALIZE_V,
            )  # fmt: skip
        tl.store(d_x + wide, d_out, mask=wide_mask)
    if MEMORY:
        tl.debug_barrier()
        PER_CHUNK: tl.constexpr = (CHUNK + TILE - 1) // TILE
        chunk = begin // PER_CHUNK
        memory, slot = line * tl.num_programs(1) + place, chunk * PER_CHUNK
        w2_at = _anchor(w2, start2, reset, line, chunk, num_chunks, memory, slot, num_tiles, F * K)
        d_start2_at, d_start1_at, returned = None, None, False
        if reset is not None:
            returned = tl.load(reset + line * num_chunks + chunk) != 0
            d_start2_at = d_start2 + memory * F * K
            if not LINEAR:
                d_start1_at = d_start1 + memory * F * K
        first = load_matrix(w2_at, F, K, BLOCK_F, BLOCK_K)
        if LINEAR:
            if is_gate:
                read_x = tl.sum(first.to(tl.float32) * read_x[None, :], 1)
        else:
            # The gradients of the two weights are taken one after the other: together they would fill the registers. Blocks of tokens are
            # held features first: a tile of 32 tokens has too few rows for the products of a warp group, the features do not.
            w1_at = _anchor(w1, start1, reset, line, chunk, num_chunks, memory, slot, num_tiles, F * K)
            d_second, read_hidden = tl.zeros((BLOCK_K, BLOCK_F), tl.float32), tl.zeros((BLOCK_F,), tl.float32)
            for tile in tl.range(begin, end, num_stages=1):
                token, exists = _tokens_of(tile, tokens, CHUNK, TILE)
                wide, wide_mask = _features(token, at_k, exists, K, BLOCK_K)
                x = tl.load(source + wide, mask=wide_mask, other=0.0)
                pre = tl.dot(first, x, input_precision=PRECISION)
                hidden = pre * _sigmoid(pre)
                if is_gate:
                    d_logit = _gate_gradient(
                        eta, log_alpha, d_eta, d_log_alpha, in_eta, in_log_alpha, line, token, exists, row, tokens, stream, eta_max,
                        PARTS > 0,
                    )  # fmt: skip
                    read_hidden += tl.sum(hidden * d_logit[None, :], 1)
                d_out = tl.load(d_x + wide, mask=wide_mask, other=0.0).to(x.dtype)
                d_second += tl.dot(d_out, tl.trans(hidden.to(x.dtype)), input_precision=PRECISION)
            _hand_back(d_w1 + memory * F * K, d_start1_at, returned, d_second, K, F, BLOCK_K, BLOCK_F)
            second = load_matrix(w1_at, K, F, BLOCK_K, BLOCK_F)
            if is_gate:
                read_x += tl.sum(second.to(tl.float32) * read_hidden[None, :], 1)
        d_first = tl.zeros((BLOCK_F, BLOCK_K), tl.float32)
        for tile in tl.range(begin, end, num_stages=1):
            token, exists = _tokens_of(tile, tokens, CHUNK, TILE)
            wide, wide_mask = _features(token, at_k, exists, K, BLOCK_K)
            x = tl.load(source + wide, mask=wide_mask, other=0.0)
            d_out = tl.load(d_x + wide, mask=wide_mask, other=0.0)
            d_pre = d_out.to(x.dtype)
            if not LINEAR:
                pre = tl.dot(first, x, input_precision=PRECISION)
                rising = _sigmoid(pre)
                d_hidden = tl.dot(tl.trans(second), d_pre, input_precision=PRECISION)
                d_pre = (d_hidden * (rising + pre * rising * (1.0 - rising))).to(x.dtype)
            d_first += tl.dot(d_pre, tl.trans(x), input_precision=PRECISION)
            d_read = tl.dot(tl.trans(first), d_pre, input_precision=PRECISION)
            if not LINEAR:
                d_read += d_out
            tl.store(d_x + wide, d_read, mask=wide_mask)
        _hand_back(d_w2 + memory * F * K, d_start2_at, returned, d_first, F, K, BLOCK_F, BLOCK_K)
    if is_gate:
        part = ((stream - 1) * tl.num_programs(2) + line) * tl.num_programs(0) + tl.program_id(0)
        read_x += tl.load(d_readout + part * K + at_k, mask=at_k < K, other=0.0)
        tl.store(d_readout + part * K + at_k, read_x, mask=at_k < K)
        tl.store(d_bias + part, tl.load(d_bias + part) + read_one)


def _settings(
    streams: tuple[torch.Tensor, ...], whole: tuple[torch.Tensor, ...], anchors: Anchors, tiling: Tiling, kernel: str
) -> tuple[int, dict]:
    """(tokens from row to row of what may be a window of longer rows, the constants of a launch), after our own mistakes in layouts."""
    rows, tokens, width = streams[0].shape
    row = streams[0].stride(0) // width
    assert tokens == tiling.tokens and all(t.shape[:2] == (rows, tokens) for t in (*streams, *whole)), (streams[0].shape, tiling)
    assert all(t.stride() == ((row * width, width, 1) if t.dim() == 3 else (row, 1)) for t in (*streams, *whole))
    hidden = anchors.weights[0].shape[2] if anchors.weights else width
    for weights, shape in zip(anchors.weights, ((hidden, width), (width, hidden)), strict=False):
        assert weights.is_contiguous() and weights.dtype == streams[0].dtype, weights.dtype
        assert weights.shape == (rows * len(anchors.names), tiling.num_tiles + 1, *shape), weights.shape
    assert all(t.is_contiguous() and t.dtype == streams[0].dtype for t in anchors.start)
    assert anchors.reset is None or (anchors.reset.is_contiguous() and anchors.reset.shape == (rows, tiling.num_chunks))
    tuned = tuning(width=width, hidden=hidden)
    assert tuned is not None
    places = {f"PLACE_{name.upper()}": anchors.names.index(name) if name in anchors.names else -1 for name in STREAMS}
    return row, {
        "K": width, "F": hidden, "BLOCK_K": padded(width), "BLOCK_F": padded(hidden), "CHUNK": tiling.chunk, "TILE": tiling.tile, **places,
        "MEMORY": bool(anchors.weights), "LINEAR": len(anchors.weights) == 1,
        "PRECISION": "tf32x3" if streams[0].dtype == torch.float32 else "tf32", "num_warps": tuned.warps_of(kernel), "num_stages": 1,
    }  # fmt: skip


def _pair(weights: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor | None, ...]:
    """W2 and W1, or None for what there is not."""
    return (*weights, None, None)[:2]


def empty_streams(xk: torch.Tensor) -> Streams:
    """Room for all generated streams of static ones [L, T, K]."""
    vectors = [torch.empty(xk.shape, dtype=xk.dtype, device=xk.device) for _ in range(3)]
    return Streams(*vectors, *(torch.empty(xk.shape[:2], dtype=torch.float32, device=xk.device) for _ in range(5)))


def generate_forward(
    streams: tuple[torch.Tensor, ...],
    live: torch.Tensor | None,
    anchors: Anchors,
    readout: Readout,
    *,
    normalize_v: bool,
    tiling: Tiling,
    chunks: range,
    out: Streams,
) -> None:
    """Write the streams anchors.names of the tokens of some chunks to `out`, which is contiguous.

    streams: the static k, v, q [L, T, K], fp32 or bf16, and live [B, T] fp32 or None: whole, or windows of the same longer rows. readout:
    parameters [H, K] and [H], fp32. tiling: of the slots of the states.
    """
    row, settings = _settings(streams, (), anchors, tiling, "generate_forward")
    assert all(t.is_contiguous() for t in out) and (live is None or live.stride() == (row, 1))
    own = replace(tiling, tile=min(READ_TILE, padded(tiling.chunk)))
    tiles = own.tiles_of(chunks)
    _generate_forward[(len(tiles), len(anchors.names), len(streams[0]))](
        *streams, live, *_pair(anchors.weights), *_pair(anchors.start), anchors.reset, *readout.parameters(), *out, readout.eta_max,
        tiling.tokens, row, len(readout.bias_eta), tiling.num_chunks, tiling.num_tiles, tiling.per_chunk, tiles.start,
        **{**settings, "TILE": own.tile}, NORMALIZE_V=normalize_v, WRITES=readout.writes, RETENTION=readout.retention,
    )  # fmt: skip


def generate_backward(
    upstream: tuple[torch.Tensor, ...],
    inner: Inner | None,
    streams: tuple[torch.Tensor, ...],
    anchors: Anchors,
    readout: Readout,
    generated: Streams,
    *,
    normalize_v: bool,
    tiling: Tiling,
    tiles: range,
    run: int,
    d_x: torch.Tensor,
    d_weights: tuple[torch.Tensor, ...],
    d_start: tuple[torch.Tensor, ...],
    d_readout: torch.Tensor,
    d_bias: torch.Tensor,
) -> None:
    """Gradients of the streams anchors.names at the tokens of some tiles; with memories, the tiles of one chunk.

    upstream: gradients of k, v, q [L, T, K] and of eta, log_alpha [L, T]; streams, generated and upstream: whole, or windows of the same
    longer rows. inner: None for zero. run: tiles that one program takes. Written: d_x [5, L, T, K] fp32, by stream as in STREAMS. Added to,
    all fp32: the adjoints d_weights of the anchors [L * S, ...], or where a row returned to the start before this chunk d_start, d_weights
    becoming 0; d_readout [2, L, R, K] and d_bias [2, L, R] of eta and alpha by row and run, R = ceil(tiles / run).
    """
    row, settings = _settings(streams, (*generated, *upstream), anchors, tiling, "generate_backward")
    runs, rows = -(-len(tiles) // run), len(streams[0])
    assert not anchors.weights or runs == 1
    assert (
        d_readout.shape == (GATES, rows, runs, settings["K"]) and d_bias.shape == (GATES, rows, runs) and d_x.shape[1:] == streams[0].shape
    )
    assert all(t.is_contiguous() for t in (d_x, d_readout, d_bias, *d_weights, *d_start, *(inner or ())))
    _generate_backward[(runs, len(anchors.names), rows)](
        *streams, *_pair(anchors.weights), *_pair(anchors.start), anchors.reset, readout.weight_eta, readout.weight_alpha, *generated,
        *upstream, *(inner or (None,) * 5), d_x, *_pair(d_weights), *_pair(d_start), d_readout, d_bias, readout.eta_max, tiling.tokens,
        row, len(readout.bias_eta), tiling.num_chunks, tiling.num_tiles, tiles.start, tiles.stop, run,
        **settings, NORMALIZE_V=normalize_v, PARTS=len(inner.k) // rows if inner else 0,
    )  # fmt: skip
