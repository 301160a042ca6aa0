"""Jobs of the real trainer of which one rank hangs: found within its limit and five seconds, named, with stacks of all, and restarted."""

import random
import re
from typing import Any

from tools.slurm_trials.cluster import Run, wait
from tools.slurm_trials.training import Bench, finish, records, sentence, spread

LIMIT_S = 15
"""Of a step in these runs; that of a rank's silence is the same (`hope_pt.engine.hub.Limits`)."""
SLACK_S = 5.0
# Two ranks that wait for each other have no majority that one of them differs from.
KINDS = {"sleep": "dp2", "stop": "tp2", "collective": "tp2dp2", "loader": "dp2"}
_WATCHDOG = (f"watchdog.step_s={LIMIT_S}", "watchdog.step_factor=0", "data.num_workers=1")


def trials(bench: Bench, *, count: int, seed: int) -> dict[str, Any]:
    """One run for each of `count` hangs, of all kinds in turn, in a random rank at a random step."""
    draw, found, violations = random.Random(seed), [], []
    for number in range(count):
        kind = list(KINDS)[number % len(KINDS)]
        run, ranks = bench.make(f"{kind}-{number}"), 4 if KINDS[kind] == "tp2dp2" else 2
        rank, step = draw.randrange(ranks), draw.randrange(3, 20)
        try:
            seen, wrong = _hang(bench, run, kind=kind, rank=rank, step=step, ranks=ranks)
        except AssertionError as error:
            seen, wrong = {}, [sentence(error)]
            bench.cluster.clear()
        found.append({"kind": kind, "rank": rank, "ranks": ranks, "after_step": step, **seen})
        violations += [f"{kind}, rank {rank} of {ranks}: {line}" for line in wrong]
        print(found[-1], wrong or "found, named, restarted", flush=True)
    return {
        "hangs": found,
        "limit_s": LIMIT_S,
        "named": sum(seen.get("named", False) for seen in found),
        "seconds_to_find": spread([seen["seconds"] for seen in found if "seconds" in seen]),
        "violations": violations,
    }


def _hang(bench: Bench, run: Run, *, kind: str, rank: int, step: int, ranks: int) -> tuple[dict[str, Any], list[str]]:
    """What was seen of one, and what was wrong with it."""
    job = bench.submit(run, layout=KINDS[kind], overrides=_WATCHDOG, TRIAL_FAULT=f"{kind} {rank} {step}")
    wait(lambda: len(run.actions) > 0, seconds=300, what="the end of the attempt", shown=lambda: run.log)
    last = max(record["time"] for record in records(run) if "time" in record)
    written = [file.stat().st_mtime for file in (run.path / "logs").glob("hang*.txt")]
    assert written, f"no stacks were written:\n{run.log}"
    seconds, verdict = round(min(written) - last, 1), _verdict(run)
    stacks = [other for other in range(ranks) if (run.path / "logs" / f"hang-rank-{other}.txt").exists()]
    wrong = []
    if seconds > LIMIT_S + SLACK_S:
        wrong.append(f"found after {seconds} s")
    # A stopped process cannot write its own.
    if missing := set(range(ranks)) - set(stacks) - ({rank} if kind == "stop" else set()):
        wrong.append(f"no stacks of ranks {sorted(missing)}")
    head = re.split(r" hangs?:| has been silent", verdict)[0]
    named = head.count("rank ") == 1 and f"rank {rank} of {ranks}" in head
    if not named:
        wrong.append(f"rank {rank} is not named: {verdict}")
    finish(run, job)
    if run.actions != ["requeue", "done"]:
        wrong.append(f"attempts ended with {run.actions}")
    wrong += bench.compare(run, layout=KINDS[kind])
    return {"seconds": seconds, "named": named, "stacks": len(stacks), "verdict": verdict}, wrong


def _verdict(run: Run) -> str:
    """The line that says who hangs: of the hub, or where rank 0 was the one, of those that saw it."""
    report = run.path / "logs" / "hang.txt"
    lines = (report.read_text() if report.exists() else run.log).replace(str(run.path), "RUN").splitlines()
    return next((line for line in lines if re.search(r"rank \d+ of \d+.*( hangs?:| has been silent)", line)), "nobody was named")
