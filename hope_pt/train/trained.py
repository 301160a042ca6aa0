"""A trained model from a run directory: what evaluation, generation and the report begin with."""

from dataclasses import dataclass
from pathlib import Path

from hope_pt import checkpoint
from hope_pt.checkpoint.manifest import directory_name, list_steps
from hope_pt.config import loads
from hope_pt.config.schema import RunConfig
from hope_pt.errors import CheckpointError, DataError
from hope_pt.nn import HopeLM
from hope_pt.train.directory import RunDirectory


@dataclass(frozen=True)
class Trained:
    """A verified checkpoint as a model on the CPU, with what it was trained as."""

    config: RunConfig
    lm: HopeLM
    step: int
    fingerprint: str
    """Of the data it was trained on."""
    tokenizer: Path | None
    """The tokenizer that the run keeps for itself; None where the data is not text."""


def load_trained(run: str | Path, *, step: int | None = None) -> Trained:
    """The model of the newest valid checkpoint of `run`, or of the one after `step` steps.

    Raises CheckpointError where there is none, or where the one that was named is damaged.
    """
    directory = RunDirectory(run)
    if step is None:
        found = checkpoint.load_newest(directory.checkpoints)
        if found is None:
            raise CheckpointError(f"{directory.checkpoints} has no checkpoint; name a run directory, for example runs/hope_tiny")
    else:
        path = directory.checkpoints / directory_name(step)
        if not path.exists():
            kept = ", ".join(str(kept) for kept in list_steps(directory.checkpoints)) or "none"
            raise CheckpointError(f"{path} does not exist; steps that were kept: {kept}")
        found = checkpoint.load(path)
    config = loads(found.meta["config"], source=str(found.path / "meta.json"))
    lm = HopeLM(config.model)
    lm.load_state_dict({name.removeprefix("model."): tensor for name, tensor in found.tensors(prefix="model.").items()})
    tokenizer = directory.tokenizer if directory.tokenizer.exists() else None
    return Trained(config=config, lm=lm.eval(), step=found.step, fingerprint=found.meta["fingerprint"], tokenizer=tokenizer)


def require_tokenizer(trained: Trained) -> Path:
    """The run's tokenizer; raises DataError for a run whose data is not text."""
    if trained.tokenizer is None:
        raise DataError(
            f"run {trained.config.name!r} has no tokenizer.model (data.source = {trained.config.data.source!r}), so it has no text"
        )
    return trained.tokenizer
