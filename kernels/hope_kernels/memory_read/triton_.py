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

from hope_kernels.blocks_triton import load_features, load_matrix, load_scalars, store_features, store_matrix
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
def _silu_slope(x):
    """silu(x) and silu'(x)."""
    sigmoid = tl.sigmoid(x)
    hidden = x * sigmoid
    return hidden, sigmoid + hidden * (1 - sigmoid)


@triton.jit
def _inner(
    query, w2, s2, residual, delta, g, kappa, m, m_delta, slot, first, count,
    K: tl.constexpr, F: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_F: tl.constexpr, TILE: tl.constexpr, CAUSAL: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Product z = W_t q_t [F, C] of the first layer; the slot is that of the state at the tile's start, or of the anchor."""
    z = tl.dot(load_matrix(w2 + slot * F * K, F, K, BLOCK_F, BLOCK_K), query, input_precision=PRECISION)
    if CAUSAL:
        z = load_scalars(g, first, count, TILE)[None, :] * z
        if m is not None:
            written = load_features(residual, first, count, F, BLOCK_F, TILE)
            z -= tl.dot(written, load_features(m, first, count, TILE, TILE, TILE), input_precision=PRECISION)
        if s2 is not None:
            carried = tl.dot(load_matrix(s2 + slot * F * K, F, K, BLOCK_F, BLOCK_K), query, input_precision=PRECISION)
            z += load_scalars(kappa, first, count, TILE)[None, :] * carried
            written = load_features(delta, first, count, F, BLOCK_F, TILE)
            z -= tl.dot(written, load_features(m_delta, first, count, TILE, TILE, TILE), input_precision=PRECISION)
    return z


@triton.jit
def _read_forward(
    q, w2, w1, residual, error, hidden, g, m, n, s2, s1, delta, kappa, m_delta, out, tokens, first_tile, num_tiles,
    K: tl.constexpr, F: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_F: tl.constexpr, CHUNK: tl.constexpr, TILE: tl.constexpr,
    PER_CHUNK: tl.constexpr, CAUSAL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    row, tile = tl.program_id(0).to(tl.int64), first_tile + tl.program_id(1)
    anchor, start, count = _tile_tokens(tile, tokens, CHUNK, TILE, PER_CHUNK)
    first = row * tokens + start
    slot = row * (num_tiles + 1) + (tile if CAUSAL else anchor)
    query = load_features(q, first, count, K, BLOCK_K, TILE)
    z = _inner(query, w2, s2, residual, delta, g, kappa, m, m_delta, slot, first, count, K, F, BLOCK_K, BLOCK_F, TILE, CAUSAL, PRECISION)
    if w1 is None:
        store_features(out, z, first, count, K, BLOCK_K, TILE)
    else:
        h, _ = _silu_slope(z)
        kept = h
        y = query.to(tl.float32)
        if CAUSAL:
            seen = load_features(hidden, first, count, F, BLOCK_F, TILE)
            scores = tl.dot(tl.trans(seen), h.to(query.dtype), input_precision=PRECISION)
            scores = load_features(n, first, count, TILE, TILE, TILE).to(tl.float32) * scores
            y -= tl.dot(load_features(error, first, count, K, BLOCK_K, TILE), scores.to(query.dtype), input_precision=PRECISION)
            kept = load_scalars(g, first, count, TILE)[None, :] * h
            if s1 is not None:
                carried = (load_scalars(kappa, first, count, TILE)[None, :] * h).to(query.dtype)
                y += tl.dot(load_matrix(s1 + slot * K * F, K, F, BLOCK_K, BLOCK_F), carried, input_precision=PRECISION)
        weight = load_matrix(w1 + slot * K * F, K, F, BLOCK_K, BLOCK_F)
        y += tl.dot(weight, kept.to(query.dtype), input_precision=PRECISION)
        store_features(out, y, first, count, K, BLOCK_K, TILE)


@triton.jit
def _kept_backward(
    upstream, h, weights, factor, d_weights, d_factor, slot, into, first, count,
    K: tl.constexpr, F: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_F: tl.constexpr, TILE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Backward of factor_t W h_t, W [K, F] of a slot: stores the gradients of W and of the factor, returns that of h [F, C].

    factor is None for 1.
    """
    kept = h
    if factor is not None:
        by_token = load_scalars(factor, first, count, TILE)[None, :]
        kept = (by_token * h.to(tl.float32)).to(h.dtype)
    store_matrix(d_weights + into * K * F, tl.dot(upstream, tl.trans(kept), input_precision=PRECISION), K, F, BLOCK_K, BLOCK_F)
    weight = load_matrix(weights + slot * K * F, K, F, BLOCK_K, BLOCK_F)
    d_h = tl.dot(tl.trans(weight), upstream, input_precision=PRECISION)
    if factor is not None:
        token = tl.arange(0, TILE)
        tl.store(d_factor + first + token, tl.sum(d_h * h.to(tl.float32), 0), mask=token < count)
        d_h = by_token * d_h
    return d_h


@triton.jit
def _outer_backward(
    d_out, q, w2, w1, residual, error, hidden, g, m, n, s2, s1, delta, kappa, m_delta,
    d_z, d_w1, d_error, d_hidden, d_g, d_n, d_s1, d_kappa, tokens, first_tile, num_tiles,
    K: tl.constexpr, F: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_F: tl.constexpr, CHUNK: tl.constexpr, TILE: tl.constexpr,
    PER_CHUNK: tl.constexpr, CAUSAL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Of an MLP memory: from the gradient of the output to that of z = W2_t q_t. d_g and d_kappa get the second layer's share.

    silu'(z) waits in d_z: with it the registers would not hold what comes between.
    """
    row, tile = tl.program_id(0).to(tl.int64), first_tile + tl.program_id(1)
    anchor, start, count = _tile_tokens(tile, tokens, CHUNK, TILE, PER_CHUNK)
    first = row * tokens + start
    slot, into = row * (num_tiles + 1) + (tile if CAUSAL else anchor), row * num_tiles + tile
    query = load_features(q, first, count, K, BLOCK_K, TILE)
    upstream = load_features(d_out, first, count, K, BLOCK_K, TILE)
    z = _inner(query, w2, s2, residual, delta, g, kappa, m, m_delta, slot, first, count, K, F, BLOCK_K, BLOCK_F, TILE, CAUSAL, PRECISION)
    h, slope = _silu_slope(z)
    h = h.to(query.dtype)
    if CAUSAL:
        store_features(d_z, slope, first, count, F, BLOCK_F, TILE)
        seen = load_features(hidden, first, count, F, BLOCK_F, TILE)
        scores = tl.dot(tl.trans(seen), h, input_precision=PRECISION)
        errors = load_features(error, first, count, K, BLOCK_K, TILE)
        d_inside = -tl.dot(tl.trans(errors), upstream, input_precision=PRECISION)
        store_features(d_n, d_inside * scores, first, count, TILE, TILE, TILE)
        inside = load_features(n, first, count, TILE, TILE, TILE).to(tl.float32)
        mixed, d_scores = (inside * scores).to(query.dtype), (inside * d_inside).to(query.dtype)
        d_errors = -tl.dot(upstream, tl.trans(mixed), input_precision=PRECISION)
        store_features(d_error, d_errors, first, count, K, BLOCK_K, TILE)
        store_features(d_hidden, tl.dot(h, tl.trans(d_scores), input_precision=PRECISION), first, count, F, BLOCK_F, TILE)
    d_h = _kept_backward(upstream, h, w1, g, d_w1, d_g, slot, into, first, count, K, F, BLOCK_K, BLOCK_F, TILE, PRECISION)
    if CAUSAL:
        if s1 is not None:
            d_h += _kept_backward(upstream, h, s1, kappa, d_s1, d_kappa, slot, into, first, count, K, F, BLOCK_K, BLOCK_F, TILE, PRECISION)
        d_h = tl.dot(seen, d_scores, d_h, input_precision=PRECISION)
        tl.debug_barrier()
        slope = load_features(d_z, first, count, F, BLOCK_F, TILE).to(tl.float32)
        tl.debug_barrier()
    store_features(d_z, d_h * slope, first, count, F, BLOCK_F, TILE)


@triton.jit
def _inner_backward(
    d_z, d_rest, q, weights, written, factor, mixing, d_q, d_weights, d_written, d_factor, d_mixing, tokens, first_tile, num_tiles,
    K: tl.constexpr, F: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_F: tl.constexpr, CHUNK: tl.constexpr, TILE: tl.constexpr,
    PER_CHUNK: tl.constexpr, CAUSAL: tl.constexpr, ADDS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Backward of factor_t W q_t - (mixing written)_t from the gradient of z, for W2 or, in a launch of its own, for S2.

    d_rest [L, T, K] is added to d_q, or None; d_factor is added to what is there where it ADDS. mixing is None for what was not written,
    factor for 1.
    """
    row, tile = tl.program_id(0).to(tl.int64), first_tile + tl.program_id(1)
    anchor, start, count = _tile_tokens(tile, tokens, CHUNK, TILE, PER_CHUNK)
    first = row * tokens + start
    slot, into = row * (num_tiles + 1) + (tile if CAUSAL else anchor), row * num_tiles + tile
    query = load_features(q, first, count, K, BLOCK_K, TILE)
    upstream = load_features(d_z, first, count, F, BLOCK_F, TILE)
    weight = load_matrix(weights + slot * F * K, F, K, BLOCK_F, BLOCK_K)
    if mixing is not None:
        square = load_features(mixing, first, count, TILE, TILE, TILE)
        store_features(d_written, -tl.dot(upstream, tl.trans(square), input_precision=PRECISION), first, count, F, BLOCK_F, TILE)
        block = load_features(written, first, count, F, BLOCK_F, TILE)
        store_features(d_mixing, -tl.dot(tl.trans(block), upstream, input_precision=PRECISION), first, count, TILE, TILE, TILE)
    if factor is not None:
        by_token = tl.sum(upstream.to(tl.float32) * tl.dot(weight, query, input_precision=PRECISION), 0)
        if ADDS:
            by_token += load_scalars(d_factor, first, count, TILE)
            tl.debug_barrier()
        token = tl.arange(0, TILE)
        tl.store(d_factor + first + token, by_token, mask=token < count)
        upstream = (upstream.to(tl.float32) * load_scalars(factor, first, count, TILE)[None, :]).to(query.dtype)
    d_weight = tl.dot(upstream, tl.trans(query), input_precision=PRECISION)
    store_matrix(d_weights + into * F * K, d_weight, F, K, BLOCK_F, BLOCK_K)
    d_query = tl.dot(tl.trans(weight), upstream, input_precision=PRECISION)
    if d_rest is not None:
        d_query += load_features(d_rest, first, count, K, BLOCK_K, TILE).to(tl.float32)
        tl.debug_barrier()  # d_rest may be d_q
    store_features(d_q, d_query, first, count, K, BLOCK_K, TILE)


class Momentum(NamedTuple):
    """What momentum adds to a causal read: z += kappa (q S2^T) - m_delta delta and y += kappa h S1^T; the residual is without delta then.

    slots: (S2 [L, NT + 1, F, K], S1 [L, NT + 1, K, F]) or (S [L, NT + 1, K, K],); delta [L, T, F]; kappa [L, T] fp32; m_delta [L, T, TILE];
    the rest in the dtype of q. As gradients all are fp32, slots [L, NT, ...].
    """

    slots: tuple[torch.Tensor, ...]
    delta: torch.Tensor
    kappa: torch.Tensor
    m_delta: torch.Tensor


class ReadGradients(NamedTuple):
    """Gradients of what a read used, fp32; None where it does not use it.

    q [L, T, K]; weights: of the state that each tile was read with, W2 [L, NT, F, K] and W1 [L, NT, K, F] or W alone (with
    read = "anchor" every tile of a chunk has a share in its anchor); residual, hidden [L, T, F]; error [L, T, K]; terms: g, m and n.
    momentum: None without.
    """

    q: torch.Tensor
    weights: tuple[torch.Tensor, ...]
    residual: torch.Tensor | None
    error: torch.Tensor | None
    hidden: torch.Tensor | None
    terms: Terms
    momentum: Momentum | None


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


def _operands(
    states: States, signals: Signals, terms: Terms, momentum: Momentum | None, read: str
) -> tuple[tuple[torch.Tensor | None, ...], tuple[torch.Tensor | None, ...]]:
    """(w2, w1, residual, error, hidden, g, m, n) and (s2, s1, delta, kappa, m_delta) as the kernels take them."""
    weights = (*states.weights, None)[:2]
    if read == "anchor":
        return (*weights, *[None] * 6), (None,) * 5
    n = None if len(states.weights) == 1 else terms.n
    given = (*weights, signals.residual, signals.error, signals.hidden, terms.g, terms.m, n)
    more = (None,) * 5 if momentum is None else (*(*momentum.slots, None)[:2], *momentum[1:])
    assert all(t is None or t.is_contiguous() for t in (*given, *more))
    return given, more


def read_forward(
    q: torch.Tensor,
    states: States,
    signals: Signals,
    terms: Terms,
    *,
    rule: MemoryRule,
    tiling: Tiling,
    tiles: range,
    read: str,
    momentum: Momentum | None = None,
) -> torch.Tensor:
    """Read the memory for the tokens of `tiles`: y [L, T, K], the other tokens uninitialised. q [L, T, K] fp32 or bf16, y like it.

    states: weights [L, NT + 1, ...]; signals and terms as `memory_write` and `chunk_terms` leave them, not looked at with read = "anchor".
    With momentum and no erase, m and residual may be None.
    """
    y = torch.empty_like(q)
    settings = _settings(q, states, rule, tiling, read, "read_forward")
    operands, more = _operands(states, signals, terms, momentum, read)
    _read_forward[(q.shape[0], len(tiles))](q, *operands, *more, y, tiling.tokens, tiles.start, tiling.num_tiles, **settings)
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
    momentum: Momentum | None = None,
) -> ReadGradients:
    """Gradients for the tokens of `tiles` from that of y, d_y [L, T, K] in the dtype of q; the other arguments as in `read_forward`."""
    assert d_y.is_contiguous() and d_y.shape == q.shape and d_y.dtype == q.dtype
    settings = _settings(q, states, rule, tiling, read, "read_backward")
    operands, more = _operands(states, signals, terms, momentum, read)
    w2, w1, residual, error, hidden, g, m, n = operands
    s2, s1, delta, kappa, m_delta = more
    d_q, d_residual, d_error, d_hidden, d_g, d_m, d_n, d_delta, d_kappa, d_m_delta = (
        None if t is None else torch.empty_like(t, dtype=torch.float32) for t in (q, *operands[2:], *more[2:])
    )
    d_w2, d_w1, d_s2, d_s1 = (
        None if w is None else torch.empty(q.shape[0], tiling.num_tiles, *w.shape[2:], dtype=torch.float32, device=w.device)
        for w in (w2, w1, s2, s1)
    )
    d_z, d_rest = d_y, None
    grid, run = (q.shape[0], len(tiles)), (tiling.tokens, tiles.start, tiling.num_tiles)
    if rule.memory == "mlp":
        d_z, d_rest = torch.empty(*q.shape[:2], w2.shape[2], dtype=q.dtype, device=q.device), d_y
        _outer_backward[grid](d_y, q, *operands, *more, d_z, d_w1, d_error, d_hidden, d_g, d_n, d_s1, d_kappa, *run, **settings)
    settings["ADDS"] = rule.memory == "mlp"
    _inner_backward[grid](d_z, d_rest, q, w2, residual, g, m, d_q, d_w2, d_residual, d_g, d_m, *run, **settings)
    if s2 is not None:
        _inner_backward[grid](d_z, d_q, q, s2, delta, kappa, m_delta, d_q, d_s2, d_delta, d_kappa, d_m_delta, *run, **settings)
    d_terms = Terms(g=d_g, g_prev=None, w=None, g_end=None, y=None, m=d_m, n=d_n)
    layers = rule.num_layers
    d_momentum = None if s2 is None else Momentum((d_s2, d_s1)[:layers], d_delta, d_kappa, d_m_delta)
    return ReadGradients(d_q, (d_w2, d_w1)[:layers], d_residual, d_error, d_hidden, d_terms, d_momentum)
