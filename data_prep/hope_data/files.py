"""Small file operations that survive a kill: write to a temporary name, fsync, rename; hash; lock.

Every writer of `hope_data` goes through `commit_bytes` or `commit_directory`, so a file that carries its final name is complete.
"""

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hope_data.errors import PrepError

_READ_BYTES = 1 << 20


def sha256_bytes(data: bytes) -> str:
    """Hex sha256 of a byte string."""
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: Path) -> str:
    """Hex sha256 of a file, read in pieces."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(_READ_BYTES):
            digest.update(piece)
    return digest.hexdigest()


def canonical_json(value: Any) -> bytes:
    """The one byte string of a JSON value that hashes are taken of."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode("ascii")


def pretty_json(value: Any) -> bytes:
    """Readable, deterministic JSON text for files."""
    return (json.dumps(value, indent=1, sort_keys=True, ensure_ascii=True) + "\n").encode("ascii")


def read_json(path: Path) -> Any:
    """Parse a JSON file; PrepError if it is missing or broken."""
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        raise PrepError(f"{path} does not exist; name a directory that `hope-data tokenize` wrote") from None
    except ValueError as error:
        raise PrepError(f"{path} is not valid JSON ({error}); write the corpus again") from None


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn an operating-system failure while writing under `path` (full disk, quota, read-only) into a PrepError."""
    try:
        yield
    except OSError as error:
        raise PrepError(f"cannot write {path}: {error.strerror}; finished parts are kept: mend it and run the same command again") from None


def sync_directory(path: Path) -> None:
    """Make the names in a directory durable."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_synced(path: Path, data: bytes) -> None:
    """Write a file and fsync it; the caller renames."""
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def commit_bytes(path: Path, data: bytes) -> None:
    """Write `data` to `path` atomically."""
    with writing(path):
        temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        try:
            write_synced(temporary, data)
            os.replace(temporary, path)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise
        sync_directory(path.parent)


def commit_directory(path: Path, fill: Callable[[Path], None]) -> None:
    """Create the directory `path` atomically: `fill` writes (and syncs) files in a temporary one, which is then renamed."""
    with writing(path):
        temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        try:
            fill(temporary)
            sync_directory(temporary)
            os.rename(temporary, path)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        sync_directory(path.parent)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on `path`; PrepError when another process holds it. The kernel drops it when the holder dies."""
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = open(path, "w")
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        handle.close()
        raise PrepError(f"another hope-data is writing here ({path}); wait for it or choose another --out") from None
    try:
        yield
    finally:
        handle.close()
