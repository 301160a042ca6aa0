"""Preflight names the injected node: seeded faults on every node of a faked machine room, a tournament of links, and real processes."""

import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from hope_pt import cli
from hope_pt.engine.launch import Launch
from hope_pt.engine.probe import LOCAL_ROUNDS, NODE_ROUNDS, Clock, Probe, matchings, schedule
from hope_pt.launch import health, preflight
from hope_pt.launch.preflight import Verdict, first_rank_is_gone, judge

NODES = ["n1", "n2", "n3", "n4"]
GPUS = 2
UPTIME_S = 500_000.0
RANKS = Path(__file__).with_name("preflight_ranks.py")
XID = "[{seconds:.6f}] NVRM: Xid (PCI:0000:3b:00): {number}, pid=4321, name=python, more words of the driver\n"


@dataclass
class Machine:
    """One node as `examine` sees it; what is not changed is well."""

    smi: str = "0, 0\n1, 0\n"
    smi_error: Exception | None = None
    seen_gpus: int = GPUS
    dmesg: str | None = "[    0.000000] Linux version 6.1\n"
    kern_log: str | None = None
    free_bytes: int = 1 << 40
    free_files: int = 1 << 20
    total_files: int = 1 << 21
    write_error: OSError | None = None
    product_s: dict[int, float] = field(default_factory=dict)

    def run(self, command, **options):
        if command[0] == "nvidia-smi":
            if self.smi_error:
                raise self.smi_error
            return SimpleNamespace(stdout=self.smi)
        return SimpleNamespace(returncode=1 if self.dmesg is None else 0, stdout=self.dmesg or "")

    def replace_text(self, path, *, text):
        if self.write_error:
            raise self.write_error
        path.write_text(text)


@dataclass
class Room:
    """Four nodes of two ranks, their clocks and links; a link's seconds are those of a good one times the worse node's factor."""

    machines: dict[str, Machine] = field(default_factory=lambda: {node: Machine() for node in NODES})
    missing: list[int] = field(default_factory=list)
    ahead_s: dict[str, float] = field(default_factory=dict)
    across: dict[str, float] = field(default_factory=dict)
    within: dict[str, float] = field(default_factory=dict)

    def verdict(self, place: Path, monkeypatch) -> Verdict:
        nodes = [node for node in NODES for _ in range(GPUS)]
        reports = {
            rank: self.report(place, rank, node, monkeypatch) for rank, node in enumerate(nodes) if rank == 0 or rank not in self.missing
        }
        zero = self.ahead_s.get(NODES[0], 0.0)
        clocks = {rank: Clock(self.ahead_s.get(nodes[rank], 0.0) - zero, 0.03) for rank in reports}
        whole = not self.missing and len({report["kind"] for report in reports.values()}) == 1
        exchanges = {rank: {peer: self.link_s(nodes[rank], nodes[peer]) for peer in schedule(nodes, rank)} for rank in reports}
        found = Probe(reports, self.missing, 0.004 if whole else None, clocks, exchanges if whole else {})
        return judge(found, hosts=NODES, world_size=len(nodes))

    def link_s(self, a: str, b: str) -> float:
        return 0.0003 * self.within.get(a, 1.0) if a == b else 0.001 * max(self.across.get(a, 1.0), self.across.get(b, 1.0))

    def report(self, place: Path, rank: int, node: str, monkeypatch) -> dict:
        machine, local = self.machines[node], rank % GPUS
        with monkeypatch.context() as patch:
            patch.setattr(health.subprocess, "run", machine.run)
            patch.setattr(health.shutil, "disk_usage", lambda path: SimpleNamespace(free=machine.free_bytes))
            counts = SimpleNamespace(f_files=machine.total_files, f_favail=machine.free_files)
            patch.setattr(health.os, "statvfs", lambda path: counts)
            patch.setattr(health, "replace_text", machine.replace_text)
            patch.setattr(health, "product_s", lambda device: machine.product_s.get(local, 0.010 + 0.0001 * rank))
            patch.setattr(health.time, "clock_gettime", lambda clock: UPTIME_S)
            patch.setattr(health.torch.cuda, "device_count", lambda: machine.seen_gpus)
            log = place / f"kern-{node}.log"
            if machine.kern_log is not None:
                log.write_text(machine.kern_log)
            patch.setattr(health, "KERNEL_LOGS", (log,))
            environment = {"SLURMD_NODENAME": node, "CUDA_VISIBLE_DEVICES": "0,1"}
            device = torch.device("cuda" if machine.seen_gpus else "cpu")
            return json.loads(json.dumps(health.examine(device, directory=place / "run", first=local == 0, environment=environment)))


