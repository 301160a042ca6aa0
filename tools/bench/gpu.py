"""GPU benchmark of the kernels: check, measure, judge, in one command (`python -m tools.bench.gpu`, from the repository's root).

Compiles in parallel, checks every Triton operation on the device against float64 with fresh random inputs, measures the machine's
ceilings, the scans beside attention and (where installed) fla's gated delta rule, Newton-Schulz, head and loss, and pointwise; says which
goal is met; runs compute-sanitizer where it is installed. Writes tools/bench/results/gpu.json. Needs torch, triton, numpy, psutil and
pydantic; neither megatron-core nor an installation of this project: PYTHONPATH=.:kernels is enough. docs/kernels.md has the details.
"""

import argparse
import importlib.util
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tools.bench.common import RESULTS, ROOT, environment, write_results
from tools.bench.workers import Workers, prepare

SECTIONS = ("checks", "scans", "newton_schulz", "head", "pointwise", "profile", "sanitizer")
TUNING = ROOT / "kernels" / "hope_kernels" / "tuning.json"
SANITIZERS = ("memcheck", "racecheck")
SANITIZER_SECONDS = 150


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m tools.bench.gpu", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one width, two lengths, fewer repetitions")
    parser.add_argument("--sections", default=",".join(SECTIONS), help=f"comma-separated, of {', '.join(SECTIONS)}")
    parser.add_argument("--tune", action="store_true", help="also measure tiles and warps and write the best to --tuning")
    parser.add_argument("--tuning", type=Path, default=TUNING, help="where --tune writes")
    parser.add_argument("--small", action="store_true", help="checks at their smallest sizes")
    parser.add_argument(
        "--rehearse", action="store_true", help="everything at tiny sizes on the CPU, in Triton's interpreter; times mean nothing"
    )
    parser.add_argument("--check", action="store_true", help="exit 1 also if a goal is missed")
    parser.add_argument("--seed", type=int, default=secrets.randbelow(2**31), help="of the checks' inputs; random if not given")
    parser.add_argument("--jobs", type=int, default=min(16, os.cpu_count() or 1), help="processes that compile and check; 0: this one")
    parser.add_argument("--out", type=Path, help="folder of gpu.json; tools/bench/results if not given, and no file for a rehearsal")
    found = parser.parse_args(arguments)
    found.sections = found.sections.split(",")
    if unknown := set(found.sections) - set(SECTIONS):
        parser.error(f"--sections: unknown {', '.join(sorted(unknown))}; there are {', '.join(SECTIONS)}")
    missing = [name for name in ("triton", "pydantic") if importlib.util.find_spec(name) is None]
    if missing:
        parser.error(f"{' and '.join(missing)} missing; see requirements/gpu.txt")
    if not found.rehearse and not torch.cuda.is_available():
        parser.error("torch sees no CUDA device; --rehearse runs the program on the CPU")
    if found.rehearse and found.tune and found.tuning == TUNING:
        parser.error("--rehearse --tune times nothing real: name another file with --tuning")
    if found.rehearse:
        os.environ["TRITON_INTERPRET"] = "1"
        found.small, found.jobs = True, min(1, found.jobs)
    return found


def check_section(options: argparse.Namespace, workers: Workers, device: torch.device) -> list[dict[str, Any]]:
    """Every check, with its errors and what is wrong."""
    from tools.bench import gpu_checks

    names = gpu_checks.names(small=options.small)
    arguments = [(name, options.seed, str(device), options.small) for name in names]
    rows = []
    for name, (found, failed) in zip(names, workers.run("tools.bench.gpu_checks:task", arguments)):
        rows.append({"check": name, **(found or {"wrong": failed})})
        if rows[-1]["wrong"]:
            print(f"WRONG {name}: {rows[-1]['wrong']}", flush=True)
    return rows


def precompile(workers: Workers, plan: dict[str, Any], device: torch.device) -> list[str]:
    """Kernels of the scans into Triton's cache, many at once; what failed (it will fail again where it is timed)."""
    from tools.bench.gpu_ops import operations

    names = [name for name in operations(is_gpu=device.type == "cuda") if "chunked" not in name]
    rows, tokens = (2, 1024) if device.type == "cuda" else (1, 32)
    tasks = [(name, (rows, heads, tokens, width), str(device)) for heads, width in plan["heads"] for name in names]
    done = workers.run("tools.bench.gpu_speed:compile_scan", tasks)
    return [f"{name}, {shape}: {failed}" for (name, shape, _), (_, failed) in zip(tasks, done) if failed]


