"""Kernels of the terms of a tile and of the inverse they need: forward and backward of `fused.terms`, one program a row and tile.

Legend: L = B * H rows, T tokens, K head width, NT tiles of at most TILE tokens (`Tiling`). Tokens beyond the end of a tile's chunk or of
the sequence count as x = 0, eta = 0, alpha = 1: they change nothing and are not stored. The mathematics is in README.md.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from hope_kernels.chunk import decay
from hope_kernels.chunk_terms.tiles import join_tiles, split_tiles
from hope_kernels.tiling import Tiling
from hope_kernels.triton_support import operator
from hope_kernels.tuning import padded, tuning

FORWARD_SLICE, BACKWARD_SLICE = 64, 32
"""Columns of the keys that a kernel holds at a time; with more the backward kernel spills at tiles of 64."""


class Terms(NamedTuple):
    """What the tokens of every tile do to any memory; `fused.ChunkDecays` laid out by token.

    g, g_prev, w [L, T]: product of alpha in the tile up to and before t, and eta_t g_end / g_t; g_end [L, NT]: product over the tile; fp32.
    y [L, T, K]; m, n [L, T, TILE], None without queries: rows are tokens, columns places in the token's tile; dtype of the keys.
    As gradients every field is fp32, or None for zero.
    """

    g: torch.Tensor | None
    g_prev: torch.Tensor | None
    w: torch.Tensor | None
    g_end: torch.Tensor | None
    y: torch.Tensor | None
    m: torch.Tensor | None
    n: torch.Tensor | None


Gradients = tuple[torch.Tensor, torch.Tensor | None, torch.Tensor, torch.Tensor]
"""Of k, q, eta and log_alpha, fp32."""


@triton.jit
def _merge(inverse, system, SIZE: tl.constexpr, TILE: tl.constexpr, PRECISION: tl.constexpr):
    """From inverses of the diagonal blocks of length SIZE to those of twice that: the corner of [[A, 0], [B, D]]^-1 is -D^-1 B A^-1."""
    block = tl.arange(0, TILE) // SIZE
    corner = tl.where((block[:, None] // 2 == block[None, :] // 2) & (block[:, None] != block[None, :]), system, 0.0)
    return inverse - tl.dot(inverse, tl.dot(corner, inverse, input_precision=PRECISION), input_precision=PRECISION)


@triton.jit
def invert_tile(system, TILE: tl.constexpr, PRECISION: tl.constexpr):
    """(I + system)^-1, [TILE, TILE] fp32, of a strictly lower triangular system: see README.md for why not by Neumann's series."""
    BLOCKS: tl.constexpr = TILE // 16
    block = tl.arange(0, BLOCKS)
    place = tl.arange(0, 16)
    diagonal = block[:, None, None, None] == block[None, None, :, None]
    blocks = tl.sum(tl.where(diagonal, tl.reshape(system, (BLOCKS, 16, BLOCKS, 16)), 0.0), 2)
    inverse = tl.where(place[None, :, None] == place[None, None, :], 1.0, 0.0) + tl.zeros((BLOCKS, 16, 16), tl.float32)
    for i in tl.range(0, 15, num_stages=1):  # row i is final: take its share from the rows below
        column = tl.sum(tl.where(place[None, None, :] == i, blocks, 0.0), 2)
        row = tl.sum(tl.where(place[None, :, None] == i, inverse, 0.0), 1)
        inverse -= column[:, :, None] * row[:, None, :]
    whole = tl.reshape(tl.where(diagonal, inverse[:, :, None, :], 0.0), (TILE, TILE))
    if TILE >= 32:
        whole = _merge(whole, system, 16, TILE, PRECISION)
    if TILE >= 64:
        whole = _merge(whole, system, 32, TILE, PRECISION)
    return whole


@triton.jit
def _cumulative(log_alpha):
    """Cumulative sum as coarse + fine, both without rounding that matters: coarse has multiples of 2^-12, exact in fp32 below 4096.

    Differences of plain cumulative sums of log alpha = -20 would be off by 3e-5, as much as one rounding at 600.
    """
    coarse = tl.floor(log_alpha * 4096.0 + 0.5) * (1.0 / 4096.0)
    fine = log_alpha - coarse
    return coarse, fine, tl.cumsum(coarse, 0), tl.cumsum(fine, 0)


