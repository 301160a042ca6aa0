"""Preflight: is every node of a job fit for it? One process for each GPU, under a minute, before the trainer starts.

Each rank looks at its own machine (GPU, memory errors, disk, a matrix product), rank 0 collects (`hope_pt.engine.probe`), compares and
names the nodes that are bad or far slower than the others. slurm/lib/run.sh leaves those out of the job's next start.
"""

import os
import shutil
import statistics
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from hope_pt.engine.launch import Launch
from hope_pt.engine.probe import Probe, probe
from hope_pt.files import replace_text

JOIN_S = 40.0
LEAST_FREE_BYTES = 1 << 30
SLOWER = {"cuda": 1.2, "cpu": 8.0}
"""A rank's matrix product may take this much longer than the median; virtual nodes of one CPU take turns."""
SIZE = {"cuda": 8192, "cpu": 256}
_ECC = ("nvidia-smi", "--query-gpu=index,ecc.errors.uncorrected.volatile.total", "--format=csv,noheader,nounits")


@dataclass(frozen=True)
class Verdict:
    """lines: the report for people. bad: node -> reasons."""

    lines: list[str]
    bad: dict[str, list[str]]


def preflight(launch: Launch, *, directory: Path, environment: Mapping[str, str]) -> Verdict | None:
    """Collective. The verdict on rank 0, None elsewhere."""
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", launch.local_rank % torch.cuda.device_count()) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    report = examine(device, directory=directory, first=launch.local_rank == 0, environment=environment)
    found = probe(launch, report=report, device=device, seconds=JOIN_S)
    hosts = [host for host in environment.get("HOPE_HOSTS", "").split(",") if host]
    return judge(found, hosts=hosts, world_size=launch.world_size, kind=device.type) if found else None


def examine(device: torch.device, *, directory: Path, first: bool, environment: Mapping[str, str]) -> dict:
    """What a rank finds on its own machine: node, problems, seconds of a matrix product. `first`: of its node, which looks at disks too."""
    problems = []
    if first:
        problems += [*_disk(directory), *_memory_errors()]
    given = environment.get("SLURM_GPUS_ON_NODE", "")
    if first and device.type == "cuda" and given.isdigit() and 1 < torch.cuda.device_count() < int(given):
        problems.append(f"torch sees {torch.cuda.device_count()} of the {given} GPUs that the job has here")
    return {"node": environment.get("SLURMD_NODENAME", os.uname().nodename), "problems": problems, "product_s": _product_s(device)}


def judge(found: Probe, *, hosts: list[str], world_size: int, kind: str) -> Verdict:
    """Bad nodes from all reports: missing ranks, problems, matrix products far slower than the median's."""
    bad: dict[str, list[str]] = {}
    per_node = max(world_size // max(len(hosts), 1), 1)
    for rank in found.missing:
        node = hosts[rank // per_node] if hosts else f"of rank {rank}"
        bad.setdefault(node, []).append(f"rank {rank} does not reach rank 0 within {JOIN_S:.0f} s")
    median = statistics.median(report["product_s"] for report in found.reports.values())
    for rank, report in sorted(found.reports.items()):
        reasons = list(report["problems"])
        if report["product_s"] > SLOWER[kind] * median:
            reasons.append(f"rank {rank}: a matrix product takes {report['product_s'] * 1e3:.1f} ms, the median is {median * 1e3:.1f} ms")
        if reasons:
            bad.setdefault(report["node"], []).extend(reasons)
    slowest = max(report["product_s"] for report in found.reports.values())
    reduce = "not run" if found.all_reduce_s is None else f"{found.all_reduce_s * 1e3:.1f} ms for 16 MiB"
    products = f"product {median * 1e3:.1f} ms (slowest {slowest * 1e3:.1f})"
    lines = [f"preflight: {len(found.reports)} of {world_size} ranks, {products}, all-reduce {reduce}"]
    lines += [f"preflight: node {node} is bad: {reason}" for node, reasons in sorted(bad.items()) for reason in reasons]
    return Verdict(lines, bad)


def _disk(directory: Path) -> list[str]:
    """Write, fsync and rename in the run's directory, as checkpoints do, and space for more than metrics."""
    probe_file = directory / f".preflight-{os.uname().nodename}-{os.getpid()}"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        replace_text(probe_file, text="x" * 4096)
        if probe_file.stat().st_size != 4096:
            return [f"{directory}: a file of 4096 bytes reads back as {probe_file.stat().st_size}"]
        free = shutil.disk_usage(directory).free
    except OSError as error:
        return [f"{directory}: {error.strerror or error}"]
    finally:
        probe_file.unlink(missing_ok=True)
    return [f"{directory}: {free >> 20} MiB free"] if free < LEAST_FREE_BYTES else []


def _memory_errors() -> list[str]:
    """Uncorrected memory errors of the node's GPUs, where nvidia-smi tells."""
    try:
        lines = subprocess.run(_ECC, capture_output=True, text=True, timeout=20, check=True).stdout.splitlines()
    except FileNotFoundError:
        return []
    except subprocess.SubprocessError as error:
        return [f"nvidia-smi fails: {error}"]
    counts = [line.split(", ") for line in lines if line.count(", ") == 1]
    return [f"GPU {index} has {count} uncorrected memory errors" for index, count in counts if count.isdigit() and int(count)]


def _product_s(device: torch.device) -> float:
    """Best of five products of two square matrices."""
    size, times = SIZE[device.type], []
    a = torch.ones(size, size, device=device, dtype=torch.bfloat16 if device.type == "cuda" else torch.float32)
    for _ in range(6):
        began = time.perf_counter()
        # Reading an element waits for the device.
        (a @ a)[0, 0].item()
        times.append(time.perf_counter() - began)
    return min(times[1:])
