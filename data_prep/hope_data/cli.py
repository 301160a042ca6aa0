"""The command `hope-data`: train-tokenizer, tokenize, tiny, verify, inspect, fetch.

Exit codes: 0 done, 2 the user's error (one line on stderr), 1 our bug (traceback).
"""

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from hope_data.corpus_build import BuildOptions, Source, build, training_texts
from hope_data.documents import Input, ReadOptions, find_inputs
from hope_data.embedded import tiny_corpus
from hope_data.errors import PrepError
from hope_data.fetch import RECIPES, fetch, source_record
from hope_data.files import commit_bytes
from hope_data.inspection import inspect
from hope_data.parts import HoldOut
from hope_data.tokenizer import Tokenizer, train
from hope_data.verification import verify

EXIT_USER_ERROR = 2
TINY_VOCAB_SIZE, TINY_SEQ_LEN, TINY_HELDOUT_EVERY = 1024, 256, 20


def _input_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("inputs", nargs="*", help="files or directories: .jsonl .txt (also .gz, .zst) .parquet")
    parser.add_argument("--corpus", choices=["tiny"], help="the embedded public-domain text instead of files")
    parser.add_argument("--text-key", default="text", help="JSON key or parquet column of the text (default: text)")
    parser.add_argument("--id-key", default="id", help="JSON key or parquet column of the document's id, if any (default: id)")
    parser.add_argument("--max-document-mib", type=int, default=16, help="longer lines or documents are rejected (default: 16)")
    parser.add_argument("--vocab-size", type=int, help="pieces of a tokenizer trained here")
    parser.add_argument("--sample-mib", type=int, default=20, help="text that the tokenizer is trained on (default: 20)")
    parser.add_argument(
        "--heldout-rule",
        choices=["hash", "per-file"],
        help="hash: documents by sha1 of their id or text (default); per-file: a share of each file (default for the tiny corpus)",
    )
    parser.add_argument("--heldout-every", type=int, help="hold out one in so many documents, 0 for none (default: 50, tiny: 20)")


def _build_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", required=True, type=Path, help="directory of the corpus")
    parser.add_argument("--seq-len", type=int, help="tokens of a training sequence (default: 1024, tiny: 256)")
    parser.add_argument("--tokenizer", default="", help="SentencePiece model; without it one of --vocab-size is trained first")
    parser.add_argument("--dtype", choices=["auto", "uint16", "uint32"], default="auto", help="of token ids (default: by vocabulary)")
    parser.add_argument("--shard-mib", type=int, default=16, help="size of a shard (default: 16)")
    parser.add_argument("--max-reject-rate", type=float, default=1e-3, help="share of rejects that fails the run (default: 0.001)")
    parser.add_argument("--licence", default="unstated", help="licence of the inputs, for the manifest")
    parser.add_argument("--workers", type=int, default=min(8, os.cpu_count() or 1), help="processes; the output does not depend on it")


def make_parser() -> argparse.ArgumentParser:
    """The argument parser of all commands."""
    parser = argparse.ArgumentParser(prog="hope-data", description="Text in, hashed MDS shards of tokens out.")
    commands = parser.add_subparsers(dest="command", required=True)
    p = commands.add_parser("train-tokenizer", help="train a SentencePiece BPE model")
    _input_arguments(p)
    p.add_argument("--out", required=True, type=Path, help="the model file to write")
    p = commands.add_parser("tokenize", help="tokenize into a corpus directory; run again after a kill to continue")
    _input_arguments(p)
    _build_arguments(p)
    p = commands.add_parser("tiny", help="tokenize --corpus tiny --vocab-size 1024 --seq-len 256")
    _input_arguments(p)
    _build_arguments(p)
    p = commands.add_parser("verify", help="hash and check every file of a corpus")
    p.add_argument("directory", type=Path)
    p = commands.add_parser("inspect", help="counts and decoded samples of a corpus")
    p.add_argument("directory", type=Path)
    p.add_argument("--split", choices=["train", "heldout"], default="train")
    p.add_argument("--samples", type=int, default=2, help="decoded samples to print, spread over the split (default: 2)")
    p = commands.add_parser("fetch", help="download a corpus as JSONL")
    p.add_argument("recipe", choices=sorted(RECIPES))
    p.add_argument("--out", required=True, type=Path, help="directory for the JSONL files")
    p.add_argument("--package", action="append", default=[], help="debian-docs: only these packages (may be given again)")
    p.add_argument("--subset", default="sample-10BT", help="fineweb-edu: configuration of the data set (default: sample-10BT)")
    p.add_argument("--max-files", type=int, default=1, help="fineweb-edu: parquet files to download (default: 1)")
    return parser


