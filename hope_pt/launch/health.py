"""What one rank can say of its own machine: GPUs, their memory errors, the kernel's log, the run's disk, a matrix product.

The result of `examine` is JSON: node, kind (device type of torch), gpus and expected_gpus, problems of this node, disk (problems of the
run's directory, which the nodes usually share), kernel_log (whether it could be read), product_s.
"""

import contextlib
import os
import re
import shutil
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path

import torch

from hope_pt.files import replace_text

LEAST_FREE_BYTES = 1 << 30
LEAST_FREE_FILES = 10_000
SIZE = {"cuda": 8192, "cpu": 256}
TOOL_S = 10.0
"""Seconds that nvidia-smi or dmesg may take."""
XID_HOURS = 24.0
HARDWARE_XIDS = {
    48: "a memory error that cannot be corrected",
    64: "a row of memory that cannot be remapped",
    74: "NVLink",
    79: "the GPU has fallen off the bus",
    92: "many corrected memory errors",
    94: "a contained memory error",
    95: "an uncontained memory error",
    119: "the GPU's system processor does not answer",
    120: "the GPU's system processor",
    140: "a memory error that was not recovered",
}
"""Xid numbers that NVIDIA's catalogue lays to the hardware; 13, 31, 43 and others come from programs and say nothing of a node."""
KERNEL_LOGS = (Path("/var/log/kern.log"),)
_ECC = ("nvidia-smi", "--query-gpu=index,ecc.errors.uncorrected.volatile.total", "--format=csv,noheader,nounits")
_XID = re.compile(r"NVRM: Xid \((?:PCI:)?([^)]*)\): (\d+)")
_SINCE_BOOT = re.compile(r"\[ *(\d+\.\d+)\]")


def examine(device: torch.device, *, directory: Path, first: bool, environment: Mapping[str, str]) -> dict:
    """The report of a rank. `first`: of its node, which looks at what ranks of a node share."""
    expected = len([one for one in environment.get("CUDA_VISIBLE_DEVICES", "").split(",") if one])
    report = {
        "node": environment.get("SLURMD_NODENAME", os.uname().nodename),
        "kind": device.type,
        "gpus": torch.cuda.device_count(),
        "expected_gpus": expected,
        "problems": [],
        "disk": [],
        "kernel_log": None,
        "product_s": product_s(device),
    }
    if first:
        log = kernel_log()
        report["disk"] = disk_problems(directory)
        report["problems"] = [*nvidia_problems(expected), *xid_problems(log or "", uptime_s=time.clock_gettime(time.CLOCK_BOOTTIME))]
        report["kernel_log"] = log is not None
    return report


def disk_problems(directory: Path) -> list[str]:
    """Write, fsync and rename in the run's directory, as checkpoints do, and space and names for more than metrics."""
    probe_file = directory / f".preflight-{os.uname().nodename}-{os.getpid()}"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        replace_text(probe_file, text="x" * 4096)
        if probe_file.stat().st_size != 4096:
            return [f"{directory}: a file of 4096 bytes reads back as {probe_file.stat().st_size}"]
        free, counts = shutil.disk_usage(directory).free, os.statvfs(directory)
    except OSError as error:
        return [f"{directory}: {error.strerror or error}"]
    finally:
        with contextlib.suppress(OSError):
            probe_file.unlink()
    problems = [f"{directory}: {free >> 20} MiB free"] if free < LEAST_FREE_BYTES else []
    # File systems without a fixed number of inodes say 0 of 0.
    if counts.f_files and counts.f_favail < LEAST_FREE_FILES:
        problems.append(f"{directory}: {counts.f_favail} inodes free")
    return problems


def nvidia_problems(expected: int) -> list[str]:
    """GPUs that the driver does not list, and uncorrected memory errors since it was loaded; nothing where there is no nvidia-smi."""
    try:
        done = subprocess.run(_ECC, capture_output=True, text=True, timeout=TOOL_S, check=True)
    except FileNotFoundError:
        return []
    except subprocess.SubprocessError as error:
        return [f"nvidia-smi fails: {error}"]
    rows = [line.split(", ") for line in done.stdout.splitlines() if line.count(", ") == 1]
    problems = [f"nvidia-smi lists {len(rows)} of the {expected} GPUs that the job has here"] if len(rows) < expected else []
    return problems + [f"GPU {index} has {count} uncorrected memory errors" for index, count in rows if count.isdigit() and int(count)]


def kernel_log() -> str | None:
    """The kernel's messages, None where this user may not read them."""
    try:
        done = subprocess.run(["dmesg"], capture_output=True, text=True, errors="replace", timeout=TOOL_S)
        if done.returncode == 0:
            return done.stdout
    except (OSError, subprocess.TimeoutExpired):
        pass
    for path in KERNEL_LOGS:
        try:
            return path.read_text(errors="replace")
        except OSError:
            continue
    return None


def xid_problems(log: str, *, uptime_s: float) -> list[str]:
    """Hardware errors of GPUs in the last day, one for each GPU and number; a line without seconds since boot counts whatever its age."""
    found: dict[tuple[str, int], int] = {}
    for line in log.splitlines():
        match, since_boot = _XID.search(line), _SINCE_BOOT.search(line)
        if match is None or int(match[2]) not in HARDWARE_XIDS:
            continue
        # A line of an earlier boot has more seconds than this one.
        if since_boot is None or 0 <= uptime_s - float(since_boot[1]) < XID_HOURS * 3600:
            key = (match[1], int(match[2]))
            found[key] = found.get(key, 0) + 1
    return [f"GPU {gpu}: Xid {number} ({HARDWARE_XIDS[number]}), {count} times" for (gpu, number), count in found.items()]


def product_s(device: torch.device) -> float:
    """Seconds of a product of two square matrices, the best of five."""
    size, times = SIZE[device.type], []
    a = torch.ones(size, size, device=device, dtype=torch.bfloat16 if device.type == "cuda" else torch.float32)
    for _ in range(6):
        began = time.perf_counter()
        # Reading an element waits for the device.
        (a @ a)[0, 0].item()
        times.append(time.perf_counter() - began)
    return min(times[1:])
