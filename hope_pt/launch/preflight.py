"""Preflight: is every node of a job fit for it? One process for each GPU, under a minute once all have started, before the trainer.

Each rank looks at its own machine (`hope_pt.launch.health`), rank 0 collects and looks at the network (`hope_pt.engine.probe`), and
`judge` compares and names the nodes that are bad or far slower than the others. slurm/lib/run.sh leaves those out of the job's next
start. What all nodes share, a full disk above all, is no node's fault and nothing that another start would mend.
"""

import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from hope_pt.engine.launch import Launch
from hope_pt.engine.probe import Probe, probe
from hope_pt.errors import ParallelError
from hope_pt.launch.health import examine

JOIN_S = 40.0
"""Seconds that ranks have for their own machine and to reach rank 0; longer where the job lets them start further apart (`join_s`)."""
NETWORK_S = 15.0
GRACE_S = 12.0
"""Seconds after which ranks that cannot reach rank 0 may blame it; where it lives, it has named them by then and Slurm has ended them."""
CLOCK_S = 3.0
SLOWER = {"cuda": 1.2, "cpu": 8.0}
"""A rank's matrix product may take this much longer than the median; virtual nodes of one CPU take turns."""
SLOWER_LINK = {"cuda": 1.5, "cpu": 20.0}


@dataclass
class Verdict:
    """lines: the report for people. bad: node -> reasons. shared: problems that every node has. stuck: a rank hangs in the network."""

    lines: list[str] = field(default_factory=list)
    bad: dict[str, list[str]] = field(default_factory=dict)
    shared: list[str] = field(default_factory=list)
    stuck: bool = False

    def blame(self, node: str, reason: str) -> None:
        """Adds a reason once."""
        if reason not in self.bad.setdefault(node, []):
            self.bad[node].append(reason)


def preflight(launch: Launch, *, directory: Path, environment: Mapping[str, str]) -> Verdict | None:
    """Collective. The verdict on rank 0, None elsewhere; without rank 0, the verdict about its node on all others."""
    # A node that reads Python's packages for minutes is no bad node: a slow start costs time only.
    join_s = max(JOIN_S, launch.join_s)
    end = time.monotonic() + join_s
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", launch.local_rank % torch.cuda.device_count()) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    hosts = [host for host in environment.get("HOPE_HOSTS", "").split(",") if host]
    report = examine(device, directory=directory, first=launch.local_rank == 0, environment=environment)
    try:
        found = probe(launch, report=report, device=device, seconds=max(end - time.monotonic(), 5.0), network_s=NETWORK_S)
    except ParallelError as error:
        time.sleep(GRACE_S)
        return first_rank_is_gone(launch, hosts=hosts, reason=str(error))
    return judge(found, hosts=hosts, world_size=launch.world_size, join_s=join_s) if found else None


def first_rank_is_gone(launch: Launch, *, hosts: list[str], reason: str) -> Verdict:
    """What the other ranks say when nobody collects their reports."""
    node = hosts[0] if hosts else launch.master_addr
    return Verdict([f"preflight: node {node} is bad: rank {launch.rank} says that {reason}"], {node: [reason]})


