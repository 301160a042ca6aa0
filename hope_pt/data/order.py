"""The order of samples: a pure function of (fingerprint, seed, epoch, position), computed where it is needed.

Position p of a run lies in epoch p // num_samples. In each epoch the blocks of `shuffle_block` consecutive samples come in a random
order, and the samples of each block in a random order: reads stay local, memory is O(block + number of blocks), any position is
reached at once. The random order is the stable sort of raw Philox numbers keyed by a hash, so it is the same on every machine and
with every numpy release; ranks and workers have no part in it.
"""

import hashlib
from collections import OrderedDict

import numpy as np

_KEPT = 64  # permutations remembered by one SampleOrder


class SampleOrder:
    """`order(positions)`: global sample positions [n] (any, from 0) to dataset indices [n], int64.

    Raises ValueError for negative positions.
    """

    def __init__(self, *, num_samples: int, seed: int, fingerprint: str, shuffle_block: int):
        if num_samples < 1 or shuffle_block < 1:
            raise ValueError(f"num_samples = {num_samples} and shuffle_block = {shuffle_block} must be positive")
        self._num_samples = num_samples
        self._block = min(shuffle_block, num_samples)
        self._num_blocks = -(-num_samples // self._block)
        self._name = f"hope-order/1|{fingerprint}|{seed}"
        self._memo: OrderedDict[str, tuple[np.ndarray, ...]] = OrderedDict()

    def __call__(self, positions: np.ndarray) -> np.ndarray:
        positions = np.asarray(positions, np.int64)
        if positions.size and positions.min() < 0:
            raise ValueError("sample positions start at 0")
        epochs, offsets = np.divmod(positions, self._num_samples)
        indices = np.empty_like(positions)
        for epoch in _distinct(epochs):
            here = epochs == epoch
            indices[here] = self._within(epoch, offsets[here])
        return indices

    def _within(self, epoch: int, offsets: np.ndarray) -> np.ndarray:
        blocks, begins = self._remember(f"{epoch}", self._block_order)
        turns = np.searchsorted(begins, offsets, side="right") - 1
        indices = np.empty_like(offsets)
        for turn in _distinct(turns):
            here = turns == turn
            block = int(blocks[turn])
            (inside,) = self._remember(f"{epoch}|{block}", self._sample_order)
            indices[here] = block * self._block + inside[offsets[here] - begins[turn]]
        return indices

    def _remember(self, name: str, make) -> tuple[np.ndarray, ...]:
        if name not in self._memo:
            self._memo[name] = make(name)
            if len(self._memo) > _KEPT:
                self._memo.popitem(last=False)
        self._memo.move_to_end(name)
        return self._memo[name]

    def _block_order(self, name: str) -> tuple[np.ndarray, ...]:
        """Blocks in the epoch's order, and the offset at which each of them begins."""
        blocks = self._permutation(name, self._num_blocks)
        sizes = np.full(self._num_blocks, self._block, np.int64)
        sizes[blocks == self._num_blocks - 1] = self._num_samples - (self._num_blocks - 1) * self._block
        return blocks, np.cumsum(sizes) - sizes

    def _sample_order(self, name: str) -> tuple[np.ndarray, ...]:
        block = int(name.split("|")[1])
        return (self._permutation(name, min(self._block, self._num_samples - block * self._block)),)

    def _permutation(self, name: str, size: int) -> np.ndarray:
        digest = hashlib.sha256(f"{self._name}|{name}".encode()).digest()
        raw = np.random.Philox(key=int.from_bytes(digest[:16], "little")).random_raw(size)
        return np.argsort(raw, kind="stable")


def _distinct(values: np.ndarray) -> list[int]:
    """The distinct values; quick when there is but one, which is the rule within a batch."""
    if values.size and (values == values[0]).all():
        return [int(values[0])]
    return np.unique(values).tolist()


def sample_order(positions: np.ndarray, *, num_samples: int, seed: int, fingerprint: str, shuffle_block: int) -> np.ndarray:
    """Dataset indices [n] int64 of global sample positions [n] (from 0, across epochs); see `SampleOrder`."""
    return SampleOrder(num_samples=num_samples, seed=seed, fingerprint=fingerprint, shuffle_block=shuffle_block)(positions)
