"""One session of a run: open, continue or begin, loop, close.

Order: samples, lock, process groups, newest checkpoint and the question whether it fits, engine, state, hooks. Everything that can be
wrong with the input is found before configuration, metrics or checkpoints of the run are touched.
"""

import logging
import traceback
from collections.abc import Collection, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hope_pt import checkpoint, data, engine
from hope_pt.config import loads, to_toml
from hope_pt.config.schema import RunConfig
from hope_pt.engine.peers import Watch
from hope_pt.engine.sharding import Shard
from hope_pt.errors import DivergenceError, HopeError
from hope_pt.files import read_object
from hope_pt.report import metrics, tracking
from hope_pt.report.metrics import MetricsFile, Sink
from hope_pt.signals import noted
from hope_pt.train import measures, resume, rng
from hope_pt.train.code import code_text, code_version
from hope_pt.train.directory import RunDirectory
from hope_pt.train.hooks.base import Hook, StepRecord
from hope_pt.train.hooks.checkpoint import CheckpointHook
from hope_pt.train.hooks.levels import LevelsHook
from hope_pt.train.hooks.measure import MeasureHook
from hope_pt.train.hooks.metrics import MetricsHook
from hope_pt.train.hooks.progress import ProgressHook
from hope_pt.train.hooks.status import StatusHook
from hope_pt.train.hooks.stragglers import StragglersHook
from hope_pt.train.loop import fit
from hope_pt.train.start import load_start
from hope_pt.train.state import Progress, capture, restore
from hope_pt.train.wishes import Wishes

LOG = logging.getLogger(__name__)

UNMEASURED = "unmeasured"
"""Key of a checkpoint's meta: the run was asked to stop at this step, so what was due at it has not been measured."""


@dataclass(frozen=True)
class RunResult:
    """A run that has all its steps, or was asked to stop after `steps` of them, which are saved (`stopped`: why, else empty)."""

    path: Path
    steps: int
    stopped: str = ""


def run(
    config: RunConfig, *, launch: engine.Launch | None = None, watch: Watch | None = None, signals: Collection[str] | None = None
) -> RunResult:
    """Trains `config` to its last step, from the newest checkpoint of the run directory `out/name` if there is one.

    USR1, USR2, TERM, and a file STOP in the run directory, end it at a step that all ranks agree on, after a checkpoint; a file SAVE only
    saves (`train.wishes`).
    Raises HopeError subclasses for the user's mistakes (other configuration or data than the run began with, a second writer, a full
    disk) and DivergenceError when too many steps had to be dropped. `watch`, entered by the caller, tells every rank of the failure of one;
    `signals`, of `hope_pt.signals.noted`, are those received.
    """
    launch = launch or engine.Launch()
    engine.check(config, launch=launch)
    watch = watch or Watch(launch)
    directory = RunDirectory(Path(config.out) / config.name, attempt=launch.attempt)
    with ExitStack() as stack:
        wishes = Wishes(directory.path, signals=stack.enter_context(noted()) if signals is None else signals)
        watch.configure(config.watchdog, logs=directory.logs)
        train = stack.enter_context(closing(data.open_source(config.data, split="train", vocab_size=config.model.vocab_size)))
        heldout = stack.enter_context(closing(data.open_source(config.data, split="heldout", vocab_size=config.model.vocab_size)))
        stack.callback(directory.close)
        directory.open(rank=launch.rank)
        plan = engine.start(config, launch=launch)
        stack.callback(engine.stop, plan)
        stack.enter_context(watch.reporting())
        newest = _find(config, directory=directory, fingerprint=train.fingerprint, data_parallel=plan.dp_size)
        if newest and newest.step >= config.train.steps:
            LOG.info("%s already has its %d steps", directory.path, newest.step)
            # A batch script removes the last session's status, and believes no code without one; a run killed at its end says "running".
            if launch.rank == 0 and read_object(directory.status).get("state") != "done":
                directory.write_status(state="done", step=newest.step, num_steps=config.train.steps, checkpoint=newest.step)
            return RunResult(path=directory.path, steps=newest.step)
        job = _Job(config, plan=plan, directory=directory, train=train, heldout=heldout, wishes=wishes, watch=watch)
        steps = _train(job, newest=newest)
    return RunResult(path=directory.path, steps=steps, stopped=wishes.reason if steps < config.train.steps else "")


