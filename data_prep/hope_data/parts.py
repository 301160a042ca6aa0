"""Stage 1: one input file becomes one part, a directory of raw token streams, written atomically.

`part-<key>/` holds for each split `<split>.tokens` (ids, little-endian, documents one after the other, each closed by EOS) and
`<split>.starts` (uint64 positions of the document starts in that stream), `rejects.jsonl`, and `done.json` with the counts.
The key is a hash of all that determines the content, so a rerun finds finished parts whatever became of the process that wrote them.
"""

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from hope_data.documents import Document, Input, ReadOptions, Reject, read_documents
from hope_data.errors import PrepError
from hope_data.files import canonical_json, commit_directory, pretty_json, read_json, sha256_bytes, sync_directory, write_synced
from hope_data.tokenizer import Tokenizer

SPLITS = ("train", "heldout")
_ROUND_TRIPS = 8
_PART_FORMAT = 1


@dataclass(frozen=True)
class HoldOut:
    """Which documents train never sees: one in `every` (0: none).

    Rule "hash": those whose key is divisible by `every`; a document's place does not matter. Rule "per-file": of each input the
    ceil(n / every) documents of lowest key, so that every source of a small corpus is represented.
    """

    rule: str
    every: int

    def chosen(self, source: Input, options: ReadOptions) -> "HeldOutTest":
        """The test of one file's documents; "per-file" reads the file once for it."""
        if self.rule == "hash" or not self.every:
            return HeldOutTest(every=self.every, keys=frozenset())
        keys = sorted(d.key for d in read_documents(source, options) if isinstance(d, Document))
        return HeldOutTest(every=0, keys=frozenset(keys[: -(-len(keys) // self.every)]))


@dataclass(frozen=True)
class HeldOutTest:
    """`contains(document)`: is it held out?"""

    every: int
    keys: frozenset[str]

    def contains(self, document: Document) -> bool:
        return document.key in self.keys or (self.every > 0 and int(document.key[:16], 16) % self.every == 0)


@dataclass(frozen=True)
class Part:
    """The work order of one input: everything that determines its bytes."""

    source: Input
    source_sha256: str
    read: ReadOptions
    holdout: HoldOut
    dtype: str
    tokenizer_path: str
    tokenizer_sha256: str

    @property
    def key(self) -> str:
        """Name of the part: a hash of its content's causes, not of where the files lie."""
        settings = [asdict(self.read), asdict(self.holdout), self.dtype, self.tokenizer_sha256]
        cause = [_PART_FORMAT, self.source.name, self.source_sha256, *settings]
        return sha256_bytes(canonical_json(cause))[:24]

    def directory(self, work: Path) -> Path:
        return work / f"part-{self.key}"


def build_part(part: Part, work: Path) -> dict[str, Any]:
    """Write the part if it is not there; its done.json: counts by split, rejects. PrepError on bad tokenizers and full disks."""
    directory = part.directory(work)
    if not directory.exists():
        tokenizer = Tokenizer.load(Path(part.tokenizer_path))
        commit_directory(directory, lambda temporary: _fill(temporary, part, tokenizer))
    return read_json(directory / "done.json")


def checked_ids(ids: np.ndarray, *, dtype: str, vocab_size: int, where: str) -> np.ndarray:
    """`ids` in the dtype of the shards; PrepError where an id does not fit it or the vocabulary (never a wrap)."""
    limit = min(vocab_size, int(np.iinfo(dtype).max) + 1)
    if ids.size and (ids.max() >= limit or ids.min() < 0):
        bad = int(ids.max() if ids.max() >= limit else ids.min())
        raise PrepError(
            f"{where}: token id {bad} is outside 0..{limit - 1} ({dtype}, vocabulary {vocab_size}); use --dtype uint32 or another tokenizer"
        )
    return ids.astype(np.dtype(dtype).newbyteorder("<"))


class _Stream:
    """The growing token stream of one split of one part."""

    def __init__(self, directory: Path, split: str):
        self.tokens: IO[bytes] = open(directory / f"{split}.tokens", "wb")
        self.starts: list[int] = []
        self.counts = {"documents": 0, "tokens": 0, "bytes": 0}

    def append(self, ids: np.ndarray, num_bytes: int) -> None:
        self.starts.append(self.counts["tokens"])
        self.tokens.write(ids.tobytes())
        self.counts["documents"] += 1
        self.counts["tokens"] += ids.size
        self.counts["bytes"] += num_bytes

    def close(self) -> None:
        self.tokens.flush()
        os.fsync(self.tokens.fileno())
        self.tokens.close()


def _fill(directory: Path, part: Part, tokenizer: Tokenizer) -> None:
    heldout = part.holdout.chosen(part.source, part.read)
    streams = {split: _Stream(directory, split) for split in SPLITS}
    rejects: list[dict[str, Any]] = []
    num_documents = 0
    for document in read_documents(part.source, part.read):
        if isinstance(document, Reject):
            rejects.append({"file": part.source.name, "line": document.line, "reason": document.reason})
            continue
        where = f"{part.source.name}:{document.line}"
        ids = tokenizer.encode(document.text)
        if num_documents < _ROUND_TRIPS and not tokenizer.gives_back(document.text):
            raise PrepError(f"tokenizer {tokenizer.name} does not give back the text of {where}; use one without normalisation")
        num_documents += 1
        ids = checked_ids(np.append(ids, tokenizer.eos), dtype=part.dtype, vocab_size=tokenizer.vocab_size, where=where)
        streams["heldout" if heldout.contains(document) else "train"].append(ids, len(document.text.encode("utf-8")))
    for split, stream in streams.items():
        stream.close()
        write_synced(directory / f"{split}.starts", np.array(stream.starts, "<u8").tobytes())
    write_synced(directory / "rejects.jsonl", "".join(json.dumps(r, sort_keys=True) + "\n" for r in rejects).encode("ascii"))
    counts = {split: stream.counts for split, stream in streams.items()}
    write_synced(directory / "done.json", pretty_json({"splits": counts, "rejects": len(rejects)}))
    sync_directory(directory)
