"""How a kernel cuts a sequence: tiles of at most 64 tokens, each inside one chunk.

A chunk is semantic (its error signals are taken at the state at its start), a tile is what one pass of a kernel holds on chip; the
exact chunk form of SPEC 2.1 holds for any run of tokens, so results do not depend on the tile.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Tiling:
    """`tokens` tokens in chunks of `chunk`, cut into tiles of `tile` (a power of two, at least 16; rows beyond a chunk's end are masked).

    Tile i belongs to chunk i // per_chunk and starts at token (i // per_chunk) * chunk + (i % per_chunk) * tile. The last chunk may be
    shorter and then may have fewer tiles.
    """

    tokens: int
    chunk: int
    tile: int

    @property
    def per_chunk(self) -> int:
        """Tiles of a whole chunk."""
        return -(-self.chunk // self.tile)

    @property
    def num_chunks(self) -> int:
        """Chunks, the last partial one included."""
        return -(-self.tokens // self.chunk)

    @property
    def num_tiles(self) -> int:
        """Tiles of all chunks."""
        whole, rest = divmod(self.tokens, self.chunk)
        return whole * self.per_chunk + -(-rest // self.tile)

    def tiles_of(self, chunks: range) -> range:
        """The tiles of a run of chunks."""
        return range(chunks.start * self.per_chunk, min(chunks.stop * self.per_chunk, self.num_tiles))
