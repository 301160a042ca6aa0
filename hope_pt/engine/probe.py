"""The network of a job before the job: do all ranks reach rank 0, do their clocks agree, which node makes messages slow.

Rank 0 has a store at the job's address. Every rank asks it for the time (the answer lies half a round trip back) and puts its report
there. Who has not after `seconds` is missing, by rank. Only when all are there is a process group made, because one missing rank would
leave the others waiting. Then ranks exchange 16 MiB in pairs, first with the rank of the same place on other nodes, then within the
node, in a fixed number of rounds however many nodes there are: a tournament, so that no two meet twice. A node with a bad link is slow
in all its rounds, another one only in the round with it. Last, all ranks reduce together. All of it has `network_s` seconds; who is then
not through is `stuck`, with the rank that it waits for.
"""

import json
import os
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import timedelta

import torch
import torch.distributed as dist

from hope_pt.engine.launch import Launch
from hope_pt.errors import ParallelError

NODE_ROUNDS, LOCAL_ROUNDS = 4, 2
_ELEMENTS = 1 << 22
_REPEATS = 5
_POLL_S = 0.02


@dataclass(frozen=True)
class Clock:
    """A rank's clock is `ahead_s` seconds before rank 0's, give or take `within_s`."""

    ahead_s: float
    within_s: float


@dataclass(frozen=True)
class Probe:
    """reports: what ranks said, by rank. missing: ranks that were not heard in time. all_reduce_s: of 16 MiB of fp32, the best of five.

    exchanges: rank -> other rank -> seconds to send and receive 16 MiB, the best of five. stuck: rank -> the rank it waits for, None if it
    is in something that all ranks do. errors: what a rank met in the network. Where anybody is stuck, a thread of this process may be too:
    leave with os._exit.
    """

    reports: dict[int, dict]
    missing: list[int] = field(default_factory=list)
    all_reduce_s: float | None = None
    clocks: dict[int, Clock] = field(default_factory=dict)
    exchanges: dict[int, dict[int, float]] = field(default_factory=dict)
    stuck: dict[int, int | None] = field(default_factory=dict)
    errors: dict[int, str] = field(default_factory=dict)


def probe(launch: Launch, *, report: dict, device: torch.device, seconds: float, network_s: float) -> Probe | None:
    """Collective. The result on rank 0, None on the others; `report` is any JSON with "node" and "kind", the node's name and device type.

    Without equal kinds there is no network to look at. Raises ParallelError where rank 0 does not answer.
    """
    if launch.world_size == 1:
        return Probe({0: report})
    silent = f"rank 0 at {launch.master_addr}:{launch.master_port} does not answer within {seconds:.0f} s"
    try:
        store = _connect(launch, serve=launch.rank == 0, seconds=seconds)
    except RuntimeError as error:
        raise ParallelError(silent) from error
    if launch.rank == 0:
        return _lead(launch, store, report=report, device=device, seconds=seconds, network_s=network_s)
    # Rank 0 waits for others as long as we waited for it.
    store.set_timeout(timedelta(seconds=seconds + 10.0))
    try:
        clock = _ask_the_time(store, launch.rank)
        store.set(f"report/{launch.rank}", json.dumps({"report": report, "clock": [clock.ahead_s, clock.within_s]}))
        nodes = json.loads(store.get("nodes"))
        if nodes:
            _follow(launch, store, nodes=nodes, device=device, network_s=network_s)
    except dist.DistStoreError as error:
        raise ParallelError(silent) from error
    except dist.DistNetworkError:
        # Rank 0 was there and is gone: it has its verdict, or has failed for all to see.
        pass
    return None


def _lead(launch: Launch, store: dist.Store, *, report: dict, device: torch.device, seconds: float, network_s: float) -> Probe:
    """Rank 0: hears all ranks, lets them go on to the network if all are there, and collects."""
    heard, clocks = _hear(store, launch.world_size, end=time.monotonic() + seconds)
    reports = {0: report} | heard
    clocks = {0: Clock(0.0, 0.0)} | clocks
    missing = [rank for rank in range(launch.world_size) if rank not in reports]
    ready = not missing and len({one["kind"] for one in reports.values()}) == 1
    nodes = [reports[rank]["node"] for rank in range(launch.world_size)] if ready else []
    store.set("nodes", json.dumps(nodes))
    if not ready:
        return Probe(reports, missing, clocks=clocks)
    watcher, end = _connect(launch, serve=False, seconds=network_s), time.monotonic() + network_s
    _start(launch, store, nodes=nodes, device=device)
    waiting = set(range(launch.world_size))
    while waiting and time.monotonic() < end:
        waiting = {rank for rank in waiting if not watcher.check([f"done/{rank}"])}
        time.sleep(_POLL_S)
    done = {rank: json.loads(watcher.get(f"done/{rank}")) for rank in range(launch.world_size) if rank not in waiting}
    stuck = {rank: json.loads(watcher.get(f"at/{rank}")) if watcher.check([f"at/{rank}"]) else None for rank in sorted(waiting)}
    watcher.set("over", "")
    if not stuck:
        _leave()
    exchanges = {rank: {int(peer): took for peer, took in one["exchanges"].items()} for rank, one in done.items()}
    took = None if stuck else done[0]["all_reduce_s"]
    return Probe(reports, missing, took, clocks, exchanges, stuck, {rank: one["error"] for rank, one in done.items() if one["error"]})


def _follow(launch: Launch, store: dist.Store, *, nodes: list[str], device: torch.device, network_s: float) -> None:
    """Every other rank: takes part until rank 0 has what it wants. Does not return to a caller that could only wait for ever."""
    watcher = _connect(launch, serve=False, seconds=network_s)
    thread = _start(launch, store, nodes=nodes, device=device)
    thread.join(network_s)
    try:
        watcher.get("over")
    except RuntimeError:
        # Rank 0 has all it wants and is gone.
        pass
    if thread.is_alive():
        # A thread inside a collective that never ends cannot be ended; rank 0 says what happened.
        os._exit(0)
    _leave()


