"""Weights & Biases as an optional copy of metrics.jsonl; it works without network or key, and never stops a run.

Every line carries its step and the run's id is a hash of its directory and model, so a continued run adds to the same one. Offline,
wandb cannot resume (wandb#2423): each session leaves a directory of its own, RUN/wandb/offline-run-TIME-ID, which `segments` lists in
order. They are no whole record: the session before a crash has steps that the next one takes again, and what a killed process had not
written is missing. metrics.jsonl has every step once, so `upload` sends that, and asks wandb first what it already has.
"""

import hashlib
import logging
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hope_pt.config import config_hash
from hope_pt.config.schema import RunConfig
from hope_pt.errors import ConfigError, HopeError
from hope_pt.report import metrics
from hope_pt.report.metrics import Value
from hope_pt.signals import shielded

LOG = logging.getLogger(__name__)


class WandbSink:
    """Sends each line to an open wandb run under its own step. Lines of one step are joined by wandb until the next step begins.

    When wandb fails, for example because a signal to all processes of a job has ended its own, it is told once and no longer used.
    """

    def __init__(self, run: Any):
        self._run = run

    def write(self, *, step: int, values: Mapping[str, Value]) -> None:
        """One line."""
        self._tell("log", dict(values), step=step)

    def sync(self) -> None:
        """Wandb writes in a process of its own; nothing to wait for."""

    def close(self) -> None:
        """Ends wandb's run."""
        self._tell("finish")

    def _tell(self, what: str, *arguments: Any, **options: Any) -> None:
        if self._run is None:
            return
        try:
            getattr(self._run, what)(*arguments, **options)
        except Exception as error:
            # Its exceptions cannot be named without importing it, and none of them may cost a step.
            self._run = None
            text = "wandb is gone (%s); training goes on, metrics.jsonl has everything: hope launch wandb RUN --upload"
            LOG.warning(text, _in_words(error))


def open_wandb(config: RunConfig, *, directory: Path, module: Any = None) -> WandbSink:
    """A sink for this run, as `track` says; `module` stands in for the wandb package in tests.

    Raises ConfigError if wandb is not installed or refuses (online without a key).
    """
    identity = run_id(config, directory=directory)
    return WandbSink(_init(config, identity=identity, mode=config.track.wandb_mode, place=directory, module=module))


def upload(config: RunConfig, *, directory: Path, finished: bool, module: Any = None) -> list[int]:
    """Sends the steps of RUN/metrics.jsonl that wandb does not have yet, in order, each once; returns them.

    The newest step of a run that is not `finished` waits for the next time, because lines of it may be still to come. Raises ConfigError
    as `open_wandb` does, HopeError without a readable metrics.jsonl or where wandb fails half way.
    """
    steps: dict[int, dict[str, Value]] = {}
    for record in metrics.read(directory / "metrics.jsonl"):
        steps.setdefault(record["step"], {}).update({key: value for key, value in record.items() if key != "step"})
    if steps and not finished:
        steps.pop(max(steps))
    found = segments(directory)
    # A directory that was copied keeps its run.
    identity = found[-1].name.rpartition("-")[2] if found else run_id(config, directory=directory)
    with tempfile.TemporaryDirectory() as place:
        run = _init(config, identity=identity, mode="online", place=Path(place), module=module)
        try:
            wanted = [step for step in sorted(steps) if step >= run.starting_step]
            for step in wanted:
                run.log(steps[step], step=step)
            run.finish()
        except Exception as error:
            # As in `_init`: its exceptions cannot be named. What it has taken it will not be sent again.
            raise HopeError(f"wandb failed ({_in_words(error)}); run the same command again, it sends what is missing") from error
    return wanted


def _in_words(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def segments(directory: Path) -> list[Path]:
    """What offline sessions have left, oldest first: the names begin with the time of the session's start."""
    return sorted(directory.glob("wandb/offline-run-*-*"))


def sync_commands(found: list[Path], *, version: str) -> list[list[str]]:
    """Commands that send segments to one run in this order; `version` is wandb's, empty if unknown.

    Since 0.30 `wandb sync --id` takes files of one run by the time of their start; before, each was a command of its own (wandb#5865).
    """
    if not found:
        return []
    identity = found[-1].name.rpartition("-")[2]
    if version and tuple(int(part) for part in version.split(".")[:2]) < (0, 30):
        return [["wandb", "sync", *(["--append"] if number else []), f"--id={identity}", str(one)] for number, one in enumerate(found)]
    return [["wandb", "sync", f"--id={identity}", *map(str, found)]]


def run_id(config: RunConfig, *, directory: Path) -> str:
    """16 hex digits, the same in every session of a run."""
    identity = f"{directory.resolve()}\n{config_hash(config.model)}"
    return hashlib.sha256(identity.encode()).hexdigest()[:16]


def _init(config: RunConfig, *, identity: str, mode: str, place: Path, module: Any) -> Any:
    if module is None:
        try:
            import wandb
        except ImportError as error:
            raise ConfigError('track.wandb = true but wandb is not installed; pip install "hope-pt[track]" or set it to false') from error
        module = wandb
    try:
        # wandb's own process takes SIGTERM as its end whatever we do; of USR1 and USR2 it would die.
        with shielded():
            return module.init(
                project=config.track.wandb_project,
                name=config.name,
                id=identity,
                resume="allow",
                mode=mode,
                dir=str(place),
                config=config.model_dump(mode="json"),
            )
    except Exception as error:
        # wandb's exceptions cannot be named here without importing it; each of them means that the tracker cannot be used as asked.
        raise ConfigError(
            f'wandb in mode "{mode}" refused ({" ".join(str(error).split())}); set track.wandb_mode = "offline" or track.wandb = false'
        ) from error