@dataclass(frozen=True)
class _Job:
    """What a session has beside its engine."""

    config: RunConfig
    plan: engine.Plan
    directory: RunDirectory
    train: data.Source
    heldout: data.Source
    wishes: Wishes
    watch: Watch


def _train(job: _Job, *, newest: checkpoint.Checkpoint | None) -> int:
    """From a started engine to the last step, or to the step at which the run is asked to stop; returns it."""
    config, directory = job.config, job.directory
    rng.seed(config.train.seed)
    trainer = engine.TrainEngine(config, job.plan)
    progress = restore(newest, engine=trainer) if newest else Progress()
    if newest:
        LOG.info("continuing from %s", newest.path)
        if job.plan.rank == 0:
            resume.compare_code(newest, now=code_version())
    elif config.train.start_from:
        load_start(config, engine=trainer, fingerprint=job.train.fingerprint)
    writer = job.plan.rank == 0
    with ExitStack() as stack:
        loader = stack.enter_context(
            data.Loader(
                job.train,
                config=config.data,
                global_batch_size=config.train.global_batch_size,
                dp_rank=job.plan.dp_rank,
                dp_size=job.plan.dp_size,
                start_sample=progress.consumed,
            )
        )
        sinks = _begin(config, directory=directory, progress=progress, tokenizer=job.train.tokenizer_path) if writer else []
        saver = _saver(job, trainer=trainer, sinks=sinks, committed=progress.step)
        hooks = _hooks(job, trainer=trainer, sinks=sinks, saver=saver, owed=bool(newest and newest.meta.get(UNMEASURED)))
        for hook in hooks:
            stack.callback(hook.close)
        if writer:
            stack.enter_context(_status(job, trainer=trainer, saver=saver))
        stack.enter_context(job.watch.reporting())
        stack.callback(lambda: job.watch.phases.enter("close", step=trainer.num_steps_done))
        fit(
            trainer,
            batches=loader,
            num_steps=config.train.steps,
            tokens_per_step=config.train.global_batch_size * job.train.seq_len,
            wall_s=progress.wall_s,
            hooks=hooks,
            stopped=job.wishes.before_step,
            phases=job.watch.phases,
        )
    return trainer.num_steps_done


def _find(config: RunConfig, *, directory: RunDirectory, fingerprint: str, data_parallel: int) -> checkpoint.Checkpoint | None:
    """The checkpoint to continue from, accepted, or None for a run that has none yet."""
    newest = checkpoint.load_newest(directory.checkpoints)
    if newest:
        resume.check(config, checkpoint=newest, fingerprint=fingerprint, data_parallel=data_parallel)
    elif directory.config.exists() and directory.metrics.exists() and metrics.read(directory.metrics):
        resume.check_config(config, stored=loads(directory.config.read_text(encoding="utf-8"), source=str(directory.config)), step=0)
    return newest


def _begin(config: RunConfig, *, directory: RunDirectory, progress: Progress, tokenizer: Path | None) -> list[Sink]:
    """Makes the directory agree with the step that this session starts from, and opens what metrics are written to."""
    checkpoint.set_aside_newer(directory.checkpoints, step=progress.step)
    # A run that starts from nothing measures its untrained model again, so not even lines of step 0 stay.
    metrics.truncate(directory.metrics, step=progress.step or -1)
    kept = sum("loss" in record for record in metrics.read(directory.metrics)) if directory.metrics.exists() else 0
    if kept != progress.step:
        LOG.warning("%s has %d training lines before step %d; it was changed by hand or lost", directory.metrics, kept, progress.step + 1)
    directory.begin_session(config_text=to_toml(config), code=code_text(), tokenizer=tokenizer, step=progress.step)
    sinks: list[Sink] = [MetricsFile(directory.metrics)]
    if config.track.wandb:
        sinks.append(tracking.open_wandb(config, directory=directory.path))
    return sinks


