"""Reading a checkpoint: every byte is verified before a tensor is used; the newest valid one wins, and what was skipped is said."""

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from hope_pt import engine
from hope_pt.checkpoint.manifest import directory_name, list_steps, step_of, verify_together
from hope_pt.checkpoint.write import LATEST, META
from hope_pt.engine import collectives
from hope_pt.engine.sharding import Shard
from hope_pt.errors import CheckpointError

LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint: its step, the meta that `save` was given, and where it lies."""

    step: int
    meta: dict
    path: Path

    def read(self, shards: Sequence[Shard]) -> None:
        """Collective. Fills every `shard.data` in place; together the ranks must ask for all that is stored (`engine.read_shards`)."""
        engine.read_shards(shards, self.path)

    def tensors(self, *, prefix: str = "") -> dict[str, Tensor]:
        """Whole tensors on the CPU by name; for one process, without a started engine."""
        return engine.read_full(self.path, prefix=prefix)


def load(path: str | Path) -> Checkpoint:
    """Collective. Verifies one `step-...` directory and reads its meta; raises CheckpointError naming what is wrong with it."""
    path = Path(path)
    verify_together(path)
    with collectives.together():
        try:
            meta = json.loads((path / META).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path}: cannot be read: {error}") from error
    return Checkpoint(step=step_of(path) or 0, meta=meta, path=path)


def load_newest(root: str | Path) -> Checkpoint | None:
    """Collective. The newest checkpoint in `root` that verifies, the same on all ranks, or None where there is none at all.

    Each newer one that does not verify is named in a warning. If there are checkpoints and none is valid, raises CheckpointError:
    starting from nothing must be the user's decision.
    """
    root = Path(root)
    # Ranks may see a shared directory at different times; the first one decides what there is.
    steps: list[int] = collectives.broadcast(list_steps(root))
    _check_pointer(root, steps=steps)
    for step in reversed(steps):
        try:
            checkpoint = load(root / directory_name(step))
        except CheckpointError as error:
            _warn("skipping a damaged checkpoint: %s", error)
            reason = str(error)
            continue
        if step != steps[-1]:
            _warn("falling back to %s, the newest valid checkpoint", checkpoint.path)
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
        _warn("%s names %r, which is not there", root / LATEST, named)


def _warn(text: str, *arguments: object) -> None:
    """Once for the whole job."""
    if collectives.rank() == 0:
        LOG.warning(text, *arguments)
