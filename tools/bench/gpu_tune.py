"""Measure tile lengths and warps of the scans' kernels and give a new table of tuning (`python -m tools.bench.gpu --tune`).

For every width and tile, each kernel's warps are chosen in turn with the others as they are: the kernels of a step run one after the
other, so their best choices do not depend on each other. What is timed is the core of a mixer, forward and backward, and once more with
the linear memory, whose kernels share the entry.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from hope_kernels import tuning
from hope_kernels.tuning import Tuning
from tools.bench.device import Bench
from tools.bench.gpu_ops import Shape, operations
from tools.bench.gpu_speed import compile_scan

OPS = ("self-modifying", "self-modifying linear")
TILES, WARPS = (16, 32, 64), (2, 4, 8)
Table = dict[tuple[int, int], Tuning]


@contextmanager
def using(entry: Tuning, key: tuple[int, int]) -> Iterator[None]:
    """The stored table with one entry replaced."""
    stored, read = tuning.table(), tuning.table
    tuning.table = lambda: {**stored, key: entry}  # type: ignore[assignment]
    try:
        yield
    finally:
        tuning.table = read


def candidates() -> list[tuple[tuple[int, int], Tuning]]:
    """Every entry with every tile, and all its kernels at the same warps: whose compilations cover what `tune` will ask for."""
    return [
        (key, replace(entry, tile=tile, warps=dict.fromkeys(entry.warps, warps)))
        for key, entry in tuning.table().items()
        for tile in TILES
        for warps in WARPS
        if entry.warps
    ]


def compile_candidate(key: tuple[int, int], entry: dict[str, Any], device: str) -> None:
    """Its kernels into Triton's cache on disk. entry: the fields of a `Tuning`."""
    with using(Tuning(**entry), key):
        for name in OPS:
            compile_scan(name, (1, 16, 512, key[0]), device)


def tune(bench: Bench, shape: tuple[int, int, int]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """(the new table as tuning.json stores it, every timing). shape: rows, heads, tokens."""
    timings: list[dict[str, Any]] = []
    best: dict[str, Any] = {}
    for key, entry in tuning.table().items():
        name = f"{key[0]}x{key[1]}"
        best[name] = as_stored(entry)
        if not entry.warps:
            continue
        batch, heads, tokens = shape
        found = [
            _best_warps(bench, key, replace(entry, tile=tile, warps=dict(entry.warps)), Shape(batch, heads, tokens, key[0]), timings)
            for tile in TILES
        ]
        least, winner = min(found, key=lambda each: each[0])
        if least == float("inf"):
            raise RuntimeError(f"no tile and warps of {name} could be timed: {timings[-1]['failed']}; the table stays as it was")
        best[name] = as_stored(winner)
    return best, timings


def _best_warps(bench: Bench, key: tuple[int, int], entry: Tuning, shape: Shape, timings: list[dict[str, Any]]) -> tuple[float, Tuning]:
    """(milliseconds, the entry with the best warps) of one tile length."""
    least = _time(bench, key, entry, shape, timings)
    for kernel in entry.warps:
        for warps in WARPS:
            tried = replace(entry, warps={**entry.warps, kernel: warps})
            if warps == entry.warps[kernel]:
                continue
            spent = _time(bench, key, tried, shape, timings)
            if spent < least:
                least, entry = spent, tried
    return least, entry


def _time(bench: Bench, key: tuple[int, int], entry: Tuning, shape: Shape, timings: list[dict[str, Any]]) -> float:
    """Milliseconds of both operations, infinite where one cannot run."""
    total = 0.0
    try:
        with using(entry, key):
            for name in OPS:
                op = operations(is_gpu=bench.is_gpu)[name]
                sets = [op.inputs(shape, bench.device, seed) for seed in range(2)]
                total += bench.median(lambda leaves, upstream, op=op: op.both(leaves, upstream, shape), sets)["ms"]
    except Exception as error:  # too much shared memory for this tile: not a candidate
        timings.append({"key": f"{key[0]}x{key[1]}", **vars(entry), "failed": str(error).strip().splitlines()[0][:200]})
        return float("inf")
    timings.append({"key": f"{key[0]}x{key[1]}", **vars(entry), "ms": round(total, 4)})
    return total


def as_stored(entry: Tuning) -> dict[str, Any]:
    """An entry as tuning.json holds it."""
    return {name: value for name, value in vars(entry).items() if value or name == "warps"}


def as_text(table: dict[str, Any]) -> str:
    """The table as tuning.json is written: one width a line."""
    return "{\n" + ",\n".join(f" {json.dumps(key)}: {json.dumps(entry)}" for key, entry in table.items()) + "\n}\n"
