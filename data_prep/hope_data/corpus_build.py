"""The whole of `hope-data tokenize`: inputs -> tokenizer -> parts -> shards -> manifest, in a work directory, then one rename to --out.

Killed at any moment and started again, it continues; the bytes of the result depend on the inputs and options only, not on the
number of workers, on kills, or on where the files lie. `manifest.json` describes the corpus and carries its `fingerprint`.
"""

import json
import os
import shutil
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hope_data import __version__, mds
from hope_data.documents import Document, Input, ReadOptions, read_documents
from hope_data.errors import PrepError
from hope_data.files import canonical_json, commit_bytes, locked, pretty_json, read_json, sha256_bytes, sha256_file, sync_directory, writing
from hope_data.parts import SPLITS, HoldOut, Part, build_part
from hope_data.shards import Stream, build_shard
from hope_data.tokenizer import Tokenizer, train
from hope_data.workers import run_jobs

MANIFEST_FORMAT = "hope-data/1"
CONTENT_KEYS = ("format", "tokenizer", "vocab_size", "dtype", "seq_len", "splits")


@dataclass(frozen=True)
class BuildOptions:
    """What determines a corpus besides its inputs. `tokenizer` "" trains one of `vocab_size` pieces on the train documents."""

    seq_len: int
    read: ReadOptions
    holdout: HoldOut
    tokenizer: str = ""
    vocab_size: int = 0
    train_bytes: int = 20 << 20
    dtype: str = "auto"
    shard_bytes: int = 16 << 20
    max_reject_rate: float = 1e-3


@dataclass(frozen=True)
class Source:
    """Where an input's text comes from, for the manifest."""

    name: str
    licence: str
    version: str = ""
    origin: str = ""


def fingerprint(manifest: dict[str, Any]) -> str:
    """Identity of the content: tokenizer, sample shape, counts, and the sha256 of every shard; not where it came from or what wrote it."""
    return sha256_bytes(canonical_json({k: manifest[k] for k in CONTENT_KEYS}))


def training_texts(inputs: list[Input], *, read: ReadOptions, holdout: HoldOut, max_bytes: int) -> Any:
    """Texts of train documents, from the start of every input, at most `max_bytes` shared equally among the inputs."""
    for source in inputs:
        heldout = holdout.chosen(source, read)
        left = max_bytes // len(inputs)
        for document in read_documents(source, read):
            if left <= 0:
                break
            if isinstance(document, Document) and not heldout.contains(document):
                left -= len(document.text)
                yield document.text


def build(inputs: list[Input], *, sources: list[Source], out: Path, options: BuildOptions, workers: int) -> dict[str, Any]:
    """Build (or finish, or find finished) the corpus `out`; its manifest. PrepError on bad input, other contents in `out`, full disk."""
    _check(options, out)
    hashes = run_jobs(sha256_file, [(Path(i.path),) for i in inputs], workers=1, label="inputs hashed")
    given = Tokenizer.load(Path(options.tokenizer)).sha256 if options.tokenizer else ""
    fixed = {k: v for k, v in asdict(options).items() if k not in ("tokenizer", "max_reject_rate")}
    named = [[i.name, h] for i, h in zip(inputs, hashes, strict=True)]
    plan = sha256_bytes(canonical_json([MANIFEST_FORMAT, __version__, named, [asdict(s) for s in sources], fixed, given]))
    work = out.with_name(out.name + ".work")
    with locked(work / "lock"):
        if (out / "manifest.json").exists():
            manifest = _finished(out, plan)
        else:
            manifest = _Build(inputs, hashes, sources, out, work, plan, options, workers).run()
        shutil.rmtree(work, ignore_errors=True)
    return manifest


def _check(options: BuildOptions, out: Path) -> None:
    if options.seq_len < 1:
        raise PrepError(f"--seq-len {options.seq_len} must be at least 1")
    if options.holdout.every < 0 or options.holdout.every == 1:
        raise PrepError(f"--heldout-every {options.holdout.every} must be 0 (none) or at least 2")
    if out.exists() and not (out / "manifest.json").exists() and (not out.is_dir() or any(out.iterdir())):
        raise PrepError(f"--out {out} exists and is not a corpus; choose another directory or remove it")


def _finished(out: Path, plan: str) -> dict[str, Any]:
    manifest = read_json(out / "manifest.json")
    if manifest.get("plan") != plan:
        found = manifest.get("fingerprint")
        raise PrepError(f"--out {out} holds another corpus (fingerprint {found}); choose another directory or remove it")
    return manifest


