"""metrics.jsonl, the source of truth of a run: one JSON object a line, written in the order of steps, floats exact.

A training line has step, loss (nats per token) and grad_norm (each null where it was not finite), lr, skipped (the update was dropped:
docs/spikes.md), skips (such steps since the run began), tokens (cumulative), tokens_per_s, data_s (waiting for data), wall_s (cumulative
seconds in steps) and time (Unix seconds). Evaluation and diagnostics lines have step and keys that begin with `eval/` or `memory/`, lines
about updates keys that begin with `optim/`, those about slow ranks `stragglers/`.
Python writes a float as the shortest text that reads back to the same bits, so two runs can be compared for equality.
"""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from hope_pt.errors import HopeError

Value = float | int | str | bool | None


def finite(value: float) -> float | None:
    """The value of a metric line: JSON has neither infinity nor NaN, they are null."""
    return value if math.isfinite(value) else None


class Sink(Protocol):
    """Takes metric lines: the file, a tracker, the screen."""

    def write(self, *, step: int, values: Mapping[str, Value]) -> None:
        """One line, of finite numbers and short texts."""

    def sync(self) -> None:
        """Everything written so far survives a crash of the machine after this returns."""

    def close(self) -> None:
        """No more lines will come."""


class MetricsFile:
    """Appends lines to a metrics.jsonl; each line reaches the operating system at once, so a killed writer loses none."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._file = self.path.open("a", encoding="utf-8")

    def write(self, *, step: int, values: Mapping[str, Value]) -> None:
        """Appends one line; raises HopeError if the disk refuses, ValueError for a number that is not finite."""
        line = json.dumps({"step": step, **values}, allow_nan=False)
        try:
            self._file.write(line + "\n")
            self._file.flush()
        except OSError as error:
            raise HopeError(f"cannot write {self.path}: {error.strerror}; mend the disk and run the same command again") from error

    def sync(self) -> None:
        """Forces the lines to the disk."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


def truncate(path: str | Path, *, step: int) -> None:
    """Cuts `path` before the first line after `step`, and before a line that was torn by a kill; no file is no lines.

    A run that continues from `step` then appends every later step exactly once.
    """
    path = Path(path)
    if not path.exists():
        return
    with path.open("rb+") as file:
        end = 0
        for raw in file:
            if not _belongs(raw, step=step):
                break
            end += len(raw)
        file.truncate(end)
        os.fsync(file.fileno())


def _belongs(raw: bytes, *, step: int) -> bool:
    try:
        return raw.endswith(b"\n") and json.loads(raw)["step"] <= step
    except (ValueError, KeyError, TypeError):
        return False


def read(path: str | Path) -> list[dict]:
    """All lines of a metrics.jsonl in order; a last line that is still being written is left out.

    Raises HopeError for a missing file or a damaged line.
    """
    path = Path(path)
    try:
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    except OSError as error:
        raise HopeError(f"cannot read {path}: {error.strerror}; name a run directory that has one") from error
    records = []
    for number, line in enumerate(lines, start=1):
        if number == len(lines) and not line.endswith("\n"):
            break
        try:
            records.append(json.loads(line))
        except ValueError as error:
            raise HopeError(f"{path}:{number}: not a JSON line ({error})") from error
    return records


def series(records: list[dict], *, key: str) -> tuple[list[int], list[float]]:
    """Steps and values of every record that has a number under `key`."""
    pairs = [(record["step"], record[key]) for record in records if isinstance(record.get(key), int | float)]
    return [step for step, _ in pairs], [value for _, value in pairs]
