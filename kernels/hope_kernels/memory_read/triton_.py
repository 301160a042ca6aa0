"""Reads of MLP and linear memories as Triton kernels: one program a row and tile, forward or backward.

`read_forward` takes the states at the tiles' starts and the signals that `memory_write` left, and the terms of the tiles; causal reads see
the writes up to and including their own token, anchor reads the state at the start of their chunk. The mathematics is that of `fused.py`;
README.md has it in the layout of the kernels.

Legend: L = B * H rows, T tokens, C tokens of a tile, NT tiles, K head width, F hidden width (K for a linear memory). Token
blocks are held features first, [K, C] and [F, C], so that a product has as many rows as a matrix instruction wants however short the
tile is; squares are [s, t], the token written before the token that reads.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from hope_kernels.chunk_terms.triton_ import Terms
from hope_kernels.memory_write.triton_ import Signals, States
from hope_kernels.rule import MemoryRule
from hope_kernels.tiling import Tiling
from hope_kernels.tuning import padded, tuning


@triton.jit
def _tile_tokens(tile, tokens, CHUNK: tl.constexpr, TILE: tl.constexpr, PER_CHUNK: tl.constexpr):
    """Of a tile: the slot of its chunk's anchor, its first token, and its number of tokens."""
    chunk = tile // PER_CHUNK
    first = chunk * CHUNK + (tile % PER_CHUNK) * TILE
    return chunk * PER_CHUNK, first, tl.minimum(tl.minimum(chunk * CHUNK + CHUNK, tokens) - first, TILE)


@triton.jit
def _token_block(count, WIDTH: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr):
    """Offsets and mask of [BLOCK, TILE], features first, in a tensor [..., WIDTH], from the tile's first token on.

    int32: where the tile starts belongs into the scalar pointer, or every element would have an address of 64 bits.
    """
    feature, token = tl.arange(0, BLOCK)[:, None], tl.arange(0, TILE)[None, :]
    mask = token < count
    if WIDTH != BLOCK:
        mask = mask & (feature < WIDTH)
    return token * WIDTH + feature, mask


@triton.jit
def _load_tokens(pointer, first, count, WIDTH: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr):
    """[BLOCK, TILE] of a tensor [..., WIDTH] from token `first` (int64, of all rows) on; zero beyond the tile's `count` tokens."""
    offset, mask = _token_block(count, WIDTH, BLOCK, TILE)
    return tl.load(pointer + first * WIDTH + offset, mask=mask, other=0.0)


