"""The writes of MLP and linear memories as Triton kernels: one program walks one memory through its tiles, forward or backward.

`write_forward` takes the terms of every tile (what keys and gates do to any memory) and leaves the state at every tile's start and the
error signals behind, which the reads need; `write_backward` walks the tiles in reverse. The mathematics is that of `fused.py`; README.md
has the derivation and the layout.

Legend: R = L * S memories (L rows of S memories that share k, v and the terms), T tokens, C tokens of a tile, N chunks, NT tiles,
K head width, F hidden width (K for a linear memory). Inside the kernels token blocks are held features first, [K, C] and [F, C]: the
rows of every product are features then, as many as a matrix instruction wants however short the tile is.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from hope_kernels.memory import L2_EPS
from hope_kernels.rule import MemoryRule
from hope_kernels.tiling import Tiling
from hope_kernels.tuning import padded, tuning

UNIT_EPS: tl.constexpr = tl.constexpr(L2_EPS)


@dataclass(frozen=True)
class States:
    """States of R memories, fp32.

    weights: (W2 [R, ..., F, K], W1 [R, ..., K, F]) or (W [R, ..., K, K],). "..." is one slot a tile and one more for the end, NT + 1 (slot i
    is the state at the start of tile i, after a document's reset), or nothing for a single state.
    """

    weights: tuple[torch.Tensor, ...]

    @staticmethod
    def empty(rule: MemoryRule, *lead: int, width: int, hidden: int, device: torch.device) -> "States":
        """Uninitialised states with leading dimensions `lead` of memories with K = width and F = hidden."""
        shapes = [(hidden, width), (width, hidden)] if rule.memory == "mlp" else [(width, width)]
        return States(tuple(torch.empty(*lead, *shape, dtype=torch.float32, device=device) for shape in shapes))


@dataclass(frozen=True)
class Signals:
    """What the writes of R memories leave for the reads and for backward, in the dtype of the keys.

    residual [R, T, F]: g_prev * (W2 k) + delta with the current W2 (delta alone where the rule does not erase). error [R, T, K] and
    hidden [R, T, F]: bounded error and silu(W2 k) at the anchor. scale [R, T] fp32: factor that bounded the error. A linear memory has
    only the residual.
    """

    residual: torch.Tensor
    error: torch.Tensor | None = None
    hidden: torch.Tensor | None = None
    scale: torch.Tensor | None = None

    @staticmethod
    def empty(
        rule: MemoryRule, memories: int, tokens: int, *, width: int, hidden: int, dtype: torch.dtype, device: torch.device
    ) -> "Signals":
        """Uninitialised signals of `memories` memories with K = width and F = hidden."""
        shape = (memories, tokens)
        if rule.memory == "linear":
            return Signals(torch.empty(*shape, width, dtype=dtype, device=device))
        residual, inner = (torch.empty(*shape, hidden, dtype=dtype, device=device) for _ in range(2))
        error = torch.empty(*shape, width, dtype=dtype, device=device)
        return Signals(residual, error, inner, torch.empty(shape, dtype=torch.float32, device=device))


@triton.jit
def _tile_rows(i, tokens, CHUNK: tl.constexpr, TILE: tl.constexpr, PER_CHUNK: tl.constexpr):
    """Of tile i: its chunk, the anchor's slot, its first token, its number of tokens, and whether it is the last of its chunk."""
    chunk = i // PER_CHUNK
    first = chunk * CHUNK + (i % PER_CHUNK) * TILE
    left = tl.minimum(chunk * CHUNK + CHUNK, tokens) - first
    return chunk, chunk * PER_CHUNK, first, tl.minimum(left, TILE), left <= TILE


@triton.jit
def _token_block(first, rows, WIDTH: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr):
    """Offsets and mask of [BLOCK, TILE], features first, in a tensor [..., WIDTH] from token `first` (int64, of all rows) on."""
    feature, token = tl.arange(0, BLOCK)[:, None], tl.arange(0, TILE)[None, :]
    mask = token < rows
    if WIDTH != BLOCK:
        mask = mask & (feature < WIDTH)
    return first * WIDTH + token * WIDTH + feature, mask


@triton.jit
def _load_tokens(pointer, first, rows, WIDTH: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr):
    """[BLOCK, TILE] of a tensor [..., WIDTH]; zero beyond the tile's tokens."""
    offset, mask = _token_block(first, rows, WIDTH, BLOCK, TILE)
    return tl.load(pointer + offset, mask=mask, other=0.0)


@triton.jit
def _store_tokens(pointer, value, first, rows, WIDTH: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr):
    """Store [BLOCK, TILE] to a tensor [..., WIDTH], in its dtype."""
    offset, mask = _token_block(first, rows, WIDTH, BLOCK, TILE)
    tl.store(pointer + offset, value.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def _load_scalars(pointer, first, rows, TILE: tl.constexpr):
    """[TILE] of a tensor [...] of one fp32 number a token; zero beyond the tile's tokens."""
    token = tl.arange(0, TILE)
    return tl.load(pointer + first + token, mask=token < rows, other=0.0)


@triton.jit
def _store_scalars(pointer, value, first, rows, TILE: tl.constexpr):
    token = tl.arange(0, TILE)
    tl.store(pointer + first + token, value, mask=token < rows)


@triton.jit
def _matrix(ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr):
    """Offsets and mask (of the padding) of a matrix [ROWS, COLUMNS] in a block of powers of two."""
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
def _bounded(x, inverse_square, HUBER: tl.constexpr):
    """x / sqrt(1 + |x|^2 / d^2) of every token [I, C] and the factor [C]; inverse_square = 1 / d^2."""
    if HUBER:
        scale = tl.rsqrt(1 + tl.sum(x * x, 0) * inverse_square)
        return x * scale[None, :], scale
    else:
        return x, tl.full((x.shape[1],), 1.0, tl.float32)


@triton.jit
def _unit(x):
    """Unit length of every token [I, C] (`memory.l2norm`) and the factor [C]."""
    scale = tl.rsqrt(tl.sum(x * x, 0) + UNIT_EPS)
    return x * scale[None, :], scale


@triton.jit
def _unit_target(v, hidden_v, a1, PRECISION: tl.constexpr):
    """Unit-length target [K, C] and its factor [C] from v and silu(W2 v), or from v alone where that is None."""
    target = v.to(tl.float32)
    if hidden_v is not None:
        target += tl.dot(a1, hidden_v.to(v.dtype), input_precision=PRECISION)
    return _unit(target)


@triton.jit
def _mlp_error(
    k, v, pre, a2, a1, inverse_square, HUBER: tl.constexpr, NORMALIZE: tl.constexpr, SELF_TARGET: tl.constexpr, PRECISION: tl.constexpr
):
    """hidden [F, C], the bounded error of M(k) [K, C] and its factor [C] at the anchors a2, a1; pre = a2 k.

    M(k) - M(v) = k - v + W1 (silu(W2 k) - silu(W2 v)): one product with W1, unless the target is made unit length first.
    """
    hidden, _ = _silu_slope(pre)
    inner = hidden
    hidden_v = None
    if SELF_TARGET:
        hidden_v, _ = _silu_slope(tl.dot(a2, v, input_precision=PRECISION))
    if NORMALIZE:
        target, _ = _unit_target(v, hidden_v, a1, PRECISION)
    else:
        target = v.to(tl.float32)
        if SELF_TARGET:
            inner -= hidden_v
    error = tl.dot(a1, inner.to(k.dtype), input_precision=PRECISION) + k.to(tl.float32) - target
    error, scale = _bounded(error, inverse_square, HUBER)
    return hidden, error, scale


@triton.jit
def _linear_error(
    pre, v, a, inverse_square, HUBER: tl.constexpr, NORMALIZE: tl.constexpr, SELF_TARGET: tl.constexpr, PRECISION: tl.constexpr
):
    """The bounded error of W k [K, C] and its factor, the target and its factor, at the anchor a; pre = a k."""
    target = v.to(tl.float32)
    if SELF_TARGET:
        target = tl.dot(a, v, input_precision=PRECISION)
    target_scale = None
    if NORMALIZE:
        target, target_scale = _unit(target)
    error, scale = _bounded(pre - target, inverse_square, HUBER)
    return error, scale, target, target_scale


@triton.jit
def _mlp_forward(
    k_ptr, v_ptr, y_ptr, w_ptr, g_prev_ptr, g_end_ptr, commit_ptr, reset_ptr, start_w2_ptr, start_w1_ptr,
    w2_ptr, w1_ptr, residual_ptr, error_ptr, hidden_ptr, scale_ptr,
    tokens, num_tiles, num_chunks, memories_per_row, first_tile, end_tile, inverse_square,
    K: tl.constexpr, F: tl.constexpr, BK: tl.constexpr, BF: tl.constexpr,
    CHUNK: tl.constexpr, TILE: tl.constexpr, PER_CHUNK: tl.constexpr,
    HUBER: tl.constexpr, ERASE: tl.constexpr, NORMALIZE: tl.constexpr, SELF_TARGET: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The tiles first_tile .. end_tile of one MLP memory: signals, and the state after each tile in the next slot."""
    memory = tl.program_id(0).to(tl.int64)
    row = memory // memories_per_row
    dtype = k_ptr.dtype.element_ty
    w2_ptr += memory * (num_tiles + 1) * (F * K)
    w1_ptr += memory * (num_tiles + 1) * (F * K)
    for i in tl.range(first_tile, end_tile, num_stages=1):
        chunk, anchor, first, rows, is_last = _tile_rows(i, tokens, CHUNK, TILE, PER_CHUNK)
        here, there = row * tokens + first, memory * tokens + first  # of what the memories share, and of their own
        slot = tl.cast(i, tl.int64) * (F * K)
        anchor_slot = tl.cast(anchor, tl.int64) * (F * K)
        if reset_ptr is not None:
            if i == anchor:
                if tl.load(reset_ptr + row * num_chunks + chunk) != 0:
                    _store_matrix(w2_ptr + slot, _load_matrix(start_w2_ptr + memory * (F * K), F, K, BF, BK), F, K, BF, BK)
                    _store_matrix(w1_ptr + slot, _load_matrix(start_w1_ptr + memory * (F * K), K, F, BK, BF), K, F, BK, BF)
            tl.debug_barrier()
        k = _load_tokens(k_ptr, here, rows, K, BK, TILE)
        a2 = _load_matrix(w2_ptr + anchor_slot, F, K, BF, BK).to(dtype)
        pre = tl.dot(a2, k, input_precision=PRECISION)
        a1 = _load_matrix(w1_ptr + anchor_slot, K, F, BK, BF).to(dtype)
        v = _load_tokens(v_ptr, here, rows, K, BK, TILE)
        hidden, error, scale = _mlp_error(k, v, pre, a2, a1, inverse_square, HUBER, NORMALIZE, SELF_TARGET, PRECISION)
        _store_tokens(hidden_ptr, hidden, there, rows, F, BF, TILE)
        _store_tokens(error_ptr, error, there, rows, K, BK, TILE)
        _store_scalars(scale_ptr, scale, there, rows, TILE)
        back = tl.dot(tl.trans(a1), error.to(dtype), input_precision=PRECISION)
        residual, _ = _bounded(back * _silu_slope(pre)[1], inverse_square, HUBER)
        if ERASE:
            current = pre
            if PER_CHUNK > 1:
                current = tl.dot(_load_matrix(w2_ptr + slot, F, K, BF, BK).to(dtype), k, input_precision=PRECISION)
            residual += current * _load_scalars(g_prev_ptr, here, rows, TILE)[None, :]
        residual = residual.to(dtype)
        _store_tokens(residual_ptr, residual, there, rows, F, BF, TILE)
        g_end = tl.load(g_end_ptr + row * num_tiles + i)
        y = _load_tokens(y_ptr, here, rows, K, BK, TILE)
        w2 = _load_matrix(w2_ptr + slot, F, K, BF, BK) * g_end - tl.dot(residual, tl.trans(y), input_precision=PRECISION)
        _store_matrix(w2_ptr + slot + F * K, w2, F, K, BF, BK)
        paced = (error * _load_scalars(w_ptr, here, rows, TILE)[None, :]).to(dtype)
        w1 = _load_matrix(w1_ptr + slot, K, F, BK, BF) * g_end - tl.dot(paced, tl.trans(hidden.to(dtype)), input_precision=PRECISION)
        _store_matrix(w1_ptr + slot + F * K, w1, K, F, BK, BF)
        tl.debug_barrier()
        if commit_ptr is not None:
            if is_last:
                if tl.load(commit_ptr + row * num_chunks + chunk) == 0:
                    _store_matrix(w2_ptr + slot + F * K, _load_matrix(w2_ptr + anchor_slot, F, K, BF, BK), F, K, BF, BK)
                    _store_matrix(w1_ptr + slot + F * K, _load_matrix(w1_ptr + anchor_slot, K, F, BK, BF), K, F, BK, BF)
            tl.debug_barrier()


@triton.jit
def _linear_forward(
    k_ptr, v_ptr, y_ptr, g_prev_ptr, g_end_ptr, commit_ptr, reset_ptr, start_ptr, w_ptr, residual_ptr,
    tokens, num_tiles, num_chunks, memories_per_row, first_tile, end_tile, inverse_square,
    K: tl.constexpr, BK: tl.constexpr, CHUNK: tl.constexpr, TILE: tl.constexpr, PER_CHUNK: tl.constexpr,
    HUBER: tl.constexpr, ERASE: tl.constexpr, NORMALIZE: tl.constexpr, SELF_TARGET: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The same for one linear memory."""
    memory = tl.program_id(0).to(tl.int64)
    row = memory // memories_per_row
    dtype = k_ptr.dtype.element_ty
    w_ptr += memory * (num_tiles + 1) * (K * K)
    for i in tl.range(first_tile, end_tile, num_stages=1):
        chunk, anchor, first, rows, is_last = _tile_rows(i, tokens, CHUNK, TILE, PER_CHUNK)
        here = row * tokens + first
        slot = tl.cast(i, tl.int64) * (K * K)
        anchor_slot = tl.cast(anchor, tl.int64) * (K * K)
        if reset_ptr is not None:
            if i == anchor:
                if tl.load(reset_ptr + row * num_chunks + chunk) != 0:
                    _store_matrix(w_ptr + slot, _load_matrix(start_ptr + memory * (K * K), K, K, BK, BK), K, K, BK, BK)
            tl.debug_barrier()
        k = _load_tokens(k_ptr, here, rows, K, BK, TILE)
        v = _load_tokens(v_ptr, here, rows, K, BK, TILE)
        a = _load_matrix(w_ptr + anchor_slot, K, K, BK, BK).to(dtype)
        pre = tl.dot(a, k, input_precision=PRECISION)
        residual, _, _, _ = _linear_error(pre, v, a, inverse_square, HUBER, NORMALIZE, SELF_TARGET, PRECISION)
        if ERASE:
            current = pre
            if PER_CHUNK > 1:
                current = tl.dot(_load_matrix(w_ptr + slot, K, K, BK, BK).to(dtype), k, input_precision=PRECISION)
            residual += current * _load_scalars(g_prev_ptr, here, rows, TILE)[None, :]
        residual = residual.to(dtype)
        _store_tokens(residual_ptr, residual, memory * tokens + first, rows, K, BK, TILE)
        g_end = tl.load(g_end_ptr + row * num_tiles + i)
        y = _load_tokens(y_ptr, here, rows, K, BK, TILE)
        w = _load_matrix(w_ptr + slot, K, K, BK, BK) * g_end - tl.dot(residual, tl.trans(y), input_precision=PRECISION)
        _store_matrix(w_ptr + slot + K * K, w, K, K, BK, BK)
        tl.debug_barrier()
        if commit_ptr is not None:
            if is_last:
                if tl.load(commit_ptr + row * num_chunks + chunk) == 0:
                    _store_matrix(w_ptr + slot + K * K, _load_matrix(w_ptr + anchor_slot, K, K, BK, BK), K, K, BK, BK)
            tl.debug_barrier()


def _constants(k: torch.Tensor, rule: MemoryRule, tiling: Tiling) -> dict:
    """Compile-time constants shared by all kernels."""
    width = k.shape[-1]
    return {
        "K": width, "BK": padded(width), "CHUNK": tiling.chunk, "TILE": tiling.tile, "PER_CHUNK": tiling.per_chunk,
        "HUBER": rule.objective == "huber", "ERASE": rule.erases(0), "NORMALIZE": rule.normalize_v, "SELF_TARGET": rule.self_target,
        "PRECISION": "tf32x3" if k.dtype == torch.float32 else None,
    }  # fmt: skip


def supports(rule: MemoryRule) -> bool:
    """Whether the kernels compute the rule."""
    return rule.objective != "dot" and not rule.momentum and (rule.memory == "linear" or not rule.erases(1))


def write_forward(
    k: torch.Tensor,
    v: torch.Tensor,
    terms,
    states: States,
    signals: Signals,
    *,
    rule: MemoryRule,
    tiling: Tiling,
    tiles: range,
    commit: torch.Tensor | None = None,
    reset: torch.Tensor | None = None,
    start: States | None = None,
) -> None:
    """Write the tokens of whole chunks into R = L * S memories, S memories a row: fills states and signals.

    k, v [L, T, K]: fp32 or bf16. terms: `chunk_terms.triton_.Terms` of all tiles (y, w, g_prev and g_end are used). states: slots [R, NT + 1,
    ...], of which slot tiles.start is given and tiles.start + 1 .. tiles.stop are filled. signals: filled at the tokens of the tiles.
    commit, reset: uint8 [L, N] or None; a chunk without commit leaves its anchor in the slot after its last tile, a reset chunk starts
    from start [R, ...], which is then written to the slot of its first tile.
    """
    rows, tokens, width = k.shape
    slots = states.weights[0]
    memories, hidden = slots.shape[0], slots.shape[-2]
    _check(k, v, terms, states, rule=rule, tiling=tiling, tiles=tiles)
    masks = (commit, reset, *((None,) * len(states.weights) if reset is None else start.weights))
    sizes = (tokens, tiling.num_tiles, tiling.num_chunks, memories // rows, tiles.start, tiles.stop, rule.huber_delta**-2)
    warps = tuning(width=width, hidden=hidden).warps_of("write_forward")
    if rule.memory == "linear":
        _linear_forward[(memories,)](
            k, v, terms.y, terms.g_prev, terms.g_end, *masks, *states.weights, signals.residual, *sizes,
            **_constants(k, rule, tiling), num_warps=warps,
        )  # fmt: skip
        return
    _mlp_forward[(memories,)](
        k, v, terms.y, terms.w, terms.g_prev, terms.g_end, *masks, *states.weights,
        signals.residual, signals.error, signals.hidden, signals.scale, *sizes,
        **_constants(k, rule, tiling), F=hidden, BF=padded(hidden), num_warps=warps,
    )  # fmt: skip


def _check(k: torch.Tensor, v: torch.Tensor, terms, states: States, *, rule: MemoryRule, tiling: Tiling, tiles: range) -> None:
    """Our own mistakes in shapes and layouts."""
    assert supports(rule), rule
    assert k.shape == v.shape and k.dtype == v.dtype == terms.y.dtype and k.shape[1] == tiling.tokens
    assert tiles.start % tiling.per_chunk == 0 and (tiles.stop % tiling.per_chunk == 0 or tiles.stop == tiling.num_tiles)
    assert all(t.shape[1] == tiling.num_tiles + 1 and t.shape[0] % k.shape[0] == 0 and t.dtype == torch.float32 for t in states.weights)
    assert all(t.is_contiguous() for t in (k, v, terms.y, terms.w, terms.g_prev, terms.g_end, *states.weights))