@triton.jit
def _ratios(coarse_t, fine_t, coarse_s, fine_s, kept):
    """exp(a_t - a_s) where `kept`, else 0; the mask comes first, so nothing overflows."""
    return tl.exp(tl.where(kept, (coarse_t[:, None] - coarse_s[None, :]) + (fine_t[:, None] - fine_s[None, :]), float("-inf")))


@triton.jit
def _extent(tile, tokens, CHUNK: tl.constexpr, TILE: tl.constexpr):
    """(first token of a tile, which of its places [TILE] hold a token)."""
    PER_CHUNK: tl.constexpr = (CHUNK + TILE - 1) // TILE
    chunk = tile // PER_CHUNK
    first = chunk * CHUNK + (tile % PER_CHUNK) * TILE
    return first, first + tl.arange(0, TILE) < tl.minimum((chunk + 1) * CHUNK, tokens)


@triton.jit
def _slice(x, start, live, first, K: tl.constexpr, BLOCK_K: tl.constexpr, SLICE: tl.constexpr, TILE: tl.constexpr):
    """(pointers [TILE, SLICE] to columns first ... of the rows of length K from `start` on, mask of what exists)."""
    column = first + tl.arange(0, SLICE)
    there = live[:, None]
    if K != BLOCK_K:
        there = there & (column < K)[None, :]
    return x + start * K + (tl.arange(0, TILE)[:, None] * K + column[None, :]), there


@triton.jit
def _products(a, b, start, live, K: tl.constexpr, BLOCK_K: tl.constexpr, SLICE: tl.constexpr, TILE: tl.constexpr, PRECISION: tl.constexpr):
    """The product a b^T [TILE, TILE] fp32 of the same rows of two matrices, SLICE columns at a time: fewer registers than all at once."""
    total = tl.zeros((TILE, TILE), tl.float32)
    for column in tl.range(0, BLOCK_K, SLICE, num_stages=1):
        at_a, there = _slice(a, start, live, column, K, BLOCK_K, SLICE, TILE)
        at_b, there = _slice(b, start, live, column, K, BLOCK_K, SLICE, TILE)
        total += tl.dot(tl.load(at_a, there, 0.0), tl.trans(tl.load(at_b, there, 0.0)), input_precision=PRECISION)
    return total


