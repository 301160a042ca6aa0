"""Jobs of the real trainer that are asked to stop, in every way: they lose no step, and the end of the run does not show it."""

import random
from collections.abc import Callable, Sequence
from typing import Any

from tools.slurm_trials.cluster import Run, wait
from tools.slurm_trials.training import Bench, finish, records, sentence, status

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


WAYS: dict[str, Callable[[Run, str], None]] = {
    "usr1": by_signal,
    "requeue": by_requeue,
    "preemption": by_preemption,
    "stop": by_file,
}


def trials(bench: Bench, *, ways: Sequence[str], seed: int) -> dict[str, Any]:
    """One run each that is stopped once, at a random step, without periodic checkpoints: only the agreed one can be continued from."""
    draw, found, violations = random.Random(seed), [], []
    for way in ways:
        run = bench.make(way)
        try:
            seen = _stop(bench, run, way=way, after=draw.randrange(5, max(6, bench.steps // 2)))
            wrong = bench.compare(run, layout=LAYOUT)
            if seen["lost"]:
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
    unsaved = ["checkpoint.every=0"]
    job = bench.submit(run, layout=LAYOUT, overrides=unsaved)
    run.wait_for_step(after, seconds=200)
    WAYS[way](run, job)
    wait(lambda: len(run.attempts) > 1 or job not in run.cluster.queue(), seconds=120, what="the stop", shown=lambda: run.log)
    said, last = status(run), max(record["step"] for record in records(run))
    if way == "stop":
        assert run.wait(job) == "COMPLETED" and run.actions == ["stopped"], run.log
        job = bench.submit(run, layout=LAYOUT, overrides=unsaved)
    finish(run, job)
    start = next(line for line in run.attempts if line.startswith("start 2 "))
    resumed = int(start.partition("step=")[2].split()[0])
    return {"at_step": last, "resumed_from": resumed, "lost": last - resumed, "reason": said.get("reason"), "actions": run.actions}