def _leave() -> None:
    # A rank that met an error may have no group.
    if dist.is_initialized():
        dist.destroy_process_group()


def _connect(launch: Launch, *, serve: bool, seconds: float) -> dist.Store:
    return dist.TCPStore(launch.master_addr, launch.master_port, None, serve, timeout=timedelta(seconds=seconds), wait_for_workers=False)


def _ask_the_time(store: dist.Store, rank: int) -> Clock:
    asked, began = time.time(), time.monotonic()
    store.set(f"asked/{rank}", "")
    there = float(store.get(f"time/{rank}"))
    half = (time.monotonic() - began) / 2
    return Clock(asked + half - there, half)


def _hear(store: dist.Store, world_size: int, *, end: float) -> tuple[dict[int, dict], dict[int, Clock]]:
    """Tells the time to who asks and reads reports, until all have come or time is up."""
    unasked, waiting = set(range(1, world_size)), set(range(1, world_size))
    reports, clocks = {}, {}
    while waiting and time.monotonic() < end:
        for rank in _present(store, "asked", unasked):
            store.set(f"time/{rank}", repr(time.time()))
            unasked.discard(rank)
        for rank in _present(store, "report", waiting - unasked):
            said = json.loads(store.get(f"report/{rank}"))
            reports[rank], clocks[rank] = said["report"], Clock(*said["clock"])
            waiting.discard(rank)
        time.sleep(_POLL_S)
    return reports, clocks


def _present(store: dist.Store, key: str, ranks: Iterable[int]) -> list[int]:
    return [rank for rank in ranks if store.check([f"{key}/{rank}"])]


def _start(launch: Launch, store: dist.Store, *, nodes: list[str], device: torch.device) -> threading.Thread:
    thread = threading.Thread(target=_network, args=(launch, store, nodes, device), daemon=True)
    thread.start()
    return thread


def _network(launch: Launch, store: dist.Store, nodes: list[str], device: torch.device) -> None:
    """Exchanges in pairs, then the all-reduce; leaves "at/RANK" before each and "done/RANK" at the end, with the times or an error."""
    found: dict = {"exchanges": {}, "all_reduce_s": None, "error": ""}
    try:
        _measure(launch, store, nodes, device=device, found=found)
    except RuntimeError as error:
        found["error"] = " ".join(str(error).split())
    store.set(f"done/{launch.rank}", json.dumps(found))


def _measure(launch: Launch, store: dist.Store, nodes: list[str], *, device: torch.device, found: dict) -> None:
    rank = launch.rank
    # Longer than anybody waits: whoever is stuck is named by rank 0, not ended by its backend.
    limit = timedelta(seconds=120)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo", store=store, rank=rank, world_size=launch.world_size, timeout=limit
    )
    dist.barrier()
    for peer in schedule(nodes, rank):
        store.set(f"at/{rank}", json.dumps(peer))
        found["exchanges"][peer] = _exchange_s(peer, device=device)
    store.set(f"at/{rank}", "null")
    found["all_reduce_s"] = _all_reduce_s(device)


def schedule(nodes: list[str], rank: int) -> list[int]:
    """The ranks that `rank` exchanges with, one after the other; `nodes` has the node of every rank. Symmetric between two ranks."""
    members: dict[str, list[int]] = {}
    for one, node in enumerate(nodes):
        members.setdefault(node, []).append(one)
    names = list(members)
    own = members[nodes[rank]]
    here, place = names.index(nodes[rank]), own.index(rank)
    others = (members[names[pairs[here]]] for pairs in matchings(len(names), NODE_ROUNDS) if here in pairs)
    across = [other[place] for other in others if place < len(other)]
    return across + [own[pairs[place]] for pairs in matchings(len(own), LOCAL_ROUNDS) if place in pairs]


def matchings(players: int, rounds: int) -> list[dict[int, int]]:
    """The first rounds of a tournament of everybody against everybody: player -> opponent; with an odd number one rests in each."""
    modulus = players - 1 + players % 2
    found = []
    for number in range(min(rounds, modulus)):
        pairs = {}
        for one in range(modulus):
            other = (number - one) % modulus
            if other != one:
                pairs[one] = other
            elif modulus < players:
                pairs[one], pairs[modulus] = modulus, one
        found.append(pairs)
    return found


def _exchange_s(peer: int, *, device: torch.device) -> float:
    """Best of five exchanges with one rank; the first also waits for it to come."""
    sent, received, times = torch.ones(_ELEMENTS, device=device), torch.zeros(_ELEMENTS, device=device), []
    for _ in range(_REPEATS):
        received.zero_()
        began = time.perf_counter()
        for work in dist.batch_isend_irecv([dist.P2POp(dist.isend, sent, peer), dist.P2POp(dist.irecv, received, peer)]):
            work.wait()
        # Reading an element waits for the device.
        if received[-1].item() != 1.0:
            raise RuntimeError(f"rank {peer} sent ones and another number arrived: memory or network of this job is damaged")
        times.append(time.perf_counter() - began)
    return min(times)


def _all_reduce_s(device: torch.device) -> float:
    values, times = torch.ones(_ELEMENTS, device=device), []
    for _ in range(_REPEATS):
        dist.barrier()
        began = time.perf_counter()
        dist.all_reduce(values, op=dist.ReduceOp.MAX)
        if values[-1].item() != 1.0:
            raise RuntimeError("an all-reduce of ones gave another number: memory or network of this job is damaged")
        times.append(time.perf_counter() - began)
    return min(times)
