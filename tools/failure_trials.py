"""One rank of a real training job is killed, stopped or raises, in every phase: the whole job must end, soon, naming that rank.

    python -m tools.failure_trials [--trials all|short] [--parallel 3] [--seed 0] [--out FILE]

Each trial is a job of 2 or 4 ranks of `hope train` on gloo; the ranks are forks of this process, which has imported everything but started
nothing, and the last ones real processes of their own. The fault is injected in one rank by replacing a function of the phase, or comes
from outside at a random moment. A trial passes when every rank has ended within 30 s of the fault, every other rank's standard error
names the right one in one line, the exit codes are right, and no process of the job is left. Exit code 0 if all pass.
"""

import argparse
import importlib
import itertools
import json
import os
import random
import signal
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import psutil

import hope_pt.engine.step
import hope_pt.train  # noqa: F401  the ranks are forks: what is imported here they need not import
from hope_pt import cli
from hope_pt.errors import DataError
from tools.bench.common import environment

LIMIT_S = 30.0
START_S = 150.0
MESSAGE = "injected by the trial"
CONFIG = """
name = "run"
[model]
vocab_size = 32
num_layers = 2
width = 16
num_heads = 2
[model.titans]
chunk_mem = 4
chunk_proj = 8
[model.cms]
hidden = 24
periods = [1, 2]
[data]
source = "mqar"
seq_len = 32
[engine]
micro_batch_size = 1
device = "cpu"
threads = 1
[checkpoint]
every = 4
[eval]
every = 3
sequences = 8
[train]
global_batch_size = 4
steps = 100000
"""
# Phase -> the function whose n-th call in the chosen rank is the fault, and what the job needs for it to be called.
PHASES: dict[str, tuple[str, int, tuple[str, ...]]] = {
    "reading the configuration": ("hope_pt.config:load", 1, ()),
    "joining": ("torch.distributed:init_process_group", 1, ()),
    "building the model": ("hope_pt.engine.step:TrainEngine.__init__", 1, ()),
    "reading data": ("hope_pt.data:Loader.__next__", 3, ("data.num_workers=1",)),
    "forward": ("hope_pt.nn:HopeBlock.forward", 5, ()),
    "collective": ("torch.distributed:all_reduce", 6, ()),
    "optimizer": ("hope_pt.optim:Clocked.step", 3, ()),
    "saving": ("hope_pt.train.hooks.checkpoint:CheckpointHook.after_step", 4, ()),
    "evaluation": ("hope_pt.train.hooks.measure:MeasureHook.after_step", 3, ()),
    "shutdown": ("hope_pt.engine.plan:stop", 1, ("train.steps=4",)),
}
BEFORE, ANY = "before joining", "any moment"


@dataclass(frozen=True)
class Trial:
    """`action` happens in `phase` to `rank`; exec: processes of their own instead of forks."""

    phase: str
    action: str
    rank: int
    world_size: int
    exec: bool = False


@dataclass(frozen=True)
class Outcome:
    """What was seen. seconds: from the fault to the end of the last rank, None if one did not end; line: what the others said of it."""

    trial: Trial
    seconds: float | None
    named: bool
    exit_codes: list[int | None]
    codes_right: bool
    orphans: int
    line: str

    @property
    def passed(self) -> bool:
        """Everything was as it must be."""
        return self.seconds is not None and self.seconds <= LIMIT_S and self.named and self.codes_right and not self.orphans


def plan(which: str, *, seed: int) -> list[Trial]:
    """The trials; short: one of each kind of fault, spread over the phases."""
    if which == "short":
        return [
            Trial(BEFORE, "kill", 1, 2),
            Trial("joining", "raise", 0, 2),
            Trial("building the model", "kill", 3, 4),
            Trial("reading data", "user", 1, 2),
            Trial("forward", "stop", 2, 4),
            Trial("collective", "kill", 0, 2),
            Trial("optimizer", "raise", 1, 2),
            Trial("saving", "kill", 1, 2),
            Trial("evaluation", "raise", 3, 4),
            Trial("shutdown", "kill", 1, 2),
            Trial(ANY, "stop", 0, 2),
        ]
    draw = random.Random(seed)
    trials = [Trial(BEFORE, "kill", rank, 2) for rank in (0, 1)]
    for phase in PHASES:
        for action in ("kill", "raise", "stop"):
            world_size = draw.choice((2, 4))
            trials.append(Trial(phase, action, draw.randrange(world_size), world_size))
    trials += [Trial("reading data", "user", 1, 2), Trial("forward", "user", 0, 4)]
    trials += [Trial(ANY, "kill", draw.randrange(4), 4) for _ in range(4)] + [Trial(ANY, "stop", draw.randrange(2), 2) for _ in range(2)]
    return trials + [Trial(ANY, "kill", 0, 2, exec=True), Trial(ANY, "kill", 1, 2, exec=True), Trial(ANY, "stop", 1, 2, exec=True)]


