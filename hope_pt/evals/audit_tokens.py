"""Which training tokens drove the largest updates of a CMS level (docs/memory_audit.md).

    metrics.jsonl: steps of the largest measured updates -> steps whose gradients they summed -> samples of these steps, whose order is a
    pure function -> loss and gradient of each at the weights nearest in time -> ranked

A sequence is ranked by the length of its own part of the step's gradient, of the level's parameters, before clipping. That says who pushed
hard, not what was learned: parts can cancel each other, and clipping, moments and weight decay make the update from the sum. The weights
are those of a checkpoint (or the start), which may be many steps away; the distance is given. With train.segments > 1 the training
gradient ends where a segment begins, this one does not.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from hope_pt.checkpoint.manifest import list_steps
from hope_pt.config.schema import RunConfig
from hope_pt.data import Batch, Source, sample_order
from hope_pt.evals.audit import returned
from hope_pt.nn import HopeLM
from hope_pt.nn.names import level_of
from hope_pt.report import metrics
from hope_pt.train.directory import RunDirectory
from hope_pt.train.trained import Trained, load_trained

Decode = Callable[[list[int]], str]
# Tokens shown before the one with the highest loss.
_BEFORE = 24


@dataclass(frozen=True)
class Update:
    """A measured update of a level, over all its blocks; steps first to step gave it their gradients."""

    level: int
    step: int
    first: int
    norm: float
    ratio: float


@dataclass(frozen=True)
class Driver:
    """One sequence that an update summed. sample: its index in the training split. loss: nats per token. gradient: length of its part.

    share: of the examined sequences' lengths. token, token_loss: the target that was least expected; text: what stood before it.
    """

    sample: int
    step: int
    loss: float
    gradient: float
    share: float
    text: str
    token: str
    token_loss: float


@dataclass(frozen=True)
class Driven:
    """An update and the sequences that drove it, hardest first: the first of `examined` out of `candidates`, at the weights of a step."""

    update: Update
    weights_step: int
    examined: int
    candidates: int
    drivers: tuple[Driver, ...]


def largest_updates(records: Sequence[dict], *, level: int, config: RunConfig, top: int) -> list[Update]:
    """The measured updates of a level with the largest relative norm.

    A nested level's update at a restart is that of its initial state, which sums the gradients since the restart before.
    """
    found, cms = [], config.model.cms
    for record in records:
        squares, weights, period = 0.0, 0.0, 0
        restart = cms.restart(level)
        for block in range(config.model.num_layers):
            norm, ratio = (record.get(f"optim/level{level}/block{block}/{name}") for name in ("update_norm", "update_ratio"))
            if norm and ratio:
                squares, weights = squares + norm**2, weights + (norm / ratio) ** 2
                period = max(period, restart if restart and record["step"] % restart == 0 else cms.period(level, block=block))
        if period:
            first = record["step"] - period + 1
            found.append(Update(level, record["step"], first, math.sqrt(squares), math.sqrt(squares / weights)))
    return sorted(found, key=lambda update: -update.ratio)[:top]


def driven(
    run: str | Path,
    trained: Trained,
    start: Mapping[str, Tensor] | None,
    *,
    since: int,
    source: Source,
    decode: Decode,
    sequences: int,
    top: int,
) -> list[Driven]:
    """The `top` largest measured updates of each level with the `top` sequences that drove each, of at most `sequences` examined.

    Updates after step `since` and up to the audited one. start: the weights before the first step, None where they are not known. source:
    the training split. A run without measured updates there has none.
    """
    directory, config = RunDirectory(run), trained.config
    records = [record for record in metrics.read(directory.metrics) if record["step"] <= trained.step]
    measured = [record for record in records if record["step"] > since]
    skipped = {record["step"] for record in records if record.get("skipped")}
    kept = list_steps(directory.checkpoints)
    # One checkpoint beside the audited one: more would fill the memory.
    other: tuple[int, HopeLM] | None = None
    found = []
    for level in range(len(config.model.cms.periods)):
        for update in largest_updates(measured, level=level, config=config, top=top):
            nearest = min([*([] if start is None else [0]), *kept], key=lambda step: (abs(step - (update.first - 1)), step))
            lm = trained.lm
            if nearest and nearest != trained.step:
                if other is None or other[0] != nearest:
                    other = (nearest, load_trained(run, step=nearest).lm)
                lm = other[1]
            steps = [step for step in range(update.first, update.step + 1) if step not in skipped]
            beginning = start if start is not None and not nearest else {}
            with returned(lm, beginning, names=list(beginning)):
                candidates, drivers = _drivers(lm, steps, level=level, source=source, config=config, decode=decode, sequences=sequences)
            found.append(Driven(update, nearest, min(candidates, sequences), candidates, tuple(drivers[:top])))
    return found


def _drivers(
    lm: HopeLM, steps: Sequence[int], *, level: int, source: Source, config: RunConfig, decode: Decode, sequences: int
) -> tuple[int, list[Driver]]:
    """(sequences of these steps, those examined, hardest first); evenly spread where there are more than may be examined."""
    size = config.train.global_batch_size
    positions = np.concatenate([np.arange((step - 1) * size, step * size) for step in steps])
    count = min(sequences, len(positions))
    chosen = positions[np.arange(count) * len(positions) // count]
    data = config.data
    samples = sample_order(
        chosen, num_samples=source.num_samples, seed=data.seed, fingerprint=source.fingerprint, shuffle_block=data.shuffle_block
    )
    parameters = [value for name, value in lm.named_parameters() if (place := level_of(name)) and place[0] == level]
    found = []
    for position, sample in zip(chosen.tolist(), samples.tolist(), strict=True):
        batch = source.read(np.array([sample]))
        losses_T, gradient = _gradient(lm, batch, parameters=parameters, config=config)
        found.append((int(position) // size + 1, sample, batch, losses_T, gradient))
    total = sum(gradient for *_, gradient in found) or 1.0
    drivers = [
        _driver(step, sample, batch, losses_T, gradient=gradient, share=gradient / total, decode=decode)
        for step, sample, batch, losses_T, gradient in found
    ]
    return len(positions), sorted(drivers, key=lambda driver: -driver.gradient)


def _gradient(lm: HopeLM, batch: Batch, *, parameters: Sequence[Tensor], config: RunConfig) -> tuple[Tensor, float]:
    """(loss [T] of every counted token of one sequence, length of its part of the gradient of the step's mean loss)."""
    starts = batch.doc_start_BT if config.data.document_reset else None
    with torch.enable_grad():
        losses_BT = lm.token_losses(batch.tokens_BT, batch.targets_BT, doc_start_BT=starts) * batch.loss_mask_BT
        counted = float(batch.loss_mask_BT.sum()) or 1.0
        grads = torch.autograd.grad(losses_BT.sum() / (counted * config.train.global_batch_size), parameters)
    return losses_BT.detach()[0], math.sqrt(sum(float(grad.double().square().sum()) for grad in grads))


def _driver(step: int, sample: int, batch: Batch, losses_T: Tensor, *, gradient: float, share: float, decode: Decode) -> Driver:
    counted = float(batch.loss_mask_BT.sum()) or 1.0
    hardest = int(losses_T.argmax())
    tokens, target = batch.tokens_BT[0].tolist(), int(batch.targets_BT[0, hardest])
    text = decode(tokens[max(0, hardest + 1 - _BEFORE) : hardest + 1])
    return Driver(sample, step, float(losses_T.sum()) / counted, gradient, share, text, decode([target]), float(losses_T[hardest]))