@triton.jit
def _chunk_inverse(
    k, eta, log_alpha, inverse, tokens,
    K: tl.constexpr, BLOCK_K: tl.constexpr, SLICE: tl.constexpr, CHUNK: tl.constexpr, TILE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    first, live = _extent(tl.program_id(0), tokens, CHUNK, TILE)
    start = tl.program_id(1).to(tl.int64) * tokens + first
    at = tl.arange(0, TILE)
    coarse_step, fine_step, coarse, fine = _cumulative(tl.load(log_alpha + start + at, live, 0.0))
    before = _ratios(coarse - coarse_step, fine - fine_step, coarse, fine, at[:, None] > at[None, :])
    gram = _products(k, k, start, live, K, BLOCK_K, SLICE, TILE, PRECISION)
    solved = invert_tile(before * gram * tl.load(eta + start + at, live, 0.0)[None, :], TILE, PRECISION)
    tl.store(inverse + start * TILE + (at[:, None] * TILE + at[None, :]), solved, live[:, None])


@triton.jit
def _unit_lower_inverse(system, inverse, SIZE: tl.constexpr, TILE: tl.constexpr, PRECISION: tl.constexpr):
    start = tl.program_id(0).to(tl.int64) * SIZE * SIZE
    row, column = tl.arange(0, TILE)[:, None], tl.arange(0, TILE)[None, :]
    at, there = start + row * SIZE + column, (row < SIZE) & (column < SIZE)
    solved = invert_tile(tl.load(system + at, there & (row > column), 0.0), TILE, PRECISION)
    tl.store(inverse + at, solved, there)


@triton.jit(do_not_specialize=["first_tile"])  # or every chunk of a scan would be compiled anew
def _terms_forward(
    k, q, eta, log_alpha, g, g_prev, w, g_end, y, m, n, inverse, first_tile, num_tiles, tokens,
    K: tl.constexpr, BLOCK_K: tl.constexpr, SLICE: tl.constexpr, CHUNK: tl.constexpr, TILE: tl.constexpr, ERASE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    tile, line = first_tile + tl.program_id(0), tl.program_id(1).to(tl.int64)
    first, live = _extent(tile, tokens, CHUNK, TILE)
    start = line * tokens + first  # 64 bits; offsets inside the tile need 32
    at = tl.arange(0, TILE)
    rows = start + at
    square, square_live = at[:, None] * TILE + at[None, :], live[:, None]
    eta_t = tl.load(eta + rows, live, 0.0)
    coarse_step, fine_step, coarse, fine = _cumulative(tl.load(log_alpha + rows, live, 0.0))
    coarse_prev, fine_prev = coarse - coarse_step, fine - fine_step
    coarse_end, fine_end = tl.sum(coarse_step, 0), tl.sum(fine_step, 0)
    w_t = eta_t * tl.exp((coarse_end - coarse) + (fine_end - fine))
    tl.store(g + rows, tl.exp(coarse + fine), live)
    tl.store(g_prev + rows, tl.exp(coarse_prev + fine_prev), live)
    tl.store(w + rows, w_t, live)
    tl.store(g_end + line * num_tiles + tile, tl.exp(coarse_end + fine_end))
    if ERASE:
        before = _ratios(coarse_prev, fine_prev, coarse, fine, at[:, None] > at[None, :])
        gram = _products(k, k, start, live, K, BLOCK_K, SLICE, TILE, PRECISION)
        solved = invert_tile(before * gram * eta_t[None, :], TILE, PRECISION)
        tl.store(inverse + start * TILE + square, solved, square_live)
    for column in tl.range(0, BLOCK_K, SLICE, num_stages=1):
        at_k, there = _slice(k, start, live, column, K, BLOCK_K, SLICE, TILE)
        at_y, there = _slice(y, start, live, column, K, BLOCK_K, SLICE, TILE)
        written = tl.load(at_k, there, 0.0).to(tl.float32) * w_t[:, None]
        if ERASE:
            written = tl.dot(tl.trans(solved), written, input_precision=PRECISION)
        tl.store(at_y, written.to(y.dtype.element_ty), there)
    if q is not None:
        weights = _ratios(coarse, fine, coarse, fine, at[:, None] >= at[None, :]) * eta_t[None, :]
        tl.store(n + start * TILE + square, weights.to(n.dtype.element_ty), square_live)
        inside = weights * _products(q, k, start, live, K, BLOCK_K, SLICE, TILE, PRECISION)
        if ERASE:
            inside = tl.dot(inside, solved, input_precision=PRECISION)
        tl.store(m + start * TILE + square, inside.to(m.dtype.element_ty), square_live)


@triton.jit
def _or_zero(x, rows, live, TILE: tl.constexpr):
    """The values of a tile's tokens, zero where there is no tensor."""
    if x is None:
        return tl.zeros((TILE,), tl.float32)
    else:
        return tl.load(x + rows, live, 0.0)


@triton.jit(do_not_specialize=["first_tile"])  # or every chunk of a scan would be compiled anew
def _terms_backward(
    d_g, d_g_prev, d_w, d_g_end, d_y, d_m, d_n, k, q, eta, log_alpha, y, m, inverse, d_k, d_q, d_eta, d_log_alpha,
    first_tile, num_tiles, tokens,
    K: tl.constexpr, BLOCK_K: tl.constexpr, SLICE: tl.constexpr, CHUNK: tl.constexpr, TILE: tl.constexpr, ERASE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    tile, line = first_tile + tl.program_id(0), tl.program_id(1).to(tl.int64)
    first, live = _extent(tile, tokens, CHUNK, TILE)
    start = line * tokens + first  # 64 bits; offsets inside the tile need 32
    at = tl.arange(0, TILE)
    rows = start + at
    square, square_live = at[:, None] * TILE + at[None, :], live[:, None]
    eta_t = tl.load(eta + rows, live, 0.0)
    coarse_step, fine_step, coarse, fine = _cumulative(tl.load(log_alpha + rows, live, 0.0))
    coarse_prev, fine_prev = coarse - coarse_step, fine - fine_step
    coarse_end, fine_end = tl.sum(coarse_step, 0), tl.sum(fine_step, 0)
    keep = tl.exp((coarse_end - coarse) + (fine_end - fine))
    w_t = keep * eta_t
    d_log_g = _or_zero(d_g, rows, live, TILE) * tl.exp(coarse + fine)
    d_log_g_prev = _or_zero(d_g_prev, rows, live, TILE) * tl.exp(coarse_prev + fine_prev)
    d_w_t = _or_zero(d_w, rows, live, TILE)
    d_eta_t = tl.zeros((TILE,), tl.float32)
    d_system = tl.zeros((TILE, TILE), tl.float32)
    if ERASE:
        solved = tl.load(inverse + start * TILE + square, square_live, 0.0)
    if q is not None:
        d_inside = tl.load(d_m + start * TILE + square, square_live, 0.0)
        if ERASE:
            d_inside = tl.dot(d_inside, tl.trans(solved), input_precision=PRECISION)
            read = tl.load(m + start * TILE + square, square_live, 0.0)
            d_system = tl.dot(tl.trans(read), d_inside.to(read.dtype), input_precision=PRECISION)
        ratio = _ratios(coarse, fine, coarse, fine, at[:, None] >= at[None, :])
        scores = _products(q, k, start, live, K, BLOCK_K, SLICE, TILE, PRECISION)
        flow = ratio * (tl.load(d_n + start * TILE + square, square_live, 0.0) + d_inside * scores)
        d_eta_t += tl.sum(flow, 0)
        d_log_g += tl.sum(flow * eta_t[None, :], 1)
        d_scores = (d_inside * ratio * eta_t[None, :]).to(k.dtype.element_ty)
    for column in tl.range(0, BLOCK_K, SLICE, num_stages=1):
        at_k, there = _slice(k, start, live, column, K, BLOCK_K, SLICE, TILE)
        at_y, there = _slice(y, start, live, column, K, BLOCK_K, SLICE, TILE)
        at_d_y, there = _slice(d_y, start, live, column, K, BLOCK_K, SLICE, TILE)
        d_written = tl.load(at_d_y, there, 0.0)
        if ERASE:
            d_written = tl.dot(solved, d_written, input_precision=PRECISION)
            solution = tl.load(at_y, there, 0.0)
            d_system += tl.dot(solution, tl.trans(d_written).to(solution.dtype), input_precision=PRECISION)
        d_w_t += tl.sum(d_written * tl.load(at_k, there, 0.0).to(tl.float32), 1)
        at_d_k, there = _slice(d_k, start, live, column, K, BLOCK_K, SLICE, TILE)
        tl.store(at_d_k, d_written * w_t[:, None], there)
    if ERASE:
        before = _ratios(coarse_prev, fine_prev, coarse, fine, at[:, None] > at[None, :])
        d_gram = d_system * -before
        flow = d_gram * _products(k, k, start, live, K, BLOCK_K, SLICE, TILE, PRECISION)
        d_eta_t += tl.sum(flow, 0)
        d_log_g_prev += tl.sum(flow * eta_t[None, :], 1)
        d_gram *= eta_t[None, :]
        d_gram = (d_gram + tl.trans(d_gram)).to(k.dtype.element_ty)
    # Every use of eta_s but w comes with 1 / g_s, and log g is a cumulative sum. w_s has all later alpha: what comes before t.
    later = tl.cumsum(d_log_g + d_log_g_prev - eta_t * d_eta_t, 0, reverse=True)
    d_log_w = d_w_t * w_t
    d_log_alpha_t = later - d_log_g_prev + (tl.cumsum(d_log_w, 0) - d_log_w)
    if d_g_end is not None:
        d_log_alpha_t += tl.load(d_g_end + line * num_tiles + tile) * tl.exp(coarse_end + fine_end)
    tl.store(d_eta + rows, d_eta_t + d_w_t * keep, live)
    tl.store(d_log_alpha + rows, d_log_alpha_t, live)
    tl.debug_barrier()  # the sums below are added to what other threads stored above
    for column in tl.range(0, BLOCK_K, SLICE, num_stages=1):
        at_k, there = _slice(k, start, live, column, K, BLOCK_K, SLICE, TILE)
        at_d_k, there = _slice(d_k, start, live, column, K, BLOCK_K, SLICE, TILE)
        x = tl.load(at_k, there, 0.0)
        d_x = tl.load(at_d_k, there, 0.0)
        if ERASE:
            d_x += tl.dot(d_gram, x, input_precision=PRECISION)
        if q is not None:
            at_q, there = _slice(q, start, live, column, K, BLOCK_K, SLICE, TILE)
            at_d_q, there = _slice(d_q, start, live, column, K, BLOCK_K, SLICE, TILE)
            d_x += tl.dot(tl.trans(d_scores), tl.load(at_q, there, 0.0), input_precision=PRECISION)
            tl.store(at_d_q, tl.dot(d_scores, x, input_precision=PRECISION), there)
        tl.store(at_d_k, d_x, there)


def _precision(precise: bool) -> str:
    """How fp32 products are taken: as three of tf32 (where the operands are fp32) or as one (bf16)."""
    return "tf32x3" if precise else "tf32"


def _sizes(k: torch.Tensor, tiling: Tiling, *, largest_slice: int) -> dict[str, Any]:
    """Constants of a kernel; largest_slice: columns of the width in registers at a time."""
    block = padded(k.shape[-1])
    widths = {"K": k.shape[-1], "BLOCK_K": block, "SLICE": min(block, largest_slice)}
    return widths | {"CHUNK": tiling.chunk, "TILE": tiling.tile, "PRECISION": _precision(k.dtype == torch.float32)}


def _check(tiling: Tiling, wide: tuple[torch.Tensor | None, ...], gates: tuple[torch.Tensor, ...]) -> None:
    """Our own mistakes: layouts that the kernels would misread."""
    lead = wide[0].shape[:2]
    assert lead[1] == tiling.tokens and tiling.tile in (16, 32, 64), (lead, tiling)
    assert all(t is None or (t.is_contiguous() and t.shape == wide[0].shape and t.dtype == wide[0].dtype) for t in wide)
    assert all(t.is_contiguous() and t.shape == lead and t.dtype == torch.float32 for t in gates)


def _warps(kernel: str, width: int) -> int:
    return tuning(width=width, hidden=width).warps_of(kernel)


def empty_terms(k: torch.Tensor, *, tiling: Tiling, queries: bool, erase: bool) -> tuple[Terms, torch.Tensor | None]:
    """Room for the terms of keys k [L, T, K] and, with the erase, for the inverse: what `chunk_terms` takes as `out`."""
    rows, square = k.shape[:2], (*k.shape[:2], tiling.tile)
    g, g_prev, w = (torch.empty(rows, dtype=torch.float32, device=k.device) for _ in range(3))
    g_end = torch.empty(rows[0], tiling.num_tiles, dtype=torch.float32, device=k.device)
    m, n = (torch.empty(square, dtype=k.dtype, device=k.device) if queries else None for _ in range(2))
    inverse = torch.empty(square, dtype=torch.float32, device=k.device) if erase else None
    return Terms(g, g_prev, w, g_end, torch.empty_like(k), m, n), inverse


def chunk_terms(
    k: torch.Tensor,
    q: torch.Tensor | None,
    eta: torch.Tensor,
    log_alpha: torch.Tensor,
    *,
    tiling: Tiling,
    erase: bool,
    tiles: range | None = None,
    out: tuple[Terms, torch.Tensor | None] | None = None,
) -> tuple[Terms, torch.Tensor | None]:
    """Terms of the tiles of a sequence, and with `erase` the inverse [L, T, TILE] fp32 that `chunk_terms_backward` needs.

    k, q [L, T, K] fp32 or bf16, q None where no token reads inside its chunk; eta, log_alpha [L, T] fp32. tiles: which to compute (all);
    with `out` (from `empty_terms`) those are written and the rest stays.
    """
    _check(tiling, (k, q), (eta, log_alpha))
    tiles = range(tiling.num_tiles) if tiles is None else tiles
    terms, inverse = out or empty_terms(k, tiling=tiling, queries=q is not None, erase=erase)
    _terms_forward[(len(tiles), k.shape[0])](
        k, q, eta, log_alpha, *terms, inverse, tiles.start, tiling.num_tiles, tiling.tokens,
        **_sizes(k, tiling, largest_slice=FORWARD_SLICE), ERASE=erase, num_warps=_warps("terms_forward", k.shape[-1]), num_stages=1,
    )  # fmt: skip
    return terms, inverse


def chunk_terms_backward(
    d_terms: Terms,
    k: torch.Tensor,
    q: torch.Tensor | None,
    eta: torch.Tensor,
    log_alpha: torch.Tensor,
    terms: Terms,
    inverse: torch.Tensor | None,
    *,
    tiling: Tiling,
    erase: bool,
    tiles: range | None = None,
    out: Gradients | None = None,
) -> Gradients:
    """Gradients (d_k, d_q or None, d_eta, d_log_alpha), fp32, from those of the terms: inputs and results of `chunk_terms` otherwise.

    d_terms: y always, m and n with queries, the others may be None. With `out` (four tensors in this order) the tokens of `tiles` are
    overwritten and the rest stays.
    """
    _check(tiling, (k, q, terms.y), (eta, log_alpha))
    assert all(d is None or (d.dtype == torch.float32 and d.is_contiguous() and d.shape == t.shape) for d, t in zip(d_terms, terms))
    tiles = range(tiling.num_tiles) if tiles is None else tiles
    if out is None:
        wide, gate = (torch.empty(t.shape, dtype=torch.float32, device=k.device) for t in (k, eta))
        out = wide, None if q is None else torch.empty_like(wide), gate, torch.empty_like(gate)
    _terms_backward[(len(tiles), k.shape[0])](
        *d_terms, k, q, eta, log_alpha, terms.y, terms.m, inverse, *out, tiles.start, tiling.num_tiles, tiling.tokens,
        **_sizes(k, tiling, largest_slice=BACKWARD_SLICE), ERASE=erase, num_warps=_warps("terms_backward", k.shape[-1]), num_stages=1,
    )  # fmt: skip
    return out


@operator("chunk_inverse")
def chunk_inverse(k: torch.Tensor, eta: torch.Tensor, log_alpha: torch.Tensor, chunk: int, tile: int) -> torch.Tensor:
    """See `hope_kernels.chunk_terms.chunk_inverse`."""
    tiling = Tiling(k.shape[1], chunk, tile)
    _check(tiling, (k,), (eta, log_alpha))
    inverse = torch.empty(*eta.shape, tile, dtype=torch.float32, device=eta.device)
    _chunk_inverse[(tiling.num_tiles, k.shape[0])](
        k, eta, log_alpha, inverse, tiling.tokens, **_sizes(k, tiling, largest_slice=FORWARD_SLICE),
        num_warps=_warps("terms_forward", k.shape[-1]), num_stages=1,
    )  # fmt: skip
    return inverse


@chunk_inverse.register_fake
def _(k, eta, log_alpha, chunk, tile):
    return eta.new_empty(*eta.shape, tile)


def _save_chunk_inverse(ctx, inputs, output):
    *tensors, chunk, tile = inputs
    ctx.tiling = Tiling(int(tensors[0].shape[1]), chunk, tile)  # a traced length becomes a constant: it says how many tiles there are
    ctx.save_for_backward(*tensors, output)


def _chunk_inverse_backward(ctx, d_inverse):
    """In plain torch: the scans never differentiate the inverse alone."""
    *tensors, inverse = ctx.saved_tensors
    k, eta, log_alpha, inverse, d_inverse = (split_tiles(t.float(), ctx.tiling) for t in (*tensors, inverse, d_inverse))
    d_paced = -(inverse.mT @ d_inverse @ inverse.mT) * decay(eta, log_alpha, None, reads=False).before
    flow = d_paced * (k @ k.mT)
    d_gram, d_eta = d_paced * eta.unsqueeze(-2), flow.sum(-2)
    d_log_g_prev = (flow @ eta.unsqueeze(-1)).squeeze(-1)
    later = (d_log_g_prev - eta * d_eta).flip(-1).cumsum(-1).flip(-1)
    d_k, d_eta, d_log_alpha = (join_tiles(t, ctx.tiling) for t in ((d_gram + d_gram.mT) @ k, d_eta, later - d_log_g_prev))
    return d_k.to(tensors[0].dtype), d_eta, d_log_alpha, None, None


chunk_inverse.register_autograd(_chunk_inverse_backward, setup_context=_save_chunk_inverse)


@operator("unit_lower_inverse")
def unit_lower_inverse(system: torch.Tensor, precise: bool) -> torch.Tensor:
    """See `hope_kernels.chunk_terms.unit_lower_inverse`."""
    size = system.shape[-1]
    assert system.is_contiguous() and system.dtype == torch.float32 and system.shape[-2] == size <= 64, (system.shape, system.dtype)
    inverse = torch.empty_like(system)
    _unit_lower_inverse[(system[..., 0, 0].numel(),)](
        system, inverse, SIZE=size, TILE=padded(size), PRECISION=_precision(precise), num_warps=4, num_stages=1
    )
    return inverse


@unit_lower_inverse.register_fake
def _(system, precise):
    return torch.empty_like(system)


def _save_inverse(ctx, inputs, output):
    ctx.save_for_backward(output)


def _unit_lower_inverse_backward(ctx, d_inverse):
    (inverse,) = ctx.saved_tensors
    return -(inverse.mT @ d_inverse @ inverse.mT).tril(-1), None


unit_lower_inverse.register_autograd(_unit_lower_inverse_backward, setup_context=_save_inverse)
