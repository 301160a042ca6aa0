"""Disk that a run needs: its checkpoints, by the planner's bytes of one."""

import shutil
from dataclasses import dataclass
from pathlib import Path

from hope_pt.config.schema import RunConfig
from hope_pt.launch.weights import checkpoint_bytes


@dataclass(frozen=True)
class DiskNeed:
    """Bytes: of one checkpoint; of those that are kept and the one being written; of the same and all that are never removed."""

    checkpoint: int
    working: int
    whole_run: int


def disk_need(config: RunConfig) -> DiskNeed:
    """Checkpoints only: metrics and logs are small beside them."""
    one, settings = checkpoint_bytes(config), config.checkpoint
    saves = config.train.steps // settings.every + 1 if settings.every else 1
    working = min(settings.keep, saves) + 1
    forever = config.train.steps // settings.keep_every if settings.keep_every else 0
    return DiskNeed(one, working * one, (working + forever) * one)


def free_bytes(place: Path) -> int:
    """Free bytes where `place` lies."""
    return shutil.disk_usage(place).free
