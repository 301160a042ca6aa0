"""Jobs of the real trainer that are stopped, in every way but by kill -9 of a rank: the end of the run does not show it."""

import random
import time
from collections.abc import Callable, Sequence
from typing import Any

from tools.slurm_trials.cluster import Run, wait
from tools.slurm_trials.training import SAVE_EVERY, Bench, finish, records, sentence, status

LAYOUT = "tp2dp2"


def by_signal(run: Run, job: str) -> None:
    """As some time before the time limit: USR1 to the batch script only."""
    run.cluster.run("scancel", "--batch", "--signal=USR1", job)


def by_requeue(run: Run, job: str) -> None:
    """As an administrator does."""
    run.cluster.run("scontrol", "requeue", job)


def by_preemption(run: Run, job: str) -> None:
    """A job of a higher partition takes all nodes for a second."""
    nodes = len(run.cluster.node_states())
    whole = [f"--nodes={nodes}", "--ntasks-per-node=1", "--gres=gpu:4", "--mem=0", "--exclusive", "--output=/dev/null"]
    run.cluster.run("sbatch", "-p", "high", *whole, "--wrap", "srun sleep 1")


def by_file(run: Run, job: str) -> None:
    """The file STOP in the run directory, as a person makes it."""
    (run.path / "STOP").touch()


def by_node_death(run: Run, job: str) -> None:
    """The second machine of the job is lost without a word; there is a third one."""
    run.lose_node("n2")


def by_controller(run: Run, job: str) -> None:
    """Kill -9 of slurmctld, and a new one; the job is to go on. What was submitted in the last seconds is not in its files yet."""
    time.sleep(5)
    run.cluster.kill_daemon("slurmctld")
    time.sleep(2)
    run.cluster.start_controller()


WAYS: dict[str, Callable[[Run, str], None]] = {
    "usr1": by_signal,
    "requeue": by_requeue,
    "preemption": by_preemption,
    "stop": by_file,
    "node": by_node_death,
    "controller": by_controller,
}


def trials(bench: Bench, *, ways: Sequence[str], seed: int) -> dict[str, Any]:
    """One run each that is stopped once, at a random step; where ranks can agree on it, without periodic checkpoints to continue from."""
    draw, found, violations = random.Random(seed), [], []
    for way in ways:
        run = bench.make(way)
        try:
            seen = _stop(bench, run, way=way, after=draw.randrange(5, max(6, bench.steps // 2)))
            wrong = bench.compare(run, layout=LAYOUT)
            if seen["lost"] > (SAVE_EVERY if way == "node" else 0):
                wrong.append(f"{seen['lost']} steps had to be taken again")
        except AssertionError as error:
            seen, wrong = {}, [sentence(error)]
        bench.cluster.clear()
        found.append({"way": way, **seen})
        violations += [f"{way}: {line}" for line in wrong]
        print(f"{way}: {seen} {wrong or 'as if nothing had been'}", flush=True)
    return {"stops": found, "steps": bench.steps, "violations": violations}


def _stop(bench: Bench, run: Run, *, way: str, after: int) -> dict[str, Any]:
    """Stops a run and sees it through to its end."""
    unsaved = [] if way == "node" else ["checkpoint.every=0"]
    job = bench.submit(run, layout=LAYOUT, overrides=unsaved)
    run.wait_for_step(after, seconds=200)
    WAYS[way](run, job)
    if way == "controller":
        finish(run, job)
        assert run.actions == ["done"] and len(run.attempts) == 2, run.attempts
        return {"at_step": after, "lost": 0, "actions": run.actions}
    wait(lambda: len(run.attempts) > 1 or job not in run.cluster.queue(), seconds=120, what="the stop", shown=lambda: run.log)
    said, last = status(run), max(record["step"] for record in records(run))
    if way == "stop":
        assert run.wait(job) == "COMPLETED" and run.actions == ["stopped"], run.log
        job = bench.submit(run, layout=LAYOUT, overrides=unsaved)
    finish(run, job)
    start = next(line for line in run.attempts if line.startswith("start 2 "))
    resumed = int(start.partition("step=")[2].split()[0])
    return {"at_step": last, "resumed_from": resumed, "lost": last - resumed, "reason": said.get("reason"), "actions": run.actions}
