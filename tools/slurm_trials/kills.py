"""`kill -9` of random ranks of jobs of the real trainer: what it computes in the end must not show it.

A run is killed up to six times before it has its steps, then another begins, in the layouts in turn. Half of the kills come at a random
moment of an attempt, its start included, half a random moment after a save has begun to write. Steps, the interval of saves and the
periods of the CMS levels have no common multiple within a run.
"""

import os
import random
import shutil
import signal
import threading
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from tools.slurm_trials.cluster import Run, wait
from tools.slurm_trials.training import SAVE_EVERY, Bench, finish, records, sentence, spread

ORDER = ("dp2", "tp2", "dp2", "tp2", "tp2dp2")
# A kill in start-up makes no progress, and nobody is to give up because of that here.
PATIENCE = "100000"
KILLS_A_RUN = 6
"""Of more, most would come in the start-up of attempts that have little left to do."""


@dataclass
class Kill:
    """One kill. Times in seconds since the epoch; None for what did not happen before the next kill."""

    moment: str
    killed: float
    ended: float | None = None
    """The batch script has recorded the end of the attempt."""
    restarted: float | None = None
    """It has recorded the start of the next one."""
    stepped: float | None = None
    """First new step."""
    committed: int = 0
    """The step at which the next one began."""
    lost: int | None = None
    """Steps that had to be taken again."""


class KillTrials:
    """A series of kills, and what it has shown. count: kills of the whole series; order: layouts in turn."""

    def __init__(self, bench: Bench, *, count: int, order: Sequence[str], seed: int):
        self.kills: list[Kill] = []
        self.violations: list[str] = []
        self.runs: Counter[str] = Counter()
        self._bench, self._order, self._seed = bench, order, seed
        self._left, self._lock = threading.Semaphore(count), threading.Lock()

    def run(self, *, parallel: int = 1) -> None:
        """Kills run after run, `parallel` of them at a time: a requeued job waits some seconds for the scheduler."""
        for layout in dict.fromkeys(self._order):
            self._bench.reference(layout)
        pool = ThreadPoolExecutor(parallel)
        try:
            for worker in [pool.submit(self._work) for _ in range(parallel)]:
                worker.result()
        finally:
            # Those of a series that is stopped end with its cluster.
            pool.shutdown(wait=False, cancel_futures=True)

    def _work(self) -> None:
        while self._left.acquire(blocking=False):
            self._left.release()
            with self._lock:
                number = self.runs.total()
                layout = self._order[number % len(self._order)]
                self.runs[layout] += 1
            self._one_run(f"{number + 1}-{layout}", layout=layout, draw=random.Random(f"{self._seed}-{number}"))

    def _one_run(self, name: str, *, layout: str, draw: random.Random) -> None:
        run, kills = self._bench.make(name), list[Kill]()
        try:
            self._kill_until_done(run, kills, layout=layout, draw=draw)
            with self._lock:
                wrong = self._bench.compare(run, layout=layout)
        except AssertionError as error:
            wrong = [sentence(error)]
            run.cluster.run("scancel", *run.jobs, check=False)
        with self._lock:
            self.kills += kills
            self.violations += [f"{name}: {line}" for line in wrong]
        print(f"run {name}: {len(kills)} kills; {wrong or 'as if nothing had been'}", flush=True)
        if not wrong:
            shutil.rmtree(run.path.parent)

    def figures(self) -> dict[str, Any]:
        """What the series has shown."""
        moments = Counter(kill.moment for kill in self.kills)
        return {
            "kills": len(self.kills),
            "moments": dict(moments),
            "runs": dict(self.runs),
            "steps": self._bench.steps,
            "save_every": SAVE_EVERY,
            "recovery_s": _recovery(self.kills),
            "steps_taken_again": spread([kill.lost for kill in self.kills if kill.lost is not None]),
            "violations": self.violations,
        }

    def _kill_until_done(self, run: Run, kills: list[Kill], *, layout: str, draw: random.Random) -> None:
        """One run from its submission to its end, with the kills that it met."""
        job = self._bench.submit(run, layout=layout, HOPE_MAX_FRUITLESS=PATIENCE)
        reference = self._bench.reference(layout)
        while len(kills) < KILLS_A_RUN and self._left.acquire(blocking=False):
            wait(lambda: len(run.processes()) > 0 or job not in run.cluster.queue(), seconds=120, what="ranks", shown=lambda: run.log)
            previous = kills[-1] if kills else None
            left = 1.0 - (previous.committed / self._bench.steps if previous else 0.0)
            kill = _kill(run, previous=previous, seconds=reference.startup + left * reference.training, draw=draw)
            if kill is None:
                self._left.release()
                break
            kills.append(kill)
            if not _follow(run, kill, attempt=len(kills)):
                break
        finish(run, job)
        if kills:
            _note_step(run, kills[-1])
        unexpected = set(run.actions) - {"requeue", "done"}
        assert not unexpected, f"attempts ended with {unexpected}\n{run.log}"


