"""The network of a job before the job: do all ranks reach rank 0, what does each say of itself, how long does an all-reduce take.

Rank 0 has a store at the job's address; every rank puts its report there. Who has not after `seconds` is missing, by rank. Only when all
are there is a process group made, because one missing rank would leave the others waiting.
"""

import json
import time
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from hope_pt.engine.launch import Launch

_ELEMENTS = 1 << 22
_ROUNDS = 5


@dataclass(frozen=True)
class Probe:
    """reports: what ranks said, by rank. missing: ranks that were not heard in time. all_reduce_s: of 16 MiB of fp32, the best of five."""

    reports: dict[int, dict]
    missing: list[int]
    all_reduce_s: float | None


def probe(launch: Launch, *, report: dict, device: torch.device, seconds: float) -> Probe | None:
    """Collective. The result on rank 0, None on the others; `report` is any JSON. Raises RuntimeError where rank 0 cannot be reached."""
    if launch.world_size == 1:
        return Probe({0: report}, [], None)
    limit = timedelta(seconds=seconds)
    first = launch.rank == 0
    store = dist.TCPStore(launch.master_addr, launch.master_port, None, first, timeout=limit, wait_for_workers=False)
    store.set(f"report/{launch.rank}", json.dumps(report))
    missing = _missing(store, launch, end=time.monotonic() + seconds) if first else []
    if first:
        store.set("verdict", json.dumps(missing))
    elif json.loads(store.get("verdict")):
        return None
    took = None if missing else _all_reduce_s(launch, store, device=device, limit=limit)
    if not first:
        return None
    heard = [rank for rank in range(launch.world_size) if rank not in missing]
    return Probe({rank: json.loads(store.get(f"report/{rank}")) for rank in heard}, missing, took)


def _missing(store: dist.Store, launch: Launch, *, end: float) -> list[int]:
    """Ranks without a report when time is up."""
    waiting = list(range(launch.world_size))
    while waiting and time.monotonic() < end:
        waiting = [rank for rank in waiting if not store.check([f"report/{rank}"])]
        time.sleep(0.05)
    return waiting


def _all_reduce_s(launch: Launch, store: dist.Store, *, device: torch.device, limit: timedelta) -> float:
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=launch.rank, world_size=launch.world_size, timeout=limit)
    try:
        values, times = torch.ones(_ELEMENTS, device=device), []
        for _ in range(_ROUNDS):
            dist.barrier()
            began = time.perf_counter()
            dist.all_reduce(values, op=dist.ReduceOp.MAX)
            # Reading an element waits for the device.
            if values[-1].item() != 1.0:
                raise RuntimeError("an all-reduce of ones gave another number: memory or network of this job is damaged")
            times.append(time.perf_counter() - began)
        # Nobody leaves, and closes the store, before all have their result.
        dist.barrier()
    finally:
        dist.destroy_process_group()
    return min(times)
