"""One rank of a real training job hangs, in every phase: the job must end, soon after the limit of the phase, with stacks and a culprit.

    python -m tools.hang_trials [--only TEXT] [--parallel 3] [--seed 0] [--out FILE]

Each trial is a job of `tools.failure_trials` with limits of seconds, of which one rank

* sleeps: its main thread waits for ever in a function of the phase;
* stops: SIGSTOP, which the other ranks find by its silence;
* misses a collective: it goes on without one in which the others wait;
* waits for a reader: its process that reads data has been stopped.

A trial passes when the verdict came within 5 s of the limit, every rank that can has written its stacks, no other rank than the right one
is named, every survivor says so in one line and ends with code 1, and no process of the job is left. Exit code 0 if all pass.
"""

import argparse
import itertools
import json
import multiprocessing
import os
import random
import signal
import statistics
import sys
import tempfile
import threading
import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from hope_pt.engine.hub import Limits
from hope_pt.engine.phases import Phases
from tools.bench.common import environment
from tools.failure_trials import START_S, Job, Outcome, Trial, attribute, run

DETECTED_S = 5.0
LIMITS_S = {"setup": 300, "first_step": 120, "step": 10, "checkpoint": 10, "evaluation": 20, "close": 10}
"""What the jobs allow their phases; those that no trial hangs in have time on a busy machine."""
WATCHDOG = tuple(f"watchdog.{name}_s={limit}" for name, limit in LIMITS_S.items() if name != "close") + ("watchdog.step_factor=0",)
SETUP_S = 60
NO_EVALUATION = ("eval.at_start=false", "eval.every=0", "eval.diagnostics_every=0")


@dataclass(frozen=True)
class Place:
    """The fault is at the first call of `target` in the phase after two steps; what the job needs for it to be called."""

    phase: str
    target: str
    overrides: tuple[str, ...] = ()


PLACES = {
    "building the model": Place("setup", "hope_pt.engine.step:TrainEngine.__init__", (f"watchdog.setup_s={SETUP_S}",)),
    "reading data": Place("step", "hope_pt.data:Loader.__next__"),
    "a reader of data": Place("step", "hope_pt.data:Loader.__next__", ("data.num_workers=1",)),
    "forward": Place("step", "hope_pt.nn:HopeBlock.forward"),
    "a reduction of gradients": Place("step", "torch.distributed:all_reduce"),
    "optimizer": Place("step", "hope_pt.optim:Clocked.step"),
    "agreeing to go on": Place("step", "hope_pt.engine.collectives:largest", NO_EVALUATION),
    "saving": Place("checkpoint", "hope_pt.checkpoint:Saving"),
    "files of a checkpoint": Place("checkpoint", "hope_pt.engine.collectives:gather"),
    "evaluation": Place("evaluation", "hope_pt.train.hooks.measure:MeasureHook._run"),
    "the end": Place("close", "hope_pt.engine.plan:stop", ("train.steps=4",)),
}
FAULTS = {
    "sleeps": ("building the model", "reading data", "forward", "a reduction of gradients", "optimizer", "saving", "evaluation", "the end"),
    "stops": ("forward", "a reduction of gradients", "saving"),
    "misses": ("agreeing to go on", "files of a checkpoint"),
    "waits for a reader": ("a reader of data",),
}


def limit_s(trial: Trial) -> float:
    """Seconds from the fault after which the job may be ended: as most of a phase lies after its fault, never more than its limit."""
    if trial.action == "stops":
        return Limits.silent_s
    return SETUP_S if trial.phase == "building the model" else LIMITS_S[PLACES[trial.phase].phase]


@dataclass(frozen=True)
class HangOutcome(Outcome):
    """What was seen besides. detected_s: from the fault to the verdict; culprit: right, nobody, wrong; stacks: ranks that wrote theirs."""

    detected_s: float | None
    culprit: str
    stacks: list[int]

    @property
    def passed(self) -> bool:
        """Everything was as it must be; where nothing tells the ranks apart nobody need be named."""
        in_time = self.detected_s is not None and self.detected_s <= limit_s(self.trial) + DETECTED_S
        return (
            in_time
            and self.seconds is not None
            and self.named
            and self.codes_right
            and not self.orphans
            and self.stacks == able(self.trial)
        )


def able(trial: Trial) -> list[int]:
    """The ranks that can write their stacks and end by themselves: all but a stopped one."""
    return [rank for rank in range(trial.world_size) if trial.action != "stops" or rank != trial.rank]


