"""The writes of MLP and linear memories as Triton kernels: one program walks one memory through its tiles, forward or backward.

`write_forward` takes the terms of every tile (what keys and gates do to any memory) and leaves the state at every tile's start and the
error signals behind, which the reads need; `write_backward` walks the tiles in reverse. The mathematics is that of `fused.py`; README.md
has the derivation and the layout.

Legend: R = L * S memories (L rows of S memories that share k, v and the terms), T tokens, C tokens of a tile, N chunks, NT tiles,
K head width, F hidden width (K for a linear memory). Inside the kernels token blocks are held tokens first, [C, K] and [C, F]: in a
tile of less than 64 tokens the products whose rows are tokens fill no warp group and are done by single warps.

The loops over tiles are `while` loops: out of a `for` loop Triton hoists the accumulators of all its products (3.6 to 3.9 on Blackwell),
and together they need more tensor memory than there is; the kernel then compiles to a trap.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from hope_kernels.blocks_triton import load_matrix, load_scalars, load_tokens, store_matrix, store_scalars, store_tokens
from hope_kernels.memory import L2_EPS
from hope_kernels.rule import MemoryRule
from hope_kernels.tiling import Tiling
from hope_kernels.tuning import padded, tuning

UNIT_EPS: tl.constexpr = tl.constexpr(L2_EPS)


@dataclass(frozen=True)
class States:
    """States of R memories along a run of tiles.

    weights: slots (W2 [R, NT + 1, F, K], W1 [R, NT + 1, K, F]) or (W [R, NT + 1, K, K],) in the dtype of the keys: slot i is the state at
    the start of tile i, after a document's reset, as the operand of every product with it. current: the state itself, fp32, [R, ...]
    without slots: before a call of `write_forward` that at the start of its first tile, afterwards that after its last. rest: what rounding
    took from the slots, in their shapes and dtype: the gradient of g_end needs it where the keys are bf16. () where no backward follows.
    """

    weights: tuple[torch.Tensor, ...]
    current: tuple[torch.Tensor, ...]
    rest: tuple[torch.Tensor, ...] = ()

    @staticmethod
    def at(current: tuple[torch.Tensor, ...], *, tiles: int, dtype: torch.dtype, backward: bool) -> "States":
        """Room for `tiles` tiles from a given state on, which is written over; backward: whether `write_backward` follows."""
        shapes = [(len(t), tiles + 1, *t.shape[1:]) for t in current]
        slots = tuple(torch.empty(shape, dtype=dtype, device=current[0].device) for shape in shapes)
        rounded = backward and dtype != torch.float32
        return States(slots, current, tuple(torch.empty_like(t) for t in slots) if rounded else ())


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
def _identity(ids_ptr, memories_per_row):
    """(memory, row) of the program. Loaded anew for every tile, or the addresses of all tensors would stay in registers along the loop."""
    memory = tl.load(ids_ptr + tl.program_id(0))
    return memory.to(tl.int64), (memory // memories_per_row).to(tl.int64)


@triton.jit
def _store_slot(
    slot, rest, value, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr
):  # fmt: skip
    """Store a state as an operand and, where `rest` is wanted, what that leaves out."""
    store_matrix(slot, value, ROWS, COLUMNS, BLOCK_ROWS, BLOCK_COLUMNS)
    if rest is not None:
        value -= value.to(slot.dtype.element_ty).to(tl.float32)
        store_matrix(rest, value, ROWS, COLUMNS, BLOCK_ROWS, BLOCK_COLUMNS)


@triton.jit
def _slots(pointer, rest_ptr, number, SIZE: tl.constexpr):
    """Pointers to a slot (its number counts all memories') and to its rest."""
    if rest_ptr is not None:
        return pointer + number * SIZE, rest_ptr + number * SIZE
    else:
        return pointer + number * SIZE, None


@triton.jit
def _load_gradient(pointer, first, rows, WIDTH: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr):
    """[TILE, BLOCK] of a gradient [..., WIDTH], zero where there is none."""
    if pointer is not None:
        return load_tokens(pointer, first, rows, WIDTH, BLOCK, TILE)
    else:
        return tl.zeros((TILE, BLOCK), tl.float32)


@triton.jit
def _enter_tile(
    grad, low, anchor_grad, read_grad, slot, rest, live, keep, is_last,
    SIZE: tl.constexpr, PER_CHUNK: tl.constexpr, READS_ANCHOR: tl.constexpr, FLAT: tl.constexpr,
):  # fmt: skip
    """Begin the backward pass of a tile for one matrix, from the gradient of the state after it; element by element, FLAT at a time.

    `low` becomes the gradient of what the tile wrote (zero where `live` is 0: nothing was committed); `grad` that of the current state
    at the tile's start as far as it does not go through products: kept, read. What reads saw, or kept without commit, was in a chunk of
    several tiles the anchor: it goes to anchor_grad. Returns the gradient of g_end.
    """
    d_g_end = 0.0
    for start in tl.range(0, SIZE, FLAT, num_stages=1):
        at = start + tl.arange(0, FLAT)
        inside = at < SIZE
        value = tl.load(grad + at, inside, 0.0)
        written = value * live
        tl.store(low + at, written.to(low.dtype.element_ty), inside)
        weight = tl.load(slot + at, inside, 0.0).to(tl.float32)
        if rest is not None:
            weight += tl.load(rest + at, inside, 0.0).to(tl.float32)
        d_g_end += tl.sum(written * weight, 0)
        kept = value * keep
        if PER_CHUNK > 1:
            through = value * (1 - live)
            if not is_last:
                through = tl.load(anchor_grad + at, inside, 0.0)
            if READS_ANCHOR and read_grad is not None:
                through += tl.load(read_grad + at, inside, 0.0)
            tl.store(anchor_grad + at, through, inside)
        if (PER_CHUNK == 1 or not READS_ANCHOR) and read_grad is not None:
            kept += tl.load(read_grad + at, inside, 0.0)
        tl.store(grad + at, kept, inside)
    return d_g_end


@triton.jit
def _leave_chunk(grad, anchor_grad, start_grad, is_reset, memory, SIZE: tl.constexpr, PER_CHUNK: tl.constexpr, FLAT: tl.constexpr):
    """End the backward pass of a chunk for one matrix: the current state was the anchor, and after a reset the start."""
    for start in tl.range(0, SIZE, FLAT, num_stages=1):
        at = start + tl.arange(0, FLAT)
        inside = at < SIZE
        value = tl.load(grad + at, inside, 0.0)
        if PER_CHUNK > 1:
            value += tl.load(anchor_grad + at, inside, 0.0)
        if start_grad is not None:
            if is_reset:
                of_start = start_grad + memory * SIZE + at
                tl.store(of_start, value + tl.load(of_start, inside, 0.0), inside)
                value = tl.zeros_like(value)
        tl.store(grad + at, value, inside)


@triton.jit
def _silu(x):
    """silu(x), silu'(x) and silu''(x)."""
    sigmoid = tl.sigmoid(x)
    hidden = x * sigmoid
    falling = 1 - sigmoid
    slope = sigmoid + hidden * falling
    return hidden, slope, falling * (2 * slope - hidden)


@triton.jit
def _bounded(x, inverse_square, HUBER: tl.constexpr):
    """X / sqrt(1 + |x|^2 / d^2) of every token [C, I] and the factor [C]; inverse_square = 1 / d^2."""
    if HUBER:
        scale = tl.rsqrt(1 + tl.sum(x * x, 1) * inverse_square)
        return x * scale[:, None], scale
    else:
        return x, tl.full((x.shape[0],), 1.0, tl.float32)


@triton.jit
def _bounded_backward(grad, bounded, scale, inverse_square, HUBER: tl.constexpr):
    """From the gradient of the bounded error to that of the error: s (G - E (E . G) / d^2)."""
    if HUBER:
        along = tl.sum(bounded * grad, 1) * inverse_square
        return (grad - bounded * along[:, None]) * scale[:, None]
    else:
        return grad


@triton.jit
def _unit_backward(grad, unit, scale, NORMALIZE: tl.constexpr):
    """From the gradient of the unit-length target to that of the target: s (G - t (t . G))."""
    if NORMALIZE:
        return (grad - unit * tl.sum(unit * grad, 1)[:, None]) * scale[:, None]
    else:
        return grad


@triton.jit
def _unit(x, NORMALIZE: tl.constexpr):
    """Of every token [C, I]: x at unit length (`memory.l2norm`) where the rule normalises targets, and the factor [C]."""
    if NORMALIZE:
        scale = tl.rsqrt(tl.sum(x * x, 1) + UNIT_EPS)
        return x * scale[:, None], scale
    else:
        return x, tl.full((x.shape[0],), 1.0, tl.float32)


@triton.jit
def _mlp_target(v, hidden_v, a1, NORMALIZE: tl.constexpr, SELF_TARGET: tl.constexpr, PRECISION: tl.constexpr):
    """The target [C, K], M(v) from hidden_v = silu(W2 v) or v, and the factor [C] of its unit length."""
    target = v.to(tl.float32)
    if SELF_TARGET:
        target += tl.dot(hidden_v.to(v.dtype), tl.trans(a1), input_precision=PRECISION)
    return _unit(target, NORMALIZE)


@triton.jit
def _mlp_error(
    k_ptr, v_ptr, hidden, a2, a1, first, rows, inverse_square, K: tl.constexpr, BK: tl.constexpr, TILE: tl.constexpr,
    HUBER: tl.constexpr, NORMALIZE: tl.constexpr, SELF_TARGET: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The bounded error of M(k) [C, K] and its factor [C] at the anchors a2, a1; hidden = silu(W2 k).

    M(k) - M(v) = k - v + W1 (silu(W2 k) - silu(W2 v)): one product with W1, unless the target is made unit length first.
    """
    if SELF_TARGET:
        v = load_tokens(v_ptr, first, rows, K, BK, TILE)
        hidden_v, _, _ = _silu(tl.dot(v, tl.trans(a2), input_precision=PRECISION))
        if NORMALIZE:
            target, _ = _mlp_target(v, hidden_v, a1, NORMALIZE, SELF_TARGET, PRECISION)
        else:
            hidden -= hidden_v
            target = v.to(tl.float32)
    else:
        target, _ = _unit(load_tokens(v_ptr, first, rows, K, BK, TILE).to(tl.float32), NORMALIZE)
    error = tl.dot(hidden.to(a1.dtype), tl.trans(a1), -target, input_precision=PRECISION)
    return _bounded(error + load_tokens(k_ptr, first, rows, K, BK, TILE).to(tl.float32), inverse_square, HUBER)


@triton.jit
def _linear_target(v, a, NORMALIZE: tl.constexpr, SELF_TARGET: tl.constexpr, PRECISION: tl.constexpr):
    """The target [C, K], W v or v, and the factor [C] of its unit length, at the anchor a."""
    target = v.to(tl.float32)
    if SELF_TARGET:
        target = tl.dot(v, tl.trans(a), input_precision=PRECISION)
    return _unit(target, NORMALIZE)


@triton.jit(do_not_specialize=["first_tile", "end_tile"])
def _mlp_forward(
    ids_ptr, k_ptr, v_ptr, y_ptr, w_ptr, g_prev_ptr, g_end_ptr, commit_ptr, reset_ptr,
    start2_ptr, start1_ptr, kept2_ptr, kept1_ptr, w2_ptr, w1_ptr, rest2_ptr, rest1_ptr, current2_ptr, current1_ptr,
    residual_ptr, error_ptr, hidden_ptr, scale_ptr,
    tokens, num_tiles, num_chunks, memories_per_row, first_tile, end_tile, inverse_square,
    K: tl.constexpr, F: tl.constexpr, BK: tl.constexpr, BF: tl.constexpr,
    CHUNK: tl.constexpr, TILE: tl.constexpr, PER_CHUNK: tl.constexpr,
    HUBER: tl.constexpr, ERASE: tl.constexpr, NORMALIZE: tl.constexpr, SELF_TARGET: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The tiles first_tile .. end_tile of one MLP memory: signals, the current state, and the slots it passes through."""
    dtype = k_ptr.dtype.element_ty
    memory, row = _identity(ids_ptr, memories_per_row)
    slots = memory * (num_tiles + 1)
    slot2, rest2 = _slots(w2_ptr, rest2_ptr, slots + first_tile, F * K)
    slot1, rest1 = _slots(w1_ptr, rest1_ptr, slots + first_tile, F * K)
    _store_slot(slot2, rest2, load_matrix(current2_ptr + memory * (F * K), F, K, BF, BK), F, K, BF, BK)
    _store_slot(slot1, rest1, load_matrix(current1_ptr + memory * (F * K), K, F, BK, BF), K, F, BK, BF)
    tl.debug_barrier()
    i = first_tile
    while i < end_tile:
        chunk, anchor, first, rows, is_last = _tile_rows(i, tokens, CHUNK, TILE, PER_CHUNK)
        memory, row = _identity(ids_ptr, memories_per_row)
        slots = memory * (num_tiles + 1)
        now2_ptr, now1_ptr = current2_ptr + memory * (F * K), current1_ptr + memory * (F * K)
        here, there = row * tokens + first, memory * tokens + first  # of what the memories share, and of their own
        slot2, rest2 = _slots(w2_ptr, rest2_ptr, slots + i, F * K)
        slot1, rest1 = _slots(w1_ptr, rest1_ptr, slots + i, F * K)
        anchor2, anchor1 = w2_ptr + (slots + anchor) * (F * K), w1_ptr + (slots + anchor) * (F * K)
        if reset_ptr is not None:
            if (i == anchor) & (tl.load(reset_ptr + row * num_chunks + chunk) != 0):
                w2 = load_matrix(start2_ptr + memory * (F * K), F, K, BF, BK)
                store_matrix(now2_ptr, w2, F, K, BF, BK)
                _store_slot(slot2, rest2, w2, F, K, BF, BK)
                w1 = load_matrix(start1_ptr + memory * (F * K), K, F, BK, BF)
                store_matrix(now1_ptr, w1, K, F, BK, BF)
                _store_slot(slot1, rest1, w1, K, F, BK, BF)
            tl.debug_barrier()
        if commit_ptr is not None:
            if (i == anchor) & (tl.load(commit_ptr + row * num_chunks + chunk) == 0):
                store_matrix(kept2_ptr + memory * (F * K), load_matrix(now2_ptr, F, K, BF, BK), F, K, BF, BK)
                store_matrix(kept1_ptr + memory * (F * K), load_matrix(now1_ptr, K, F, BK, BF), K, F, BK, BF)
            tl.debug_barrier()
        a2 = load_matrix(anchor2, F, K, BF, BK)
        a1 = load_matrix(anchor1, K, F, BK, BF)
        k = load_tokens(k_ptr, here, rows, K, BK, TILE)
        hidden, _, _ = _silu(tl.dot(k, tl.trans(a2), input_precision=PRECISION))
        store_tokens(hidden_ptr, hidden, there, rows, F, BF, TILE)
        error, scale = _mlp_error(
            k_ptr, v_ptr, hidden, a2, a1, here, rows, inverse_square, K, BK, TILE, HUBER, NORMALIZE, SELF_TARGET, PRECISION
        )
        store_tokens(error_ptr, error, there, rows, K, BK, TILE)
        store_scalars(scale_ptr, scale, there, rows, TILE)
        next2, next_rest2 = _slots(w2_ptr, rest2_ptr, slots + i + 1, F * K)
        next1, next_rest1 = _slots(w1_ptr, rest1_ptr, slots + i + 1, F * K)
        # W1 first: its update needs nothing of what follows, and its blocks leave the registers
        g_end = tl.load(g_end_ptr + row * num_tiles + i)
        paced = (error * -load_scalars(w_ptr, here, rows, TILE)[:, None]).to(dtype)
        kept = load_matrix(now1_ptr, K, F, BK, BF) * g_end
        w1 = tl.dot(tl.trans(paced), hidden.to(dtype), kept, input_precision=PRECISION)
        store_matrix(now1_ptr, w1, K, F, BK, BF)
        _store_slot(next1, next_rest1, w1, K, F, BK, BF)
        # the anchors once more from memory, and the pre-activation for one product: kept, they would spill
        a1 = load_matrix(anchor1, K, F, BK, BF)
        back = tl.dot(error.to(dtype), a1, input_precision=PRECISION)
        k = load_tokens(k_ptr, here, rows, K, BK, TILE)
        a2 = load_matrix(anchor2, F, K, BF, BK)
        pre = tl.dot(k, tl.trans(a2), input_precision=PRECISION)
        residual, _ = _bounded(back * _silu(pre)[1], inverse_square, HUBER)
        if ERASE:
            if PER_CHUNK > 1:
                pre = tl.dot(k, tl.trans(load_matrix(slot2, F, K, BF, BK)), input_precision=PRECISION)
            residual += pre * load_scalars(g_prev_ptr, here, rows, TILE)[:, None]
        store_tokens(residual_ptr, residual, there, rows, F, BF, TILE)
        y = load_tokens(y_ptr, here, rows, K, BK, TILE)
        kept = load_matrix(now2_ptr, F, K, BF, BK) * g_end
        w2 = tl.dot(tl.trans((-residual).to(dtype)), y, kept, input_precision=PRECISION)
        store_matrix(now2_ptr, w2, F, K, BF, BK)
        _store_slot(next2, next_rest2, w2, F, K, BF, BK)
        tl.debug_barrier()
        if commit_ptr is not None:
            if is_last & (tl.load(commit_ptr + row * num_chunks + chunk) == 0):
                w2 = load_matrix(kept2_ptr + memory * (F * K), F, K, BF, BK)
                store_matrix(now2_ptr, w2, F, K, BF, BK)
                _store_slot(next2, next_rest2, w2, F, K, BF, BK)
                w1 = load_matrix(kept1_ptr + memory * (F * K), K, F, BK, BF)
                store_matrix(now1_ptr, w1, K, F, BK, BF)
                _store_slot(next1, next_rest1, w1, K, F, BK, BF)
            tl.debug_barrier()
        i += 1


@triton.jit(do_not_specialize=["first_tile", "end_tile"])
def _linear_forward(
    k_ptr, v_ptr, y_ptr, g_prev_ptr, g_end_ptr, commit_ptr, reset_ptr, start_ptr, kept_ptr, w_ptr, rest_ptr, current_ptr, residual_ptr,
    tokens, num_tiles, num_chunks, memories_per_row, first_tile, end_tile, inverse_square,
    K: tl.constexpr, BK: tl.constexpr, CHUNK: tl.constexpr, TILE: tl.constexpr, PER_CHUNK: tl.constexpr,
    HUBER: tl.constexpr, ERASE: tl.constexpr, NORMALIZE: tl.constexpr, SELF_TARGET: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The same for one linear memory."""
    memory = tl.program_id(0).to(tl.int64)
    row = memory // memories_per_row
    current_ptr += memory * (K * K)
    slots = memory * (num_tiles + 1)
    slot, rest = _slots(w_ptr, rest_ptr, slots + first_tile, K * K)
    _store_slot(slot, rest, load_matrix(current_ptr, K, K, BK, BK), K, K, BK, BK)
    tl.debug_barrier()
    i = first_tile
    while i < end_tile:
        chunk, anchor, first, rows, is_last = _tile_rows(i, tokens, CHUNK, TILE, PER_CHUNK)
        here = row * tokens + first
        slot, rest = _slots(w_ptr, rest_ptr, slots + i, K * K)
        if reset_ptr is not None:
            if (i == anchor) & (tl.load(reset_ptr + row * num_chunks + chunk) != 0):
                w = load_matrix(start_ptr + memory * (K * K), K, K, BK, BK)
                store_matrix(current_ptr, w, K, K, BK, BK)
                _store_slot(slot, rest, w, K, K, BK, BK)
            tl.debug_barrier()
        if commit_ptr is not None:
            if (i == anchor) & (tl.load(commit_ptr + row * num_chunks + chunk) == 0):
                store_matrix(kept_ptr + memory * (K * K), load_matrix(current_ptr, K, K, BK, BK), K, K, BK, BK)
            tl.debug_barrier()
        k = load_tokens(k_ptr, here, rows, K, BK, TILE)
        v = load_tokens(v_ptr, here, rows, K, BK, TILE)
        a = load_matrix(w_ptr + (slots + anchor) * (K * K), K, K, BK, BK)
        pre = tl.dot(k, tl.trans(a), input_precision=PRECISION)
        target, _ = _linear_target(v, a, NORMALIZE, SELF_TARGET, PRECISION)
        residual, _ = _bounded(pre - target, inverse_square, HUBER)
        if ERASE:
            passed = pre
            if PER_CHUNK > 1:
                passed = tl.dot(k, tl.trans(load_matrix(slot, K, K, BK, BK)), input_precision=PRECISION)
            residual += passed * load_scalars(g_prev_ptr, here, rows, TILE)[:, None]
        residual = residual.to(k.dtype)
        store_tokens(residual_ptr, residual, memory * tokens + first, rows, K, BK, TILE)
        g_end = tl.load(g_end_ptr + row * num_tiles + i)
        y = load_tokens(y_ptr, here, rows, K, BK, TILE)
        w = load_matrix(current_ptr, K, K, BK, BK) * g_end - tl.dot(tl.trans(residual), y, input_precision=PRECISION)
        store_matrix(current_ptr, w, K, K, BK, BK)
        slot, rest = _slots(w_ptr, rest_ptr, slots + i + 1, K * K)
        _store_slot(slot, rest, w, K, K, BK, BK)
        tl.debug_barrier()
        if commit_ptr is not None:
            if is_last & (tl.load(commit_ptr + row * num_chunks + chunk) == 0):
                w = load_matrix(kept_ptr + memory * (K * K), K, K, BK, BK)
                store_matrix(current_ptr, w, K, K, BK, BK)
                _store_slot(slot, rest, w, K, K, BK, BK)
            tl.debug_barrier()
        i += 1


@triton.jit(do_not_specialize=["first_tile", "end_tile"])
def _mlp_backward(
    ids_ptr, k_ptr, v_ptr, y_ptr, w_ptr, g_prev_ptr, g_end_ptr, commit_ptr, reset_ptr,
    w2_ptr, w1_ptr, rest2_ptr, rest1_ptr, residual_ptr, error_ptr, hidden_ptr, scale_ptr,
    in_residual_ptr, in_error_ptr, in_hidden_ptr, read2_ptr, read1_ptr,
    sums_ptr, parked_ptr, start2_ptr, start1_ptr,
    d_k_ptr, d_v_ptr, d_y_ptr, d_w_ptr, d_g_prev_ptr, d_g_end_ptr,
    tokens, num_tiles, num_chunks, memories_per_row, first_tile, end_tile, inverse_square,
    K: tl.constexpr, F: tl.constexpr, BK: tl.constexpr, BF: tl.constexpr,
    CHUNK: tl.constexpr, TILE: tl.constexpr, PER_CHUNK: tl.constexpr, READS_ANCHOR: tl.constexpr,
    HUBER: tl.constexpr, ERASE: tl.constexpr, NORMALIZE: tl.constexpr, SELF_TARGET: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The tiles of one MLP memory in reverse.

    Between its products a tile lives in memory. `sums`, fp32, has for every memory the gradients of the current weights and of the anchor's
    and one block [TILE, F]; `parked`, in the dtype of the keys, has the gradients of the weights as operands and seven blocks. Registers
    hold the blocks of one product; and Triton spreads a product over eight warps only where its result enters no other product.
    """
    dtype = k_ptr.dtype.element_ty
    SIZE: tl.constexpr = F * K
    FLAT: tl.constexpr = min(BF * BK, 2048)
    i = end_tile
    while i > first_tile:
        i -= 1
        chunk, anchor, first, rows, is_last = _tile_rows(i, tokens, CHUNK, TILE, PER_CHUNK)
        memory, row = _identity(ids_ptr, memories_per_row)
        here, there = row * tokens + first, memory * tokens + first
        slots = memory * (num_tiles + 1)
        slot2, rest2 = _slots(w2_ptr, rest2_ptr, slots + i, SIZE)
        slot1, rest1 = _slots(w1_ptr, rest1_ptr, slots + i, SIZE)
        grad2_ptr = sums_ptr + memory * (4 * SIZE + TILE * F)
        grad1_ptr = grad2_ptr + SIZE
        anchor2_ptr = grad1_ptr + SIZE
        anchor1_ptr = anchor2_ptr + SIZE
        part_ptr = anchor1_ptr + SIZE
        low2_ptr = parked_ptr + memory * (2 * SIZE + TILE * (5 * F + 2 * K))
        low1_ptr = low2_ptr + SIZE
        d_back_ptr = low1_ptr + SIZE
        d_pre_ptr = d_back_ptr + TILE * F
        d_passed_ptr = d_pre_ptr + TILE * F
        d_pre_v_ptr = d_passed_ptr + TILE * F
        inner_ptr = d_pre_v_ptr + TILE * F
        d_error_ptr = inner_ptr + TILE * F
        d_target_ptr = d_error_ptr + TILE * K
        g_end = tl.load(g_end_ptr + row * num_tiles + i)
        live = 1.0
        keep = g_end
        if commit_ptr is not None:
            if is_last & (tl.load(commit_ptr + row * num_chunks + chunk) == 0):
                live = 0.0
                keep = 1.0 if PER_CHUNK == 1 else 0.0
        reads = (memory * num_tiles + i) * SIZE
        read2, read1 = None, None
        if read2_ptr is not None:
            read2, read1 = read2_ptr + reads, read1_ptr + reads
        d_g_end = _enter_tile(
            grad2_ptr, low2_ptr, anchor2_ptr, read2, slot2, rest2, live, keep, is_last, SIZE, PER_CHUNK, READS_ANCHOR, FLAT
        )
        d_g_end += _enter_tile(
            grad1_ptr, low1_ptr, anchor1_ptr, read1, slot1, rest1, live, keep, is_last, SIZE, PER_CHUNK, READS_ANCHOR, FLAT
        )
        tl.store(d_g_end_ptr + memory * num_tiles + i, d_g_end)
        tl.debug_barrier()
        # W2' = g_end W2 - residual^T y
        low2 = load_matrix(low2_ptr, F, K, BF, BK)
        residual = load_tokens(residual_ptr, there, rows, F, BF, TILE)
        store_tokens(d_y_ptr, -tl.dot(residual, low2, input_precision=PRECISION), there, rows, K, BK, TILE)
        y = load_tokens(y_ptr, here, rows, K, BK, TILE)
        d_residual = _load_gradient(in_residual_ptr, there, rows, F, BF, TILE)
        d_residual -= tl.dot(y, tl.trans(low2), input_precision=PRECISION)
        store_tokens(part_ptr, d_residual, 0, rows, F, BF, TILE)
        if ERASE and PER_CHUNK > 1:
            k = load_tokens(k_ptr, here, rows, K, BK, TILE)
            passed = tl.dot(k, tl.trans(load_matrix(slot2, F, K, BF, BK)), input_precision=PRECISION)
            store_scalars(d_g_prev_ptr, tl.sum(d_residual * passed, 1), there, rows, TILE)
            d_passed = d_residual * load_scalars(g_prev_ptr, here, rows, TILE)[:, None]
            store_tokens(d_passed_ptr, d_passed, 0, rows, F, BF, TILE)
        tl.debug_barrier()
        # residual = g_prev W2 k + bounded(back * slope), back = error W1
        a2 = load_matrix(w2_ptr + (slots + anchor) * SIZE, F, K, BF, BK)
        a1 = load_matrix(w1_ptr + (slots + anchor) * SIZE, K, F, BK, BF)
        k = load_tokens(k_ptr, here, rows, K, BK, TILE)
        pre = tl.dot(k, tl.trans(a2), input_precision=PRECISION)
        _, slope, curvature = _silu(pre)
        back = tl.dot(load_tokens(error_ptr, there, rows, K, BK, TILE), a1, input_precision=PRECISION)
        d_residual = load_tokens(part_ptr, 0, rows, F, BF, TILE)
        if ERASE and PER_CHUNK == 1:
            store_scalars(d_g_prev_ptr, tl.sum(d_residual * pre, 1), there, rows, TILE)
        delta, delta_scale = _bounded(back * slope, inverse_square, HUBER)
        d_inner = _bounded_backward(d_residual, delta, delta_scale, inverse_square, HUBER)
        store_tokens(d_back_ptr, d_inner * slope, 0, rows, F, BF, TILE)
        d_pre = d_inner * back * curvature
        if ERASE and PER_CHUNK == 1:
            d_pre += d_residual * load_scalars(g_prev_ptr, here, rows, TILE)[:, None]
        store_tokens(part_ptr, d_pre, 0, rows, F, BF, TILE)
        tl.debug_barrier()
        # W1' = g_end W1 - (w error)^T hidden, error = bounded(k + W1 hidden - target)
        low1 = load_matrix(low1_ptr, K, F, BK, BF)
        hidden = load_tokens(hidden_ptr, there, rows, F, BF, TILE)
        through = tl.dot(hidden, tl.trans(low1), input_precision=PRECISION)
        error = load_tokens(error_ptr, there, rows, K, BK, TILE).to(tl.float32)
        store_scalars(d_w_ptr, -tl.sum(through * error, 1), there, rows, TILE)
        d_back = load_tokens(d_back_ptr, 0, rows, F, BF, TILE)
        d_error = tl.dot(d_back, tl.trans(a1), input_precision=PRECISION)
        d_error -= through * load_scalars(w_ptr, here, rows, TILE)[:, None]
        d_error += _load_gradient(in_error_ptr, there, rows, K, BK, TILE)
        d_error = _bounded_backward(d_error, error, load_scalars(scale_ptr, there, rows, TILE), inverse_square, HUBER)
        store_tokens(d_error_ptr, d_error, 0, rows, K, BK, TILE)
        store_tokens(d_k_ptr, d_error, there, rows, K, BK, TILE)
        if not SELF_TARGET:
            target, target_scale = _unit(load_tokens(v_ptr, here, rows, K, BK, TILE).to(tl.float32), NORMALIZE)
            store_tokens(d_v_ptr, _unit_backward(-d_error, target, target_scale, NORMALIZE), there, rows, K, BK, TILE)
        tl.debug_barrier()
        if SELF_TARGET and NORMALIZE:
            v = load_tokens(v_ptr, here, rows, K, BK, TILE)
            hidden_v, _, _ = _silu(tl.dot(v, tl.trans(a2), input_precision=PRECISION))
            store_tokens(inner_ptr, hidden_v, 0, rows, F, BF, TILE)
            target, target_scale = _mlp_target(v, hidden_v, a1, NORMALIZE, SELF_TARGET, PRECISION)
            d_error = load_tokens(d_k_ptr, there, rows, K, BK, TILE)
            d_target = _unit_backward(-d_error, target, target_scale, NORMALIZE)
            store_tokens(d_target_ptr, d_target, 0, rows, K, BK, TILE)
            store_tokens(d_v_ptr, d_target, there, rows, K, BK, TILE)
            tl.debug_barrier()
        d_error = load_tokens(d_error_ptr, 0, rows, K, BK, TILE)
        d_hidden = tl.dot(d_error, a1, input_precision=PRECISION)
        if SELF_TARGET:
            v = load_tokens(v_ptr, here, rows, K, BK, TILE)
            hidden_v, slope_v, _ = _silu(tl.dot(v, tl.trans(a2), input_precision=PRECISION))
            if NORMALIZE:
                d_hidden_v = tl.dot(load_tokens(d_target_ptr, 0, rows, K, BK, TILE), a1, input_precision=PRECISION)
            else:
                d_hidden_v = -d_hidden
                hidden = load_tokens(hidden_ptr, there, rows, F, BF, TILE).to(tl.float32)
                store_tokens(inner_ptr, hidden - hidden_v, 0, rows, F, BF, TILE)
            store_tokens(d_pre_v_ptr, d_hidden_v * slope_v, 0, rows, F, BF, TILE)
        error = load_tokens(error_ptr, there, rows, K, BK, TILE).to(tl.float32)
        paced = (error * load_scalars(w_ptr, here, rows, TILE)[:, None]).to(dtype)
        d_hidden -= tl.dot(paced, low1, input_precision=PRECISION)
        d_hidden += _load_gradient(in_hidden_ptr, there, rows, F, BF, TILE)
        k = load_tokens(k_ptr, here, rows, K, BK, TILE)
        _, slope, _ = _silu(tl.dot(k, tl.trans(a2), input_precision=PRECISION))
        d_pre = load_tokens(part_ptr, 0, rows, F, BF, TILE) + d_hidden * slope
        store_tokens(d_pre_ptr, d_pre, 0, rows, F, BF, TILE)
        tl.debug_barrier()
        d_error = load_tokens(d_k_ptr, there, rows, K, BK, TILE)
        if SELF_TARGET:
            d_target = load_tokens(d_v_ptr, there, rows, K, BK, TILE) if NORMALIZE else -d_error
            d_target += tl.dot(load_tokens(d_pre_v_ptr, 0, rows, F, BF, TILE), a2, input_precision=PRECISION)
            store_tokens(d_v_ptr, d_target, there, rows, K, BK, TILE)
        d_k = d_error + tl.dot(load_tokens(d_pre_ptr, 0, rows, F, BF, TILE), a2, input_precision=PRECISION)
        if ERASE and PER_CHUNK > 1:
            d_passed = load_tokens(d_passed_ptr, 0, rows, F, BF, TILE)
            d_k += tl.dot(d_passed, load_matrix(slot2, F, K, BF, BK), input_precision=PRECISION)
        store_tokens(d_k_ptr, d_k, there, rows, K, BK, TILE)
        # the weights, from what is parked
        through2, through1 = grad2_ptr, grad1_ptr
        if PER_CHUNK > 1:
            through2, through1 = anchor2_ptr, anchor1_ptr
        d_error = load_tokens(d_error_ptr, 0, rows, K, BK, TILE)
        total = load_matrix(through1, K, F, BK, BF)
        error = tl.trans(load_tokens(error_ptr, there, rows, K, BK, TILE))
        total = tl.dot(error, load_tokens(d_back_ptr, 0, rows, F, BF, TILE), total, input_precision=PRECISION)
        if SELF_TARGET and not NORMALIZE:
            total = tl.dot(tl.trans(d_error), load_tokens(inner_ptr, 0, rows, F, BF, TILE), total, input_precision=PRECISION)
        else:
            total = tl.dot(tl.trans(d_error), load_tokens(hidden_ptr, there, rows, F, BF, TILE), total, input_precision=PRECISION)
            if SELF_TARGET:
                d_target = tl.trans(load_tokens(d_target_ptr, 0, rows, K, BK, TILE))
                total = tl.dot(d_target, load_tokens(inner_ptr, 0, rows, F, BF, TILE), total, input_precision=PRECISION)
        store_matrix(through1, total, K, F, BK, BF)
        total = load_matrix(through2, F, K, BF, BK)
        k = load_tokens(k_ptr, here, rows, K, BK, TILE)
        total = tl.dot(tl.trans(load_tokens(d_pre_ptr, 0, rows, F, BF, TILE)), k, total, input_precision=PRECISION)
        if SELF_TARGET:
            v = load_tokens(v_ptr, here, rows, K, BK, TILE)
            total = tl.dot(tl.trans(load_tokens(d_pre_v_ptr, 0, rows, F, BF, TILE)), v, total, input_precision=PRECISION)
        store_matrix(through2, total, F, K, BF, BK)
        if ERASE and PER_CHUNK > 1:
            d_passed = tl.trans(load_tokens(d_passed_ptr, 0, rows, F, BF, TILE))
            total = tl.dot(d_passed, k, load_matrix(grad2_ptr, F, K, BF, BK), input_precision=PRECISION)
            store_matrix(grad2_ptr, total, F, K, BF, BK)
        tl.debug_barrier()
        is_reset = False
        if reset_ptr is not None:
            is_reset = tl.load(reset_ptr + row * num_chunks + chunk) != 0
        if (i == anchor) & (is_reset | (PER_CHUNK > 1)):
            _leave_chunk(grad2_ptr, anchor2_ptr, start2_ptr, is_reset, memory, SIZE, PER_CHUNK, FLAT)
            _leave_chunk(grad1_ptr, anchor1_ptr, start1_ptr, is_reset, memory, SIZE, PER_CHUNK, FLAT)
        tl.debug_barrier()


@triton.jit(do_not_specialize=["first_tile", "end_tile"])
def _linear_backward(
    ids_ptr, k_ptr, v_ptr, y_ptr, g_prev_ptr, g_end_ptr, commit_ptr, reset_ptr, w_ptr, rest_ptr, residual_ptr,
    in_residual_ptr, read_ptr, sums_ptr, parked_ptr, start_ptr,
    d_k_ptr, d_v_ptr, d_y_ptr, d_g_prev_ptr, d_g_end_ptr,
    tokens, num_tiles, num_chunks, memories_per_row, first_tile, end_tile, inverse_square,
    K: tl.constexpr, BK: tl.constexpr, CHUNK: tl.constexpr, TILE: tl.constexpr, PER_CHUNK: tl.constexpr, READS_ANCHOR: tl.constexpr,
    HUBER: tl.constexpr, ERASE: tl.constexpr, NORMALIZE: tl.constexpr, SELF_TARGET: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The same for one linear memory; `sums` has two matrices, `parked` one matrix and three blocks."""
    dtype = k_ptr.dtype.element_ty
    FLAT: tl.constexpr = min(BK * BK, 2048)
    i = end_tile
    while i > first_tile:
        i -= 1
        chunk, anchor, first, rows, is_last = _tile_rows(i, tokens, CHUNK, TILE, PER_CHUNK)
        memory, row = _identity(ids_ptr, memories_per_row)
        here, there = row * tokens + first, memory * tokens + first
        slots = memory * (num_tiles + 1)
        slot, rest = _slots(w_ptr, rest_ptr, slots + i, K * K)
        grad_ptr = sums_ptr + memory * (2 * K * K)
        anchor_ptr = grad_ptr + K * K
        low_ptr = parked_ptr + memory * (K * K + TILE * 3 * K)
        d_pre_ptr = low_ptr + K * K
        d_passed_ptr = d_pre_ptr + TILE * K
        d_target_ptr = d_passed_ptr + TILE * K
        g_end = tl.load(g_end_ptr + row * num_tiles + i)
        live = 1.0
        keep = g_end
        if commit_ptr is not None:
            if is_last & (tl.load(commit_ptr + row * num_chunks + chunk) == 0):
                live = 0.0
                keep = 1.0 if PER_CHUNK == 1 else 0.0
        read = None
        if read_ptr is not None:
            read = read_ptr + (memory * num_tiles + i) * (K * K)
        d_g_end = _enter_tile(grad_ptr, low_ptr, anchor_ptr, read, slot, rest, live, keep, is_last, K * K, PER_CHUNK, READS_ANCHOR, FLAT)
        tl.store(d_g_end_ptr + memory * num_tiles + i, d_g_end)
        tl.debug_barrier()
        low = load_matrix(low_ptr, K, K, BK, BK)
        residual = load_tokens(residual_ptr, there, rows, K, BK, TILE)
        store_tokens(d_y_ptr, -tl.dot(residual, low, input_precision=PRECISION), there, rows, K, BK, TILE)
        y = load_tokens(y_ptr, here, rows, K, BK, TILE)
        d_residual = -tl.dot(y, tl.trans(low), input_precision=PRECISION)
        d_residual += _load_gradient(in_residual_ptr, there, rows, K, BK, TILE)
        # residual = g_prev W k + bounded(W k - target)
        a = load_matrix(w_ptr + (slots + anchor) * (K * K), K, K, BK, BK)
        k = load_tokens(k_ptr, here, rows, K, BK, TILE)
        v = load_tokens(v_ptr, here, rows, K, BK, TILE)
        pre = tl.dot(k, tl.trans(a), input_precision=PRECISION)
        target, target_scale = _linear_target(v, a, NORMALIZE, SELF_TARGET, PRECISION)
        error, scale = _bounded(pre - target, inverse_square, HUBER)
        d_error = _bounded_backward(d_residual, error, scale, inverse_square, HUBER)
        d_target = _unit_backward(-d_error, target, target_scale, NORMALIZE)
        if SELF_TARGET:
            store_tokens(d_target_ptr, d_target, 0, rows, K, BK, TILE)
            d_target = tl.dot(d_target.to(dtype), a, input_precision=PRECISION)
        store_tokens(d_v_ptr, d_target, there, rows, K, BK, TILE)
        if ERASE:
            d_passed = d_residual * load_scalars(g_prev_ptr, here, rows, TILE)[:, None]
            if PER_CHUNK > 1:
                pre = tl.dot(k, tl.trans(load_matrix(slot, K, K, BK, BK)), input_precision=PRECISION)
                store_tokens(d_passed_ptr, d_passed, 0, rows, K, BK, TILE)
            else:
                d_error += d_passed
            store_scalars(d_g_prev_ptr, tl.sum(d_residual * pre, 1), there, rows, TILE)
        store_tokens(d_pre_ptr, d_error, 0, rows, K, BK, TILE)
        d_k = tl.dot(d_error.to(dtype), a, input_precision=PRECISION)
        if ERASE and PER_CHUNK > 1:
            d_k = tl.dot(d_passed.to(dtype), load_matrix(slot, K, K, BK, BK), d_k, input_precision=PRECISION)
        store_tokens(d_k_ptr, d_k, there, rows, K, BK, TILE)
        tl.debug_barrier()
        through = grad_ptr
        if PER_CHUNK > 1:
            through = anchor_ptr
        total = load_matrix(through, K, K, BK, BK)
        k = load_tokens(k_ptr, here, rows, K, BK, TILE)
        total = tl.dot(tl.trans(load_tokens(d_pre_ptr, 0, rows, K, BK, TILE)), k, total, input_precision=PRECISION)
        if SELF_TARGET:
            v = load_tokens(v_ptr, here, rows, K, BK, TILE)
            total = tl.dot(tl.trans(load_tokens(d_target_ptr, 0, rows, K, BK, TILE)), v, total, input_precision=PRECISION)
        store_matrix(through, total, K, K, BK, BK)
        if ERASE and PER_CHUNK > 1:
            d_passed = tl.trans(load_tokens(d_passed_ptr, 0, rows, K, BK, TILE))
            total = tl.dot(d_passed, k, load_matrix(grad_ptr, K, K, BK, BK), input_precision=PRECISION)
            store_matrix(grad_ptr, total, K, K, BK, BK)
        tl.debug_barrier()
        is_reset = False
        if reset_ptr is not None:
            is_reset = tl.load(reset_ptr + row * num_chunks + chunk) != 0
        if (i == anchor) & (is_reset | (PER_CHUNK > 1)):
            _leave_chunk(grad_ptr, anchor_ptr, start_ptr, is_reset, memory, K * K, PER_CHUNK, FLAT)
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
    start: tuple[torch.Tensor, ...] = (),
) -> None:
    """Write the tokens of whole chunks into R = L * S memories, S memories a row: fills slots and signals, moves the current state on.

    k, v [L, T, K]: fp32 or bf16. terms: `chunk_terms.triton_.Terms` of all tiles (y, w, g_prev and g_end are used). states: slots
    tiles.start .. tiles.stop are filled. signals: filled at the tokens of the tiles. commit, reset: uint8 [L, N] or None; a chunk without
    commit leaves the state as it was, a reset chunk begins with start (W2 [R, F, K], W1 [R, K, F]) or (W [R, K, K],), fp32.
    """
    rows, tokens, width = k.shape
    memories, hidden = states.current[0].shape[:2]
    _check(k, v, terms, states, rule=rule, tiling=tiling, tiles=tiles)
    absent = (None,) * len(states.current)
    kept = absent if commit is None else tuple(torch.empty_like(t) for t in states.current)
    moved = (commit, reset, *(start or absent), *kept, *states.weights, *(states.rest or absent), *states.current)
    sizes = (tokens, tiling.num_tiles, tiling.num_chunks, memories // rows, tiles.start, tiles.stop, rule.huber_delta**-2)
    warps = tuning(width=width, hidden=hidden).warps_of("write_forward")
    if rule.memory == "linear":
        _linear_forward[(memories,)](
            k, v, terms.y, terms.g_prev, terms.g_end, *moved, signals.residual, *sizes, **_constants(k, rule, tiling), num_warps=warps
        )
        return
    ids = torch.arange(memories, dtype=torch.int32, device=k.device)
    _mlp_forward[(memories,)](
        ids, k, v, terms.y, terms.w, terms.g_prev, terms.g_end, *moved,
        signals.residual, signals.error, signals.hidden, signals.scale, *sizes,
        **_constants(k, rule, tiling), F=hidden, BF=padded(hidden), num_warps=warps,
    )  # fmt: skip


@dataclass(frozen=True)
class WriteGradients:
    """Gradients of a call of `write_forward`, fp32; filled at its tiles.

    k, v, y [R, T, K], w, g_prev [R, T], g_end [R, NT]: each memory's share; None where the rule does not use the input. current: of the
    state at the start of the first tile. start: of the start, added to what was there; () without resets.
    """

    k: torch.Tensor
    v: torch.Tensor
    y: torch.Tensor
    w: torch.Tensor | None
    g_prev: torch.Tensor | None
    g_end: torch.Tensor
    current: tuple[torch.Tensor, ...]
    start: tuple[torch.Tensor, ...]

    @staticmethod
    def empty(k: torch.Tensor, current: tuple[torch.Tensor, ...], *, rule: MemoryRule, tiling: Tiling, resets: bool) -> "WriteGradients":
        """Room for the gradients of keys k [L, T, K] and memories with states like `current`."""
        memories, device = len(current[0]), k.device
        d_k, d_v, d_y = (torch.empty(memories, *k.shape[1:], dtype=torch.float32, device=device) for _ in range(3))
        narrow = [torch.empty(memories, k.shape[1], dtype=torch.float32, device=device) for _ in range(2)]
        g_end = torch.empty(memories, tiling.num_tiles, dtype=torch.float32, device=device)
        start = tuple(torch.zeros_like(t) for t in current) if resets else ()
        w, g_prev = narrow[0] if rule.memory == "mlp" else None, narrow[1] if rule.erases(0) else None
        return WriteGradients(d_k, d_v, d_y, w, g_prev, g_end, tuple(torch.empty_like(t) for t in current), start)


def write_backward(
    k: torch.Tensor,
    v: torch.Tensor,
    terms,
    states: States,
    signals: Signals,
    d_current: tuple[torch.Tensor, ...],
    *,
    rule: MemoryRule,
    tiling: Tiling,
    tiles: range,
    d_signals: Signals | None = None,
    d_reads: tuple[torch.Tensor, ...] = (),
    read: str = "causal",
    commit: torch.Tensor | None = None,
    reset: torch.Tensor | None = None,
    out: WriteGradients | None = None,
) -> WriteGradients:
    """Backward of `write_forward`, given its arguments after the call (of states the slots only).

    d_current: gradient of the state after the last tile, fp32, shapes of states.current. d_signals: gradients of residual, error and hidden
    from the reads, fp32, each may be None. d_reads: gradients of the weights that the reads of every tile saw, fp32 [R, NT, ...]: with
    read = "causal" those at the start of the tile, with "anchor" those of its chunk; () where nothing reads.
    """
    rows, tokens, width = k.shape
    memories, hidden = d_current[0].shape[:2]
    _check(k, v, terms, states, rule=rule, tiling=tiling, tiles=tiles)
    out = out or WriteGradients.empty(k, d_current, rule=rule, tiling=tiling, resets=reset is not None)
    matrix, block = width * hidden, tiling.tile * hidden
    if rule.memory == "linear":
        sums_size, parked_size = 2 * matrix, matrix + 3 * block
    else:
        sums_size, parked_size = 4 * matrix + block, 2 * matrix + 5 * block + 2 * tiling.tile * width
    sums = torch.empty(memories, sums_size, dtype=torch.float32, device=k.device)
    parked = torch.empty(memories, parked_size, dtype=k.dtype, device=k.device)
    sums[:, : len(d_current) * matrix] = torch.cat([t.flatten(1) for t in d_current], 1)
    from_reads = d_signals or Signals(None)
    absent = (None,) * len(d_current)
    walked = (*(d_reads or absent), sums, parked, *(out.start or absent))
    sizes = (tokens, tiling.num_tiles, tiling.num_chunks, memories // rows, tiles.start, tiles.stop, rule.huber_delta**-2)
    constants = _constants(k, rule, tiling) | {"READS_ANCHOR": read == "anchor"}
    kernel = "write_backward" if rule.memory == "mlp" else "write_linear_backward"
    warps = tuning(width=width, hidden=hidden).warps_of(kernel)
    ids = torch.arange(memories, dtype=torch.int32, device=k.device)
    if rule.memory == "linear":
        _linear_backward[(memories,)](
            ids, k, v, terms.y, terms.g_prev, terms.g_end, commit, reset, *states.weights, *(states.rest or absent),
            signals.residual, from_reads.residual, *walked,
            out.k, out.v, out.y, out.g_prev, out.g_end, *sizes, **constants, num_warps=warps,
        )  # fmt: skip
    else:
        _mlp_backward[(memories,)](
            ids, k, v, terms.y, terms.w, terms.g_prev, terms.g_end, commit, reset, *states.weights, *(states.rest or absent),
            signals.residual, signals.error, signals.hidden, signals.scale,
            from_reads.residual, from_reads.error, from_reads.hidden, *walked,
            out.k, out.v, out.y, out.w, out.g_prev, out.g_end, *sizes, **constants, F=hidden, BF=padded(hidden), num_warps=warps,
        )  # fmt: skip
    for to, found in zip(out.current, sums[:, : len(d_current) * matrix].split(matrix, 1), strict=True):
        to.copy_(found.view_as(to))
    return out


def _check(k: torch.Tensor, v: torch.Tensor, terms, states: States, *, rule: MemoryRule, tiling: Tiling, tiles: range) -> None:
    """Our own mistakes in shapes and layouts."""
    assert supports(rule), rule
    assert k.shape == v.shape and k.dtype == v.dtype == terms.y.dtype and k.shape[1] == tiling.tokens
    assert tiles.start % tiling.per_chunk == 0 and (tiles.stop % tiling.per_chunk == 0 or tiles.stop == tiling.num_tiles)
    assert all(t.shape[1] == tiling.num_tiles + 1 and t.shape[0] % k.shape[0] == 0 and t.dtype == k.dtype for t in states.weights)
    assert all(t.dtype == torch.float32 for t in states.current)
    assert all(t.is_contiguous() for t in (k, v, terms.y, terms.w, terms.g_prev, terms.g_end, *states.weights, *states.current))
