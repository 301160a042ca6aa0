"""Memory-mapped reader of the MDS shards that `hope-data` (or mosaicml-streaming's MDSWriter) wrote; format: docs/data.md.

A sample lies in a shard as `sizes | doc_starts | tokens`, tokens last, so its ids are the last (seq_len + 1) * itemsize bytes before the
next sample's offset. Every shard's sha256 is compared with the manifest before its first sample is used: at opening for a corpus of up
to CHECK_AT_OPEN_BYTES, at first touch beyond that.
"""

import hashlib
import json
import mmap
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hope_pt.data.batch import Batch, Rows
from hope_pt.errors import DataError

CHECK_AT_OPEN_BYTES = 256 << 20
_LENGTH_BYTES = (1, 2, 4, 8)
_COLUMNS = ["doc_starts", "tokens"]
_CONTENT_KEYS = ("format", "tokenizer", "vocab_size", "dtype", "seq_len", "splits")  # what the fingerprint is taken of


@dataclass(frozen=True)
class Manifest:
    """The part of manifest.json that reading needs; `text` is the whole, parsed."""

    path: Path
    text: dict[str, Any]

    @classmethod
    def load(cls, directory: Path) -> "Manifest":
        """Read and check directory/manifest.json; DataError if missing, broken, altered or of another format."""
        path = directory / "manifest.json"
        try:
            text = json.loads(path.read_bytes())
        except OSError as error:
            raise DataError(f"cannot read {path}: {error.strerror}; set data.path to a directory that `hope-data tokenize` wrote") from None
        except ValueError as error:
            raise DataError(f"{path} is not valid JSON ({error}); write the corpus again") from None
        if not isinstance(text, dict) or text.get("format") != "hope-data/1":
            raise DataError(f"{path} is not a hope-data/1 manifest; write the corpus again with this version's `hope-data tokenize`")
        body = {k: text.get(k) for k in _CONTENT_KEYS}
        found = hashlib.sha256(json.dumps(body, sort_keys=True, separators=(",", ":")).encode("ascii")).hexdigest()
        if found != text.get("fingerprint"):
            raise DataError(f"{path} was altered: fingerprint {text.get('fingerprint')}, its content says {found}; write the corpus again")
        return cls(path, text)


class ShardSource:
    """`Source` over one split of a local corpus directory.

    `fetch(path)`, when given, is called before a shard file is first opened and must leave it in place (the streaming backend).
    """

    def __init__(self, directory: Path, *, split: str, seq_len: int, fetch: Callable[[Path], None] | None = None):
        manifest = Manifest.load(directory)
        text = manifest.text
        if text["seq_len"] != seq_len:
            raise DataError(
                f"data.seq_len = {seq_len} but {manifest.path} says {text['seq_len']}; set data.seq_len = {text['seq_len']} "
                f"or tokenize again with --seq-len {seq_len}"
            )
        counts = text["splits"][split]
        if not counts["samples"]:
            raise DataError(f"{directory} has no {split} samples; tokenize again with another --heldout-every")
        self.fingerprint: str = text["fingerprint"]
        self.num_samples: int = counts["samples"]
        self.seq_len = seq_len
        self.vocab_size: int = text["vocab_size"]
        self.bytes_per_token: float = counts["bytes"] / counts["tokens"]
        self.tokenizer_path: Path | None = directory / text["tokenizer"]["file"]
        self._directory, self._split, self._fetch = directory, split, fetch
        self._dtype = np.dtype(text["dtype"]).newbyteorder("<")
        self._records = counts["shards"]
        self._ends = np.cumsum([r["samples"] for r in self._records])
        self._open: list[_Shard | None] = [None] * len(self._records)
        _check_hash(directory / text["tokenizer"]["file"], text["tokenizer"]["sha256"])
        self._check_files()

    def _check_files(self) -> None:
        """Presence and size of every local shard, and the hashes of a small corpus: a damaged one fails before the first step."""
        if self._fetch is None:
            for record in self._records:
                _check_size(self._path(record), record)
            if sum(r["bytes"] for r in self._records) <= CHECK_AT_OPEN_BYTES:
                for k in range(len(self._records)):
                    self._shard(k)

    def _path(self, record: dict[str, Any]) -> Path:
        return self._directory / self._split / record["file"]

    def _shard(self, k: int) -> "_Shard":
        shard = self._open[k]
        if shard is None:
            path = self._path(self._records[k])
            if self._fetch is not None:
                self._fetch(path)
            shard = self._open[k] = _Shard(path, self._records[k], dtype=self._dtype, seq_len=self.seq_len)
        return shard

    def read(self, indices: np.ndarray) -> Batch:
        return self.read_rows(indices).to_batch()

    def read_rows(self, indices: np.ndarray) -> Rows:
        indices = np.asarray(indices, np.int64)
        if indices.size and (indices.min() < 0 or indices.max() >= self.num_samples):
            raise IndexError(f"sample index outside 0..{self.num_samples - 1}")
        shards = np.searchsorted(self._ends, indices, side="right")
        ids = np.empty((indices.size, self.seq_len + 1), self._dtype)
        starts = np.zeros((indices.size, self.seq_len), np.bool_)
        for k in np.unique(shards).tolist():
            shard = self._open[k] or self._shard(k)
            rows = np.flatnonzero(shards == k)
            shard.copy_samples(indices[rows] - int(self._ends[k] - self._records[k]["samples"]), rows, ids, starts)
        return Rows(ids, starts)

    def close(self) -> None:
        for shard in self._open:
            if shard is not None:
                shard.close()
        self._open = [None] * len(self._records)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": [None] * len(self._records)}


