"""Runs `hope launch preflight` in forked ranks, a node each, with a fault in one; the last line printed is JSON: case -> what was seen.

preflight_ranks.py DIRECTORY CASE ...
"""

import contextlib
import json
import os
import socket
import sys
import time
from pathlib import Path

import torch.distributed as dist

from hope_pt import cli
from hope_pt.launch import health, preflight

WORLD = 4
ABSENT = {"missing": 3, "gone": 0}


def break_something(case: str, rank: int) -> None:
    """In the process of one rank, what a bad node would do."""
    if case == "clock" and rank == 1:
        real = time.time
        time.time = lambda: real() + 60.0
    if case in ("link", "stuck") and rank == 2:
        batch = dist.batch_isend_irecv
        dist.batch_isend_irecv = lambda operations: (time.sleep(0.5 if case == "link" else 600), batch(operations))[1]
    if case == "no group":
        dist.init_process_group = refuse


def refuse(*arguments, **options) -> None:
    raise RuntimeError("no interface named ib0")


def one_rank(case: str, rank: int, *, directory: Path, port: int) -> int:
    preflight.JOIN_S, join_s = (1.0, "5") if case in ABSENT else (30.0, "1")
    preflight.NETWORK_S, preflight.GRACE_S = 8.0 if case == "stuck" else 20.0, 0.5
    # Turns of one CPU are no faults, and neither is a small disk under a test.
    preflight.SLOWER, preflight.SLOWER_LINK = {"cpu": 1e9}, {"cpu": 8.0}
    health.LEAST_FREE_BYTES = health.LEAST_FREE_FILES = 0
    break_something(case, rank)
    place = {"RANK": str(rank), "WORLD_SIZE": str(WORLD), "LOCAL_RANK": "0", "SLURMD_NODENAME": f"n{rank + 1}"}
    os.environ.update(place | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "HOPE_HOSTS": "n1,n2,n3,n4", "HOPE_JOIN_S": join_s})
    return cli.main(["launch", "preflight", str(directory)])


def run_case(case: str, *, directory: Path) -> dict:
    (directory / "slurm").mkdir(parents=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    began, children, log = time.monotonic(), [], directory / "log"
    for rank in range(WORLD):
        if ABSENT.get(case) == rank:
            continue
        children.append(os.fork())
        if children[-1] == 0:
            code = 1
            with log.open("a") as opened, contextlib.redirect_stdout(opened), contextlib.redirect_stderr(opened):
                code = one_rank(case, rank, directory=directory, port=port)
            os._exit(code)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    named = directory / "slurm" / "bad-node"
    bad = named.read_text().split() if named.exists() else []
    return {"codes": codes, "bad": bad, "text": log.read_text(), "seconds": time.monotonic() - began}


if __name__ == "__main__":
    print(json.dumps({case: run_case(case, directory=Path(sys.argv[1]) / case) for case in sys.argv[2:]}))
