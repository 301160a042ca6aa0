"""A run that begins with the weights of another: `train.start_from`. Not a resume: clocks, moments, samples and learning rate start anew.

In: a run directory, one of its step-... directories, or the directory that `hope stack` wrote, which is a verified checkpoint without
optimizer state, of step 0, beside a configuration. The weights must be those of this model by name and shape; what else differs (chunk
lengths, data) is said and allowed.
"""

import logging
import re
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hope_pt import checkpoint
from hope_pt.checkpoint import Checkpoint
from hope_pt.checkpoint.manifest import list_steps, step_of
from hope_pt.config import diff, loads, to_toml
from hope_pt.config.schema import ModelConfig, RunConfig, TokenClockConfig
from hope_pt.engine import collectives
from hope_pt.engine.sharding import Shard, slice_of
from hope_pt.engine.tensor_files import read_metadata, stored_tensors
from hope_pt.errors import CheckpointError
from hope_pt.files import replace_text
from hope_pt.nn import HopeLM
from hope_pt.train.directory import RunDirectory
from hope_pt.train.state import FORMAT
from hope_pt.train.trained import Trained

LOG = logging.getLogger(__name__)
_MODEL = "model."
_BLOCK = re.compile(r"model\.blocks\.\d+\.")


def load_start(config: RunConfig, *, engine: Any, fingerprint: str) -> None:
    """Collective. Gives a new `engine` the weights of `train.start_from`. CheckpointError if they are not those of this model."""
    found = find_start(config.train.start_from)
    with collectives.together():
        stored = stored_tensors(read_metadata(found.path))
        shapes = {name.removeprefix(_MODEL): tuple(there.size) for name, there in stored.items() if name.startswith(_MODEL)}
        _check_shapes(config, shapes, path=found.path)
    _say_differences(config, found, fingerprint=fingerprint)
    nothing = {"updates": {}, "counts": {}, "tensors": {}, "rules": engine.optimizer.rules}
    engine.load(partial(_read, found), {"step": 0, "clock": 0, **nothing})


def find_start(path: str | Path) -> Checkpoint:
    """Collective. The checkpoint that a value of `train.start_from` means, verified."""
    path = Path(path)
    if step_of(path) is not None:
        return checkpoint.load(path)
    found = checkpoint.load_newest(path if list_steps(path) else RunDirectory(path).checkpoints)
    if found is None:
        raise CheckpointError(
            f'train.start_from = "{path}" has no checkpoint; name a run directory, a step-... directory, or what `hope stack` wrote'
        )
    return found


def write_start(out: Path, *, trained: Trained, model: ModelConfig, weights: Mapping[str, Tensor]) -> tuple[Path, list[str]]:
    """Writes the new directory `out`, `weights` under HopeLM's names, for a run called like it.

    Returns the path of its configuration, and the keys that are back at their defaults. That configuration is the one of the trained run
    with another model and this start; with another number of levels, what it says level by level means nothing. CheckpointError if the
    disk refuses it.
    """
    train = trained.config.train.model_copy(update={"start_from": str(out)})
    config = trained.config.model_copy(update={"name": out.name, "model": model, "train": train})
    reset: list[str] = []
    if len(model.cms.periods) != len(trained.config.model.cms.periods):
        config, reset = _without_levels(config)
    text = to_toml(config)
    loads(text, source=str(out))  # a name that no run may have, for example
    meta = {"format": FORMAT, "step": 0, "config": text, "fingerprint": trained.fingerprint, "trained_as": trained.config.name}
    shards = [Shard(_MODEL + name, value) for name, value in weights.items()]
    checkpoint.save(out, step=0, shards=shards, meta={**meta, "trained_steps": trained.step}, layout="one process", keep=1, keep_every=0)
    path = out / "start.toml"
    replace_text(path, text=text)
    return path, reset


def _without_levels(config: RunConfig) -> tuple[RunConfig, list[str]]:
    """The configuration with no setting of single levels, and the keys that this has changed."""
    optim = config.optim.model_copy(update={"levels": (), "freeze_levels": ()})
    if (optim.name, optim.memory) == ("adamw", "adamw"):
        optim = optim.model_copy(update={"matrix_lr": 0.0})  # it was that of the rules in `levels`
    plain = config.model_copy(update={"optim": optim, "token_clock": TokenClockConfig()})
    return plain, [line.partition(": ")[0] for line in diff(config, plain)]


def _read(found: Checkpoint, shards: Sequence[Shard]) -> None:
    """Collective. Fills this rank's shards, a block of the model at a time: no rank has all of it in memory, or reads what it lacks."""
    parts: dict[str, list[Shard]] = {}
    for shard in shards:
        block = _BLOCK.match(shard.name)
        parts.setdefault(block.group() if block else shard.name, []).append(shard)
    with collectives.together():
        for prefix, members in parts.items():
            tensors = found.tensors(prefix=prefix)
            for shard in members:
                shard.data.copy_(slice_of(tensors[shard.name], axis=shard.axis, index=shard.index, count=shard.count))


def _check_shapes(config: RunConfig, stored: Mapping[str, tuple[int, ...]], *, path: Path) -> None:
    wanted = {name: tuple(value.shape) for name, value in HopeLM(config.model, device=torch.device("meta")).state_dict().items()}
    names = sorted(name for name in wanted.keys() | stored.keys() if wanted.get(name) != stored.get(name))
    if names:
        there, here = (shapes.get(names[0], "absent") for shapes in (stored, wanted))
        raise CheckpointError(
            f'train.start_from = "{config.train.start_from}": {len(names)} tensors of {path} are not those of this model, the first '
            f"{names[0]} ({there} there, {here} here); give the model the settings that it was trained with"
        )


def _say_differences(config: RunConfig, found: Checkpoint, *, fingerprint: str) -> None:
    if collectives.rank() != 0:
        return
    LOG.info("beginning with the weights of %s", found.path)
    stored = loads(found.meta["config"], source=str(found.path / "meta.json"))
    changes = diff(stored.model, config.model)
    if changes:
        LOG.warning("the weights were trained with another model: %s", "; ".join(changes))
    if found.meta["fingerprint"] != fingerprint:
        LOG.warning("the weights were trained on other data (fingerprint %s); the tokenizer has to be the same", found.meta["fingerprint"])