def _kill(run: Run, *, previous: Kill | None, seconds: float, draw: random.Random) -> Kill | None:
    """Kills one rank within an attempt that takes about `seconds`; None if it has finished before."""
    in_save = draw.random() < 0.5
    earliest = time.monotonic() + draw.uniform(0.0, seconds)
    delay = draw.uniform(0.0, 0.03)
    stale, looked = _temporaries(run), 0.0
    while time.monotonic() < earliest or (in_save and not _temporaries(run) - stale):
        if time.monotonic() > looked + 0.5:
            looked = time.monotonic()
            if not run.processes():
                return None
        time.sleep(0.001)
    if in_save:
        time.sleep(delay)
    ranks = run.processes()
    try:
        os.kill(draw.choice(ranks), signal.SIGKILL)
    except (IndexError, ProcessLookupError):
        return None
    kill = Kill("in a save" if _temporaries(run) - stale else "between saves", time.time())
    if previous is not None:
        _note_step(run, previous)
    if not any(record.get("time", 0.0) > (previous.restarted or 0.0 if previous else 0.0) for record in records(run)):
        kill.moment = "before the attempt's first step"
    return kill


def _follow(run: Run, kill: Kill, *, attempt: int) -> bool:
    """Watches the end of a killed attempt and the start of the next; False if the run had all its steps."""
    wait(lambda: len(run.actions) == attempt, seconds=60, what=f"attempt {attempt} to end", shown=lambda: run.log)
    kill.ended = time.time()
    last = max((record["step"] for record in records(run)), default=0)
    if run.actions[-1] != "requeue":
        return False
    starts = f"start {attempt + 1} "
    wait(lambda: any(line.startswith(starts) for line in run.attempts), seconds=120, what="the next attempt", shown=lambda: run.log)
    kill.restarted = time.time()
    start = next(line for line in run.attempts if line.startswith(starts))
    kill.committed = int(start.partition("step=")[2].split()[0])
    kill.lost = max(0, last - kill.committed)
    return True


def _temporaries(run: Run) -> set[str]:
    """What saves have begun to write; of dead ones too, until the next save begins."""
    return {path.name for path in (run.path / "checkpoints").glob(".tmp-step-*")}


def _note_step(run: Run, kill: Kill) -> None:
    """When the attempt after `kill` had its first new step, as its line says."""
    if kill.restarted is not None and kill.stepped is None:
        after = [record["time"] for record in records(run) if record.get("time", 0.0) > kill.restarted]
        kill.stepped = min(after, default=None)


def _recovery(kills: Sequence[Kill]) -> dict[str, Any]:
    """From the kill to the first new step; the scheduler's wait is that from the end of an attempt to the start of the next."""
    whole = [kill.stepped - kill.killed for kill in kills if kill.stepped]
    waits = [kill.restarted - kill.ended for kill in kills if kill.restarted and kill.ended]
    own = [kill.stepped - kill.killed - (kill.restarted - kill.ended) for kill in kills if kill.stepped and kill.restarted and kill.ended]
    ends = [kill.ended - kill.killed for kill in kills if kill.ended]
    return {
        "whole": spread(whole),
        "without_the_schedulers_wait": spread(own),
        "until_the_attempt_has_ended": spread(ends),
        "schedulers_wait": spread(waits),
    }