def attribute(target: str) -> tuple[Any, str]:
    """Owner and name of the function `module:path`, to be replaced."""
    module, _, path = target.partition(":")
    *owners, name = path.split(".")
    owner: Any = importlib.import_module(module)
    for part in owners:
        owner = getattr(owner, part)
    return owner, name


def _at_call(target: str, nth: int, fault: Callable[[], None]) -> None:
    """Replaces the function `module:path` so that `fault` precedes its n-th call."""
    owner, name = attribute(target)
    original, calls = getattr(owner, name), itertools.count(1)

    def replaced(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == nth:
            fault()
        return original(*args, **kwargs)

    setattr(owner, name, replaced)


class Job:
    """The ranks of one trial, from their start to the end of the last one."""

    def __init__(self, trial: Trial, *, root: Path, delay: float = 0.0):
        self.trial, self.root, self.delay = trial, root, delay
        self.codes: list[int | None] = [None] * trial.world_size
        self.started = time.time()
        self.ended: float | None = None
        self.trained: float | None = None
        root.mkdir()
        (root / "run.toml").write_text(CONFIG, encoding="utf-8")
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
        self.ranks = [self._start(rank, port=port) for rank in range(trial.world_size)]

    def is_over(self) -> bool:
        """Looks at the ranks, causes a fault from outside when its time has come; True when all have ended, or too late."""
        for rank, process in enumerate(self.ranks):
            if self.codes[rank] is None:
                pid, status = os.waitpid(process, os.WNOHANG)
                self.codes[rank] = os.waitstatus_to_exitcode(status) if pid else None
        if None not in self.codes:
            self.ended = time.time()
        if self.trial.phase == ANY and not (self.root / "fault").exists():
            self._from_outside()
        return self.ended is not None or time.time() > self._give_up()

    def outcome(self) -> Outcome:
        """The judgement; what is left of the job is killed."""
        orphans = self.clear()
        trial, fault = self.trial, self.root / "fault"
        others = [rank for rank in range(trial.world_size) if rank != trial.rank]
        lines = [self._lines(rank) for rank in others]
        name = f"rank {trial.rank} of {trial.world_size}"
        said = MESSAGE if trial.action in ("raise", "user") else name
        code = 2 if trial.action == "user" or (trial.phase == BEFORE and trial.rank == 0) else 1
        own = {"raise": 1, "user": 2}.get(trial.action, -signal.SIGKILL)
        return Outcome(
            trial=trial,
            seconds=round(self.ended - float(fault.read_text()), 1) if self.ended and fault.exists() else None,
            named=all(len(found) == 1 and name in found[0] and said in found[0] for found in lines),
            exit_codes=self.codes,
            codes_right=self.codes == [own if rank == trial.rank else code for rank in range(trial.world_size)],
            orphans=orphans,
            line=lines[0][0] if lines[0] else "",
        )

    def clear(self) -> int:
        """Kills what is left; how many processes of ranks that have ended that were."""
        orphans = self._orphans()
        for process in orphans:
            process.kill()
        for rank, process in enumerate(self.ranks):
            if self.codes[rank] is None:
                os.kill(process, signal.SIGKILL)
                os.waitpid(process, 0)
        return len(orphans)

    def _start(self, rank: int, *, port: int) -> int:
        child = os.fork()
        if child:
            return child
        os.setsid()
        log = os.open(self.root / f"rank-{rank}.log", os.O_WRONLY | os.O_CREAT)
        os.dup2(log, 1)
        os.dup2(log, 2)
        code = 1
        try:
            size = self.trial.world_size
            place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "MASTER_PORT": port}
            os.environ.update({name: str(value) for name, value in place.items()} | {"MASTER_ADDR": "127.0.0.1"})
            if rank == self.trial.rank:
                self._arm()
            arguments = ["train", str(self.root / "run.toml"), f"out={self.root}", *self._overrides()]
            if self.trial.exec:
                os.execv(sys.executable, [sys.executable, "-m", "hope_pt", *arguments])
            code = cli.main(arguments)
        except BaseException:
            sys.excepthook(*sys.exc_info())
        finally:
            sys.stderr.flush()
            os._exit(code)

    def _overrides(self) -> tuple[str, ...]:
        return PHASES[self.trial.phase][2] if self.trial.phase in PHASES else ()

    def _arm(self) -> None:
        """In the chosen rank: the fault happens now, or at the n-th call of the phase's function."""
        if self.trial.phase == BEFORE:
            self._fault()
        if self.trial.phase in PHASES:
            target, nth, _ = PHASES[self.trial.phase]
            _at_call(target, nth, self._fault)

    def _fault(self) -> None:
        (self.root / "fault").write_text(str(time.time()))
        if self.trial.action in ("raise", "user"):
            raise (DataError if self.trial.action == "user" else RuntimeError)(MESSAGE)
        os.kill(os.getpid(), signal.SIGKILL if self.trial.action == "kill" else signal.SIGSTOP)

    def _from_outside(self) -> None:
        """A random time after the first line of metrics."""
        if self.trained is None and (self.root / "run/metrics.jsonl").exists():
            self.trained = time.monotonic()
        if self.trained is not None and time.monotonic() > self.trained + self.delay:
            (self.root / "fault").write_text(str(time.time()))
            os.kill(self.ranks[self.trial.rank], signal.SIGKILL if self.trial.action == "kill" else signal.SIGSTOP)

    def _give_up(self) -> float:
        """Well after the fault was due to have ended the job; a busy machine may take long to reach it."""
        fault = self.root / "fault"
        return os.stat(fault).st_mtime + LIMIT_S + 10.0 if fault.exists() else self.started + START_S

    def _lines(self, rank: int) -> list[str]:
        text = (self.root / f"rank-{rank}.log").read_text(errors="replace")
        return [line for line in text.splitlines() if line.startswith("hope: ")]

    def _orphans(self) -> list[psutil.Process]:
        """What lives in the sessions of the ranks that have ended; readers of data get a moment to see that they are alone."""
        deadline = time.monotonic() + LIMIT_S
        sessions = {process for process, code in zip(self.ranks, self.codes, strict=True) if code is not None}
        while (left := [process for process in psutil.process_iter() if _session(process) in sessions]) and time.monotonic() < deadline:
            time.sleep(0.1)
        return left


