"""Reads of MLP and linear memories as Triton kernels: one program a row and tile, forward or backward.

`read_forward` takes the states at the tiles' starts and the signals that `memory_write` left, and the terms of the tiles; causal reads see
the writes up to and including their own token, anchor reads the state at the start of their chunk. The mathematics is that of `fused.py`;
README.md has it in the layout of the kernels.

Legend: L = B * H rows, T tokens, C tokens of a tile, NT tiles, K head width, F hidden width (K for a linear memory). As in
`memory_write`, token blocks are held features first, [K, C] and [F, C]; squares are [s, t], the token written before the token that reads.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from hope_kernels.chunk_terms.triton_ import Terms
from hope_kernels.memory_write.triton_ import (
    Signals,
    States,
    _load_matrix,
    _load_scalars,
    _load_tokens,
    _silu_slope,
    _store_matrix,
    _store_scalars,
    _store_tokens,
    _tile_rows,
)
from hope_kernels.rule import MemoryRule
from hope_kernels.tiling import Tiling
from hope_kernels.tuning import padded, tuning


@triton.jit
def _inner(
    query, weight, residual, g, m, first, rows,
    OUT: tl.constexpr, BLOCK_OUT: tl.constexpr, TILE: tl.constexpr, CAUSAL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """W_t q_t [OUT, C] of the first layer, and W q with the weight itself (the state at the tile's start, or the anchor)."""
    pre = tl.dot(weight.to(query.dtype), query, input_precision=PRECISION)
    z = pre
    if CAUSAL:
        written = _load_tokens(residual, first, rows, OUT, BLOCK_OUT, TILE)
        mixing = _load_tokens(m, first, rows, TILE, TILE, TILE)
        z = _load_scalars(g, first, rows, TILE)[None, :] * pre - tl.dot(written, mixing, input_precision=PRECISION)
    return z, pre


@triton.jit
def _read_forward(
    q, w2, w1, residual, error, hidden, g, m, n, out, tokens, first_tile, num_tiles,
    K: tl.constexpr, F: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_F: tl.constexpr, CHUNK: tl.constexpr, TILE: tl.constexpr,
    PER_CHUNK: tl.constexpr, LINEAR: tl.constexpr, CAUSAL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    row, tile = tl.program_id(0).to(tl.int64), first_tile + tl.program_id(1)
    _, anchor, start, rows, _ = _tile_rows(tile, tokens, CHUNK, TILE, PER_CHUNK)
    first = row * tokens + start
    slot = row * (num_tiles + 1) + (tile if CAUSAL else anchor)
    query = _load_tokens(q, first, rows, K, BLOCK_K, TILE)
    weight = _load_matrix(w2 + slot * F * K, F, K, BLOCK_F, BLOCK_K)
    z, _ = _inner(query, weight, residual, g, m, first, rows, F, BLOCK_F, TILE, CAUSAL, PRECISION)
    if LINEAR:
        _store_tokens(out, z, first, rows, K, BLOCK_K, TILE)
    else:
        h, _ = _silu_slope(z)
        kept = h
        y = query.to(tl.float32)
        if CAUSAL:
            seen = _load_tokens(hidden, first, rows, F, BLOCK_F, TILE)
            scores = tl.dot(tl.trans(seen), h.to(query.dtype), input_precision=PRECISION)
            scores = _load_tokens(n, first, rows, TILE, TILE, TILE).to(tl.float32) * scores
            y -= tl.dot(_load_tokens(error, first, rows, K, BLOCK_K, TILE), scores.to(query.dtype), input_precision=PRECISION)
            kept = _load_scalars(g, first, rows, TILE)[None, :] * h
        weight = _load_matrix(w1 + slot * K * F, K, F, BLOCK_K, BLOCK_F).to(query.dtype)
        y += tl.dot(weight, kept.to(query.dtype), input_precision=PRECISION)
        _store_tokens(out, y, first, rows, K, BLOCK_K, TILE)


@triton.jit
def _read_backward(
    d_out, q, w2, w1, residual, error, hidden, g, m, n,
    d_q, d_w2, d_w1, d_residual, d_error, d_hidden, d_g, d_m, d_n, tokens, first_tile, num_tiles,
    K: tl.constexpr, F: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_F: tl.constexpr, CHUNK: tl.constexpr, TILE: tl.constexpr,
    PER_CHUNK: tl.constexpr, LINEAR: tl.constexpr, CAUSAL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    row, tile = tl.program_id(0).to(tl.int64), first_tile + tl.program_id(1)
    _, anchor, start, rows, _ = _tile_rows(tile, tokens, CHUNK, TILE, PER_CHUNK)
    first = row * tokens + start
    slot, into = row * (num_tiles + 1) + (tile if CAUSAL else anchor), row * num_tiles + tile
    query = _load_tokens(q, first, rows, K, BLOCK_K, TILE)
    upstream = _load_tokens(d_out, first, rows, K, BLOCK_K, TILE)
    weight = _load_matrix(w2 + slot * F * K, F, K, BLOCK_F, BLOCK_K)
    z, pre = _inner(query, weight, residual, g, m, first, rows, F, BLOCK_F, TILE, CAUSAL, PRECISION)
    if CAUSAL:
        decay = _load_scalars(g, first, rows, TILE)
    if LINEAR:
        d_z = upstream.to(tl.float32)
        d_query = tl.zeros((BLOCK_K, TILE), tl.float32)
        if CAUSAL:
            d_decay = tl.zeros((TILE,), tl.float32)
    else:
        h, slope = _silu_slope(z)
        kept = h
        if CAUSAL:
            kept = decay[None, :] * h
        d_outer = tl.dot(upstream, tl.trans(kept.to(query.dtype)), input_precision=PRECISION)
        _store_matrix(d_w1 + into * K * F, d_outer, K, F, BLOCK_K, BLOCK_F)
        outer = _load_matrix(w1 + slot * K * F, K, F, BLOCK_K, BLOCK_F).to(query.dtype)
        d_h = tl.dot(tl.trans(outer), upstream, input_precision=PRECISION)
        if CAUSAL:
            d_decay = tl.sum(d_h * h, 0)
            d_h = decay[None, :] * d_h
            h = h.to(query.dtype)
            seen = _load_tokens(hidden, first, rows, F, BLOCK_F, TILE)
            inside = _load_tokens(n, first, rows, TILE, TILE, TILE).to(tl.float32)
            scores = tl.dot(tl.trans(seen), h, input_precision=PRECISION)
            errors = _load_tokens(error, first, rows, K, BLOCK_K, TILE)
            d_inner = -tl.dot(tl.trans(errors), upstream, input_precision=PRECISION)
            mixed = (inside * scores).to(query.dtype)
            d_errors = -tl.dot(upstream, tl.trans(mixed), input_precision=PRECISION)
            _store_tokens(d_error, d_errors, first, rows, K, BLOCK_K, TILE)
            _store_tokens(d_n, d_inner * scores, first, rows, TILE, TILE, TILE)
            d_scores = (d_inner * inside).to(query.dtype)
            _store_tokens(d_hidden, tl.dot(h, tl.trans(d_scores), input_precision=PRECISION), first, rows, F, BLOCK_F, TILE)
            d_h += tl.dot(seen, d_scores, input_precision=PRECISION)
        d_z = d_h * slope
        d_query = upstream.to(tl.float32)
    d_pre = d_z
    if CAUSAL:
        d_pre = decay[None, :] * d_z
        _store_scalars(d_g, d_decay + tl.sum(d_z * pre, 0), first, rows, TILE)
        d_z = d_z.to(query.dtype)
        mixing = _load_tokens(m, first, rows, TILE, TILE, TILE)
        written = _load_tokens(residual, first, rows, F, BLOCK_F, TILE)
        _store_tokens(d_residual, -tl.dot(d_z, tl.trans(mixing), input_precision=PRECISION), first, rows, F, BLOCK_F, TILE)
        _store_tokens(d_m, -tl.dot(tl.trans(written), d_z, input_precision=PRECISION), first, rows, TILE, TILE, TILE)
    d_pre = d_pre.to(query.dtype)
    d_inner_weight = tl.dot(d_pre, tl.trans(query), input_precision=PRECISION)
    _store_matrix(d_w2 + into * F * K, d_inner_weight, F, K, BLOCK_F, BLOCK_K)
    weight = _load_matrix(w2 + slot * F * K, F, K, BLOCK_F, BLOCK_K).to(query.dtype)
    d_query += tl.dot(tl.trans(weight), d_pre, input_precision=PRECISION)
    _store_tokens(d_q, d_query, first, rows, K, BLOCK_K, TILE)


class ReadGradients(NamedTuple):
    """Gradients of what a read used, fp32; None where it does not use it.

    q [L, T, K]; states: of the state each tile was read with, weights [L, NT, ...] (with read = "anchor" several tiles of a chunk have a
    share in one anchor); residual, hidden [L, T, F]; error [L, T, K]; terms: g, m and n.
    """

    q: torch.Tensor
    states: States
    residual: torch.Tensor | None
    error: torch.Tensor | None
    hidden: torch.Tensor | None
    terms: Terms


def _settings(q: torch.Tensor, states: States, rule: MemoryRule, tiling: Tiling, read: str, kernel: str) -> dict[str, int | str | bool]:
    """Compile-time arguments of both kernels, and the check of what they take for granted."""
    hidden, width = states.weights[0].shape[-2:]
    assert q.is_contiguous() and q.shape[1:] == (tiling.tokens, width) and rule.num_layers == len(states.weights), (q.shape, tiling)
    assert all(w.is_contiguous() and w.dtype == torch.float32 and w.shape[:2] == (q.shape[0], tiling.num_tiles + 1) for w in states.weights)
    return {
        "K": width, "F": hidden, "BLOCK_K": padded(width), "BLOCK_F": padded(hidden),
        "CHUNK": tiling.chunk, "TILE": tiling.tile, "PER_CHUNK": tiling.per_chunk,
        "LINEAR": rule.memory == "linear", "CAUSAL": read == "causal", "PRECISION": "tf32x3" if q.dtype == torch.float32 else None,
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
    d_weights = tuple(torch.empty(q.shape[0], tiling.num_tiles, *w.shape[2:], device=w.device) for w in states.weights)
    d_q = room(q)
    _read_backward[(q.shape[0], len(tiles))](
        d_y, q, *operands, d_q, *(*d_weights, None)[:2], d_residual, d_error, d_hidden, d_g, d_m, d_n,
        tiling.tokens, tiles.start, tiling.num_tiles, **settings,
    )  # fmt: skip
    d_terms = Terms(g=d_g, g_prev=None, w=None, g_end=None, y=None, m=d_m, n=d_n)
    return ReadGradients(d_q, States(d_weights), d_residual, d_error, d_hidden, d_terms)