def judge(found: Probe, *, hosts: list[str], world_size: int, join_s: float = JOIN_S) -> Verdict:
    """Bad nodes from all reports: ranks missing after `join_s`, problems, clocks, products and exchanges far slower than the median's."""
    verdict = Verdict(stuck=bool(found.stuck or found.errors))
    per_node = max(world_size // max(len(hosts), 1), 1)
    for rank in found.missing:
        verdict.blame(hosts[rank // per_node] if hosts else f"of rank {rank}", f"rank {rank} does not reach rank 0 within {join_s:.0f} s")
    kind = "cuda" if any(report["kind"] == "cuda" for report in found.reports.values()) else "cpu"
    _own_problems(found, verdict, kind=kind)
    _clocks(found, verdict)
    products = _products(found, verdict, slower=SLOWER[kind])
    exchanges = _exchanges(found, verdict, slower=SLOWER_LINK[kind])
    _stuck(found, verdict)
    reduce = "not run" if found.all_reduce_s is None else f"{found.all_reduce_s * 1e3:.1f} ms for 16 MiB"
    head = f"preflight: {len(found.reports)} of {world_size} ranks, {products}, all-reduce {reduce}{exchanges}"
    bad = [f"preflight: node {node} is bad: {reason}" for node, reasons in sorted(verdict.bad.items()) for reason in reasons]
    verdict.lines = [head, *verdict.lines, *bad, *(f"preflight: on every node: {problem}" for problem in verdict.shared)]
    return verdict


def _own_problems(found: Probe, verdict: Verdict, *, kind: str) -> None:
    """What ranks say of their own machines; a disk that is bad on every node is not a node's."""
    disks: dict[str, list[str]] = {report["node"]: [] for report in found.reports.values()}
    for report in found.reports.values():
        node = report["node"]
        disks[node] += report["disk"]
        for problem in report["problems"]:
            verdict.blame(node, problem)
        if kind == "cuda" and report["gpus"] < max(report["expected_gpus"], 1):
            verdict.blame(node, f"torch sees {report['gpus']} of the {max(report['expected_gpus'], 1)} GPUs that the job has here")
    if kind == "cpu" and any(report["expected_gpus"] for report in found.reports.values()):
        verdict.lines.append("preflight: the job has GPUs and torch sees none of them on any node")
    if all(disks.values()):
        verdict.shared += sorted({problem for problems in disks.values() for problem in problems})
    else:
        for node, problems in disks.items():
            for problem in problems:
                verdict.blame(node, problem)
    unread = sorted({report["node"] for report in found.reports.values() if report["kernel_log"] is False})
    if unread:
        verdict.lines.append(f"preflight: kernel log not readable on {', '.join(unread)}: not searched for GPU errors (Xid)")


def _clocks(found: Probe, verdict: Verdict) -> None:
    """Nodes whose clock differs from the median's; of two that differ nobody can say which is wrong."""
    nodes = {found.reports[rank]["node"]: clock for rank, clock in sorted(found.clocks.items(), reverse=True)}
    if len(nodes) < 2:
        return
    middle = statistics.median_low(clock.ahead_s for clock in nodes.values())
    wrong = {node: clock.ahead_s - middle for node, clock in nodes.items() if abs(clock.ahead_s - middle) - clock.within_s > CLOCK_S}
    if len(nodes) == 2 and wrong:
        (node, ahead), other = next(iter(wrong.items())), next(one for one in nodes if one not in wrong)
        verdict.lines.append(f"preflight: the clock of {node} is {ahead:+.1f} s from that of {other}: one of the two nodes is wrong")
        return
    for node, ahead in wrong.items():
        verdict.blame(node, f"its clock is {ahead:+.1f} s from the median of {len(nodes)} nodes")


def _products(found: Probe, verdict: Verdict, *, slower: float) -> str:
    """Compares matrix products among ranks on the same kind of device; where half of them are slow the other half is right."""
    kinds = sorted({report["kind"] for report in found.reports.values()})
    times = {kind: [report["product_s"] for report in found.reports.values() if report["kind"] == kind] for kind in kinds}
    medians = {kind: statistics.median_low(values) for kind, values in times.items()}
    for rank, report in sorted(found.reports.items()):
        took, median = report["product_s"], medians[report["kind"]]
        if took > slower * median:
            verdict.blame(report["node"], f"rank {rank}: a matrix product takes {took * 1e3:.1f} ms, the median is {median * 1e3:.1f} ms")
    return ", ".join(f"product on {kind} {medians[kind] * 1e3:.1f} ms (slowest {max(times[kind]) * 1e3:.1f})" for kind in kinds)


def _exchanges(found: Probe, verdict: Verdict, *, slower: float) -> str:
    """Lays slow exchanges to nodes: one that is slow even in the best of its rounds; returns words for the report."""
    node_of = {rank: report["node"] for rank, report in found.reports.items()}
    across: dict[str, dict[str, float]] = {}
    within: dict[str, float] = {}
    for rank, times in found.exchanges.items():
        here = node_of[rank]
        for peer, took in times.items():
            if node_of[peer] != here:
                # The slowest rank of a node is the node's time in a round.
                across.setdefault(here, {})[node_of[peer]] = max(took, across.get(here, {}).get(node_of[peer], 0.0))
        own = [took for peer, took in times.items() if node_of[peer] == here]
        within[here] = max(within.get(here, 0.0), min(own)) if own else within.get(here, 0.0)
    words = ""
    best = {node: min(times.values()) for node, times in across.items()}
    for what, scores in (("with other nodes", best), ("within the node", {node: took for node, took in within.items() if took})):
        if not scores:
            continue
        usual = statistics.median_low(scores.values())
        words += f", exchange {what} {usual * 1e3:.1f} ms (slowest {max(scores.values()) * 1e3:.1f})"
        if len(best) == 2 and what == "with other nodes":
            words += ", which cannot be laid to one of two nodes"
        for node, took in scores.items():
            if took > slower * usual:
                verdict.blame(node, f"exchanges of 16 MiB {what} take {took * 1e3:.1f} ms, the median is {usual * 1e3:.1f} ms")
    return words


def _stuck(found: Probe, verdict: Verdict) -> None:
    """Ranks that wait for each other: one of the two nodes, or what lies between; both are left out. Others only wait for those."""
    for rank, peer in found.stuck.items():
        if peer is not None and found.stuck.get(peer) == rank:
            node, other = found.reports[rank]["node"], found.reports[peer]["node"]
            verdict.blame(node, f"ranks {min(rank, peer)} and {max(rank, peer)} ({node}, {other}) exchange nothing in {NETWORK_S:.0f} s")
    if found.stuck and not any("exchange nothing" in reason for reasons in verdict.bad.values() for reason in reasons):
        names = ", ".join(f"{rank} ({found.reports[rank]['node']})" for rank in found.stuck)
        verdict.lines.append(f"preflight: ranks {names} are not through the network's test after {NETWORK_S:.0f} s; no node can be named")
    for rank, error in found.errors.items():
        verdict.lines.append(f"preflight: rank {rank} on {found.reports[rank]['node']}: {error}")
