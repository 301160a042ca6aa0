"""The stored autotune table: tile lengths and warps of every kernel by the (padded) widths of a memory.

`tuning.json` is keyed by "<head width>x<hidden width>", both rounded up to a power of two, at least 16. Widths between two entries take the
next larger one; what is larger than every entry is not supported. `tools/bench/gpu.py --tune` measures the candidates on a GPU.
"""

import functools
import json
from dataclasses import dataclass
from pathlib import Path

DEFAULT_WARPS = 4


def padded(width: int) -> int:
    """The block that holds `width` columns: a power of two, at least 16 (the least a matrix instruction takes)."""
    return max(16, 1 << (width - 1).bit_length())


@dataclass(frozen=True)
class Tuning:
    """Tile lengths and warps.

    tile: tokens of a tile that holds a whole chunk. tile_long: of a tile of a longer chunk, whose kernels hold more (the anchor beside
    the current state); 0: as `tile`. warps: of each kernel by name.
    """

    tile: int
    warps: dict[str, int]
    tile_long: int = 0

    def tile_of(self, chunk: int) -> int:
        """Tokens of the tiles of a chunk of `chunk` tokens: a power of two, at least 16."""
        whole = padded(chunk)
        return whole if whole <= self.tile else self.tile_long or self.tile

    def warps_of(self, kernel: str) -> int:
        """Warps of one kernel."""
        return self.warps.get(kernel, DEFAULT_WARPS)


@functools.cache
def table() -> dict[tuple[int, int], Tuning]:
    """The stored table: (head width, hidden width) -> tuning."""
    stored = json.loads((Path(__file__).parent / "tuning.json").read_text())
    widths = {key: key.split("x") for key in stored}
    return {(int(width), int(hidden)): Tuning(**stored[key]) for key, (width, hidden) in widths.items()}


def tuning(*, width: int, hidden: int) -> Tuning | None:
    """The entry for a memory of head width `width` and hidden width `hidden` (the width again for a linear memory), or None."""
    fits = [key for key in table() if key[0] >= width and key[1] >= hidden]
    return table()[min(fits)] if fits else None
