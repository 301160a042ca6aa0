"""Durable file operations: what is written here is on the disk, whole, or not visible under its name.

The order is always: write under a temporary name, fsync the file, rename, fsync the directory. Names that begin with `TEMPORARY`
belong to a writer; whoever holds the run's lock may remove them, because their writer is dead.
"""

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

TEMPORARY = ".tmp-"


def fsync(path: Path) -> None:
    """Forces a file's content, or a directory's entries, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, *, text: str) -> None:
    """Writes and fsyncs `text` in place; for files inside a directory that is not committed yet."""
    path.write_text(text, encoding="utf-8")
    fsync(path)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Gives a temporary path; what was written there replaces `path`, so that a reader sees the old or the new content, never a mixture.

    An error within it leaves the old content in place and no temporary file.
    """
    temporary = path.with_name(f"{TEMPORARY}{path.name}-{os.getpid()}")
    try:
        yield temporary
        fsync(temporary)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    fsync(path.parent)


def replace_text(path: Path, *, text: str) -> None:
    """Replaces the content of `path`, all of it or nothing; raises OSError with the old one in place."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def read_object(path: Path) -> dict[str, Any]:
    """A JSON object, empty where the file is missing, damaged or something else."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def rename(source: Path, *, target: Path) -> None:
    """Renames within one directory and makes the new name durable; `target` must not exist or be an empty directory."""
    os.rename(source, target)
    fsync(target.parent)


def remove_tree(path: Path) -> None:
    """Removes a directory so that it is never seen half removed under its own name."""
    doomed = path.with_name(f"{TEMPORARY}removed-{path.name}")
    if doomed.exists():
        shutil.rmtree(doomed)
    os.rename(path, doomed)
    shutil.rmtree(doomed)


def remove_temporaries(root: Path) -> None:
    """Removes what dead writers left in `root`; the caller holds the lock that makes it the only writer."""
    for path in sorted(root.glob(f"{TEMPORARY}*")):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