def machine(**changes) -> Callable[[Room, str], None]:
    return lambda room, node: room.machines.update({node: Machine(**changes)})


def xid(number: int, *, hours: float = 1.0) -> str:
    return XID.format(seconds=UPTIME_S - 3600 * hours, number=number)


SMI = ["nvidia-smi"]
FAULTS: dict[str, tuple[Callable[[Room, str], None], str]] = {
    "the driver has lost a GPU": (machine(smi="0, 0\n"), "nvidia-smi lists 1 of the 2 GPUs"),
    "torch sees one GPU": (machine(seen_gpus=1), "torch sees 1 of the 2 GPUs"),
    "torch sees no GPU": (machine(seen_gpus=0), "torch sees 0 of the 2 GPUs"),
    "uncorrected memory errors": (machine(smi="0, 0\n1, 3\n"), "GPU 1 has 3 uncorrected memory errors"),
    "nvidia-smi hangs": (machine(smi_error=subprocess.TimeoutExpired(SMI, 10)), "nvidia-smi fails"),
    "nvidia-smi fails": (machine(smi_error=subprocess.CalledProcessError(9, SMI)), "nvidia-smi fails"),
    "a GPU off the bus": (machine(dmesg=xid(79) * 3), "Xid 79 (the GPU has fallen off the bus), 3 times"),
    "a double-bit error": (machine(dmesg=xid(31) + xid(48)), "Xid 48"),
    "NVLink errors": (machine(dmesg=xid(74, hours=23)), "Xid 74"),
    "an Xid in kern.log": (machine(dmesg=None, kern_log="Nov 21 18:41:29 host kernel: " + xid(95)), "Xid 95"),
    "an Xid without seconds": (machine(dmesg="NVRM: Xid (0000:3b:00): 119, pid=1\n"), "GPU 0000:3b:00: Xid 119"),
    "both GPUs somewhat slow": (machine(product_s={0: 0.0130, 1: 0.0131}), "a matrix product takes 13"),
    "one GPU very slow": (machine(product_s={1: 0.5}), "a matrix product takes 500"),
    "a full disk": (machine(free_bytes=1 << 29), "512 MiB free"),
    "no inodes": (machine(free_files=12), "12 inodes free"),
    "a read-only disk": (machine(write_error=OSError(errno.EROFS, "Read-only file system")), "Read-only file system"),
    "a stale mount": (machine(write_error=OSError(errno.ESTALE, "Stale file handle")), "Stale file handle"),
    "an exceeded quota": (machine(write_error=OSError(errno.EDQUOT, "Disk quota exceeded")), "Disk quota exceeded"),
    "one rank is not heard": (lambda room, node: room.missing.append(GPUS * NODES.index(node) + 1), "does not reach rank 0"),
    "a clock that is ahead": (lambda room, node: room.ahead_s.update({node: 120.0}), "its clock is +120.0 s"),
    "a clock that is behind": (lambda room, node: room.ahead_s.update({node: -4.0}), "its clock is -4.0 s"),
    "a slow network card": (lambda room, node: room.across.update({node: 1.8}), "exchanges of 16 MiB with other nodes take 1.8 ms"),
    "a slow link in the node": (lambda room, node: room.within.update({node: 3.0}), "exchanges of 16 MiB within the node take 0.9 ms"),
}