@dataclass(frozen=True)
class _Build:
    """One run of `build`: parts, shards, manifest in `work`, then the rename that makes them the corpus."""

    inputs: list[Input]
    hashes: list[str]
    sources: list[Source]
    out: Path
    work: Path
    plan: str
    options: BuildOptions
    workers: int

    def run(self) -> dict[str, Any]:
        options = self.options
        path = self._tokenizer()
        tokenizer = Tokenizer.load(path)
        dtype = options.dtype if options.dtype != "auto" else ("uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32")
        parts = [
            Part(i, h, options.read, options.holdout, dtype, str(path), tokenizer.sha256)
            for i, h in zip(self.inputs, self.hashes, strict=True)
        ]
        done = run_jobs(build_part, [(p, self.work) for p in parts], workers=self.workers, label="parts")
        rejects = b"".join((p.directory(self.work) / "rejects.jsonl").read_bytes() for p in parts)
        _check_rejects(rejects, done, options.max_reject_rate)
        staged = self.work / f"corpus-{self.plan[:24]}"
        splits = {}
        for split in SPLITS:
            sizes = tuple((str(p.directory(self.work)), d["splits"][split]["tokens"]) for p, d in zip(parts, done, strict=True))
            stream = Stream(split, sizes, dtype, options.seq_len, options.shard_bytes)
            _check_stream(stream, options)
            splits[split] = _write_split(stream, counts=[d["splits"][split] for d in done], directory=staged / split, workers=self.workers)
        manifest = self._manifest(tokenizer, dtype=dtype, splits=splits, rejects=rejects)
        commit_bytes(staged / "tokenizer.model", tokenizer.data)
        commit_bytes(staged / "rejects.jsonl", rejects)
        commit_bytes(staged / "manifest.json", pretty_json(manifest))
        with writing(self.out):
            self.out.parent.mkdir(parents=True, exist_ok=True)
            os.rename(staged, self.out)
            sync_directory(self.out.parent)
        return manifest

    def _tokenizer(self) -> Path:
        """The given model, or the one trained on these inputs (kept in `work` until the corpus is finished)."""
        options = self.options
        if options.tokenizer:
            return Path(options.tokenizer)
        settings = [asdict(options.read), asdict(options.holdout), options.train_bytes, options.vocab_size]
        cause = [[i.name for i in self.inputs], self.hashes, *settings]
        path = self.work / f"tokenizer-{sha256_bytes(canonical_json(cause))[:24]}.model"
        if not path.exists():
            texts = training_texts(self.inputs, read=options.read, holdout=options.holdout, max_bytes=options.train_bytes)
            commit_bytes(path, train(texts, vocab_size=options.vocab_size))
        return path

    def _manifest(self, tokenizer: Tokenizer, *, dtype: str, splits: dict[str, Any], rejects: bytes) -> dict[str, Any]:
        manifest = {
            "format": MANIFEST_FORMAT,
            "tool_version": __version__,
            "plan": self.plan,
            "tokenizer": {"file": "tokenizer.model", "sha256": tokenizer.sha256, **tokenizer.control_ids()},
            "vocab_size": tokenizer.vocab_size,
            "dtype": dtype,
            "seq_len": self.options.seq_len,
            "heldout": asdict(self.options.holdout),
            "inputs": [{"name": i.name, "sha256": h} for i, h in zip(self.inputs, self.hashes, strict=True)],
            "sources": [asdict(s) for s in self.sources],
            "splits": splits,
            "rejects": _reject_summary(rejects),
        }
        return {**manifest, "fingerprint": fingerprint(manifest)}


def _check_rejects(rejects: bytes, done: list[dict[str, Any]], limit: float) -> None:
    bad = sum(d["rejects"] for d in done)
    good = sum(d["splits"][s]["documents"] for d in done for s in SPLITS)
    if bad and bad > limit * (bad + good):
        first = json.loads(rejects.split(b"\n", 1)[0])
        reasons = ", ".join(f"{n} x {r}" for r, n in sorted(_reject_summary(rejects)["reasons"].items(), key=lambda x: -x[1])[:3])
        raise PrepError(
            f"{bad} of {bad + good} documents rejected ({reasons}; first {first['file']}:{first['line']}), more than "
            f"--max-reject-rate {limit:g}; mend the input or raise the rate"
        )


def _reject_summary(rejects: bytes) -> dict[str, Any]:
    reasons = Counter(json.loads(line)["reason"] for line in rejects.splitlines())
    return {"total": sum(reasons.values()), "reasons": dict(sorted(reasons.items()))}


def _check_stream(stream: Stream, options: BuildOptions) -> None:
    if stream.num_samples == 0 and (stream.split == "train" or options.holdout.every):
        raise PrepError(
            f"the {stream.split} split has {stream.num_tokens} tokens, fewer than one sample of --seq-len {stream.seq_len} + 1; "
            "give more text, a smaller --seq-len, or another --heldout-every (0 holds nothing out)"
        )


def _write_split(stream: Stream, *, counts: list[dict[str, int]], directory: Path, workers: int) -> dict[str, Any]:
    """Shards and index.json of one split; its entry in the manifest."""
    with writing(directory):
        directory.mkdir(parents=True, exist_ok=True)
    jobs = [(stream, k, directory) for k in range(stream.num_shards)]
    entries = run_jobs(build_shard, jobs, workers=workers, label=f"{stream.split} shards")
    commit_bytes(directory / "index.json", mds.index_json(entries))
    total = {k: sum(c[k] for c in counts) for k in ("documents", "tokens", "bytes")}
    shards = []
    for entry in entries:
        raw = entry["raw_data"]
        shards.append({"file": raw["basename"], "sha256": raw["hashes"]["sha256"], "bytes": raw["bytes"], "samples": entry["samples"]})
    used = stream.num_samples * stream.seq_len + 1 if stream.num_samples else 0
    return {**total, "samples": stream.num_samples, "unused_tokens": stream.num_tokens - used, "shards": shards}
