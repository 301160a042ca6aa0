"""What every benchmark records beside its figures: hardware, versions, commit, date; and how peak memory and CPU time are measured."""

import datetime
import json
import os
import platform
import subprocess
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil
import torch

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "tools" / "bench" / "results"
PACKAGES = ("torch", "triton", "megatron-core", "hope-pt", "fla-core")


def environment() -> dict[str, Any]:
    """Where and with what a figure was measured; None for a package that is not installed, and for the commit outside a checkout."""
    # The results of a series before this one change no figure.
    results = (":!docs/results", ":!tools/bench/results")
    changes = _git("status", "--porcelain", "--untracked-files=no", "--", ".", *results)
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": _git("rev-parse", "HEAD"),
        "uncommitted_changes": None if changes is None else bool(changes),
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "load_at_start": os.getloadavg()[0],
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "platform": platform.platform(),
        "versions": {"python": platform.python_version(), "cuda": torch.version.cuda, **{name: _version(name) for name in PACKAGES}},
    }


def cpu_seconds(work: Callable[[], object]) -> float:
    """CPU seconds, over all threads of this process, of one call."""
    start = time.process_time()
    work()
    return time.process_time() - start


def peak_mib(work: Callable[[], object]) -> float:
    """MiB of resident memory that one call adds at its peak. Linux only: the high-water mark is reset before the call."""
    Path("/proc/self/clear_refs").write_text("5")
    before = _status_kib("VmRSS")
    work()
    return (_status_kib("VmHWM") - before) / 1024


def write_results(name: str, results: dict[str, Any], *, folder: Path = RESULTS) -> Path:
    """tools/bench/results/NAME.json, or in another folder."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    path.write_text(json.dumps(results, indent=1) + "\n")
    return path


def _status_kib(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1])
    raise RuntimeError(f"/proc/self/status has no {field}")


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _git(*arguments: str) -> str | None:
    """What git prints, or None where it is missing or this is a copy without its history."""
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
    except FileNotFoundError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None
