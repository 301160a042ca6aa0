"""The writes of memories with momentum as Triton kernels: one program walks one memory through its tiles, forward or backward.

`write_forward` and `write_backward` are those of `triton_.py` for the terms of `chunk_terms.momentum`. With error signals delta of inputs
k, S the momentum and W the weights of a layer at a tile's start (the anchor's are those at the start of its chunk):

    r = g_prev (k W2^T) + kappa_prev (k S2^T)
    W2' = g_end W2 + kappa_end S2 - r^T y - delta^T y_delta          S2' = mu_total S2 - delta^T (u k)
    W1' = g_end W1 + kappa_end S1 - error^T (w hidden)               S1' = mu_total S1 - error^T (u hidden)

without r where the rule does not erase; a linear memory has the first layer alone. Backward, with G and H the gradients of W' and S' and
"+=" onto what the reads give:

    d_r += -y G2^T          d_delta += -y_delta G2^T - (u k) H2^T       d_y = -r G2           d_y_delta = -delta G2
    d_g_prev = d_r . (k W2^T)        d_kappa_prev = d_r . (k S2^T)      d_k += -u (delta H2) + (g_prev d_r) W2 + (kappa_prev d_r) S2
    d_w = -(hidden G1^T) . error     d_u = -(delta H2) . k - (hidden H1^T) . error
    d_error += -w (hidden G1^T) - u (hidden H1^T)                       d_hidden += -(w error) G1 - (u error) H1
    dW2 = g_end G2 + (g_prev d_r)^T k        dS2 = kappa_end G2 + mu_total H2 + (kappa_prev d_r)^T k
    dW1 = g_end G1                           dS1 = kappa_end G1 + mu_total H1
    d_g_end = <W, G>        d_kappa_end = <S, G>        d_mu_total = <S, H>, each over both layers

The gradient of delta continues to keys, targets and the anchor as without momentum (README.md).

Legend: R = L * S memories (L rows of S memories that share k, v and the terms), T tokens, C tokens of a tile, N chunks, NT tiles,
K head width, F hidden width (K for a linear memory), M matrices of a state: the weights of all layers, then their momenta.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from hope_kernels.blocks_triton import load_matrix, load_scalars, load_tokens, store_matrix, store_scalars, store_tokens
from hope_kernels.chunk_terms.momentum import MomentumTerms
from hope_kernels.memory_write.triton_ import (
    States,
    _bounded,
    _bounded_backward,
    _identity,
    _linear_target,
    _load_gradient,
    _mlp_error,
    _mlp_target,
    _silu,
    _slots,
    _store_slot,
    _tile_rows,
    _unit,
    _unit_backward,
)
from hope_kernels.rule import MemoryRule
from hope_kernels.tiling import Tiling
from hope_kernels.tuning import padded, tuning


class MomentumStates(NamedTuple):
    """States of R memories with momentum along a run of tiles.

    slots [M, R, NT + 1, F * K] in the dtype of the keys: slot i is the state at the start of tile i, after a document's reset. rest: what
    rounding took from the slots, in their shape and dtype, or None. current [M, R, F * K] fp32: the state itself, before a call of
    `write_forward` that at the start of its first tile, afterwards that after its last. shapes: of the M matrices.
    """

    slots: torch.Tensor
    rest: torch.Tensor | None
    current: torch.Tensor
    shapes: tuple[torch.Size, ...]

    @staticmethod
    def at(state: tuple[torch.Tensor, ...], *, tiles: int, dtype: torch.dtype, backward: bool) -> "MomentumStates":
        """Room for `tiles` tiles from a state of M tensors [R, ...] on; backward: whether `write_backward` follows."""
        current = stacked(state)
        count, memories, size = current.shape
        slots = torch.empty(count, memories, tiles + 1, size, dtype=dtype, device=current.device)
        rounded = backward and dtype != torch.float32
        return MomentumStates(slots, torch.empty_like(slots) if rounded else None, current, tuple(t.shape[1:] for t in state))

    def split(self, stack: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The M tensors [R, ...] of a stack like `current`, copied."""
        return tuple(t.unflatten(1, shape).clone() for t, shape in zip(stack, self.shapes, strict=True))

    def seen(self) -> tuple[States, tuple[torch.Tensor, ...]]:
        """(weights, momenta) of all slots, [R, NT + 1, ...] each, as the reads take them."""
        matrices = tuple(t.unflatten(2, shape) for t, shape in zip(self.slots, self.shapes, strict=True))
        layers = len(matrices) // 2
        return States(matrices[:layers], ()), matrices[layers:]


