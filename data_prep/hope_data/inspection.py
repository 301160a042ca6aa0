"""`hope-data inspect`: what is in a corpus, in numbers and as decoded samples with their document starts marked."""

from pathlib import Path

import numpy as np

from hope_data import mds
from hope_data.errors import PrepError
from hope_data.files import read_json
from hope_data.tokenizer import Tokenizer

DOCUMENT_MARK = "\n==== document start ====\n"


def inspect(directory: Path, *, split: str, samples: int) -> str:
    """A text for people; PrepError if the corpus is missing or broken."""
    manifest = read_json(directory / "manifest.json")
    lines = [f"{directory}: fingerprint {manifest['fingerprint']}"]
    lines.append(f"  vocabulary {manifest['vocab_size']}, {manifest['dtype']} ids, samples of {manifest['seq_len']} + 1 tokens")
    rule = manifest["heldout"]
    lines.append(f"  held out: rule {rule['rule']}, one in {rule['every']}; rejects {manifest['rejects']['total']}")
    for name, counts in manifest["splits"].items():
        ratio = counts["bytes"] / max(1, counts["tokens"])
        lines.append(
            f"  {name}: {counts['samples']} samples, {counts['documents']} documents, {counts['tokens']} tokens, {counts['bytes']} bytes "
            f"({ratio:.3f} bytes a token), {len(counts['shards'])} shards, {counts['unused_tokens']} tokens unused"
        )
    for source in manifest["sources"][:40]:
        lines.append(f"  source: {source['name']} [{source['licence']}] {source['version']}")
    tokenizer = Tokenizer.load(directory / "tokenizer.model")
    total = manifest["splits"][split]["samples"]
    for index in np.linspace(0, total - 1, min(samples, total)).round().astype(int).tolist():
        ids, starts = read_sample(directory, manifest, split, index)
        edges = [0, *[int(s) for s in starts if s > 0], len(ids)]
        pieces = [tokenizer.decode(ids[a:b]) for a, b in zip(edges[:-1], edges[1:], strict=True)]
        text = (DOCUMENT_MARK if starts.size and starts[0] == 0 else "") + DOCUMENT_MARK.join(pieces)
        lines += [f"---- {split} sample {index}, document starts {starts.tolist()}", text]
    return "\n".join(lines)


def read_sample(directory: Path, manifest: dict, split: str, index: int) -> tuple[np.ndarray, np.ndarray]:
    """(ids [seq_len + 1], document starts) of one sample."""
    for shard in manifest["splits"][split]["shards"]:
        if index < shard["samples"]:
            path = directory / split / shard["file"]
            try:
                return mds.decode_shard(path.read_bytes(), dtype=manifest["dtype"])[index]
            except (OSError, ValueError, IndexError) as error:
                raise PrepError(f"cannot read {path}: {error}; run `hope-data verify {directory}`") from None
        index -= shard["samples"]
    raise PrepError(f"{directory} has no {split} sample {index}")
