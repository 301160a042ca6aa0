"""Kernels of the terms of a tile and of the inverse they need: forward and backward of `fused.terms`, one program a row and tile.

Legend: L = B * H rows, T tokens, K head width, NT tiles of at most TILE tokens (`Tiling`). Tokens beyond the end of a tile's chunk or of
the sequence count as x = 0, eta = 0, alpha = 1: they change nothing and are not stored. The mathematics is in README.md.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from hope_kernels.tiling import Tiling
from hope_kernels.tuning import padded, tuning


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
def _tokens_of(tile, tokens, CHUNK: tl.constexpr, TILE: tl.constexpr):
    """(tokens of a tile [TILE], which of them exist)."""
    PER_CHUNK: tl.constexpr = (CHUNK + TILE - 1) // TILE
    chunk = tile // PER_CHUNK
    at = chunk * CHUNK + (tile % PER_CHUNK) * TILE + tl.arange(0, TILE)
    return at, at < tl.minimum((chunk + 1) * CHUNK, tokens)


@triton.jit
def _columns(K: tl.constexpr, BLOCK_K: tl.constexpr, live):
    """Mask [TILE, BLOCK_K] of what exists of a tile of rows of length K."""
    if K == BLOCK_K:
        return live[:, None]
    else:
        return live[:, None] & (tl.arange(0, BLOCK_K) < K)[None, :]


@triton.jit
def _terms_forward(
    k, q, eta, log_alpha, g, g_prev, w, g_end, y, m, n, inverse, first_tile, num_tiles, tokens,
    K: tl.constexpr, BLOCK_K: tl.constexpr, CHUNK: tl.constexpr, TILE: tl.constexpr, ERASE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    tile, line = first_tile + tl.program_id(0), tl.program_id(1).to(tl.int64)
    token, live = _tokens_of(tile, tokens, CHUNK, TILE)
    at = tl.arange(0, TILE)
    scalar = line * tokens + token
    wide, wide_live = scalar[:, None] * K + tl.arange(0, BLOCK_K)[None, :], _columns(K, BLOCK_K, live)
    square = scalar[:, None] * TILE + at[None, :]
    eta_t = tl.load(eta + scalar, live, 0.0)
    log_alpha_t = tl.load(log_alpha + scalar, live, 0.0)
    x = tl.load(k + wide, wide_live, 0.0)
    coarse_step, fine_step, coarse, fine = _cumulative(log_alpha_t)
    coarse_prev, fine_prev = coarse - coarse_step, fine - fine_step
    coarse_end, fine_end = tl.sum(coarse_step, 0), tl.sum(fine_step, 0)
    w_t = eta_t * tl.exp((coarse_end - coarse) + (fine_end - fine))
    tl.store(g + scalar, tl.exp(coarse + fine), live)
    tl.store(g_prev + scalar, tl.exp(coarse_prev + fine_prev), live)
    tl.store(w + scalar, w_t, live)
    tl.store(g_end + line * num_tiles + tile, tl.exp(coarse_end + fine_end))
    written = x.to(tl.float32) * w_t[:, None]
    if ERASE:
        before = _ratios(coarse_prev, fine_prev, coarse, fine, at[:, None] > at[None, :])
        system = before * tl.dot(x, tl.trans(x), input_precision=PRECISION) * eta_t[None, :]
        solved = invert_tile(system, TILE, PRECISION)
        tl.store(inverse + square, solved, live[:, None])
        written = tl.dot(tl.trans(solved), written, input_precision=PRECISION)
    tl.store(y + wide, written.to(y.dtype.element_ty), wide_live)
    if q is not None:
        weights = _ratios(coarse, fine, coarse, fine, at[:, None] >= at[None, :]) * eta_t[None, :]
        tl.store(n + square, weights.to(n.dtype.element_ty), live[:, None])
        queries = tl.load(q + wide, wide_live, 0.0)
        inside = weights * tl.dot(queries, tl.trans(x), input_precision=PRECISION)
        if ERASE:
            inside = tl.dot(inside, solved, input_precision=PRECISION)
        tl.store(m + square, inside.to(m.dtype.element_ty), live[:, None])


def _precision(operands: torch.Tensor) -> str:
    """How fp32 products are taken: as three of tf32 where the operands are fp32, as one where they are bf16."""
    return "tf32x3" if operands.dtype == torch.float32 else "tf32"


def _sizes(k: torch.Tensor, tiling: Tiling) -> dict[str, int]:
    return {"K": k.shape[-1], "BLOCK_K": padded(k.shape[-1]), "CHUNK": tiling.chunk, "TILE": tiling.tile}


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
    gates = [torch.empty(rows, dtype=torch.float32, device=k.device) for _ in range(3)]
    g_end = torch.empty(rows[0], tiling.num_tiles, dtype=torch.float32, device=k.device)
    m, n = (torch.empty(square, dtype=k.dtype, device=k.device) if queries else None for _ in range(2))
    inverse = torch.empty(square, dtype=torch.float32, device=k.device) if erase else None
    return Terms(*gates, g_end, torch.empty_like(k), m, n), inverse


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
        k, q, eta, log_alpha, *terms, inverse, tiles.start, tiling.num_tiles, tiling.tokens, **_sizes(k, tiling), ERASE=erase,
        PRECISION=_precision(k), num_warps=_warps("terms_forward", k.shape[-1]), num_stages=1,
    )  # fmt: skip
    return terms, inverse
