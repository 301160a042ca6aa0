"""Reading a checkpoint: every byte is verified before a tensor is used; the newest valid one wins, and what was skipped is said."""

import json
import logging
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from hope_pt.checkpoint.manifest import directory_name, list_steps, verify
from hope_pt.checkpoint.tensors import read_tensors
from hope_pt.checkpoint.write import LATEST, META
from hope_pt.errors import CheckpointError

LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint: what `save` was given, on the CPU, and where it lies."""

    step: int
    tensors: dict[str, Tensor]
    meta: dict
    path: Path


def load(path: str | Path) -> Checkpoint:
    """Verifies and reads one `step-...` directory; raises CheckpointError naming what is wrong with it."""
    path = Path(path)
    verify(path)
    try:
        meta = json.loads((path / META).read_text(encoding="utf-8"))
        return Checkpoint(step=int(path.name.partition("-")[2]), tensors=read_tensors(path), meta=meta, path=path)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from error


def load_newest(root: str | Path) -> Checkpoint | None:
    """The newest checkpoint in `root` that verifies, or None where there is none at all.

    Each newer one that does not verify is named in a warning. If there are checkpoints and none is valid, raises CheckpointError:
    starting from nothing must be the user's decision.
    """
    root = Path(root)
    steps = list_steps(root)
    _check_pointer(root, steps=steps)
    for step in reversed(steps):
        try:
            checkpoint = load(root / directory_name(step))
        except CheckpointError as error:
            LOG.warning("skipping a damaged checkpoint: %s", error)
            reason = str(error)
            continue
        if step != steps[-1]:
            LOG.warning("falling back to %s, the newest valid checkpoint", checkpoint.path)
        return checkpoint
    if steps:
        raise CheckpointError(f"none of the {len(steps)} checkpoints in {root} is valid (oldest: {reason}); restore one, or remove them")
    return None


def _check_pointer(root: Path, *, steps: list[int]) -> None:
    """Says so if `latest` names a checkpoint that is gone; the directories themselves decide what is loaded."""
    try:
        named = (root / LATEST).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return
    if named not in {directory_name(step) for step in steps}:
        LOG.warning("%s names %r, which is not there", root / LATEST, named)