@pytest.mark.parametrize("node", NODES)
@pytest.mark.parametrize(("fault", "said"), FAULTS.values(), ids=FAULTS.keys())
def test_the_injected_node_is_named_and_no_other(fault, said, node, tmp_path, monkeypatch):
    room = Room()
    fault(room, node)
    verdict = room.verdict(tmp_path, monkeypatch)
    assert list(verdict.bad) == [node], verdict.lines
    assert any(said in reason for reason in verdict.bad[node]), verdict.bad
    assert any(line.startswith(f"preflight: node {node} is bad: ") for line in verdict.lines)


HARMLESS: dict[str, Callable[[Room, str], None]] = {
    "nothing": lambda room, node: None,
    "an Xid of a program": machine(dmesg=xid(13) + xid(31) + xid(43) + xid(45)),
    "an Xid of two days ago": machine(dmesg=xid(79, hours=48)),
    "an Xid of an earlier boot": machine(dmesg=XID.format(seconds=UPTIME_S + 9, number=79)),
    "no nvidia-smi": machine(smi_error=FileNotFoundError()),
    "a file system without a number of inodes": machine(free_files=0, total_files=0),
    "a product 10 % slower": machine(product_s={0: 0.011}),
    "a clock 2 s ahead": lambda room, node: room.ahead_s.update({node: 2.0}),
    "links 30 % slower": lambda room, node: room.across.update({node: 1.3}),
}


@pytest.mark.parametrize("change", HARMLESS.values(), ids=HARMLESS.keys())
def test_what_is_no_fault_of_a_node_names_nobody(change, tmp_path, monkeypatch):
    room = Room()
    change(room, "n3")
    verdict = room.verdict(tmp_path, monkeypatch)
    assert verdict.bad == {} and verdict.shared == [] and not verdict.stuck
    assert len(verdict.lines) == 1 and "8 of 8 ranks, product on cuda 10." in verdict.lines[0]


def test_a_kernel_log_that_cannot_be_read_is_said(tmp_path, monkeypatch):
    room = Room()
    for node in ("n2", "n4"):
        room.machines[node].dmesg = None
    verdict = room.verdict(tmp_path, monkeypatch)
    assert verdict.bad == {}
    assert verdict.lines[1:] == ["preflight: kernel log not readable on n2, n4: not searched for GPU errors (Xid)"]


def test_a_disk_that_is_full_for_all_is_no_nodes_fault(tmp_path, monkeypatch):
    """To leave out all nodes would make the job wait for ever."""
    room = Room({node: Machine(free_bytes=1 << 20) for node in NODES})
    verdict = room.verdict(tmp_path, monkeypatch)
    assert verdict.bad == {} and verdict.shared == [f"{tmp_path}/run: 1 MiB free"]
    assert verdict.lines[-1] == f"preflight: on every node: {tmp_path}/run: 1 MiB free"


def test_of_two_nodes_neither_is_blamed_for_what_lies_between_them():
    reports = {rank: blank(f"n{rank + 1}") for rank in range(2)}
    found = Probe(reports, [], 1.0, {0: Clock(0, 0), 1: Clock(60.0, 0.1)}, {0: {1: 1.0}, 1: {0: 1.0}})
    verdict = judge(found, hosts=["n1", "n2"], world_size=2)
    assert verdict.bad == {}
    assert "which cannot be laid to one of two nodes" in verdict.lines[0]
    assert verdict.lines[1] == "preflight: the clock of n2 is +60.0 s from that of n1: one of the two nodes is wrong"


def test_of_two_nodes_the_slow_one_is_named():
    reports = {rank: blank(f"n{rank // 2 + 1}") | {"product_s": 0.010 if rank < 2 else 0.013} for rank in range(4)}
    slow_inside = {0: {1: 0.001}, 1: {0: 0.001}, 2: {3: 0.002}, 3: {2: 0.002}}
    assert list(judge(Probe(reports), hosts=["n1", "n2"], world_size=4).bad) == ["n2"]
    even = {rank: report | {"product_s": 0.01} for rank, report in reports.items()}
    assert list(judge(Probe(even, exchanges=slow_inside), hosts=["n1", "n2"], world_size=4).bad) == ["n2"]