def _saver(job: _Job, *, trainer: engine.TrainEngine, sinks: list[Sink], committed: int) -> CheckpointHook:
    """What saves the run; `committed` is the step that it continues from."""
    config, code = job.config, code_version()

    def snapshot(record: StepRecord) -> tuple[list[Shard], dict]:
        progress = Progress(step=record.step, consumed=record.step * config.train.global_batch_size, wall_s=record.wall_s)
        shards, meta = capture(trainer, progress=progress, config=config, fingerprint=job.train.fingerprint, code_version=code)
        return shards, {**meta, UNMEASURED: bool(job.wishes.reason)}

    return CheckpointHook(
        snapshot,
        root=job.directory.checkpoints,
        layout=job.plan.mesh.describe(),
        config=config.checkpoint,
        last_step=config.train.steps,
        wishes=job.wishes,
        committed=committed,
        sinks=sinks,
    )


def _hooks(job: _Job, *, trainer: engine.TrainEngine, sinks: list[Sink], saver: CheckpointHook, owed: bool) -> list[Hook]:
    """In the order of a step: metrics, wishes, measurements, checkpoint, and what the person sees. Only the first rank writes and shows.

    owed: the step that this session starts from has not been measured yet.
    """
    config, plan, heldout = job.config, job.plan, job.heldout
    last, schedule, writer = config.train.steps, config.eval, plan.rank == 0
    asked: dict[str, Any] = {"wishes": job.wishes, "owed": owed}
    hooks: list[Hook] = [MetricsHook(sinks), job.wishes, LevelsHook(lambda: trainer.optimizer.watched.measured, sinks=sinks)]
    if schedule.stragglers_every and plan.world_size > 1:
        hooks.append(StragglersHook(lambda: trainer.own_s, sinks=sinks, every=schedule.stragglers_every))
    if writer and config.data.source == "shards":
        measure = measures.baselines(config, train=job.train, heldout=heldout)
        when: dict[str, Any] = {"at_start": True} if schedule.at_start else {"last_step": last}
        hooks.append(MeasureHook(measure, sinks=sinks, every=0, announce=True, wishes=job.wishes, **when))
    if schedule.diagnostics_every and config.model.mixer == "titans":
        measure = measures.diagnostics(trainer=trainer, plan=plan, heldout=heldout)
        hooks.append(MeasureHook(measure, sinks=sinks, every=schedule.diagnostics_every, at_start=True, **asked))
    measure = measures.evaluation(config, trainer=trainer, plan=plan, heldout=heldout)
    when = {"at_start": schedule.at_start, "last_step": last}
    hooks.append(MeasureHook(measure, sinks=sinks, every=schedule.every, announce=True, **when, **asked))
    hooks.append(saver)
    if writer:
        hooks += [StatusHook(job.directory, num_steps=last, committed=lambda: saver.committed), ProgressHook(num_steps=last)]
    return hooks


@contextmanager
def _status(job: _Job, *, trainer: engine.TrainEngine, saver: CheckpointHook) -> Iterator[None]:
    """Writes how the session ended; a kill leaves `running`, and the free lock tells that nobody is."""

    def write(state: str, *, message: str = "", reason: str = "") -> None:
        job.directory.write_status(
            state=state,
            step=trainer.num_steps_done,
            num_steps=job.config.train.steps,
            message=message,
            reason=reason,
            checkpoint=saver.committed,
        )

    try:
        yield
    except BaseException as error:
        states = {DivergenceError: "diverged", KeyboardInterrupt: "interrupted"}
        job.directory.note(f"stopped after step {trainer.num_steps_done}: {traceback.format_exc()}")
        # On a full disk the status cannot be written either; the error that stopped the run is the one to show.
        with suppress(HopeError):
            write(states.get(type(error), "failed"), message=str(error))
        raise
    if trainer.num_steps_done == job.config.train.steps:
        write("done")
    else:
        write("stopped", reason=job.wishes.reason)
    if job.wishes.reason:
        job.wishes.fulfilled()