@triton.jit
def _store_tokens(pointer, value, first, count, WIDTH: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr):
    offset, mask = _token_block(count, WIDTH, BLOCK, TILE)
    tl.store(pointer + first * WIDTH + offset, value.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def _load_scalars(pointer, first, count, TILE: tl.constexpr):
    """[TILE] of one fp32 number a token; zero beyond the tile's tokens."""
    token = tl.arange(0, TILE)
    return tl.load(pointer + first + token, mask=token < count, other=0.0)


@triton.jit
def _matrix(ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr):
    """Offsets and mask (of the padding) of a matrix [ROWS, COLUMNS]."""
    row, column = tl.arange(0, BLOCK_ROWS)[:, None], tl.arange(0, BLOCK_COLUMNS)[None, :]
    return row * COLUMNS + column, (row < ROWS) & (column < COLUMNS)


@triton.jit
def _load_matrix(pointer, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr):
    """A matrix [ROWS, COLUMNS], zero in the padding."""
    offset, mask = _matrix(ROWS, COLUMNS, BLOCK_ROWS, BLOCK_COLUMNS)
    if ROWS == BLOCK_ROWS and COLUMNS == BLOCK_COLUMNS:
        return tl.load(pointer + offset)
    else:
        return tl.load(pointer + offset, mask=mask, other=0.0)


@triton.jit
def _store_matrix(pointer, value, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr):
    offset, mask = _matrix(ROWS, COLUMNS, BLOCK_ROWS, BLOCK_COLUMNS)
    if ROWS == BLOCK_ROWS and COLUMNS == BLOCK_COLUMNS:
        tl.store(pointer + offset, value)
    else:
        tl.store(pointer + offset, value, mask=mask)


@triton.jit
def _silu_slope(x):
    """silu(x) and silu'(x)."""
    sigmoid = tl.sigmoid(x)
    hidden = x * sigmoid
    return hidden, sigmoid + hidden * (1 - sigmoid)


@triton.jit
def _inner(
    query, weight, residual, g, m, first, count,
    OUT: tl.constexpr, BLOCK_OUT: tl.constexpr, TILE: tl.constexpr, CAUSAL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Product z = W_t q_t [OUT, C] of the first layer; `weight` is the state at the tile's start, or the anchor."""
    z = tl.dot(weight, query, input_precision=PRECISION)
    if CAUSAL:
        written = _load_tokens(residual, first, count, OUT, BLOCK_OUT, TILE)
        mixing = _load_tokens(m, first, count, TILE, TILE, TILE)
        z = _load_scalars(g, first, count, TILE)[None, :] * z - tl.dot(written, mixing, input_precision=PRECISION)
    return z


@triton.jit
def _read_forward(
    q, w2, w1, residual, error, hidden, g, m, n, out, tokens, first_tile, num_tiles,
    K: tl.constexpr, F: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_F: tl.constexpr, CHUNK: tl.constexpr, TILE: tl.constexpr,
    PER_CHUNK: tl.constexpr, CAUSAL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    row, tile = tl.program_id(0).to(tl.int64), first_tile + tl.program_id(1)
    anchor, start, count = _tile_tokens(tile, tokens, CHUNK, TILE, PER_CHUNK)
    first = row * tokens + start
    slot = row * (num_tiles + 1) + (tile if CAUSAL else anchor)
    query = _load_tokens(q, first, count, K, BLOCK_K, TILE)
    weight = _load_matrix(w2 + slot * F * K, F, K, BLOCK_F, BLOCK_K)
    z = _inner(query, weight, residual, g, m, first, count, F, BLOCK_F, TILE, CAUSAL, PRECISION)
    if w1 is None:
        _store_tokens(out, z, first, count, K, BLOCK_K, TILE)
    else:
        h, _ = _silu_slope(z)
        kept = h
        y = query.to(tl.float32)
        if CAUSAL:
            seen = _load_tokens(hidden, first, count, F, BLOCK_F, TILE)
            scores = tl.dot(tl.trans(seen), h.to(query.dtype), input_precision=PRECISION)
            scores = _load_tokens(n, first, count, TILE, TILE, TILE).to(tl.float32) * scores
            y -= tl.dot(_load_tokens(error, first, count, K, BLOCK_K, TILE), scores.to(query.dtype), input_precision=PRECISION)
            kept = _load_scalars(g, first, count, TILE)[None, :] * h
        weight = _load_matrix(w1 + slot * K * F, K, F, BLOCK_K, BLOCK_F)
        y += tl.dot(weight, kept.to(query.dtype), input_precision=PRECISION)
        _store_tokens(out, y, first, count, K, BLOCK_K, TILE)


@triton.jit
def _outer_backward(
    d_out, q, w2, w1, residual, error, hidden, g, m, n, d_z, d_w1, d_error, d_hidden, d_g, d_n, tokens, first_tile, num_tiles,
    K: tl.constexpr, F: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_F: tl.constexpr, CHUNK: tl.constexpr, TILE: tl.constexpr,
    PER_CHUNK: tl.constexpr, CAUSAL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Of an MLP memory: from the gradient of the output to that of z = W2_t q_t. d_g gets the second layer's share.

    silu'(z) waits in d_z: with it the registers would not hold what comes between.
    """
    row, tile = tl.program_id(0).to(tl.int64), first_tile + tl.program_id(1)
    anchor, start, count = _tile_tokens(tile, tokens, CHUNK, TILE, PER_CHUNK)
    first = row * tokens + start
    slot, into = row * (num_tiles + 1) + (tile if CAUSAL else anchor), row * num_tiles + tile
    query = _load_tokens(q, first, count, K, BLOCK_K, TILE)
    upstream = _load_tokens(d_out, first, count, K, BLOCK_K, TILE)
    weight = _load_matrix(w2 + slot * F * K, F, K, BLOCK_F, BLOCK_K)
    z = _inner(query, weight, residual, g, m, first, count, F, BLOCK_F, TILE, CAUSAL, PRECISION)
    h, slope = _silu_slope(z)
    h = h.to(query.dtype)
    kept = h
    if CAUSAL:
        _store_tokens(d_z, slope, first, count, F, BLOCK_F, TILE)
        seen = _load_tokens(hidden, first, count, F, BLOCK_F, TILE)
        scores = tl.dot(tl.trans(seen), h, input_precision=PRECISION)
        errors = _load_tokens(error, first, count, K, BLOCK_K, TILE)
        d_inside = -tl.dot(tl.trans(errors), upstream, input_precision=PRECISION)
        _store_tokens(d_n, d_inside * scores, first, count, TILE, TILE, TILE)
        inside = _load_tokens(n, first, count, TILE, TILE, TILE).to(tl.float32)
        mixed, d_scores = (inside * scores).to(query.dtype), (inside * d_inside).to(query.dtype)
        d_errors = -tl.dot(upstream, tl.trans(mixed), input_precision=PRECISION)
        _store_tokens(d_error, d_errors, first, count, K, BLOCK_K, TILE)
        _store_tokens(d_hidden, tl.dot(h, tl.trans(d_scores), input_precision=PRECISION), first, count, F, BLOCK_F, TILE)
        decay = _load_scalars(g, first, count, TILE)[None, :]
        kept = (decay * h.to(tl.float32)).to(query.dtype)
    d_outer = tl.dot(upstream, tl.trans(kept), input_precision=PRECISION)
    _store_matrix(d_w1 + into * K * F, d_outer, K, F, BLOCK_K, BLOCK_F)
    outer = _load_matrix(w1 + slot * K * F, K, F, BLOCK_K, BLOCK_F)
    d_h = tl.dot(tl.trans(outer), upstream, input_precision=PRECISION)
    if CAUSAL:
        token = tl.arange(0, TILE)
        tl.store(d_g + first + token, tl.sum(d_h * h.to(tl.float32), 0), mask=token < count)
        d_h = tl.dot(seen, d_scores, decay * d_h, input_precision=PRECISION)
        tl.debug_barrier()
        slope = _load_tokens(d_z, first, count, F, BLOCK_F, TILE).to(tl.float32)
        tl.debug_barrier()
    _store_tokens(d_z, d_h * slope, first, count, F, BLOCK_F, TILE)


@triton.jit
def _inner_backward(
    d_z, d_out, q, w2, residual, g, m, d_q, d_w2, d_residual, d_g, d_m, tokens, first_tile, num_tiles,
    K: tl.constexpr, F: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_F: tl.constexpr, CHUNK: tl.constexpr, TILE: tl.constexpr,
    PER_CHUNK: tl.constexpr, CAUSAL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """From the gradient of z = W2_t q_t on; d_out is None for a linear memory, whose output z is. Adds to what is in d_g otherwise."""
    row, tile = tl.program_id(0).to(tl.int64), first_tile + tl.program_id(1)
    anchor, start, count = _tile_tokens(tile, tokens, CHUNK, TILE, PER_CHUNK)
    first = row * tokens + start
    slot, into = row * (num_tiles + 1) + (tile if CAUSAL else anchor), row * num_tiles + tile
    query = _load_tokens(q, first, count, K, BLOCK_K, TILE)
    weight = _load_matrix(w2 + slot * F * K, F, K, BLOCK_F, BLOCK_K)
    d_pre = _load_tokens(d_z, first, count, F, BLOCK_F, TILE)
    if CAUSAL:
        mixing = _load_tokens(m, first, count, TILE, TILE, TILE)
        _store_tokens(d_residual, -tl.dot(d_pre, tl.trans(mixing), input_precision=PRECISION), first, count, F, BLOCK_F, TILE)
        written = _load_tokens(residual, first, count, F, BLOCK_F, TILE)
        _store_tokens(d_m, -tl.dot(tl.trans(written), d_pre, input_precision=PRECISION), first, count, TILE, TILE, TILE)
        token = tl.arange(0, TILE)
        d_decay = tl.sum(d_pre.to(tl.float32) * tl.dot(weight, query, input_precision=PRECISION), 0)
        if d_out is not None:
            d_decay += _load_scalars(d_g, first, count, TILE)
        tl.store(d_g + first + token, d_decay, mask=token < count)
        d_pre = (d_pre.to(tl.float32) * _load_scalars(g, first, count, TILE)[None, :]).to(query.dtype)
    d_weight = tl.dot(d_pre, tl.trans(query), input_precision=PRECISION)
    _store_matrix(d_w2 + into * F * K, d_weight, F, K, BLOCK_F, BLOCK_K)
    d_query = tl.dot(tl.trans(weight), d_pre, input_precision=PRECISION)
    if d_out is not None:
        d_query += _load_tokens(d_out, first, count, K, BLOCK_K, TILE).to(tl.float32)
    _store_tokens(d_q, d_query, first, count, K, BLOCK_K, TILE)


class ReadGradients(NamedTuple):
    """Gradients of what a read used, fp32; None where it does not use it.

    q [L, T, K]; weights: of the state that each tile was read with, W2 [L, NT, F, K] and W1 [L, NT, K, F] or W alone (with
    read = "anchor" every tile of a chunk has a share in its anchor); residual, hidden [L, T, F]; error [L, T, K]; terms: g, m and n.
    """

    q: torch.Tensor
    weights: tuple[torch.Tensor, ...]
    residual: torch.Tensor | None
    error: torch.Tensor | None
    hidden: torch.Tensor | None
    terms: Terms


def _settings(q: torch.Tensor, states: States, rule: MemoryRule, tiling: Tiling, read: str, kernel: str) -> dict[str, int | str | bool]:
    """Compile-time arguments of both kernels, and the check of what they take for granted."""
    hidden, width = states.weights[0].shape[-2:]
    assert q.is_contiguous() and q.shape[1:] == (tiling.tokens, width) and rule.num_layers == len(states.weights), (q.shape, tiling)
    assert all(w.is_contiguous() and w.dtype == q.dtype and w.shape[:2] == (q.shape[0], tiling.num_tiles + 1) for w in states.weights)
    return {
        "K": width, "F": hidden, "BLOCK_K": padded(width), "BLOCK_F": padded(hidden),
        "CHUNK": tiling.chunk, "TILE": tiling.tile, "PER_CHUNK": tiling.per_chunk,
        "CAUSAL": read == "causal", "PRECISION": "tf32x3" if q.dtype == torch.float32 else None,
        "num_warps": tuning(width=width, hidden=hidden).warps_of(kernel), "num_stages": 1,
    }  # fmt: skip


def _operands(states: States, signals: Signals, terms: Terms, read: str) -> tuple[torch.Tensor | None, ...]:
    """w2, w1, residual, error, hidden, g, m and n as the kernels take them."""
    weights = (*states.weights, None)[:2]
    if read == "anchor":
        return (*weights, *[None] * 6)
    given = (signals.residual, signals.error, signals.hidden, terms.g, terms.m, terms.n)
    assert all(t is None or t.is_contiguous() for t in given)
    return (*weights, *given)


def read_forward(
    q: torch.Tensor, states: States, signals: Signals, terms: Terms, *, rule: MemoryRule, tiling: Tiling, tiles: range, read: str
) -> torch.Tensor:
    """Read the memory for the tokens of `tiles`: y [L, T, K], the other tokens uninitialised. q [L, T, K] fp32 or bf16, y like it.

    states: weights [L, NT + 1, ...]; signals and terms as `memory_write` and `chunk_terms` leave them, not looked at with read = "anchor".
    """
    y = torch.empty_like(q)
    settings = _settings(q, states, rule, tiling, read, "read_forward")
    operands = _operands(states, signals, terms, read)
    _read_forward[(q.shape[0], len(tiles))](q, *operands, y, tiling.tokens, tiles.start, tiling.num_tiles, **settings)
    return y


def read_backward(
    d_y: torch.Tensor,
    q: torch.Tensor,
    states: States,
    signals: Signals,
    terms: Terms,
    *,
    rule: MemoryRule,
    tiling: Tiling,
    tiles: range,
    read: str,
) -> ReadGradients:
    """Gradients for the tokens of `tiles` from that of y, d_y [L, T, K] in the dtype of q; the other arguments as in `read_forward`."""
    assert d_y.is_contiguous() and d_y.shape == q.shape and d_y.dtype == q.dtype
    settings = _settings(q, states, rule, tiling, read, "read_backward")
    operands = _operands(states, signals, terms, read)
    room = lambda t: None if t is None else torch.empty_like(t, dtype=torch.float32)  # noqa: E731
    d_residual, d_error, d_hidden, d_g, d_m, d_n = (room(t) for t in operands[2:])
    d_weights = tuple(torch.empty(q.shape[0], tiling.num_tiles, *w.shape[2:], dtype=torch.float32, device=w.device) for w in states.weights)
    d_q, d_z = room(q), d_y
    grid, run = (q.shape[0], len(tiles)), (tiling.tokens, tiles.start, tiling.num_tiles)
    if rule.memory == "mlp":
        d_z = torch.empty(*q.shape[:2], states.weights[0].shape[2], dtype=q.dtype, device=q.device)
        _outer_backward[grid](d_y, q, *operands, d_z, d_weights[1], d_error, d_hidden, d_g, d_n, *run, **settings)
    w2, _, residual, _, _, g, m, _ = operands
    d_out = d_y if rule.memory == "mlp" else None
    _inner_backward[grid](d_z, d_out, q, w2, residual, g, m, d_q, d_weights[0], d_residual, d_g, d_m, *run, **settings)
    d_terms = Terms(g=d_g, g_prev=None, w=None, g_end=None, y=None, m=d_m, n=d_n)
    return ReadGradients(d_q, d_weights, d_residual, d_error, d_hidden, d_terms)
