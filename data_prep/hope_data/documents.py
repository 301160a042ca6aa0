"""Input files to documents: jsonl(.gz/.zst), txt(.gz/.zst) and parquet, one at a time, with what had to be rejected and where.

A jsonl line or parquet row is one document. A txt file is one document, or several separated by lines that hold only a form feed.
Bad input never stops the reading and never slips through: it comes out as a `Reject` with the file's line (or row) number.
"""

import gzip
import hashlib
import io
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from hope_data.errors import PrepError

SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".txt", ".txt.gz", ".txt.zst", ".parquet")
PAGE_BREAK = b"\f"


@dataclass(frozen=True)
class Input:
    """One input file: where it lies, and the name that stands for it in the output (never its place on this machine)."""

    path: str
    name: str


@dataclass(frozen=True)
class ReadOptions:
    """How documents are read."""

    text_key: str = "text"
    id_key: str = "id"
    max_bytes: int = 16 << 20


@dataclass(frozen=True)
class Document:
    """One document; `key` is the hex sha1 of its id, or of its text where it has none (the held-out rule reads it)."""

    line: int
    text: str
    key: str


@dataclass(frozen=True)
class Reject:
    """A document that cannot be used: line (or row) number from 1, and why."""

    line: int
    reason: str


def find_inputs(arguments: list[str]) -> list[Input]:
    """Files as given, directories as the sorted supported files below them; PrepError if there is none or a name comes twice."""
    found: list[Input] = []
    for argument in arguments:
        path = Path(argument)
        if path.is_dir():
            files = sorted(p for p in path.rglob("*") if p.name.endswith(SUFFIXES) and p.is_file())
            found += [Input(str(p), p.relative_to(path).as_posix()) for p in files]
        elif not path.exists():
            raise PrepError(f"input {argument} does not exist")
        elif not path.name.endswith(SUFFIXES):
            raise PrepError(f"input {argument} has none of the endings {' '.join(SUFFIXES)}; rename or convert it")
        else:
            found.append(Input(str(path), path.name))
    if not found:
        raise PrepError(f"no input files in {' '.join(arguments) or 'the command'}; give files or directories of {' '.join(SUFFIXES)}")
    names = [f.name for f in found]
    for name in names:
        if names.count(name) > 1:
            raise PrepError(f"two inputs have the name {name}; give their common directory instead")
    return found


def read_documents(source: Input, options: ReadOptions) -> Iterator[Document | Reject]:
    """All documents and rejects of one file, in order; PrepError if the file cannot be read at all."""
    try:
        if source.name.endswith(".parquet"):
            yield from _read_parquet(source, options)
        else:
            with _open(source) as file:
                yield from (_read_jsonl if ".jsonl" in source.name else _read_txt)(file, options)
    except OSError as error:
        raise PrepError(f"cannot read {source.path}: {error.strerror or error}") from None
    except (EOFError, zlib.error) as error:
        raise PrepError(f"cannot decompress {source.path}: {error}; fetch the file again") from None


def _open(source: Input) -> IO[bytes]:
    if source.name.endswith(".gz"):
        return gzip.open(source.path, "rb")  # type: ignore[return-value]
    if source.name.endswith(".zst"):
        return _open_zst(source)
    return open(source.path, "rb")


def _open_zst(source: Input) -> IO[bytes]:
    try:
        import zstandard
    except ImportError:
        raise PrepError(f"{source.path} needs the package zstandard: pip install zstandard") from None
    return io.BufferedReader(_ZstdFile(open(source.path, "rb"), zstandard))


