"""Writing a checkpoint: temporary directory, fsync, manifest, one rename, `latest`, then retention.

A kill at any point leaves either no trace but a temporary directory, which the next save removes, or the whole checkpoint.
"""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from hope_pt.checkpoint.files import TEMPORARY, fsync, remove_temporaries, rename, replace_text, write_text
from hope_pt.checkpoint.manifest import directory_name, verify, write_manifest
from hope_pt.checkpoint.retention import prune, set_aside
from hope_pt.checkpoint.tensors import write_tensors
from hope_pt.errors import CheckpointError

META = "meta.json"
LATEST = "latest"


def save(root: str | Path, *, step: int, tensors: Mapping[str, Tensor], meta: dict, keep: int, keep_every: int) -> Path:
    """Commits `root/step-00000500/` and returns its path; the caller holds the run's lock.

    `tensors`: name `group.rest` -> any tensor; `meta`: JSON values only, finite floats (they come back bit for bit).
    Raises CheckpointError if the disk refuses (full, read-only): earlier checkpoints are untouched and no temporary remains.
    """
    root = Path(root)
    final = root / directory_name(step)
    temporary = root / f"{TEMPORARY}{final.name}-{os.getpid()}"
    text = json.dumps(meta, indent=1, sort_keys=True, allow_nan=False) + "\n"
    try:
        root.mkdir(parents=True, exist_ok=True)
        remove_temporaries(root)
        temporary.mkdir()
        write_tensors(temporary, tensors=tensors)
        write_text(temporary / META, text=text)
        for path in sorted(temporary.iterdir()):
            fsync(path)
        write_manifest(temporary, step=step)
        fsync(temporary)
        _make_room(final)
        rename(temporary, target=final)
        replace_text(root / LATEST, text=final.name + "\n")
        prune(root, newest=step, keep=keep, keep_every=keep_every)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise CheckpointError(
            f"cannot write {final}: {error.strerror or error}; earlier checkpoints are intact: "
            "mend the disk and run the same command again to continue from the newest"
        ) from error
    return final


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
