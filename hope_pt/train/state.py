"""What a checkpoint holds, and how it becomes a running session again.

Tensors: `model.*` and `optim.*`, every rank its shards. Meta, as JSON, equal on all ranks: the engine's scalars (step, clocks), the data
cursor (global samples consumed), seconds trained, the first rank's random generators, the resolved configuration as text and its hash, the
data's fingerprint, the code's version, and the chunk lengths that the model only works with.
"""

from dataclasses import dataclass
from typing import Any

from hope_pt.checkpoint import Checkpoint
from hope_pt.config import config_hash, to_toml
from hope_pt.config.schema import RunConfig
from hope_pt.engine import collectives
from hope_pt.engine.sharding import Shard
from hope_pt.train import rng

FORMAT = 3


@dataclass(frozen=True)
class Progress:
    """Where a run stands between two steps."""

    step: int = 0
    consumed: int = 0
    """Global samples read; the next one is the sample at this position of the order."""
    wall_s: float = 0.0
    """Seconds in steps, over all sessions."""


def capture(engine: Any, *, progress: Progress, config: RunConfig, fingerprint: str, code_version: str) -> tuple[list[Shard], dict]:
    """Collective. This rank's shards, copies on the CPU, and the meta of `engine` after `progress.step` steps."""
    shards, scalars = engine.shards()
    meta = {
        "format": FORMAT,
        "step": progress.step,
        "consumed_samples": progress.consumed,
        "wall_s": progress.wall_s,
        "engine": scalars,
        "rng": collectives.broadcast(rng.capture()),
        "config": to_toml(config),
        "config_hash": config_hash(config),
        "fingerprint": fingerprint,
        "code_version": code_version,
        "data_parallel": engine.plan.dp_size,
        "chunk_lengths": {"memory": config.model.titans.chunk_mem, "projection": config.model.titans.chunk_proj},
    }
    return shards, meta


def restore(checkpoint: Checkpoint, *, engine: Any) -> Progress:
    """Collective. Loads engine and generators from a checkpoint that `resume.check` has accepted."""
    meta = checkpoint.meta
    engine.load(checkpoint.read, meta["engine"])
    rng.restore(meta["rng"])
    return Progress(step=meta["step"], consumed=meta["consumed_samples"], wall_s=meta["wall_s"])