def _inputs(args: argparse.Namespace, stack: ExitStack) -> tuple[list[Input], list[Source]]:
    if args.corpus == "tiny":
        if args.inputs:
            raise PrepError(f"--corpus tiny takes no input files, got {' '.join(args.inputs)}; drop one of them")
        return stack.enter_context(tiny_corpus())
    inputs = find_inputs(args.inputs)
    return inputs, [Source(**(source_record(i.path) or {"name": i.name, "licence": getattr(args, "licence", "")})) for i in inputs]


def _settings(args: argparse.Namespace) -> tuple[ReadOptions, HoldOut]:
    read = ReadOptions(text_key=args.text_key, id_key=args.id_key, max_bytes=args.max_document_mib << 20)
    tiny = args.corpus == "tiny"
    every = args.heldout_every if args.heldout_every is not None else (TINY_HELDOUT_EVERY if tiny else 50)
    return read, HoldOut(rule=args.heldout_rule or ("per-file" if tiny else "hash"), every=every)


def _train_tokenizer(args: argparse.Namespace) -> None:
    if not args.vocab_size:
        raise PrepError("--vocab-size is missing; say how many pieces the tokenizer has, for example --vocab-size 32768")
    read, holdout = _settings(args)
    with ExitStack() as stack:
        inputs, _ = _inputs(args, stack)
        texts = training_texts(inputs, read=read, holdout=holdout, max_bytes=args.sample_mib << 20)
        data = train(texts, vocab_size=args.vocab_size)
    commit_bytes(args.out, data)
    print(f"{args.out}: {args.vocab_size} pieces, sha256 {Tokenizer(data, name=str(args.out)).sha256}")


def _tokenize(args: argparse.Namespace) -> None:
    read, holdout = _settings(args)
    tiny = args.corpus == "tiny"
    if args.tokenizer and args.vocab_size:
        raise PrepError("--tokenizer and --vocab-size exclude each other: a given tokenizer has its size")
    vocab_size = args.vocab_size or (0 if args.tokenizer else TINY_VOCAB_SIZE if tiny else 0)
    if not args.tokenizer and not vocab_size:
        raise PrepError("give --tokenizer FILE, or --vocab-size N to train one first")
    options = BuildOptions(
        seq_len=args.seq_len if args.seq_len is not None else (TINY_SEQ_LEN if tiny else 1024),
        read=read,
        holdout=holdout,
        tokenizer=args.tokenizer,
        vocab_size=vocab_size,
        train_bytes=args.sample_mib << 20,
        dtype=args.dtype,
        shard_bytes=args.shard_mib << 20,
        max_reject_rate=args.max_reject_rate,
    )
    with ExitStack() as stack:
        inputs, sources = _inputs(args, stack)
        manifest = build(inputs, sources=sources, out=args.out, options=options, workers=args.workers)
    for split, counts in manifest["splits"].items():
        size = f"{counts['samples']} samples of {manifest['seq_len']} + 1 tokens"
        print(f"{split}: {size}, {counts['documents']} documents, {counts['tokens']} tokens")
    print(f"{args.out}: vocabulary {manifest['vocab_size']}, rejects {manifest['rejects']['total']}, fingerprint {manifest['fingerprint']}")


def _run(args: argparse.Namespace) -> None:
    if args.command == "train-tokenizer":
        _train_tokenizer(args)
    elif args.command in ("tokenize", "tiny"):
        if args.command == "tiny":
            args.corpus = "tiny"
        _tokenize(args)
    elif args.command == "verify":
        print(verify(args.directory))
    elif args.command == "inspect":
        print(inspect(args.directory, split=args.split, samples=args.samples))
    else:
        for path in fetch(args.recipe, args.out, packages=args.package, subset=args.subset, max_files=args.max_files):
            print(path)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; the exit code."""
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    args = make_parser().parse_args(arguments)
    try:
        _run(args)
    except PrepError as error:
        print(f"hope-data: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    return 0


if __name__ == "__main__":
    sys.exit(main())
