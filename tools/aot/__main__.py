"""Compile gate of the Triton kernels, without a GPU: `python -m tools.aot [--arch ARCH] [--only SUBSTRING] [--update] [--jobs N]`.

Compiles every case of tools/aot/cases/ for Hopper and Blackwell, prints what each took and exits 1 with one line for each finding: spills,
missing matrix instructions, broken limits, a difference from tools/aot/baseline.json. --update writes the baseline anew; commit it with
the change that moved it. docs/kernels.md explains the findings.
"""

import argparse
import multiprocessing
import os
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

from tools.aot import gate
from tools.aot.compile import ARCHITECTURES, Figures, use, version_family

COLUMNS = ("registers", "stack", "local", "mma", "hmma", "shared", "tensor_memory", "instructions")


def compiled(folder: Path, arch: str, names: list[str], *, jobs: int) -> Iterator[tuple[str, Figures | None, str]]:
    """(case, figures or None, why not) of every case, compiled in processes of this architecture."""
    # Kernels cannot be sent to another process, names can; and a process stays with one architecture.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context, initializer=use, initargs=(arch,)) as pool:
        for name, (found, reason) in zip(names, pool.map(partial(gate.compile_named, folder), names)):
            yield name, found, reason


def judge(folder: Path, arch: str, only: str, *, update: bool, jobs: int) -> list[str]:
    """Compile and compare for one architecture; the findings."""
    cases, broken = gate.collect(folder, only)
    findings = list(broken)
    stored = gate.read_baseline(folder).get(version_family(), {}).get(arch, {})
    if not stored and not update:
        print(f"no baseline of triton {version_family()} for {arch}: limits only")
    width = max(map(len, cases), default=0)
    print(f"{'case':<{width}} {' '.join(f'{column:>13}' for column in COLUMNS)}")
    good: dict[str, Figures] = {}
    for name, found, reason in compiled(folder, arch, list(cases), jobs=jobs):
        if found is None:
            findings.append(f"{name}: does not compile: {reason}")
            continue
        print(f"{name:<{width}} {' '.join(f'{getattr(found, column):>13}' for column in COLUMNS)}", flush=True)
        broken_limits = gate.over_limits(cases[name], found)
        findings += [f"{name}: {line}" for line in broken_limits]
        if not broken_limits:
            good[name] = found
        if stored and not update:
            differs = gate.changes(found, stored[name]) if name in stored else ["not in the baseline"]
            findings += [f"{name}: {line}; run with --update if meant" for line in differs]
    gone = [name for name in stored if only in name and name not in cases and not broken]
    if update:
        gate.update_baseline(folder, version_family(), arch, good, gone=gone)
    else:
        findings += [f"{name}: in the baseline, not a case; run with --update if meant" for name in gone]
    return [f"{arch} {line}" for line in findings]


def main() -> int:
    """Run the gate; 1 with findings, 2 where it cannot run."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--arch", choices=list(ARCHITECTURES), help="one architecture instead of all")
    parser.add_argument("--only", default="", metavar="SUBSTRING", help='only cases whose "<file>/<name>" contains it')
    parser.add_argument("--cases", type=Path, default=gate.CASES, help="folder of files with cases; baseline.json lies beside it")
    parser.add_argument("--update", action="store_true", help="write the baseline of what was compiled")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes that compile")
    arguments = parser.parse_args()
    if "TRITON_INTERPRET" in os.environ:
        parser.error("TRITON_INTERPRET is set: kernels would not be compiled; unset it")
    began = time.monotonic()
    findings: list[str] = []
    for arch in [arguments.arch] if arguments.arch else list(ARCHITECTURES):
        print(f"triton {version_family()}, {arch}")
        findings += judge(arguments.cases, arch, arguments.only, update=arguments.update, jobs=arguments.jobs)
    for line in findings:
        print(f"FAIL {line}", file=sys.stderr)
    print(f"{len(findings)} findings in {time.monotonic() - began:.0f} s")
    return int(bool(findings))


if __name__ == "__main__":
    raise SystemExit(main())
