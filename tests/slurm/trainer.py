#!/usr/bin/env python3
"""A stand-in for `hope` on a virtual cluster: the protocol between trainer and batch script without torch, a start in 0.1 s.

`trainer.py train CONFIG key=value ...`, one process a rank. Rank 0 counts steps, commits `checkpoints/step-N`, and writes status.json as
the trainer does. FAKE_* variables make it misbehave. Files take the place of the all-reduce that agrees on a signal: a rank that is missing
breaks it.
"""

import json
import os
import signal
import socket
import sys
import time
from pathlib import Path

rank, attempt = int(os.environ["SLURM_PROCID"]), int(os.environ["HOPE_ATTEMPT"])
run = Path(os.environ["HOPE_RUN_DIR"])
steps = int(os.environ.get("FAKE_STEPS", "5"))
period = float(os.environ.get("FAKE_PERIOD", "0.1"))
received = []


def flag(number, frame):
    received.append({signal.SIGUSR1: "usr1", signal.SIGTERM: "term"}[number])


def status(state, step, **more):
    if rank == 0:
        temporary = run / ".tmp-status.json"
        temporary.write_text(json.dumps({"state": state, "step": step, "num_steps": steps, "message": "", **more}, indent=1) + "\n")
        temporary.replace(run / "status.json")


def commit(step):
    if rank == 0:
        (run / "checkpoints" / f"step-{step:08d}").mkdir(parents=True, exist_ok=True)


def together(what, seconds):
    """Whether all ranks come here within some seconds."""
    (run / "slurm" / f"{what}-{attempt}-{rank}").touch()
    end = time.monotonic() + seconds
    while len(list((run / "slurm").glob(f"{what}-{attempt}-*"))) < int(os.environ["SLURM_NTASKS"]):
        if time.monotonic() > end or (what == "joined" and received):
            return False
        time.sleep(0.02)
    return True


def committed():
    return max((int(path.name[5:]) for path in run.glob("checkpoints/step-*")), default=0)


def main():
    if sys.argv[1:3] == ["launch", "preflight"]:
        node = os.environ["SLURMD_NODENAME"]
        if node in os.environ.get("FAKE_BAD_NODES", "").split(","):
            with (run / "slurm" / "bad-node").open("a") as file:
                file.write(node + "\n")
            return 3
        return 0
    (run / "slurm" / f"seen-{attempt}-{rank}.json").write_text(
        json.dumps({"argv": sys.argv[1:], "environment": dict(os.environ), "host": socket.gethostname(), "pid": os.getpid()})
    )
    if attempt <= int(os.environ.get("FAKE_FAIL_ATTEMPTS", "0")) and rank == int(os.environ.get("FAKE_FAIL_RANK", "0")):
        return int(os.environ.get("FAKE_FAIL_CODE", "1"))
    if os.environ.get("FAKE_AGREES", "1") == "1":
        signal.signal(signal.SIGUSR1, flag)
        signal.signal(signal.SIGTERM, flag)
    if os.environ.get("FAKE_AGREES") == "never":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if not together("joined", 20):
        return 1
    first = committed()
    status("running", first)
    for step in range(first + 1, steps + 1):
        time.sleep(period)
        if received:
            if not together("agreed", 2):
                return 1
            commit(step)
            status("stopped", step, reason=received[0], checkpoint=step)
            return 0
        if step % int(os.environ.get("FAKE_EVERY", "2")) == 0 or step == steps:
            commit(step)
        if rank == 0:
            with (run / "metrics.jsonl").open("a") as file:
                file.write(json.dumps({"step": step, "loss": 1.0 / step, "tokens_per_s": 100.0, "time": time.time()}) + "\n")
        if os.environ.get("FAKE_CRASH_AT") == str(step):
            return 1
    status("done", steps)
    return 0


sys.exit(main())
