"""Writing a checkpoint: every rank its file, then manifest, one rename, `latest`, verification, retention.

    all ranks     temporary directory -> own file, fsync, sha256 -> .................................. -> read a share back -> ......
    first rank    (creates it)                                    -> meta, manifest, fsync, rename, latest                   -> prune

The arrows between the columns are collective: an error of any rank ends the save on all of them. A kill at any point leaves either no
trace but a temporary directory, which the next save removes, or the whole checkpoint.
"""

import contextlib
import json
import os
import shutil
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path

from hope_pt import engine
from hope_pt.checkpoint.manifest import describe, directory_name, entry, verify, write_manifest
from hope_pt.checkpoint.retention import prune, set_aside
from hope_pt.engine import collectives
from hope_pt.engine.sharding import Shard
from hope_pt.errors import CheckpointError
from hope_pt.files import TEMPORARY, fsync, remove_temporaries, rename, replace_text, write_text

META = "meta.json"
LATEST = "latest"


class Saving:
    """A checkpoint on its way to the disk while training goes on. Collective: made and advanced by all ranks in the same order.

    The tensors must not change before its end. What is slow (writing, hashing, reading back) happens in a thread; what ranks do together
    (commit, retention) happens in `advance`. Arguments and errors are those of `save`. Dropping the object before `advance` is true loses
    at most this checkpoint.
    """

    def __init__(self, root: str | Path, *, step: int, shards: Sequence[Shard], meta: dict, layout: str, keep: int, keep_every: int):
        self._protocol = _save(Path(root), step=step, shards=shards, meta=meta, layout=layout, keep=keep, keep_every=keep_every)
        self._thread = _Thread(next(self._protocol))

    def advance(self, *, wait: bool) -> bool:
        """Whether the checkpoint is committed and retention done. Without `wait` goes on only where all ranks have finished their part."""
        while wait or collectives.all_true(not self._thread.is_alive()):
            self._thread.join()
            try:
                self._thread = _Thread(_resume(self._protocol, error=self._thread.error))
            except StopIteration:
                return True
        return False

    def abandon(self) -> None:
        """Waits for this rank's thread and leaves the rest; not collective, for a session that ends with an error."""
        self._thread.join()


def save(root: str | Path, *, step: int, shards: Sequence[Shard], meta: dict, layout: str, keep: int, keep_every: int) -> Path:
    """Collective. Commits `root/step-00000500/` and returns its path; the caller's job holds the run's lock.

    root: on a disk that all ranks share. shards: this rank's parts; over all ranks every part of every tensor once. meta: JSON values
    only, finite floats, equal on all ranks; they come back bit for bit. layout: a note for people. keep, keep_every: see `retention`.
    Raises CheckpointError on all ranks if the disk refuses one (full, read-only): earlier checkpoints are untouched and no temporary
    remains.
    """
    protocol = _save(Path(root), step=step, shards=shards, meta=meta, layout=layout, keep=keep, keep_every=keep_every)
    error: BaseException | None = None
    while True:
        try:
            work = _resume(protocol, error=error)
        except StopIteration as done:
            return done.value
        error = _failure(work)


_Work = Callable[[], None]


class _Thread(threading.Thread):
    """Runs one piece of work; its error is kept for whoever resumes the protocol. A daemon: a training that ends does not wait for it."""

    def __init__(self, work: _Work):
        super().__init__(name="checkpoint", daemon=True)
        self.error: BaseException | None = None
        self._work = work
        self.start()

    def run(self) -> None:
        self.error = _failure(self._work)


def _failure(work: _Work) -> BaseException | None:
    try:
        work()
    except Exception as error:
        return error
    return None


def _resume(protocol: Generator[_Work, None, Path], *, error: BaseException | None) -> _Work:
    """The next piece of work; `error` is raised where the last piece was yielded. StopIteration with the path at the end."""
    return protocol.throw(error) if error else next(protocol)


def _save(
    root: Path, *, step: int, shards: Sequence[Shard], meta: dict, layout: str, keep: int, keep_every: int
) -> Generator[_Work, None, Path]:
    """The protocol of one save on one rank. What it yields is not collective and may run in a thread; the rest is collective."""
    first, final = collectives.rank() == 0, root / directory_name(step)
    text = json.dumps(meta, indent=1, sort_keys=True, allow_nan=False) + "\n"
    temporary: Path = collectives.broadcast(root / f"{TEMPORARY}{final.name}-{os.getpid()}")
    files: dict[str, dict] = {}
    try:
        with _agreed(final):
            if first:
                root.mkdir(parents=True, exist_ok=True)
                remove_temporaries(root)
                temporary.mkdir()
        write = engine.prepare_write(shards, temporary)
        with _agreed(final):
            yield lambda: files.update({name: entry(size, digest) for name, (size, digest) in write().items()})
        everyone = collectives.gather(files)
        with _agreed(final):
            if first:
                write_text(temporary / META, text=text)
                every = {name: described for part in everyone for name, described in part.items()}
                write_manifest(temporary, step=step, layout=layout, files={**every, META: describe(temporary / META)})
                fsync(temporary)
                _make_room(final)
                rename(temporary, target=final)
                replace_text(root / LATEST, text=final.name + "\n")
        with _agreed(final):
            yield lambda: verify(final, part=collectives.rank(), parts=collectives.size())
        with _agreed(final):
            if first:
                prune(root, newest=step, keep=keep, keep_every=keep_every)
    except CheckpointError:
        if first:
            shutil.rmtree(temporary, ignore_errors=True)
        raise
    return final


@contextlib.contextmanager
def _agreed(final: Path) -> Iterator[None]:
    """Collective at its end: what the disk refuses one rank within it is one CheckpointError on all of them."""
    with collectives.together():
        try:
            yield
        except OSError as error:
            who = f"rank {collectives.rank()} " if collectives.size() > 1 else ""
            raise CheckpointError(
                f"{who}cannot write {final}: {error.strerror or error}; earlier checkpoints are intact: "
                "mend the disk and run the same command again to continue from the newest"
            ) from error


def _make_room(final: Path) -> None:
    """Moves a damaged checkpoint of the same step aside; a valid one is never replaced."""
    if not final.exists():
        return
    try:
        verify(final)
    except CheckpointError:
        set_aside(final)
        return
    raise FileExistsError(0, "a valid checkpoint of this step exists already", str(final))