class _Shard:
    """One mapped and verified shard file."""

    def __init__(self, path: Path, record: dict[str, Any], *, dtype: np.dtype, seq_len: int):
        _check_size(path, record)
        try:
            with open(path, "rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise DataError(f"cannot read shard {path}: {error.strerror}; restore the file or write the corpus again") from None
        found = hashlib.sha256(self._map).hexdigest()
        if found != record["sha256"]:
            raise DataError(f"shard {path} is damaged: sha256 {found}, the manifest says {record['sha256']}; restore the file")
        self._path, self._dtype, self._length = path, dtype, seq_len + 1
        count = int.from_bytes(self._map[:4], "little")
        offsets = np.frombuffer(self._map, "<u4", count + 1, 4).astype(np.int64)
        self._check_columns(json.loads(self._map[8 + 4 * count : int(offsets[0])]))
        row_bytes = self._length * self._dtype.itemsize
        self._firsts = offsets[1:] - row_bytes
        # row i of this view is the row_bytes bytes from byte i on: gathering rows of it is one memcpy a sample
        self._windows = np.lib.stride_tricks.sliding_window_view(np.frombuffer(self._map, np.uint8), row_bytes)
        self._starts = [self._read_starts(begin) for begin in offsets[:-1].tolist()]
        self._with_starts = np.array([places.size > 0 for places in self._starts])

    def _check_columns(self, config: dict[str, Any]) -> None:
        encodings = config["column_encodings"]
        if config["column_names"] != _COLUMNS or config["column_sizes"] != [None, None] or encodings[1] != f"ndarray:{self._dtype.name}":
            raise DataError(
                f"shard {self._path} has the columns {config['column_names']} as {encodings}; expected {_COLUMNS} as "
                f"['ndarray:uint32', 'ndarray:{self._dtype.name}']"
            )

    def _read_starts(self, begin: int) -> np.ndarray:
        """Document starts among the inputs of the sample at byte `begin`: two sizes of 4 bytes, then the array's code, length, values."""
        size = _LENGTH_BYTES[self._map[begin + 8] & 3]
        count = int.from_bytes(self._map[begin + 9 : begin + 9 + size], "little")
        places = np.frombuffer(self._map, "<u4", count, begin + 9 + size)
        return places[places < self._length - 1]

    def copy_samples(self, indices: np.ndarray, rows: np.ndarray, ids: np.ndarray, starts: np.ndarray) -> None:
        """Copy samples `indices` [n] of the shard into ids[rows] [n, seq_len + 1] and set starts[rows] [n, seq_len], zero before."""
        ids[rows] = self._windows[self._firsts[indices]].view(self._dtype)
        for n in np.flatnonzero(self._with_starts[indices]).tolist():
            starts[rows[n], self._starts[indices[n]]] = True

    def close(self) -> None:
        del self._windows  # a view of the map, which cannot be closed while one is left
        self._map.close()


def _check_hash(path: Path, expected: str) -> None:
    try:
        found = hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}; copy the whole corpus directory") from None
    if found != expected:
        raise DataError(f"{path} is damaged: sha256 {found}, the manifest says {expected}; restore the file")


def _check_size(path: Path, record: dict[str, Any]) -> None:
    try:
        size = path.stat().st_size
    except OSError as error:
        raise DataError(f"shard {path} is missing ({error.strerror}); restore it or write the corpus again") from None
    if size != record["bytes"]:
        raise DataError(f"shard {path} has {size} bytes, the manifest says {record['bytes']}; restore the file")