def sanitize(seed: int) -> dict[str, str]:
    """compute-sanitizer over the small checks, by tool: "clean", or the end of what it said."""
    found: dict[str, str] = {}
    for tool in SANITIZERS:
        check = [sys.executable, "-m", "tools.bench.gpu", "--sections", "checks", "--small", "--jobs", "0", "--seed", str(seed)]
        with tempfile.TemporaryDirectory() as folder:
            command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", *check, "--out", folder]
            try:
                done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=SANITIZER_SECONDS)
            except subprocess.TimeoutExpired:
                found[tool] = f"not finished in {SANITIZER_SECONDS} s"
                continue
        text = done.stdout + done.stderr
        if "Device not supported" in text:
            found[tool] = "cannot run on this machine: device not supported"
        else:
            found[tool] = "clean" if done.returncode == 0 else f"exit {done.returncode}: {text[-1500:]}"
    return found


def tune_section(options: argparse.Namespace, workers: Workers, bench: Any, shape: tuple[int, int, int]) -> list[dict[str, Any]]:
    """Measure and write the table of tuning."""
    from tools.bench import gpu_tune

    tasks = [(key, vars(entry), str(bench.device)) for key, entry in gpu_tune.candidates()]
    workers.run("tools.bench.gpu_tune:compile_candidate", tasks)
    table, timings = gpu_tune.tune(bench, shape)
    options.tuning.write_text(gpu_tune.as_text(table))
    print(f"tuning written to {options.tuning}")
    return timings


def main() -> int:
    """Run the sections; 1 if a check or a measurement failed."""
    options = parse()
    prepare(rehearse=options.rehearse)
    from tools.bench import gpu_report, gpu_speed
    from tools.bench.device import Bench, ceilings

    device = torch.device("cpu" if options.rehearse else "cuda")
    repetitions, patience = (1, 0.0) if options.rehearse else (10, 2.0) if options.quick else (30, 6.0)
    bench, workers = Bench(device, repetitions, patience), Workers(options.jobs, rehearse=options.rehearse)
    plan = gpu_speed.REHEARSAL if options.rehearse else gpu_speed.QUICK if options.quick else gpu_speed.FULL
    results: dict[str, Any] = {"environment": environment(), "rehearsal": options.rehearse, "seed": options.seed}
    folder = options.out or (None if options.rehearse else RESULTS)
    small = options.rehearse
    sections: dict[str, Callable[[], Any]] = {
        "checks": lambda: check_section(options, workers, device),
        "ceilings": lambda: ceilings(bench),
        "precompile": lambda: precompile(workers, plan, device),
        "scans": lambda: gpu_report.told(gpu_speed.scan_rows(bench, plan)),
        "newton_schulz": lambda: gpu_report.told(gpu_speed.newton_schulz_rows(bench, small=small)),
        "head": lambda: gpu_report.told(gpu_speed.head_rows(bench, small=small)),
        "pointwise": lambda: gpu_report.told(gpu_speed.pointwise_rows(bench, small=small)),
        "profile": lambda: gpu_report.told(gpu_speed.profile_rows(bench, plan)),
        "tuning": lambda: tune_section(options, workers, bench, (1, 1, 32) if small else (4, 16, 4096)),
        "sanitizer": lambda: sanitize(options.seed),
    }
    wanted = {
        *options.sections,
        *(["ceilings", "precompile"] if "scans" in options.sections else []),
        *(["tuning"] if options.tune else []),
    }
    if options.rehearse or not shutil.which("compute-sanitizer"):
        wanted.discard("sanitizer")
    for name, section in sections.items():
        if name not in wanted:
            continue
        began = time.monotonic()
        results[name] = section()
        results.setdefault("seconds", {})[name] = round(time.monotonic() - began, 1)
        print(f"-- {name}: {results['seconds'][name]} s", flush=True)
        # Written after every section: a machine that is taken away leaves what it has found.
        if folder and folder != Path("/dev/null"):
            write_results("gpu", results | {"goals": gpu_report.goals(results)}, folder=folder)
    results["goals"] = gpu_report.goals(results)
    print(gpu_report.table(results))
    failures = gpu_report.failures(results)
    for line in failures:
        print(f"FAIL {line}", file=sys.stderr)
    missed = [name for name, goal in results["goals"].items() if goal["met"] is False]
    return int(bool(failures) or (options.check and bool(missed)))


if __name__ == "__main__":
    raise SystemExit(main())
