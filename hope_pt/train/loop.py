"""The training loop: batch, step, metrics, hooks. Everything else that happens while training is a hook."""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol

from hope_pt.engine.phases import Phases
from hope_pt.errors import DivergenceError
from hope_pt.train.hooks.base import Hook, StepRecord


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
    stopped: Callable[[int], bool] = lambda step: False,
    phases: Phases | None = None,
) -> None:
    """Steps `engine` from where it is to `num_steps`, one of `batches` a step, and calls every hook in order after each.

    `wall_s`: seconds of training before this session. `stopped(step)`: asked before each step, whether to end here. `phases`: is told
    what is being done. Raises DivergenceError where the engine has dropped too many steps (hope_pt.optim.spikes), before any hook sees the
    last of them: its state is neither evaluated nor saved.
    """
    phases, phase = phases or Phases(), "first_step"
    for hook in _entered(hooks, phases, step=engine.num_steps_done):
        hook.start(engine.num_steps_done)
    iterator = iter(batches)
    while engine.num_steps_done < num_steps and not stopped(engine.num_steps_done):
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
            skips=int(result.skips),
            tokens=engine.num_steps_done * tokens_per_step,
            tokens_per_s=tokens_per_step / step_s,
            data_s=data_s,
            wall_s=wall_s,
        )
        if result.diverged:
            raise _divergence(record, why=result.diverged)
        for hook in _entered(hooks, phases, step=record.step):
            hook.after_step(record)
        phase = "step"


def _entered(hooks: Sequence[Hook], phases: Phases, *, step: int) -> Iterator[Hook]:
    """The hooks, each in its phase."""
    for hook in hooks:
        if hook.phase:
            phases.enter(hook.phase, step=step)
        yield hook


def _divergence(record: StepRecord, *, why: str) -> DivergenceError:
    return DivergenceError(
        f"step {record.step}: loss = {record.loss}, grad_norm = {record.grad_norm}, lr = {record.lr:.3g}: {why}; the state was not saved "
        "and the same command would meet this step again: lower optim.lr or optim.clip, or look at the memory diagnostics before it"
    )
