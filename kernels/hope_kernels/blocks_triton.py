"""Blocks of tokens, numbers a token and matrices, loaded and stored: what the Triton kernels around a memory share.

Tensors of tokens are [..., T, WIDTH]; BLOCK is WIDTH rounded up to a power of two, TILE the most tokens of a tile, and `rows` those that it
has. A block is held tokens first, [TILE, BLOCK], or features first, [BLOCK, TILE]: then a product has as many rows as a matrix instruction
wants however short the tile is. What lies beyond the tile's tokens or WIDTH is read as zero and not written.

Offsets are int32: where the tile starts belongs into the scalar pointer, or every element would have an address of 64 bits.
"""

import triton
import triton.language as tl


@triton.jit
def _tokens_first(rows, WIDTH: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr):
    """Offsets and mask of [TILE, BLOCK] from the tile's first token on.

    Plus 0, which only we know: offsets that do not change along a loop over tiles would stay in registers.
    """
    zero = tl.multiple_of(rows >> 31, 16)
    token, feature = tl.arange(0, TILE)[:, None], tl.arange(0, BLOCK)[None, :] + zero
    mask = token < rows
    if WIDTH != BLOCK:
        mask = mask & (feature < WIDTH)
    return token * WIDTH + feature, mask


@triton.jit
def load_tokens(pointer, first, rows, WIDTH: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr):
    """[TILE, BLOCK] from token `first` (int64, of all rows) on."""
    offset, mask = _tokens_first(rows, WIDTH, BLOCK, TILE)
    return tl.load(pointer + first * WIDTH + offset, mask=mask, other=0.0)


@triton.jit
def store_tokens(pointer, value, first, rows, WIDTH: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr):
    """Store [TILE, BLOCK] in the tensor's dtype."""
    offset, mask = _tokens_first(rows, WIDTH, BLOCK, TILE)
    tl.store(pointer + first * WIDTH + offset, value.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def _features_first(rows, WIDTH: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr):
    """Offsets and mask of [BLOCK, TILE] from the tile's first token on."""
    feature, token = tl.arange(0, BLOCK)[:, None], tl.arange(0, TILE)[None, :]
    mask = token < rows
    if WIDTH != BLOCK:
        mask = mask & (feature < WIDTH)
    return token * WIDTH + feature, mask


@triton.jit
def load_features(pointer, first, rows, WIDTH: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr):
    """[BLOCK, TILE] from token `first` (int64, of all rows) on."""
    offset, mask = _features_first(rows, WIDTH, BLOCK, TILE)
    return tl.load(pointer + first * WIDTH + offset, mask=mask, other=0.0)


@triton.jit
def store_features(pointer, value, first, rows, WIDTH: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr):
    """Store [BLOCK, TILE] in the tensor's dtype."""
    offset, mask = _features_first(rows, WIDTH, BLOCK, TILE)
    tl.store(pointer + first * WIDTH + offset, value.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def load_scalars(pointer, first, rows, TILE: tl.constexpr):
    """[TILE] of a tensor [..., T] of one fp32 number a token."""
    token = tl.arange(0, TILE)
    return tl.load(pointer + first + token, mask=token < rows, other=0.0)


@triton.jit
def store_scalars(pointer, value, first, rows, TILE: tl.constexpr):
    """Store [TILE] to a tensor [..., T] of one fp32 number a token."""
    token = tl.arange(0, TILE)
    tl.store(pointer + first + token, value, mask=token < rows)


@triton.jit
def _matrix(ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr):
    """Offsets and mask (of the padding) of a matrix [ROWS, COLUMNS] in a block of powers of two."""
    row, column = tl.arange(0, BLOCK_ROWS)[:, None], tl.arange(0, BLOCK_COLUMNS)[None, :]
    return row * COLUMNS + column, (row < ROWS) & (column < COLUMNS)


@triton.jit
def load_matrix(pointer, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr):
    """A matrix [ROWS, COLUMNS], zero in the padding."""
    offset, mask = _matrix(ROWS, COLUMNS, BLOCK_ROWS, BLOCK_COLUMNS)
    if ROWS == BLOCK_ROWS and COLUMNS == BLOCK_COLUMNS:
        return tl.load(pointer + offset)
    else:
        return tl.load(pointer + offset, mask=mask, other=0.0)


@triton.jit
def store_matrix(pointer, value, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr):
    """Store a matrix [ROWS, COLUMNS] in the dtype of where it goes."""
    offset, mask = _matrix(ROWS, COLUMNS, BLOCK_ROWS, BLOCK_COLUMNS)
    if ROWS == BLOCK_ROWS and COLUMNS == BLOCK_COLUMNS:
        tl.store(pointer + offset, value.to(pointer.dtype.element_ty))
    else:
        tl.store(pointer + offset, value.to(pointer.dtype.element_ty), mask=mask)
