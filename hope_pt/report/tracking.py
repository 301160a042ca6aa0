"""Weights & Biases as an optional copy of metrics.jsonl; it works without network or key.

The run's id is a hash of its directory and model, so a continued run adds to the same one, and every line carries its step:
wandb's own counter restarts with the process, and an offline run cannot be resumed by wandb itself (wandb#2423). metrics.jsonl stays
the source of truth; wandb's offline files are not read back.
"""

import hashlib
from pathlib import Path
from typing import Any

from hope_pt.config import config_hash
from hope_pt.config.schema import RunConfig
from hope_pt.errors import ConfigError
from hope_pt.report.metrics import Value
from hope_pt.signals import shielded


class WandbSink:
    """Sends each line to an open wandb run under its own step. Lines of one step are joined by wandb until the next step begins."""

    def __init__(self, run: Any):
        self._run = run

    def write(self, *, step: int, values: dict[str, Value]) -> None:
        """One line."""
        self._run.log(dict(values), step=step)

    def sync(self) -> None:
        """Wandb writes in a process of its own; nothing to wait for."""

    def close(self) -> None:
        """Ends wandb's run."""
        self._run.finish()


def open_wandb(config: RunConfig, *, directory: Path, module: Any = None) -> WandbSink:
    """A sink for this run, as `track` says; `module` stands in for the wandb package in tests.

    Raises ConfigError if wandb is not installed or refuses (online without a key).
    """
    if module is None:
        try:
            import wandb
        except ImportError as error:
            raise ConfigError('track.wandb = true but wandb is not installed; pip install "hope-pt[track]" or set it to false') from error
        module = wandb
    try:
        with shielded():
            # wandb writes in a process of its own, which must still be there when the trainer stops and says its last lines.
            run = module.init(
                project=config.track.wandb_project,
                name=config.name,
                id=run_id(config, directory=directory),
                resume="allow",
                mode=config.track.wandb_mode,
                dir=str(directory),
                config=config.model_dump(mode="json"),
            )
    except Exception as error:
        # wandb's exceptions cannot be named here without importing it; each of them means that the tracker cannot be used as asked.
        raise ConfigError(
            f'track.wandb_mode = "{config.track.wandb_mode}": wandb refused ({" ".join(str(error).split())}); '
            'set track.wandb_mode = "offline" or track.wandb = false'
        ) from error
    return WandbSink(run)


def run_id(config: RunConfig, *, directory: Path) -> str:
    """16 hex digits, the same in every session of a run."""
    identity = f"{directory.resolve()}\n{config_hash(config.model)}"
    return hashlib.sha256(identity.encode()).hexdigest()[:16]
