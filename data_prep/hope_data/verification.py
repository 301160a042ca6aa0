"""`hope-data verify`: every file against its hash, every sample against the format, the counts against the manifest."""

from pathlib import Path
from typing import Any

from hope_data import mds
from hope_data.corpus_build import fingerprint
from hope_data.errors import PrepError
from hope_data.files import read_json, sha256_bytes
from hope_data.tokenizer import Tokenizer


def verify(directory: Path) -> str:
    """A line that says what was checked; PrepError naming the first file that is wrong, and how."""
    path = directory / "manifest.json"
    manifest = read_json(path)
    try:
        _expect(path, "fingerprint", manifest["fingerprint"], fingerprint(manifest))
        tokenizer = Tokenizer.load(directory / "tokenizer.model")
        _expect(directory / "tokenizer.model", "sha256", tokenizer.sha256, manifest["tokenizer"]["sha256"])
        _expect(directory / "tokenizer.model", "vocabulary", tokenizer.vocab_size, manifest["vocab_size"])
        for split in manifest["splits"]:
            _verify_split(directory / split, manifest, manifest["splits"][split], tokenizer)
    except (KeyError, TypeError, AttributeError) as error:
        raise PrepError(f"{path} is not a hope-data manifest ({error!r}); write the corpus again") from None
    counts = {split: s["samples"] for split, s in manifest["splits"].items()}
    return f"{directory}: sound; samples {counts}, fingerprint {manifest['fingerprint']}"


def _expect(path: Path, what: str, found: Any, expected: Any) -> None:
    if found != expected:
        raise PrepError(f"{path} is damaged: {what} {found}, expected {expected}; restore the file or write the corpus again")


def _verify_split(directory: Path, manifest: dict[str, Any], counts: dict[str, Any], tokenizer: Tokenizer) -> None:
    entries, documents, position, last = [], 0, 0, None
    for shard in counts["shards"]:
        path = directory / shard["file"]
        try:
            data = path.read_bytes()
        except OSError as error:
            raise PrepError(f"shard {path} is missing ({error.strerror}); restore it or write the corpus again") from None
        _expect(path, "sha256", sha256_bytes(data), shard["sha256"])
        samples = mds.decode_shard(data, dtype=manifest["dtype"])
        _expect(path, "number of samples", len(samples), shard["samples"])
        for ids, starts in samples:
            _expect(path, f"length of sample {position}", ids.size, manifest["seq_len"] + 1)
            _expect(path, f"ids below the vocabulary in sample {position}", bool(ids.max() < tokenizer.vocab_size), True)
            _expect(path, f"overlap of sample {position} with the one before", last is None or ids[0] == last, True)
            before = ids[starts[starts > 0] - 1]
            _expect(path, f"EOS before every document start of sample {position}", bool((before == tokenizer.eos).all()), True)
            documents += int((starts < manifest["seq_len"]).sum())
            position, last = position + 1, ids[-1]
        entries.append(mds.index_entry(shard["file"], data, len(samples), dtype=manifest["dtype"]))
    index = directory / "index.json"
    _expect(index, "sha256", sha256_bytes(index.read_bytes() if index.exists() else b""), sha256_bytes(mds.index_json(entries)))
    _expect(directory, "number of samples", position, counts["samples"])
    _expect(directory, "documents at least", documents <= counts["documents"], True)
