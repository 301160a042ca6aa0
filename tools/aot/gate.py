"""The judgement: which compilations break a limit, and which differ from the committed baseline.

baseline.json, beside the folder of cases: Triton release -> architecture -> case -> figures, one case a line. A difference in either
direction is a finding, so that an improvement is recorded and the next loss of it shows: any other number of matrix instructions or
tensor-memory columns; more than 8 registers (the hardware's unit of allocation) or 1 KiB of shared memory; more than a tenth of the
instructions.
"""

import fcntl
import importlib.util
import json
import os
from pathlib import Path
from types import ModuleType
from typing import Any

from tools.aot.case import KIB, Case
from tools.aot.compile import Figures, as_dict, attempt, one_line

CASES = Path(__file__).parent / "cases"
MAX_TENSOR_MEMORY = 512
TOLERANCE = {"registers": 8, "shared": KIB, "mma": 0, "hmma": 0, "tensor_memory": 0}
INSTRUCTIONS_TOLERANCE = 0.10

Baseline = dict[str, dict[str, dict[str, dict[str, Any]]]]


def collect(folder: Path, only: str) -> tuple[dict[str, Case], list[str]]:
    """Cases of the files in `folder` whose "<file>/<name>" contains `only`, and one line for each file that cannot be read."""
    cases: dict[str, Case] = {}
    broken: list[str] = []
    for path in sorted(folder.glob("*.py")):
        module = path.stem
        # A file that can hold no case asked for may be broken: "a/b" is a case of a file whose name ends in "a".
        if "/" in only and not module.endswith(only.split("/")[0]):
            continue
        try:
            found = _load(path).cases()
        except Exception as error:  # a file that cannot be read hides its kernels from the gate
            broken.append(f"{module}: {one_line(error)}")
            continue
        for case in found:
            name = f"{module}/{case.name}"
            if name in cases:
                broken.append(f"{name}: named twice")
            if only in name:
                cases[name] = case
    return cases, broken


def compile_named(folder: Path, name: str) -> tuple[Figures | None, str]:
    """Figures of the case "<file>/<name>" for this process's architecture, or None and why it does not compile."""
    cases, broken = collect(folder, name)
    # A file that was edited since the names were collected may not be readable any more.
    return attempt(cases[name]) if name in cases else (None, "; ".join(broken) or "no longer a case")


def _load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"aot_cases_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def over_limits(case: Case, found: Figures) -> list[str]:
    """What of a compilation breaks a limit."""
    products = found.mma + (found.hmma if case.hmma_reason else 0)
    counted = "HGMMA, UTCHMMA or HMMA" if case.hmma_reason else "HGMMA or UTCHMMA"
    unexplained = f"; {found.hmma} HMMA and no hmma_reason" if found.hmma and not case.hmma_reason else ""
    checks = {
        f"spills: {found.stack} B of stack, {found.local} local loads and stores": (
            found.stack > case.max_spill or (found.local and not case.max_spill)
        ),
        f"{products} matrix instructions ({counted}), at least {case.min_mma} wanted{unexplained}": (
            products < case.min_mma or bool(unexplained)
        ),
        f"{found.registers} registers, at most {case.max_registers} allowed": found.registers > case.max_registers,
        f"{found.shared} B of shared memory, at most {case.max_shared} allowed": found.shared > case.max_shared,
        f"{found.tensor_memory} tensor-memory columns, at most {MAX_TENSOR_MEMORY} exist": found.tensor_memory > MAX_TENSOR_MEMORY,
        "stores nothing: the compiler gave the kernel up": not found.stores,
    }
    return [line for line, broken in checks.items() if broken]


def changes(found: Figures, stored: dict[str, Any]) -> list[str]:
    """In what a compilation differs from the baseline, beyond the tolerances."""
    now = as_dict(found)
    lines = [f"{name} {stored[name]} -> {now[name]}" for name, slack in TOLERANCE.items() if abs(now[name] - stored[name]) > slack]
    if abs(found.instructions - stored["instructions"]) > INSTRUCTIONS_TOLERANCE * stored["instructions"]:
        lines.append(f"instructions {stored['instructions']} -> {found.instructions}")
    return lines


def read_baseline(folder: Path) -> Baseline:
    """The committed figures of the cases in `folder`."""
    path = folder.parent / "baseline.json"
    return json.loads(path.read_text()) if path.exists() else {}


def update_baseline(folder: Path, family: str, arch: str, found: dict[str, Figures], *, gone: list[str]) -> None:
    """Store `found` for this release and architecture and drop the entries `gone`; all others stay."""
    # Two people who update different cases at once must not lose each other's lines.
    lock = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        baseline = read_baseline(folder)
        entries = baseline.setdefault(family, {}).setdefault(arch, {})
        kept = {name: entry for name, entry in entries.items() if name not in gone}
        baseline[family][arch] = {**kept, **{name: as_dict(entry) for name, entry in found.items()}}
        fresh = folder.parent / "baseline.json.tmp"
        fresh.write_text(_text(baseline))
        os.replace(fresh, folder.parent / "baseline.json")
    finally:
        os.close(lock)


def _text(baseline: Baseline) -> str:
    releases = []
    for family, archs in sorted(baseline.items()):
        parts = []
        for arch, entries in sorted(archs.items()):
            rows = ",\n".join(f"   {json.dumps(name)}: {json.dumps(entry)}" for name, entry in sorted(entries.items()))
            parts.append(f"  {json.dumps(arch)}: {{\n{rows}\n  }}")
        releases.append(f" {json.dumps(family)}: {{\n" + ",\n".join(parts) + "\n }")
    return "{\n" + ",\n".join(releases) + "\n}\n"
