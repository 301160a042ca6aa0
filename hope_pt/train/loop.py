"""The training loop: batch, step, metrics, hooks. Everything else that happens while training is a hook."""

import math
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

from hope_pt.engine.phases import Phases
from hope_pt.errors import DivergenceError
from hope_pt.train.hooks.base import Hook, StepRecord

MAX_SKIPPED = 3
"""Steps in a row whose gradient was not finite; one is an accident of rounding, three are a run that has diverged."""


class Steps(Protocol):
    """The part of `engine.TrainEngine` that the loop needs."""

    num_steps_done: int

    def step(self, batch: Any) -> Any:
        """One optimizer step on this rank's rows of a global batch; returns `engine.StepResult`."""


def fit(
    engine: Steps,
    *,
    batches: Iterable[Any],
    num_steps: int,
    tokens_per_step: int,
    wall_s: float = 0.0,
    hooks: Sequence[Hook] = (),
    stopped: Callable[[], bool] = lambda: False,
    phases: Phases | None = None,
) -> None:
    """Steps `engine` from where it is to `num_steps`, one of `batches` a step, and calls every hook in order after each.

    `wall_s`: seconds of training before this session. `stopped`: asked before each step, whether to end here. `phases`: is told what is
    being done. Raises DivergenceError, before any hook sees the step, at a loss that is not finite
    and at the third step in a row whose gradient the engine had to drop; so no such state is evaluated or saved.
    """
    skipped_in_a_row, phases, phase = 0, phases or Phases(), "first_step"
    for hook in hooks:
        if hook.phase:
            phases.enter(hook.phase, step=engine.num_steps_done)
        hook.start(engine.num_steps_done)
    iterator = iter(batches)
    while engine.num_steps_done < num_steps and not stopped():
        phases.enter(phase, step=engine.num_steps_done)
        began = time.perf_counter()
        batch = next(iterator)
        data_s = time.perf_counter() - began
        result = engine.step(batch)
        step_s = time.perf_counter() - began
        wall_s += step_s
        record = StepRecord(
            step=engine.num_steps_done,
            loss=float(result.loss),
            lr=float(result.lr),
            grad_norm=float(result.grad_norm),
            skipped=bool(result.skipped),
            tokens=engine.num_steps_done * tokens_per_step,
            tokens_per_s=tokens_per_step / step_s,
            data_s=data_s,
            wall_s=wall_s,
        )
        skipped_in_a_row = skipped_in_a_row + 1 if record.skipped else 0
        _check_finite(record, skipped_in_a_row=skipped_in_a_row)
        for hook in hooks:
            if hook.phase:
                phases.enter(hook.phase, step=record.step)
            hook.after_step(record)
        phase = "step"


def _check_finite(record: StepRecord, *, skipped_in_a_row: int) -> None:
    usable = math.isfinite(record.loss) and (record.skipped or math.isfinite(record.grad_norm))
    if not usable or skipped_in_a_row == MAX_SKIPPED:
        raise DivergenceError(
            f"step {record.step}: loss = {record.loss}, grad_norm = {record.grad_norm}, lr = {record.lr:.3g}; the state was not saved and "
            "the same command would meet this step again: lower optim.lr or optim.clip, or look at the memory diagnostics before it"
        )
