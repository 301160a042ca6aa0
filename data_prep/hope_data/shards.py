"""Stage 2: the parts' token streams, one after the other, cut into samples of seq_len + 1 ids and written as MDS shards.

Sample i of a split is stream[i * seq_len : i * seq_len + seq_len + 1]: consecutive samples overlap by one id, so every id but the first
is a target exactly once. Shard k holds samples k * n .. k * n + n - 1 for a fixed n; it depends on nothing but the streams, so shards
are written in any order, by any number of workers, and again after a kill, with the same bytes. The last incomplete sample is dropped.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hope_data import mds
from hope_data.files import commit_bytes

_SAMPLE_OVERHEAD = 24  # bytes: sizes, headers, offset, sentinel and a document start or two


@dataclass(frozen=True)
class Stream:
    """The concatenated streams of one split: `parts` are (directory, number of ids)."""

    split: str
    parts: tuple[tuple[str, int], ...]
    dtype: str
    seq_len: int
    shard_bytes: int

    @property
    def num_tokens(self) -> int:
        return sum(n for _, n in self.parts)

    @property
    def num_samples(self) -> int:
        return max(0, (self.num_tokens - 1) // self.seq_len)

    @property
    def samples_per_shard(self) -> int:
        return max(1, self.shard_bytes // ((self.seq_len + 1) * np.dtype(self.dtype).itemsize + _SAMPLE_OVERHEAD))

    @property
    def num_shards(self) -> int:
        return -(-self.num_samples // self.samples_per_shard)

    def slice(self, begin: int, end: int) -> tuple[np.ndarray, np.ndarray]:
        """Ids begin..end-1 of the stream and the positions of document starts among them, relative to `begin`."""
        tokens, starts, base = [], [], 0
        for directory, size in self.parts:
            a, b = max(begin, base), min(end, base + size)
            if a < b:
                dtype = np.dtype(self.dtype).newbyteorder("<")
                tokens.append(np.fromfile(Path(directory) / f"{self.split}.tokens", dtype, b - a, offset=(a - base) * dtype.itemsize))
                places = np.fromfile(Path(directory) / f"{self.split}.starts", "<u8").astype(np.int64) + base
                starts.append(places[np.searchsorted(places, a) : np.searchsorted(places, b)] - begin)
            base += size
        return np.concatenate(tokens), np.concatenate(starts)


def build_shard(stream: Stream, index: int, directory: Path) -> dict[str, Any]:
    """Write shard `index` of the split into `directory`; its entry of index.json."""
    first = index * stream.samples_per_shard
    count = min(stream.samples_per_shard, stream.num_samples - first)
    length = stream.seq_len
    tokens, starts = stream.slice(first * length, (first + count) * length + 1)
    samples = []
    for i in range(count):
        begin, end = i * length, i * length + length + 1
        inside = starts[np.searchsorted(starts, begin) : np.searchsorted(starts, end)] - begin
        samples.append(mds.encode_sample(tokens[begin:end], inside))
    data = mds.encode_shard(samples, dtype=stream.dtype)
    path = directory / mds.shard_name(index)
    if not path.exists() or path.read_bytes() != data:
        commit_bytes(path, data)
    return mds.index_entry(path.name, data, count, dtype=stream.dtype)