def _session(process: psutil.Process) -> int:
    try:
        return os.getsid(process.pid)
    except ProcessLookupError:
        return 0


def main() -> int:
    """Runs the trials and prints the result."""
    arguments = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    arguments.add_argument("--trials", choices=("all", "short"), default="all")
    arguments.add_argument("--only", default="", help="of these, the trials whose description contains this")
    arguments.add_argument("--parallel", type=int, default=3, help="jobs at a time; most of a trial is waiting")
    arguments.add_argument("--seed", type=int, default=0)
    arguments.add_argument("--out", type=Path, help="write the result here too")
    options = arguments.parse_args()
    where = environment()
    trials = [trial for trial in plan(options.trials, seed=options.seed) if options.only in str(trial)]
    with tempfile.TemporaryDirectory(prefix="hope-failure-") as name:
        began = time.monotonic()
        draw = random.Random(options.seed)
        jobs = [partial(Job, trial, delay=draw.uniform(0.0, 3.0)) for trial in trials]
        outcomes = run(jobs, root=Path(name), parallel=options.parallel)
        result = summary(outcomes, parallel=options.parallel, seconds=round(time.monotonic() - began, 1))
    print(json.dumps({key: value for key, value in result.items() if key != "trials"}))
    result = {"environment": where, **result}
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0 if result["passed"] == len(outcomes) else 1


def run(jobs: Sequence[Callable[..., Job]], *, root: Path, parallel: int) -> list[Outcome]:
    """The outcomes, in the order in which the jobs ended; each is started in a folder of its own."""
    waiting = list(enumerate(jobs))
    active: list[Job] = []
    outcomes: list[Outcome] = []
    while waiting or active:
        while waiting and len(active) < parallel:
            index, start = waiting.pop(0)
            active.append(start(root=root / str(index)))
        for job in [job for job in active if job.is_over()]:
            active.remove(job)
            outcomes.append(job.outcome())
            print(f"{'passed' if outcomes[-1].passed else 'FAILED'}  {outcomes[-1]}", flush=True)
            if not outcomes[-1].passed:
                for log in sorted([*job.root.glob("rank-*.log"), *job.root.glob("run/logs/hang.txt")]):
                    print(f"--- {log.name}\n{log.read_text(errors='replace')[-1500:]}", flush=True)
        time.sleep(0.02)
    return outcomes


def summary(outcomes: list[Outcome], *, parallel: int, seconds: float) -> dict[str, Any]:
    """The figures and every trial."""
    took: dict[str, list[float]] = {}
    for outcome in outcomes:
        if outcome.seconds is not None:
            took.setdefault(outcome.trial.action, []).append(outcome.seconds)
    return {
        "passed": sum(outcome.passed for outcome in outcomes),
        "of": len(outcomes),
        "limit_s": LIMIT_S,
        "seconds_to_end": {action: {"median": statistics.median(values), "longest": max(values)} for action, values in took.items()},
        "parallel": parallel,
        "wall_s": seconds,
        "trials": [{**asdict(outcome), "passed": outcome.passed} for outcome in outcomes],
    }


if __name__ == "__main__":
    sys.exit(main())