def test_a_clock_is_not_judged_finer_than_the_message_was_fast():
    clocks = {0: Clock(0, 0), 1: Clock(0.1, 0.1), 2: Clock(9.0, 8.0)}
    found = Probe({rank: blank(f"n{rank}") for rank in range(3)}, [], None, clocks)
    assert judge(found, hosts=["n0", "n1", "n2"], world_size=3).bad == {}


def blank(node: str) -> dict:
    return {
        "node": node, "kind": "cuda", "gpus": 1, "expected_gpus": 1, "problems": [], "disk": [], "kernel_log": True, "product_s": 0.01
    }  # fmt: skip


@pytest.mark.parametrize("players", range(1, 18))
def test_a_tournament_never_pairs_two_twice(players):
    rounds = matchings(players, 1000)
    assert len(rounds) == (players - 1 if players % 2 == 0 else players)
    seen = set()
    for pairs in rounds:
        assert all(pairs[other] == one and one != other for one, other in pairs.items())
        assert len(pairs) == players - players % 2
        new = {frozenset(pair) for pair in pairs.items()}
        assert not new & seen
        seen |= new
    assert len(seen) == players * (players - 1) // 2


@pytest.mark.parametrize("count", [3, 4, 5, 8, 13, 64, 257])
def test_a_slow_node_is_found_among_any_number_in_a_fixed_number_of_rounds(count):
    nodes = [f"n{index}" for index in range(count) for _ in range(2)]
    schedules = {rank: schedule(nodes, rank) for rank in range(len(nodes))}
    assert max(map(len, schedules.values())) <= NODE_ROUNDS + LOCAL_ROUNDS
    assert all(rank in schedules[peer] for rank, peers in schedules.items() for peer in peers)
    reports = {rank: blank(node) for rank, node in enumerate(nodes)}
    for bad in {0, count // 2, count - 1}:
        slow = {rank: {peer: 0.002 if f"n{bad}" in (nodes[rank], nodes[peer]) else 0.001 for peer in schedules[rank]} for rank in reports}
        verdict = judge(Probe(reports, [], 0.01, exchanges=slow), hosts=list(dict.fromkeys(nodes)), world_size=len(nodes))
        assert list(verdict.bad) == [f"n{bad}"]


def test_nodes_of_different_sizes_are_paired_as_far_as_they_go():
    nodes = ["a", "a", "a", "b"]
    found = [schedule(nodes, rank) for rank in range(4)]
    assert found[3] == [0] and found[0][0] == 3 and 3 not in found[1] + found[2]
    assert all(rank in found[peer] for rank in range(4) for peer in found[rank])


def test_who_waits_for_whom():
    """Ranks 2 and 3 wait for each other, 0 for 3: the link between 2 and 3 is dead, 0 is only late."""
    reports = {rank: blank(f"n{rank}") for rank in range(4)}
    verdict = judge(Probe(reports, stuck={0: 3, 2: 3, 3: 2}), hosts=["n0", "n1", "n2", "n3"], world_size=4)
    assert list(verdict.bad) == ["n2", "n3"] and verdict.stuck
    verdict = judge(Probe(reports, stuck={0: None, 2: None}), hosts=["n0", "n1", "n2", "n3"], world_size=4)
    assert verdict.bad == {} and "ranks 0 (n0), 2 (n2) are not through" in verdict.lines[1]


def test_the_others_name_rank_0s_node_when_nobody_collects():
    verdict = first_rank_is_gone(Launch(rank=3, world_size=4, master_addr="n9"), hosts=["n5", "n6"], reason="no answer")
    assert verdict.bad == {"n5": ["no answer"]}
    assert list(first_rank_is_gone(Launch(rank=3, world_size=4, master_addr="n9"), hosts=[], reason="x").bad) == ["n9"]


def test_a_disk_of_this_machine_is_well_and_one_that_is_a_file_is_not(tmp_path):
    assert health.disk_problems(tmp_path / "new") == [] and list((tmp_path / "new").iterdir()) == []
    (tmp_path / "file").touch()
    assert health.disk_problems(tmp_path / "file") == [f"{tmp_path}/file: File exists"]


@pytest.mark.parametrize(
    ("verdict", "code", "said", "named"),
    [
        (Verdict(["fine"]), 0, "", None),
        (Verdict(["x"], bad={"n2": ["slow"], "n1": ["slow"]}), 3, "bad nodes: n1, n2", "n1\nn2\n"),
        (Verdict(["x"], shared=["/runs: 3 MiB free"]), 2, "no node can write the run: /runs: 3 MiB free; make room", None),
        (Verdict(["x"], shared=["/runs: full"], bad={"n1": ["slow"]}), 3, "bad nodes: n1", "n1\n"),
    ],
)
def test_the_exit_code_tells_a_bad_node_from_a_persons_business(tmp_path, monkeypatch, capsys, verdict, code, said, named):
    """slurm/lib/run.sh requeues without the nodes of slurm/bad-node after 3, and never after 2."""
    (tmp_path / "slurm").mkdir()
    monkeypatch.setattr(preflight, "preflight", lambda launch, **options: verdict)
    monkeypatch.setattr("hope_pt.cli.launcher.launch_from_environment", Launch)
    assert cli.main(["launch", "preflight", str(tmp_path)]) == code
    printed = capsys.readouterr()
    assert said in printed.err and verdict.lines[0] in printed.out
    file = tmp_path / "slurm" / "bad-node"
    assert (file.read_text() if file.exists() else None) == named


def test_a_hang_in_the_network_without_a_name_is_a_failed_attempt(tmp_path, monkeypatch, capsys):
    """The process leaves at once: one of its threads may be inside a collective."""
    codes = []
    monkeypatch.setattr(preflight, "preflight", lambda launch, **options: Verdict(["x"], stuck=True))
    monkeypatch.setattr("hope_pt.cli.launcher.launch_from_environment", Launch)
    monkeypatch.setattr("hope_pt.cli.launch.os._exit", codes.append)
    assert cli.main(["launch", "preflight", str(tmp_path)]) == 1
    assert codes == [1] and "did not come through the network's test" in capsys.readouterr().err


PROCESSES = {
    "well": ([0, 0, 0, 0], [], "4 of 4 ranks"),
    "missing": ([3, 0, 0], ["n4"], "node n4 is bad: rank 3 does not reach rank 0 within 5 s"),
    "gone": ([3, 3, 3], ["n1"], "says that rank 0 at"),
    "clock": ([3, 0, 0, 0], ["n2"], "its clock is +60.0 s from the median of 4 nodes"),
    "link": ([3, 0, 0, 0], ["n3"], "exchanges of 16 MiB with other nodes take"),
    "no group": ([1, 0, 0, 0], [], "rank 3 on n4: no interface named ib0\n"),
    "stuck": ([3, 0, 0, 0], ["n2", "n3"], "ranks 1 and 2 (n2, n3) exchange nothing in 8 s"),
}


@pytest.fixture(scope="module")
def processes(tmp_path_factory) -> dict[str, dict]:
    """All cases, each with up to four forked ranks and one fault."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}
    command = [sys.executable, RANKS, tmp_path_factory.mktemp("ranks"), *PROCESSES]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=150)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("case", PROCESSES)
def test_preflight_in_processes(processes, case):
    codes, bad, said = PROCESSES[case]
    found = processes[case]
    # One of those that miss rank 0 is enough to say so.
    assert found["codes"] == codes or (case == "gone" and set(found["codes"]) == {0, 3}), found
    assert found["bad"] == bad, found
    assert said in found["text"], found["text"]
    assert found["seconds"] < 60