def stacked(state: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """M tensors [R, ...] of as many numbers each as fp32 [M, R, F * K], copied."""
    return torch.stack([t.flatten(1).float() for t in state])


@dataclass(frozen=True)
class MomentumSignals:
    """What the writes leave for the reads and for backward, in the dtype of the keys.

    residual [R, T, F]: r, None where the rule does not erase. delta [R, T, F], error [R, T, K] and hidden [R, T, F] at the anchor; scale
    [R, T] fp32: factor that bounded the error. A linear memory has no error, hidden and scale. As gradients fp32, None for zero.
    """

    residual: torch.Tensor | None = None
    delta: torch.Tensor | None = None
    error: torch.Tensor | None = None
    hidden: torch.Tensor | None = None
    scale: torch.Tensor | None = None

    @staticmethod
    def empty(rule: MemoryRule, k: torch.Tensor, *, memories: int, hidden: int) -> "MomentumSignals":
        """Uninitialised signals of memories with keys k [L, T, K] and F = hidden."""
        tokens, width = k.shape[1:]
        room = lambda *shape: torch.empty(memories, tokens, *shape, dtype=k.dtype, device=k.device)  # noqa: E731
        residual, delta = room(hidden) if rule.erases(0) else None, room(hidden)
        if rule.memory == "linear":
            return MomentumSignals(residual, delta)
        scale = torch.empty(memories, tokens, dtype=torch.float32, device=k.device)
        return MomentumSignals(residual, delta, room(width), room(hidden), scale)


@triton.jit
def _slot(slots_ptr, matrix, tile, num_tiles, SIZE: tl.constexpr):
    """Pointer to a matrix at the start of a tile; `matrix` counts those of all memories."""
    return slots_ptr + (matrix * (num_tiles + 1) + tile) * SIZE


@triton.jit
def _tokens(ids_ptr, memories_per_row, tokens, first):
    """The memory, and the tile's first token among all rows and among all memories.

    Asked anew for every part of a tile, as addresses that hold for the whole tile would fill the registers.
    """
    memory, row = _identity(ids_ptr, memories_per_row)
    return memory, row * tokens + first, memory * tokens + first


@triton.jit
def _places(ids_ptr, parked_ptr, part_ptr, memories_per_row, tokens, first, PARKED: tl.constexpr, PART: tl.constexpr):
    """The same, and the memory's blocks of scratch."""
    memory, here, there = _tokens(ids_ptr, memories_per_row, tokens, first)
    return memory, here, there, parked_ptr + memory * PARKED, part_ptr + memory * PART


@triton.jit
def _move(
    source_ptr, to_ptr, slots_ptr, rest_ptr, memory, tile, num_tiles, COUNT: tl.constexpr, SIZE: tl.constexpr, FLAT: tl.constexpr,
):  # fmt: skip
    """All matrices of a memory from one stack [M, R, SIZE] to another, and to slot `tile` where there are slots; FLAT numbers at a time."""
    for which in tl.range(0, COUNT, num_stages=1):
        matrix = which * tl.num_programs(0) + memory
        for start in tl.range(0, SIZE, FLAT, num_stages=1):
            at = start + tl.arange(0, FLAT)
            inside = at < SIZE
            value = tl.load(source_ptr + matrix * SIZE + at, inside, 0.0)
            tl.store(to_ptr + matrix * SIZE + at, value, inside)
            if slots_ptr is not None:
                slot, rest = _slots(slots_ptr, rest_ptr, matrix * (num_tiles + 1) + tile, SIZE)
                low = value.to(slot.dtype.element_ty)
                tl.store(slot + at, low, inside)
                if rest is not None:
                    tl.store(rest + at, (value - low.to(tl.float32)).to(rest.dtype.element_ty), inside)


@triton.jit
def _decay(current_ptr, matrix, slow, g_end, kappa_end, mu, SIZE: tl.constexpr, FLAT: tl.constexpr):
    """What a tile leaves of a layer's W and S: g_end W + kappa_end S and mu S; FLAT numbers at a time."""
    for start in tl.range(0, SIZE, FLAT, num_stages=1):
        at = start + tl.arange(0, FLAT)
        inside = at < SIZE
        weight = tl.load(current_ptr + matrix * SIZE + at, inside, 0.0)
        momentum = tl.load(current_ptr + slow * SIZE + at, inside, 0.0)
        tl.store(current_ptr + matrix * SIZE + at, weight * g_end + momentum * kappa_end, inside)
        tl.store(current_ptr + slow * SIZE + at, momentum * mu, inside)


@triton.jit
def _write(
    current_ptr, slots_ptr, rest_ptr, written, matrix, tile, num_tiles,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    """Take `written` from a matrix of the current state; the result goes to a slot too."""
    now_ptr = current_ptr + matrix * (ROWS * COLUMNS)
    value = load_matrix(now_ptr, ROWS, COLUMNS, BLOCK_ROWS, BLOCK_COLUMNS) - written
    tl.debug_barrier()
    slot, rest = _slots(slots_ptr, rest_ptr, matrix * (num_tiles + 1) + tile, ROWS * COLUMNS)
    store_matrix(now_ptr, value, ROWS, COLUMNS, BLOCK_ROWS, BLOCK_COLUMNS)
    _store_slot(slot, rest, value, ROWS, COLUMNS, BLOCK_ROWS, BLOCK_COLUMNS)
    tl.debug_barrier()


@triton.jit(do_not_specialize=["first_tile", "end_tile"])
def _forward(
    ids_ptr, k_ptr, v_ptr, y_ptr, y_delta_ptr, w_ptr, u_ptr, g_prev_ptr, kappa_prev_ptr, g_end_ptr, kappa_end_ptr, mu_ptr,
    commit_ptr, reset_ptr, start_ptr, kept_ptr, slots_ptr, rest_ptr, current_ptr, residual_ptr, delta_ptr, error_ptr, hidden_ptr, scale_ptr,
    tokens, num_tiles, num_chunks, memories_per_row, first_tile, end_tile, inverse_square,
    K: tl.constexpr, F: tl.constexpr, BK: tl.constexpr, BF: tl.constexpr,
    CHUNK: tl.constexpr, TILE: tl.constexpr, PER_CHUNK: tl.constexpr, LAYERS: tl.constexpr,
    HUBER: tl.constexpr, ERASE: tl.constexpr, NORMALIZE: tl.constexpr, SELF_TARGET: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The tiles first_tile .. end_tile of one memory: signals, the current state, and the slots it passes through."""
    dtype = k_ptr.dtype.element_ty
    SIZE: tl.constexpr = F * K
    FLAT: tl.constexpr = min(BF * BK, 2048)
    memories = tl.num_programs(0)
    memory, row = _identity(ids_ptr, memories_per_row)
    _move(current_ptr, current_ptr, slots_ptr, rest_ptr, memory, first_tile, num_tiles, 2 * LAYERS, SIZE, FLAT)
    tl.debug_barrier()
    i = first_tile
    while i < end_tile:  # not `for`: out of one Triton hoists the accumulators of all products, too many for Blackwell
        chunk, anchor, first, rows, is_last = _tile_rows(i, tokens, CHUNK, TILE, PER_CHUNK)
        memory, row = _identity(ids_ptr, memories_per_row)
        here, there = row * tokens + first, memory * tokens + first
        if reset_ptr is not None:
            if (i == anchor) & (tl.load(reset_ptr + row * num_chunks + chunk) != 0):
                _move(start_ptr, current_ptr, slots_ptr, rest_ptr, memory, i, num_tiles, 2 * LAYERS, SIZE, FLAT)
            tl.debug_barrier()
        if commit_ptr is not None:
            skipped = tl.load(commit_ptr + row * num_chunks + chunk) == 0
            if (i == anchor) & skipped:
                _move(current_ptr, kept_ptr, None, None, memory, i, num_tiles, 2 * LAYERS, SIZE, FLAT)
            tl.debug_barrier()
        g_end = tl.load(g_end_ptr + row * num_tiles + i)
        kappa_end = tl.load(kappa_end_ptr + row * num_tiles + i)
        mu = tl.load(mu_ptr + row * num_tiles + i)
        # the signals, at the anchor
        a2 = load_matrix(_slot(slots_ptr, memory, anchor, num_tiles, SIZE), F, K, BF, BK)
        k = load_tokens(k_ptr, here, rows, K, BK, TILE)
        if LAYERS == 2:
            a1 = load_matrix(_slot(slots_ptr, memories + memory, anchor, num_tiles, SIZE), K, F, BK, BF)
            hidden, _, _ = _silu(tl.dot(k, tl.trans(a2), input_precision=PRECISION))
            store_tokens(hidden_ptr, hidden, there, rows, F, BF, TILE)
            error, scale = _mlp_error(
                k_ptr, v_ptr, hidden, a2, a1, here, rows, inverse_square, K, BK, TILE, HUBER, NORMALIZE, SELF_TARGET, PRECISION
            )
            store_tokens(error_ptr, error, there, rows, K, BK, TILE)
            store_scalars(scale_ptr, scale, there, rows, TILE)
            tl.debug_barrier()
            memory, here, there = _tokens(ids_ptr, memories_per_row, tokens, first)
            a1 = load_matrix(_slot(slots_ptr, memories + memory, anchor, num_tiles, SIZE), K, F, BK, BF)
            back = tl.dot(load_tokens(error_ptr, there, rows, K, BK, TILE), a1, input_precision=PRECISION)
            k = load_tokens(k_ptr, here, rows, K, BK, TILE)
            a2 = load_matrix(_slot(slots_ptr, memory, anchor, num_tiles, SIZE), F, K, BF, BK)
            _, slope, _ = _silu(tl.dot(k, tl.trans(a2), input_precision=PRECISION))
            delta, _ = _bounded(back * slope, inverse_square, HUBER)
        else:
            v = load_tokens(v_ptr, here, rows, K, BK, TILE)
            target, _ = _linear_target(v, a2, NORMALIZE, SELF_TARGET, PRECISION)
            delta, _ = _bounded(tl.dot(k, tl.trans(a2), input_precision=PRECISION) - target, inverse_square, HUBER)
        store_tokens(delta_ptr, delta, there, rows, F, BF, TILE)
        tl.debug_barrier()
        if ERASE:
            memory, here, there = _tokens(ids_ptr, memories_per_row, tokens, first)
            k = load_tokens(k_ptr, here, rows, K, BK, TILE)
            w2 = load_matrix(_slot(slots_ptr, memory, i, num_tiles, SIZE), F, K, BF, BK)
            residual = tl.dot(k, tl.trans(w2), input_precision=PRECISION) * load_scalars(g_prev_ptr, here, rows, TILE)[:, None]
            s2 = load_matrix(_slot(slots_ptr, LAYERS * memories + memory, i, num_tiles, SIZE), F, K, BF, BK)
            carried = tl.dot(k, tl.trans(s2), input_precision=PRECISION)
            residual += carried * load_scalars(kappa_prev_ptr, here, rows, TILE)[:, None]
            store_tokens(residual_ptr, residual, there, rows, F, BF, TILE)
            tl.debug_barrier()
        # the state
        memory, here, there = _tokens(ids_ptr, memories_per_row, tokens, first)
        slow = LAYERS * memories + memory
        _decay(current_ptr, memory, slow, g_end, kappa_end, mu, SIZE, FLAT)
        if LAYERS == 2:
            _decay(current_ptr, memories + memory, memories + slow, g_end, kappa_end, mu, SIZE, FLAT)
        tl.debug_barrier()
        delta = tl.trans(load_tokens(delta_ptr, there, rows, F, BF, TILE))
        y = load_tokens(y_delta_ptr, here, rows, K, BK, TILE)
        written = tl.dot(delta, y, input_precision=PRECISION)
        if ERASE:
            residual = tl.trans(load_tokens(residual_ptr, there, rows, F, BF, TILE))
            y = load_tokens(y_ptr, here, rows, K, BK, TILE)
            written = tl.dot(residual, y, written, input_precision=PRECISION)
        _write(current_ptr, slots_ptr, rest_ptr, written, memory, i + 1, num_tiles, F, K, BF, BK)
        memory, here, there = _tokens(ids_ptr, memories_per_row, tokens, first)
        key = load_tokens(k_ptr, here, rows, K, BK, TILE).to(tl.float32)
        paced = (key * load_scalars(u_ptr, here, rows, TILE)[:, None]).to(dtype)
        delta = tl.trans(load_tokens(delta_ptr, there, rows, F, BF, TILE))
        written = tl.dot(delta, paced, input_precision=PRECISION)
        _write(current_ptr, slots_ptr, rest_ptr, written, LAYERS * memories + memory, i + 1, num_tiles, F, K, BF, BK)
        if LAYERS == 2:
            memory, here, there = _tokens(ids_ptr, memories_per_row, tokens, first)
            error = tl.trans(load_tokens(error_ptr, there, rows, K, BK, TILE))
            hidden = load_tokens(hidden_ptr, there, rows, F, BF, TILE).to(tl.float32)
            paced = (hidden * load_scalars(w_ptr, here, rows, TILE)[:, None]).to(dtype)
            written = tl.dot(error, paced, input_precision=PRECISION)
            _write(current_ptr, slots_ptr, rest_ptr, written, memories + memory, i + 1, num_tiles, K, F, BK, BF)
            memory, here, there = _tokens(ids_ptr, memories_per_row, tokens, first)
            error = tl.trans(load_tokens(error_ptr, there, rows, K, BK, TILE))
            hidden = load_tokens(hidden_ptr, there, rows, F, BF, TILE).to(tl.float32)
            paced = (hidden * load_scalars(u_ptr, here, rows, TILE)[:, None]).to(dtype)
            written = tl.dot(error, paced, input_precision=PRECISION)
            _write(current_ptr, slots_ptr, rest_ptr, written, (LAYERS + 1) * memories + memory, i + 1, num_tiles, K, F, BK, BF)
        if commit_ptr is not None:
            if is_last & skipped:
                _move(kept_ptr, current_ptr, slots_ptr, rest_ptr, memory, i + 1, num_tiles, 2 * LAYERS, SIZE, FLAT)
            tl.debug_barrier()
        i += 1


@triton.jit
def _enter_layer(
    grads_ptr, low_ptr, anchors_ptr, slots_ptr, rest_ptr, read, slow_read, matrix, slow, tile, num_tiles,
    g_end, kappa_end, mu, live, is_last,
    SIZE: tl.constexpr, PER_CHUNK: tl.constexpr, READS_ANCHOR: tl.constexpr, FLAT: tl.constexpr,
):  # fmt: skip
    """Begin the backward pass of a tile for one layer's W and S, from the gradients of both after it; FLAT numbers at a time.

    `low` becomes the gradients of what the tile wrote (zero where `live` is 0: nothing was committed), `grads` those of the current W and S
    as far as they do not go through products, `anchors` in chunks of several tiles those of what reads saw, or of what was kept without
    commit, at the start of the chunk. Returns the gradients of g_end, kappa_end and mu_total.
    """
    d_g_end, d_kappa_end, d_mu = 0.0, 0.0, 0.0
    slot, rest = _slots(slots_ptr, rest_ptr, matrix * (num_tiles + 1) + tile, SIZE)
    slow_slot, slow_rest = _slots(slots_ptr, rest_ptr, slow * (num_tiles + 1) + tile, SIZE)
    for start in tl.range(0, SIZE, FLAT, num_stages=1):
        at = start + tl.arange(0, FLAT)
        inside = at < SIZE
        grad = tl.load(grads_ptr + matrix * SIZE + at, inside, 0.0)
        slow_grad = tl.load(grads_ptr + slow * SIZE + at, inside, 0.0)
        written, slow_written = grad * live, slow_grad * live
        tl.store(low_ptr + matrix * SIZE + at, written.to(low_ptr.dtype.element_ty), inside)
        tl.store(low_ptr + slow * SIZE + at, slow_written.to(low_ptr.dtype.element_ty), inside)
        weight = tl.load(slot + at, inside, 0.0).to(tl.float32)
        momentum = tl.load(slow_slot + at, inside, 0.0).to(tl.float32)
        if rest is not None:
            weight += tl.load(rest + at, inside, 0.0).to(tl.float32)
            momentum += tl.load(slow_rest + at, inside, 0.0).to(tl.float32)
        d_g_end += tl.sum(written * weight, 0)
        d_kappa_end += tl.sum(written * momentum, 0)
        d_mu += tl.sum(slow_written * momentum, 0)
        kept, slow_kept = written * g_end, slow_written * mu + written * kappa_end
        through, slow_through = grad * (1 - live), slow_grad * (1 - live)
        if PER_CHUNK > 1:
            if not is_last:
                through = tl.load(anchors_ptr + matrix * SIZE + at, inside, 0.0)
                slow_through = tl.load(anchors_ptr + slow * SIZE + at, inside, 0.0)
            if READS_ANCHOR and read is not None:
                through += tl.load(read + at, inside, 0.0)
            tl.store(anchors_ptr + matrix * SIZE + at, through, inside)
            tl.store(anchors_ptr + slow * SIZE + at, slow_through, inside)
        else:
            kept += through
            slow_kept += slow_through
        if (PER_CHUNK == 1 or not READS_ANCHOR) and read is not None:
            kept += tl.load(read + at, inside, 0.0)
        if slow_read is not None:
            slow_kept += tl.load(slow_read + at, inside, 0.0)
        tl.store(grads_ptr + matrix * SIZE + at, kept, inside)
        tl.store(grads_ptr + slow * SIZE + at, slow_kept, inside)
    return d_g_end, d_kappa_end, d_mu


@triton.jit
def _leave_chunk(
    grads_ptr, anchors_ptr, starts_ptr, is_reset, memory, COUNT: tl.constexpr, SIZE: tl.constexpr, PER_CHUNK: tl.constexpr,
    FLAT: tl.constexpr,
):  # fmt: skip
    """End the backward pass of a chunk: the current state was the anchor, and after a reset the start."""
    for which in tl.range(0, COUNT, num_stages=1):
        matrix = (which * tl.num_programs(0) + memory) * SIZE
        for start in tl.range(0, SIZE, FLAT, num_stages=1):
            at = matrix + start + tl.arange(0, FLAT)
            inside = start + tl.arange(0, FLAT) < SIZE
            value = tl.load(grads_ptr + at, inside, 0.0)
            if PER_CHUNK > 1:
                value += tl.load(anchors_ptr + at, inside, 0.0)
            if starts_ptr is not None:
                if is_reset:
                    tl.store(starts_ptr + at, value + tl.load(starts_ptr + at, inside, 0.0), inside)
                    value = tl.zeros_like(value)
            tl.store(grads_ptr + at, value, inside)


@triton.jit(do_not_specialize=["first_tile", "end_tile"])
def _backward(
    ids_ptr, k_ptr, v_ptr, y_ptr, y_delta_ptr, w_ptr, u_ptr, g_prev_ptr, kappa_prev_ptr, g_end_ptr, kappa_end_ptr, mu_ptr,
    commit_ptr, reset_ptr, slots_ptr, rest_ptr, residual_ptr, delta_ptr, error_ptr, hidden_ptr, scale_ptr,
    in_residual_ptr, in_delta_ptr, in_error_ptr, in_hidden_ptr, read2_ptr, read1_ptr, slow_read2_ptr, slow_read1_ptr,
    grads_ptr, starts_ptr, anchors_ptr, low_ptr, part_ptr, parked_ptr,
    d_k_ptr, d_v_ptr, d_y_ptr, d_y_delta_ptr, d_w_ptr, d_u_ptr, d_g_prev_ptr, d_kappa_prev_ptr, d_g_end_ptr, d_kappa_end_ptr, d_mu_ptr,
    tokens, num_tiles, num_chunks, memories_per_row, first_tile, end_tile, inverse_square,
    K: tl.constexpr, F: tl.constexpr, BK: tl.constexpr, BF: tl.constexpr,
    CHUNK: tl.constexpr, TILE: tl.constexpr, PER_CHUNK: tl.constexpr, LAYERS: tl.constexpr, READS_ANCHOR: tl.constexpr,
    HUBER: tl.constexpr, ERASE: tl.constexpr, NORMALIZE: tl.constexpr, SELF_TARGET: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The tiles of one memory in reverse.

    Between its products a tile lives in memory: `part`, fp32, has three blocks [TILE, F] a memory, `parked` six and two [TILE, K] in
    the dtype of the keys; `low` the gradients of the matrices as operands.
    """
    dtype = k_ptr.dtype.element_ty
    SIZE: tl.constexpr = F * K
    FLAT: tl.constexpr = min(BF * BK, 2048)
    PARKED: tl.constexpr = TILE * (6 * F + 2 * K)
    PART: tl.constexpr = 3 * TILE * F
    D_BACK: tl.constexpr = 0
    D_PRE: tl.constexpr = TILE * F
    D_PASSED: tl.constexpr = 2 * TILE * F
    D_CARRIED: tl.constexpr = 3 * TILE * F
    D_PRE_V: tl.constexpr = 4 * TILE * F
    INNER: tl.constexpr = 5 * TILE * F
    D_ERROR: tl.constexpr = 6 * TILE * F
    D_TARGET: tl.constexpr = D_ERROR + TILE * K
    memories = tl.num_programs(0)
    i = end_tile
    while i > first_tile:
        i -= 1
        chunk, anchor, first, rows, is_last = _tile_rows(i, tokens, CHUNK, TILE, PER_CHUNK)
        memory, row = _identity(ids_ptr, memories_per_row)
        slow = LAYERS * memories + memory
        g_end = tl.load(g_end_ptr + row * num_tiles + i)
        kappa_end = tl.load(kappa_end_ptr + row * num_tiles + i)
        mu = tl.load(mu_ptr + row * num_tiles + i)
        live = 1.0
        if commit_ptr is not None:
            if is_last & (tl.load(commit_ptr + row * num_chunks + chunk) == 0):
                live = 0.0
        reads = (memory * num_tiles + i) * SIZE
        read, slow_read = None, None
        if read2_ptr is not None:
            read = read2_ptr + reads
        if slow_read2_ptr is not None:
            slow_read = slow_read2_ptr + reads
        d_g_end, d_kappa_end, d_mu = _enter_layer(
            grads_ptr, low_ptr, anchors_ptr, slots_ptr, rest_ptr, read, slow_read, memory, slow, i, num_tiles,
            g_end, kappa_end, mu, live, is_last, SIZE, PER_CHUNK, READS_ANCHOR, FLAT,
        )  # fmt: skip
        if LAYERS == 2:
            outer_read, outer_slow_read = None, None
            if read1_ptr is not None:
                outer_read = read1_ptr + reads
            if slow_read1_ptr is not None:
                outer_slow_read = slow_read1_ptr + reads
            more_g_end, more_kappa_end, more_mu = _enter_layer(
                grads_ptr, low_ptr, anchors_ptr, slots_ptr, rest_ptr, outer_read, outer_slow_read, memories + memory, memories + slow,
                i, num_tiles, g_end, kappa_end, mu, live, is_last, SIZE, PER_CHUNK, READS_ANCHOR, FLAT,
            )  # fmt: skip
            d_g_end, d_kappa_end, d_mu = d_g_end + more_g_end, d_kappa_end + more_kappa_end, d_mu + more_mu
        tl.store(d_g_end_ptr + memory * num_tiles + i, d_g_end)
        tl.store(d_kappa_end_ptr + memory * num_tiles + i, d_kappa_end)
        tl.store(d_mu_ptr + memory * num_tiles + i, d_mu)
        tl.debug_barrier()
        if ERASE:  # r = g_prev (k W2^T) + kappa_prev (k S2^T), W2' = ... - r^T y
            memory, here, there, blocks, part = _places(ids_ptr, parked_ptr, part_ptr, memories_per_row, tokens, first, PARKED, PART)
            low2 = load_matrix(low_ptr + memory * SIZE, F, K, BF, BK)
            residual = load_tokens(residual_ptr, there, rows, F, BF, TILE)
            store_tokens(d_y_ptr, -tl.dot(residual, low2, input_precision=PRECISION), there, rows, K, BK, TILE)
            y = load_tokens(y_ptr, here, rows, K, BK, TILE)
            d_residual = _load_gradient(in_residual_ptr, there, rows, F, BF, TILE)
            d_residual -= tl.dot(y, tl.trans(low2), input_precision=PRECISION)
            d_passed = d_residual * load_scalars(g_prev_ptr, here, rows, TILE)[:, None]
            store_tokens(blocks + D_PASSED, d_passed, 0, rows, F, BF, TILE)
            d_carried = d_residual * load_scalars(kappa_prev_ptr, here, rows, TILE)[:, None]
            store_tokens(blocks + D_CARRIED, d_carried, 0, rows, F, BF, TILE)
            store_tokens(part, d_residual, 0, rows, F, BF, TILE)
            tl.debug_barrier()
            memory, here, there, blocks, part = _places(ids_ptr, parked_ptr, part_ptr, memories_per_row, tokens, first, PARKED, PART)
            k = load_tokens(k_ptr, here, rows, K, BK, TILE)
            w2 = load_matrix(_slot(slots_ptr, memory, i, num_tiles, SIZE), F, K, BF, BK)
            passed = tl.dot(k, tl.trans(w2), input_precision=PRECISION)
            d_residual = load_tokens(part, 0, rows, F, BF, TILE)
            store_scalars(d_g_prev_ptr, tl.sum(d_residual * passed, 1), there, rows, TILE)
            s2 = load_matrix(_slot(slots_ptr, LAYERS * memories + memory, i, num_tiles, SIZE), F, K, BF, BK)
            carried = tl.dot(k, tl.trans(s2), input_precision=PRECISION)
            store_scalars(d_kappa_prev_ptr, tl.sum(d_residual * carried, 1), there, rows, TILE)
            tl.debug_barrier()
        # W2' = ... - delta^T y_delta, S2' = ... - delta^T (u k)
        memory, here, there, blocks, part = _places(ids_ptr, parked_ptr, part_ptr, memories_per_row, tokens, first, PARKED, PART)
        delta = load_tokens(delta_ptr, there, rows, F, BF, TILE)
        low2 = load_matrix(low_ptr + memory * SIZE, F, K, BF, BK)
        store_tokens(d_y_delta_ptr, -tl.dot(delta, low2, input_precision=PRECISION), there, rows, K, BK, TILE)
        slow_low2 = load_matrix(low_ptr + (LAYERS * memories + memory) * SIZE, F, K, BF, BK)
        through = tl.dot(delta, slow_low2, input_precision=PRECISION)
        key = load_tokens(k_ptr, here, rows, K, BK, TILE).to(tl.float32)
        store_scalars(d_u_ptr, -tl.sum(through * key, 1), there, rows, TILE)
        store_tokens(d_k_ptr, -(through * load_scalars(u_ptr, here, rows, TILE)[:, None]), there, rows, K, BK, TILE)
        tl.debug_barrier()
        memory, here, there, blocks, part = _places(ids_ptr, parked_ptr, part_ptr, memories_per_row, tokens, first, PARKED, PART)
        low2 = load_matrix(low_ptr + memory * SIZE, F, K, BF, BK)
        d_delta = tl.dot(load_tokens(y_delta_ptr, here, rows, K, BK, TILE), tl.trans(low2), input_precision=PRECISION)
        key = load_tokens(k_ptr, here, rows, K, BK, TILE).to(tl.float32)
        paced = (key * load_scalars(u_ptr, here, rows, TILE)[:, None]).to(dtype)
        slow_low2 = load_matrix(low_ptr + (LAYERS * memories + memory) * SIZE, F, K, BF, BK)
        d_delta = tl.dot(paced, tl.trans(slow_low2), d_delta, input_precision=PRECISION)
        d_delta = _load_gradient(in_delta_ptr, there, rows, F, BF, TILE) - d_delta
        store_tokens(part, d_delta, 0, rows, F, BF, TILE)
        tl.debug_barrier()
        memory, here, there, blocks, part = _places(ids_ptr, parked_ptr, part_ptr, memories_per_row, tokens, first, PARKED, PART)
        a2 = load_matrix(_slot(slots_ptr, memory, anchor, num_tiles, SIZE), F, K, BF, BK)
        k = load_tokens(k_ptr, here, rows, K, BK, TILE)
        pre = tl.dot(k, tl.trans(a2), input_precision=PRECISION)
        if LAYERS == 1:
            # delta = bounded(pre - target)
            v = load_tokens(v_ptr, here, rows, K, BK, TILE)
            target, target_scale = _linear_target(v, a2, NORMALIZE, SELF_TARGET, PRECISION)
            delta, scale = _bounded(pre - target, inverse_square, HUBER)
            d_pre = _bounded_backward(load_tokens(part, 0, rows, F, BF, TILE), delta, scale, inverse_square, HUBER)
            store_tokens(blocks + D_PRE, d_pre, 0, rows, F, BF, TILE)
            d_target = _unit_backward(-d_pre, target, target_scale, NORMALIZE)
            if SELF_TARGET:
                store_tokens(blocks + D_PRE_V, d_target, 0, rows, F, BF, TILE)
            else:
                store_tokens(d_v_ptr, d_target, there, rows, K, BK, TILE)
        else:
            # delta = bounded(back slope), back = error W1
            a1 = load_matrix(_slot(slots_ptr, memories + memory, anchor, num_tiles, SIZE), K, F, BK, BF)
            store_tokens(part + TILE * F, pre, 0, rows, F, BF, TILE)
            back = tl.dot(load_tokens(error_ptr, there, rows, K, BK, TILE), a1, input_precision=PRECISION)
            store_tokens(part + 2 * TILE * F, back, 0, rows, F, BF, TILE)
            tl.debug_barrier()
            # loaded, not as they leave the products: eight warps hold those of 64 rows twice
            _, slope, curvature = _silu(load_tokens(part + TILE * F, 0, rows, F, BF, TILE))
            back = load_tokens(part + 2 * TILE * F, 0, rows, F, BF, TILE)
            delta, delta_scale = _bounded(back * slope, inverse_square, HUBER)
            d_inner = load_tokens(part, 0, rows, F, BF, TILE)
            d_inner = _bounded_backward(d_inner, delta, delta_scale, inverse_square, HUBER)
            tl.debug_barrier()
            store_tokens(blocks + D_BACK, d_inner * slope, 0, rows, F, BF, TILE)
            store_tokens(part, d_inner * back * curvature, 0, rows, F, BF, TILE)
            tl.debug_barrier()
            # W1' = ... - error^T (w hidden), S1' = ... - error^T (u hidden), error = bounded(k + W1 hidden - target)
            memory, here, there, blocks, part = _places(ids_ptr, parked_ptr, part_ptr, memories_per_row, tokens, first, PARKED, PART)
            hidden = load_tokens(hidden_ptr, there, rows, F, BF, TILE)
            low1 = load_matrix(low_ptr + (memories + memory) * SIZE, K, F, BK, BF)
            through = tl.dot(hidden, tl.trans(low1), input_precision=PRECISION)
            error = load_tokens(error_ptr, there, rows, K, BK, TILE).to(tl.float32)
            store_scalars(d_w_ptr, -tl.sum(through * error, 1), there, rows, TILE)
            d_error = _load_gradient(in_error_ptr, there, rows, K, BK, TILE)
            d_error -= through * load_scalars(w_ptr, here, rows, TILE)[:, None]
            slow_low1 = load_matrix(low_ptr + ((LAYERS + 1) * memories + memory) * SIZE, K, F, BK, BF)
            through = tl.dot(hidden, tl.trans(slow_low1), input_precision=PRECISION)
            d_u = load_scalars(d_u_ptr, there, rows, TILE) - tl.sum(through * error, 1)
            d_error -= through * load_scalars(u_ptr, here, rows, TILE)[:, None]
            tl.debug_barrier()
            store_scalars(d_u_ptr, d_u, there, rows, TILE)
            store_tokens(d_v_ptr, d_error, there, rows, K, BK, TILE)
            tl.debug_barrier()
            memory, here, there, blocks, part = _places(ids_ptr, parked_ptr, part_ptr, memories_per_row, tokens, first, PARKED, PART)
            a1 = load_matrix(_slot(slots_ptr, memories + memory, anchor, num_tiles, SIZE), K, F, BK, BF)
            d_back = load_tokens(blocks + D_BACK, 0, rows, F, BF, TILE)
            d_error = tl.dot(d_back, tl.trans(a1), input_precision=PRECISION)
            d_error += load_tokens(d_v_ptr, there, rows, K, BK, TILE)
            error = load_tokens(error_ptr, there, rows, K, BK, TILE).to(tl.float32)
            d_error = _bounded_backward(d_error, error, load_scalars(scale_ptr, there, rows, TILE), inverse_square, HUBER)
            d_k = load_tokens(d_k_ptr, there, rows, K, BK, TILE) + d_error
            tl.debug_barrier()
            store_tokens(d_k_ptr, d_k, there, rows, K, BK, TILE)
            store_tokens(blocks + D_ERROR, d_error, 0, rows, K, BK, TILE)
            d_target = -d_error
            if not SELF_TARGET:
                target, target_scale = _unit(load_tokens(v_ptr, here, rows, K, BK, TILE).to(tl.float32), NORMALIZE)
                d_target = _unit_backward(d_target, target, target_scale, NORMALIZE)
            store_tokens(d_v_ptr, d_target, there, rows, K, BK, TILE)
            tl.debug_barrier()
            if SELF_TARGET and NORMALIZE:
                memory, here, there, blocks, part = _places(
                    ids_ptr, parked_ptr, part_ptr, memories_per_row, tokens, first, PARKED, TILE * F
                )
                v = load_tokens(v_ptr, here, rows, K, BK, TILE)
                a2 = load_matrix(_slot(slots_ptr, memory, anchor, num_tiles, SIZE), F, K, BF, BK)
                a1 = load_matrix(_slot(slots_ptr, memories + memory, anchor, num_tiles, SIZE), K, F, BK, BF)
                hidden_v, _, _ = _silu(tl.dot(v, tl.trans(a2), input_precision=PRECISION))
                store_tokens(blocks + INNER, hidden_v, 0, rows, F, BF, TILE)
                target, target_scale = _mlp_target(v, hidden_v, a1, NORMALIZE, SELF_TARGET, PRECISION)
                d_target = load_tokens(d_v_ptr, there, rows, K, BK, TILE)
                d_target = _unit_backward(d_target, target, target_scale, NORMALIZE)
                tl.debug_barrier()
                store_tokens(blocks + D_TARGET, d_target, 0, rows, K, BK, TILE)
                store_tokens(d_v_ptr, d_target, there, rows, K, BK, TILE)
                tl.debug_barrier()
            if SELF_TARGET:
                memory, here, there, blocks, part = _places(
                    ids_ptr, parked_ptr, part_ptr, memories_per_row, tokens, first, PARKED, TILE * F
                )
                v = load_tokens(v_ptr, here, rows, K, BK, TILE)
                a2 = load_matrix(_slot(slots_ptr, memory, anchor, num_tiles, SIZE), F, K, BF, BK)
                hidden_v, slope_v, _ = _silu(tl.dot(v, tl.trans(a2), input_precision=PRECISION))
                a1 = load_matrix(_slot(slots_ptr, memories + memory, anchor, num_tiles, SIZE), K, F, BK, BF)
                if NORMALIZE:
                    d_hidden_v = tl.dot(load_tokens(blocks + D_TARGET, 0, rows, K, BK, TILE), a1, input_precision=PRECISION)
                else:
                    d_hidden_v = -tl.dot(load_tokens(blocks + D_ERROR, 0, rows, K, BK, TILE), a1, input_precision=PRECISION)
                    hidden = load_tokens(hidden_ptr, there, rows, F, BF, TILE).to(tl.float32)
                    store_tokens(blocks + INNER, hidden - hidden_v, 0, rows, F, BF, TILE)
                store_tokens(blocks + D_PRE_V, d_hidden_v * slope_v, 0, rows, F, BF, TILE)
                tl.debug_barrier()
            memory, here, there, blocks, part = _places(ids_ptr, parked_ptr, part_ptr, memories_per_row, tokens, first, PARKED, PART)
            a1 = load_matrix(_slot(slots_ptr, memories + memory, anchor, num_tiles, SIZE), K, F, BK, BF)
            d_hidden = tl.dot(load_tokens(blocks + D_ERROR, 0, rows, K, BK, TILE), a1, input_precision=PRECISION)
            error = load_tokens(error_ptr, there, rows, K, BK, TILE).to(tl.float32)
            paced = (error * -load_scalars(w_ptr, here, rows, TILE)[:, None]).to(dtype)
            low1 = load_matrix(low_ptr + (memories + memory) * SIZE, K, F, BK, BF)
            d_hidden = tl.dot(paced, low1, d_hidden, input_precision=PRECISION)
            paced = (error * -load_scalars(u_ptr, here, rows, TILE)[:, None]).to(dtype)
            slow_low1 = load_matrix(low_ptr + ((LAYERS + 1) * memories + memory) * SIZE, K, F, BK, BF)
            d_hidden = tl.dot(paced, slow_low1, d_hidden, input_precision=PRECISION)
            store_tokens(part + TILE * F, d_hidden, 0, rows, F, BF, TILE)
            tl.debug_barrier()
            memory, here, there, blocks, part = _places(ids_ptr, parked_ptr, part_ptr, memories_per_row, tokens, first, PARKED, PART)
            k = load_tokens(k_ptr, here, rows, K, BK, TILE)
            a2 = load_matrix(_slot(slots_ptr, memory, anchor, num_tiles, SIZE), F, K, BF, BK)
            _, slope, _ = _silu(tl.dot(k, tl.trans(a2), input_precision=PRECISION))
            d_hidden = load_tokens(part + TILE * F, 0, rows, F, BF, TILE)
            d_hidden += _load_gradient(in_hidden_ptr, there, rows, F, BF, TILE)
            d_pre = load_tokens(part, 0, rows, F, BF, TILE) + d_hidden * slope
            store_tokens(blocks + D_PRE, d_pre, 0, rows, F, BF, TILE)
        tl.debug_barrier()
        memory, here, there, blocks, part = _places(ids_ptr, parked_ptr, part_ptr, memories_per_row, tokens, first, PARKED, PART)
        a2 = load_matrix(_slot(slots_ptr, memory, anchor, num_tiles, SIZE), F, K, BF, BK)
        if SELF_TARGET:
            d_v = tl.dot(load_tokens(blocks + D_PRE_V, 0, rows, F, BF, TILE), a2, input_precision=PRECISION)
            if LAYERS == 2:
                d_v += load_tokens(d_v_ptr, there, rows, K, BK, TILE)
                tl.debug_barrier()
            store_tokens(d_v_ptr, d_v, there, rows, K, BK, TILE)
        d_k = tl.dot(load_tokens(blocks + D_PRE, 0, rows, F, BF, TILE), a2, input_precision=PRECISION)
        if ERASE:
            w2 = load_matrix(_slot(slots_ptr, memory, i, num_tiles, SIZE), F, K, BF, BK)
            d_k = tl.dot(load_tokens(blocks + D_PASSED, 0, rows, F, BF, TILE), w2, d_k, input_precision=PRECISION)
            s2 = load_matrix(_slot(slots_ptr, LAYERS * memories + memory, i, num_tiles, SIZE), F, K, BF, BK)
            d_k = tl.dot(load_tokens(blocks + D_CARRIED, 0, rows, F, BF, TILE), s2, d_k, input_precision=PRECISION)
        d_k += load_tokens(d_k_ptr, there, rows, K, BK, TILE)
        tl.debug_barrier()
        store_tokens(d_k_ptr, d_k, there, rows, K, BK, TILE)
        tl.debug_barrier()
        # the state, from what is parked
        through_ptr = grads_ptr
        if PER_CHUNK > 1:
            through_ptr = anchors_ptr
        if LAYERS == 2:
            memory, here, there, blocks, part = _places(ids_ptr, parked_ptr, part_ptr, memories_per_row, tokens, first, PARKED, PART)
            through1 = through_ptr + (memories + memory) * SIZE
            total = load_matrix(through1, K, F, BK, BF)
            error = tl.trans(load_tokens(error_ptr, there, rows, K, BK, TILE))
            total = tl.dot(error, load_tokens(blocks + D_BACK, 0, rows, F, BF, TILE), total, input_precision=PRECISION)
            d_error = tl.trans(load_tokens(blocks + D_ERROR, 0, rows, K, BK, TILE))
            if SELF_TARGET and not NORMALIZE:
                total = tl.dot(d_error, load_tokens(blocks + INNER, 0, rows, F, BF, TILE), total, input_precision=PRECISION)
            else:
                total = tl.dot(d_error, load_tokens(hidden_ptr, there, rows, F, BF, TILE), total, input_precision=PRECISION)
                if SELF_TARGET:
                    d_target = tl.trans(load_tokens(blocks + D_TARGET, 0, rows, K, BK, TILE))
                    total = tl.dot(d_target, load_tokens(blocks + INNER, 0, rows, F, BF, TILE), total, input_precision=PRECISION)
            tl.debug_barrier()
            store_matrix(through1, total, K, F, BK, BF)
            tl.debug_barrier()
        memory, here, there, blocks, part = _places(ids_ptr, parked_ptr, part_ptr, memories_per_row, tokens, first, PARKED, PART)
        k = load_tokens(k_ptr, here, rows, K, BK, TILE)
        through2 = through_ptr + memory * SIZE
        total = load_matrix(through2, F, K, BF, BK)
        total = tl.dot(tl.trans(load_tokens(blocks + D_PRE, 0, rows, F, BF, TILE)), k, total, input_precision=PRECISION)
        if SELF_TARGET:
            v = load_tokens(v_ptr, here, rows, K, BK, TILE)
            total = tl.dot(tl.trans(load_tokens(blocks + D_PRE_V, 0, rows, F, BF, TILE)), v, total, input_precision=PRECISION)
        tl.debug_barrier()
        store_matrix(through2, total, F, K, BF, BK)
        tl.debug_barrier()
        if ERASE:
            memory, here, there, blocks, part = _places(ids_ptr, parked_ptr, part_ptr, memories_per_row, tokens, first, PARKED, PART)
            k = load_tokens(k_ptr, here, rows, K, BK, TILE)
            d_passed = tl.trans(load_tokens(blocks + D_PASSED, 0, rows, F, BF, TILE))
            total = load_matrix(grads_ptr + memory * SIZE, F, K, BF, BK)
            total = tl.dot(d_passed, k, total, input_precision=PRECISION)
            tl.debug_barrier()
            store_matrix(grads_ptr + memory * SIZE, total, F, K, BF, BK)
            slow_grad_ptr = grads_ptr + (LAYERS * memories + memory) * SIZE
            d_carried = tl.trans(load_tokens(blocks + D_CARRIED, 0, rows, F, BF, TILE))
            total = tl.dot(d_carried, k, load_matrix(slow_grad_ptr, F, K, BF, BK), input_precision=PRECISION)
            tl.debug_barrier()
            store_matrix(slow_grad_ptr, total, F, K, BF, BK)
            tl.debug_barrier()
        memory, row = _identity(ids_ptr, memories_per_row)
        is_reset = False
        if reset_ptr is not None:
            is_reset = tl.load(reset_ptr + row * num_chunks + chunk) != 0
        if (i == anchor) & (is_reset | (PER_CHUNK > 1)):
            _leave_chunk(grads_ptr, anchors_ptr, starts_ptr, is_reset, memory, 2 * LAYERS, SIZE, PER_CHUNK, FLAT)
        tl.debug_barrier()


def supports(rule: MemoryRule) -> bool:
    """Whether the kernels compute the rule."""
    return rule.momentum and rule.objective != "dot" and (rule.memory == "linear" or not rule.erases(1))


def _launch(k: torch.Tensor, hidden: int, rule: MemoryRule, tiling: Tiling, kernel: str) -> dict[str, Any]:
    """Compile-time arguments of both kernels, and their warps."""
    width = k.shape[-1]
    return {
        "K": width, "F": hidden, "BK": padded(width), "BF": padded(hidden),
        "CHUNK": tiling.chunk, "TILE": tiling.tile, "PER_CHUNK": tiling.per_chunk, "LAYERS": rule.num_layers,
        "HUBER": rule.objective == "huber", "ERASE": rule.erases(0), "NORMALIZE": rule.normalize_v, "SELF_TARGET": rule.self_target,
        "PRECISION": "tf32x3" if k.dtype == torch.float32 else None,
        "num_warps": tuning(width=width, hidden=hidden).warps_of(kernel),
    }  # fmt: skip


def _shared(k: torch.Tensor, v: torch.Tensor, terms: MomentumTerms) -> tuple[torch.Tensor | None, ...]:
    """Keys, targets and terms in the order of the kernels."""
    ends = (terms.g_end, terms.kappa_end, terms.mu_total)
    return (k, v, terms.y, terms.y_delta, terms.w, terms.u, terms.g_prev, terms.kappa_prev, *ends)


def write_forward(
    k: torch.Tensor,
    v: torch.Tensor,
    terms: MomentumTerms,
    states: MomentumStates,
    signals: MomentumSignals,
    *,
    rule: MemoryRule,
    tiling: Tiling,
    tiles: range,
    commit: torch.Tensor | None = None,
    reset: torch.Tensor | None = None,
    start: torch.Tensor | None = None,
) -> None:
    """Write the tokens of whole chunks into R = L * S memories, S memories a row: fills slots and signals, moves the current state on.

    k, v [L, T, K]: fp32 or bf16. terms: of all tiles, y and y_delta in the dtype of the keys, the rest fp32. states: slots tiles.start ..
    tiles.stop are filled. signals: filled at the tokens of the tiles. commit, reset: uint8 [L, N] or None; a chunk without commit leaves
    the state as it was, a reset chunk begins with start [M, R, F * K], fp32.
    """
    _check(k, v, terms, states, rule=rule, tiling=tiling, tiles=tiles)
    memories, hidden = states.current.shape[1], states.shapes[0][0]
    kept = None if commit is None else torch.empty_like(states.current)
    ids = torch.arange(memories, dtype=torch.int32, device=k.device)
    _forward[(memories,)](
        ids, *_shared(k, v, terms), commit, reset, start, kept, states.slots, states.rest, states.current,
        signals.residual, signals.delta, signals.error, signals.hidden, signals.scale,
        tiling.tokens, tiling.num_tiles, tiling.num_chunks, memories // len(k), tiles.start, tiles.stop, rule.huber_delta**-2,
        **_launch(k, hidden, rule, tiling, "write_momentum_forward"),
    )  # fmt: skip


class MomentumWriteGradients(NamedTuple):
    """Gradients of a call of `write_forward`, fp32, each memory's share; None where the rule does not use the input.

    k, v, y, y_delta [R, T, K]; w, u, g_prev, kappa_prev [R, T]; g_end, kappa_end, mu_total [R, NT]: filled at the tiles of the call.
    current [M, R, F * K]: of the state at the start of the first tile; start like it, None without resets.
    """

    k: torch.Tensor
    v: torch.Tensor
    y: torch.Tensor | None
    y_delta: torch.Tensor
    w: torch.Tensor | None
    u: torch.Tensor
    g_prev: torch.Tensor | None
    kappa_prev: torch.Tensor | None
    g_end: torch.Tensor
    kappa_end: torch.Tensor
    mu_total: torch.Tensor
    current: torch.Tensor
    start: torch.Tensor | None


def write_backward(
    k: torch.Tensor,
    v: torch.Tensor,
    terms: MomentumTerms,
    states: MomentumStates,
    signals: MomentumSignals,
    d_current: torch.Tensor,
    *,
    rule: MemoryRule,
    tiling: Tiling,
    tiles: range,
    d_signals: MomentumSignals | None = None,
    d_reads: tuple[torch.Tensor, ...] = (),
    read: str = "causal",
    commit: torch.Tensor | None = None,
    reset: torch.Tensor | None = None,
) -> MomentumWriteGradients:
    """Backward of `write_forward`, given its arguments after the call (of states the slots only).

    d_current [M, R, F * K]: gradient of the state after the last tile, fp32. d_signals: gradients from the reads, fp32, each may be None.
    d_reads: gradients of the state that the reads of every tile saw, fp32 [R, NT, ...]: with read = "causal" of all M matrices at the start
    of the tile, with "anchor" of the weights at that of its chunk; () where nothing reads.
    """
    _check(k, v, terms, states, rule=rule, tiling=tiling, tiles=tiles)
    memories, hidden, layers = d_current.shape[1], states.shapes[0][0], rule.num_layers
    from_reads = d_signals or MomentumSignals()
    assert all(t is None or t.is_contiguous() for t in (*d_reads, d_current, *vars(from_reads).values()))
    room = lambda *shape: torch.empty(memories, *shape, dtype=torch.float32, device=k.device)  # noqa: E731
    erases, mlp = rule.erases(0), rule.memory == "mlp"
    tokens, tile = k.shape[1], tiling.tile
    out = MomentumWriteGradients(
        k=room(*k.shape[1:]),
        v=room(*k.shape[1:]),
        y=room(*k.shape[1:]) if erases else None,
        y_delta=room(*k.shape[1:]),
        w=room(tokens) if mlp else None,
        u=room(tokens),
        g_prev=room(tokens) if erases else None,
        kappa_prev=room(tokens) if erases else None,
        g_end=room(tiling.num_tiles),
        kappa_end=room(tiling.num_tiles),
        mu_total=room(tiling.num_tiles),
        current=d_current.clone(),
        start=None if reset is None else torch.zeros_like(d_current),
    )
    reads = [*d_reads, *[None] * (2 * layers - len(d_reads))]  # reads at the anchor do not see the momentum
    read2, read1, slow_read2, slow_read1 = reads if mlp else (reads[0], None, reads[1], None)
    anchors = torch.empty_like(d_current) if tiling.per_chunk > 1 else None
    low = torch.empty(d_current.shape, dtype=k.dtype, device=k.device)
    parked = torch.empty(memories, tile * (6 * hidden + 2 * k.shape[2]), dtype=k.dtype, device=k.device)
    ids = torch.arange(memories, dtype=torch.int32, device=k.device)
    _backward[(memories,)](
        ids, *_shared(k, v, terms), commit, reset, states.slots, states.rest,
        signals.residual, signals.delta, signals.error, signals.hidden, signals.scale,
        from_reads.residual, from_reads.delta, from_reads.error, from_reads.hidden, read2, read1, slow_read2, slow_read1,
        out.current, out.start, anchors, low, room(3 * tile * hidden), parked, *out[:11],
        tiling.tokens, tiling.num_tiles, tiling.num_chunks, memories // len(k), tiles.start, tiles.stop, rule.huber_delta**-2,
        READS_ANCHOR=read == "anchor", **_launch(k, hidden, rule, tiling, "write_momentum_backward"),
    )  # fmt: skip
    return out


def _check(
    k: torch.Tensor, v: torch.Tensor, terms: MomentumTerms, states: MomentumStates, *, rule: MemoryRule, tiling: Tiling, tiles: range
) -> None:
    """Our own mistakes in shapes and layouts."""
    assert supports(rule), rule
    assert k.shape == v.shape and k.dtype == v.dtype == terms.y_delta.dtype == states.slots.dtype and k.shape[1] == tiling.tokens
    assert tiles.start % tiling.per_chunk == 0 and (tiles.stop % tiling.per_chunk == 0 or tiles.stop == tiling.num_tiles)
    assert states.slots.shape[2] == tiling.num_tiles + 1 and len(states.current) == 2 * rule.num_layers == len(states.shapes)
    assert all(t is None or t.is_contiguous() for t in (*_shared(k, v, terms), states.slots, states.rest, states.current))