class _ZstdFile(io.RawIOBase):
    """Decompresses zstd frames; unlike zstandard's own reader it raises EOFError when the file ends inside a frame."""

    def __init__(self, file: IO[bytes], zstandard: Any):
        self._file, self._zstandard = file, zstandard
        self._frame: Any = None
        self._input = self._output = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._output:
            self._input = self._input or self._file.read(1 << 17)
            if not self._input:
                if self._frame is not None:
                    raise EOFError("it ends in the middle of a zstd frame")
                return 0
            self._frame = self._frame or self._zstandard.ZstdDecompressor().decompressobj()
            try:
                self._output = self._frame.decompress(self._input)
            except self._zstandard.ZstdError as error:
                raise EOFError(str(error)) from None
            self._input = self._frame.unused_data
            if self._frame.eof:
                self._frame = None
        count = min(len(buffer), len(self._output))
        buffer[:count], self._output = self._output[:count], self._output[count:]
        return count

    def close(self) -> None:
        self._file.close()
        super().close()


def _read_jsonl(file: IO[bytes], options: ReadOptions) -> Iterator[Document | Reject]:
    number = 0
    while line := file.readline(options.max_bytes + 1):
        number += 1
        if len(line) > options.max_bytes:
            while line and not line.endswith(b"\n"):
                line = file.readline(1 << 20)
            yield Reject(number, f"line longer than {options.max_bytes} bytes")
        elif line.strip():
            yield _parse(number, line, options)


def _parse(number: int, line: bytes, options: ReadOptions) -> Document | Reject:
    try:
        record = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError:
        return Reject(number, "invalid UTF-8")
    except (ValueError, RecursionError):
        return Reject(number, "broken JSON")
    if not isinstance(record, dict) or options.text_key not in record:
        return Reject(number, f"no key {options.text_key!r}")
    return _check(number, record[options.text_key], record.get(options.id_key))


def _check(number: int, text: Any, identity: Any) -> Document | Reject:
    if not isinstance(text, str):
        return Reject(number, "text is not a string")
    if not text.strip():
        return Reject(number, "empty text")
    if "\0" in text:
        return Reject(number, "NUL character")
    try:
        encoded = text.encode("utf-8")
        named = identity.encode("utf-8") if isinstance(identity, str) and identity else encoded
    except UnicodeEncodeError:
        return Reject(number, "lone surrogate")
    return Document(number, text, hashlib.sha1(named, usedforsecurity=False).hexdigest())


def _read_txt(file: IO[bytes], options: ReadOptions) -> Iterator[Document | Reject]:
    number, first, size = 0, 1, 0
    lines: list[bytes] = []
    while True:
        line = file.readline(options.max_bytes + 1)
        number += 1
        if not line or line.rstrip(b"\r\n") == PAGE_BREAK:
            if size > options.max_bytes:
                yield Reject(first, f"document longer than {options.max_bytes} bytes")
            elif lines or line:
                yield _text_document(first, b"".join(lines))
            if not line:
                return
            first, size, lines = number + 1, 0, []
        else:
            size += len(line)
            if size <= options.max_bytes:
                lines.append(line)


def _text_document(first: int, data: bytes) -> Document | Reject:
    try:
        return _check(first, data.decode("utf-8").removesuffix("\n"), None)
    except UnicodeDecodeError as error:
        return Reject(first + data[: error.start].count(b"\n"), "invalid UTF-8")


def _read_parquet(source: Input, options: ReadOptions) -> Iterator[Document | Reject]:
    try:
        import pyarrow as arrow
        import pyarrow.parquet as parquet
    except ImportError:
        raise PrepError(f"{source.path} needs the package pyarrow: pip install pyarrow") from None
    try:
        with parquet.ParquetFile(source.path) as file:
            names = file.schema_arrow.names
            if options.text_key not in names:
                raise PrepError(f"{source.path} has the columns {' '.join(names)}, none named {options.text_key!r}; set --text-key")
            columns = [options.text_key, *([options.id_key] if options.id_key in names else [])]
            row = 0
            for batch in file.iter_batches(batch_size=256, columns=columns):
                for record in batch.to_pylist():
                    row += 1
                    yield _check(row, record[options.text_key], record.get(options.id_key))
    except (arrow.ArrowException, UnicodeDecodeError) as error:
        raise PrepError(f"cannot read {source.path}: {str(error).splitlines()[0]}") from None