class HangJob(Job):
    """The ranks of one trial, from their start to the end of the last one."""

    def _overrides(self) -> tuple[str, ...]:
        return (*WATCHDOG, *PLACES[self.trial.phase].overrides)

    def _arm(self) -> None:
        """In the chosen rank: the first call of the place's function in its phase, from the second step on, is preceded by the fault."""
        place = PLACES[self.trial.phase]
        now: list[Any] = ["setup", 2]  # phase and step
        enter, (owner, name) = Phases.enter, attribute(place.target)
        original, calls = getattr(owner, name), itertools.count()

        def entered(phases: Phases, name: str, *, step: int) -> None:
            now[:] = name, step
            enter(phases, name, step=step)

        def replaced(*args: Any, **kwargs: Any) -> Any:
            if now[0] == place.phase and now[1] >= 2 and next(calls) == 0:
                self._fault()
                if self.trial.action == "misses":
                    # What it would say without the others.
                    return {"largest": args[0], "gather": list(args)}.get(name)
            return original(*args, **kwargs)

        Phases.enter = entered  # type: ignore[assignment,method-assign]
        setattr(owner, name, replaced)

    def _fault(self) -> None:
        (self.root / "fault").write_text(str(time.time()))
        if self.trial.action == "sleeps":
            threading.Event().wait()
        if self.trial.action == "stops":
            os.kill(os.getpid(), signal.SIGSTOP)
        if self.trial.action == "waits for a reader":
            (reader,) = multiprocessing.active_children()
            (self.root / "reader").write_text(str(reader.pid))
            os.kill(reader.pid or 0, signal.SIGSTOP)

    def is_over(self) -> bool:
        """Looks at the ranks; True when all have ended, or too late. A stopped reader goes on once it has been found."""
        over = super().is_over()
        reader = self.root / "reader"
        if reader.exists() and self._verdict_time() is not None:
            os.kill(int(reader.read_text()), signal.SIGCONT)
            reader.unlink()
        return over

    def _give_up(self) -> float:
        return super()._give_up() + (limit_s(self.trial) if (self.root / "fault").exists() else START_S)

    def _verdict_time(self) -> float | None:
        """When the table of the hang was written, or where rank 0, which writes it, has been stopped, the stacks of a survivor."""
        logs = self.root / "run/logs"
        files = list(logs.glob("hang-rank-*.txt" if self.trial.action == "stops" and self.trial.rank == 0 else "hang.txt"))
        return min((file.stat().st_mtime for file in files), default=None)

    def outcome(self) -> HangOutcome:
        """The judgement; what is left of the job is killed."""
        orphans = self.clear()
        trial, fault, verdict = self.trial, self.root / "fault", self._verdict_time()
        began = float(fault.read_text()) if fault.exists() else None
        lines = [self._lines(rank) for rank in able(trial)]
        line = lines[0][0] if lines[0] else ""
        right = line.startswith(f"hope: rank {trial.rank} of {trial.world_size} ")
        culprit = "right" if right else "nobody" if line.startswith("hope: all ranks ") else "wrong"
        expected = [1 if rank in able(trial) else -signal.SIGKILL for rank in range(trial.world_size)]
        return HangOutcome(
            trial=trial,
            seconds=round(self.ended - began, 1) if self.ended and began else None,
            named=culprit != "wrong" and all(found == [line] for found in lines),
            exit_codes=self.codes,
            codes_right=self.codes == expected,
            orphans=orphans,
            line=line.replace(str(self.root), "OUT"),
            detected_s=round(verdict - began, 1) if verdict and began else None,
            culprit=culprit,
            stacks=[rank for rank in range(trial.world_size) if (self.root / f"run/logs/hang-rank-{rank}.txt").exists()],
        )


def plan(*, seed: int) -> list[Trial]:
    """Every fault in every one of its places, on 2 and on 4 ranks."""
    draw = random.Random(seed)
    pairs = [(fault, place, size) for fault, places in FAULTS.items() for place in places for size in (2, 4)]
    return [Trial(place, fault, draw.randrange(size), size) for fault, place, size in pairs]


def main() -> int:
    """Runs the trials and prints the result."""
    arguments = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    arguments.add_argument("--only", default=[], action="append", help="the trials whose description contains this, and this ...")
    arguments.add_argument("--parallel", type=int, default=3, help="jobs at a time; most of a trial is waiting")
    arguments.add_argument("--seed", type=int, default=0)
    arguments.add_argument("--out", type=Path, help="write the result here too")
    options = arguments.parse_args()
    where, began = environment(), time.monotonic()
    trials = [trial for trial in plan(seed=options.seed) if all(text in str(trial) for text in options.only)]
    with tempfile.TemporaryDirectory(prefix="hope-hang-") as name:
        jobs = [partial(HangJob, trial) for trial in trials]
        outcomes = [outcome for outcome in run(jobs, root=Path(name), parallel=options.parallel) if isinstance(outcome, HangOutcome)]
    result = {"environment": where, **summary(outcomes), "parallel": options.parallel, "wall_s": round(time.monotonic() - began, 1)}
    print(json.dumps(result))
    result["trials"] = [{**asdict(outcome), "limit_s": limit_s(outcome.trial), "passed": outcome.passed} for outcome in outcomes]
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0 if result["passed"] == len(trials) else 1


def summary(outcomes: list[HangOutcome]) -> dict[str, Any]:
    """The figures by fault. late_s: from the limit to the verdict (the fault lies in the phase, so less than nothing is possible)."""
    result: dict[str, Any] = {"passed": sum(outcome.passed for outcome in outcomes), "of": len(outcomes), "faults": {}}
    for fault in FAULTS:
        seen = [outcome for outcome in outcomes if outcome.trial.action == fault]
        late = [round(outcome.detected_s - limit_s(outcome.trial), 1) for outcome in seen if outcome.detected_s is not None]
        ended = [round(o.seconds - o.detected_s, 1) for o in seen if o.seconds is not None and o.detected_s is not None]
        if late and ended:
            result["faults"][fault] = {
                "jobs": len(seen),
                "late_s": {"median": round(statistics.median(late), 1), "longest": max(late)},
                "verdict_to_end_s": {"median": round(statistics.median(ended), 1), "longest": max(ended)},
                "named": {name: sum(outcome.culprit == name for outcome in seen) for name in ("right", "nobody", "wrong")},
            }
    return result


if __name__ == "__main__":
    sys.exit(main())
