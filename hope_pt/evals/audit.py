"""What training changed since the start of a run, and which CMS level knows it (docs/memory_audit.md).

    change of a row  |W - W_start| / |W_start|                             exact, over all its parameters
    level undone     held-out loss with the level's W back at W_start      minus the loss as it is: what the level's change is worth

W_start are the weights that the run began with (the initial values are a pure function of the seed, those of another run are read again)
or, with `since`, those of an earlier checkpoint.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from hope_pt import checkpoint
from hope_pt.checkpoint.manifest import directory_name
from hope_pt.data import Source
from hope_pt.errors import CheckpointError, EvalError
from hope_pt.evals.language import heldout
from hope_pt.evals.scoring import lm_losses
from hope_pt.nn import HopeLM
from hope_pt.nn.init import init_tensor
from hope_pt.nn.names import level_of
from hope_pt.optim.held import Held
from hope_pt.optim.measure import row_of
from hope_pt.optim.sketch import sketch
from hope_pt.train.directory import RunDirectory
from hope_pt.train.start import find_start
from hope_pt.train.trained import Trained, load_trained

# Sketches of the same weights differ by the order in which fp32 numbers were added only; one training step is further away.
_SAME = 1e-4


@dataclass(frozen=True)
class Change:
    """How far a row ("level0/block3", or a class such as "matrix") is from its start; matrix: the parameter that has changed most."""

    row: str
    change: float
    matrix: str
    matrix_change: float


@dataclass(frozen=True)
class Undone:
    """Held-out loss in nats per token with something back at its start, and how much more that is than the loss as it is."""

    what: str
    loss: float
    difference: float


def start_weights(run: str | Path, trained: Trained, *, since: int | None = None) -> tuple[dict[str, Tensor], bool]:
    """W_start by parameter, and whether they are known to be those: false for another run's weights that nothing was kept to compare with.

    Raises CheckpointError if the weights that the run began with are not there any more, EvalError for a `since` that is not earlier.
    """
    if since is not None:
        if since >= trained.step:
            raise EvalError(f"--since {since}: the checkpoint that is audited is of step {trained.step}; name an earlier step")
        return _parameters(load_trained(run, step=since).lm), True
    config = trained.config
    shapes = {name: tuple(parameter.shape) for name, parameter in trained.lm.named_parameters()}
    if not config.train.start_from:
        return {name: init_tensor(name, shape, config=config.model, seed=config.train.seed) for name, shape in shapes.items()}, True
    stored = find_start(config.train.start_from).tensors(prefix="model.")
    weights = {name: stored["model." + name].float() for name in shapes if "model." + name in stored}
    same = _is_start(weights, trained=trained, path=RunDirectory(run).checkpoints) if weights.keys() == shapes.keys() else False
    if same is False:
        raise CheckpointError(
            f'train.start_from = "{config.train.start_from}" has other weights now than this run began with; name a step with --since'
        )
    return weights, bool(same)


def changes(lm: HopeLM, start: Mapping[str, Tensor]) -> list[Change]:
    """All rows, CMS levels first."""
    sums: dict[str, list[tuple[float, float, str]]] = {}
    for name, value in _parameters(lm).items():
        moved, length = (float(x.double().square().sum()) for x in (value - start[name], start[name]))
        sums.setdefault(row_of(name, ndim=value.dim(), model=lm.config), []).append((moved, length, name))
    found = []
    for row, parts in sums.items():
        most = max(parts, key=lambda part: _ratio(part[0], part[1]))
        total = _ratio(sum(moved for moved, _, _ in parts), sum(length for _, length, _ in parts))
        found.append(Change(row, total, most[2], _ratio(most[0], most[1])))
    return sorted(found, key=lambda change: _order(change.row))


def undone(trained: Trained, start: Mapping[str, Tensor], *, source: Source, sequences: int) -> tuple[float, list[Undone]]:
    """The held-out loss as it is, and with each CMS level's parameters in all blocks back at their start; the last line has all levels."""
    levels = range(len(trained.config.model.cms.periods))
    loss = _loss(trained, source=source, sequences=sequences)
    found = []
    for what, chosen in [*((f"level {level}", [level]) for level in levels), ("all levels", list(levels))]:
        names = [name for name in start if (place := level_of(name)) and place[0] in chosen]
        with returned(trained.lm, start, names=names):
            without = _loss(trained, source=source, sequences=sequences)
        found.append(Undone(what, without, without - loss))
    return loss, found


@contextmanager
def returned(lm: nn.Module, start: Mapping[str, Tensor], *, names: Sequence[str]) -> Iterator[None]:
    """Within it the named parameters have their values of `start`."""
    parameters = dict(lm.named_parameters())
    kept = {name: parameters[name].detach().clone() for name in names}
    try:
        for name in names:
            parameters[name].data.copy_(start[name])
        yield
    finally:
        for name, value in kept.items():
            parameters[name].data.copy_(value)


def _loss(trained: Trained, *, source: Source, sequences: int) -> float:
    config = trained.config
    losses = lm_losses(trained.lm, document_reset=config.data.document_reset)
    return heldout(losses, source, sequences=sequences, batch_size=config.engine.micro_batch_size, by_position=False)["eval/loss"]


def _is_start(weights: Mapping[str, Tensor], *, trained: Trained, path: Path) -> bool | None:
    """Whether these weights have the sketches of those that the run began with; None where the run has kept none."""
    found = checkpoint.load(path / directory_name(trained.step))
    watch = found.meta["engine"].get("watch") or {}
    rows = (watch.get("measures") or {}).get("start", [])
    if not rows:
        return None
    sums = {row: torch.zeros(0) for row in rows}
    for name, value in weights.items():
        row = row_of(name, ndim=value.dim(), model=trained.config.model)
        if row in sums:
            part = sketch(Held(name, value, tuple(value.shape)), value)[0]
            sums[row] = sums[row] + part if len(sums[row]) else part
    kept = found.tensors(prefix="watch.")["watch.start"]
    return all(float((sums[row] - value).norm()) <= _SAME * float(value.norm()) for row, value in zip(rows, kept, strict=True))


def _parameters(lm: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in lm.named_parameters()}


def _ratio(moved: float, length: float) -> float:
    """Relative change; infinite from zero."""
    return (moved / length) ** 0.5 if length else float("inf") if moved else 0.0


def _order(row: str) -> tuple:
    level, _, block = row.partition("/block")
    return (0, int(level.removeprefix("level")), int(block)) if block else (1, row)
