"""What a report compares: the metrics of a run directory, or a small stored curve (JSON or CSV) such as those in docs/results.

A stored curve is JSON `{"name", "config", "records"}`, where the records are those of metrics.jsonl, training lines averaged over
blocks of steps and numbers rounded; or a CSV whose header names `step` and any other keys, with empty cells where a line has no value.
"""

import csv
import json
from dataclasses import dataclass
from pathlib import Path

from hope_pt.config import loads
from hope_pt.config.schema import RunConfig
from hope_pt.errors import HopeError
from hope_pt.files import replace_text
from hope_pt.report import metrics

STORED_TRAINING_LINES = 200
AVERAGED = ("loss", "lr", "grad_norm", "tokens_per_s")


@dataclass(frozen=True)
class Curve:
    """Metrics under a name; `config` is the resolved configuration where it is known."""

    name: str
    records: list[dict]
    config: RunConfig | None = None

    def series(self, key: str) -> tuple[list[int], list[float]]:
        """Steps and values of `key`."""
        return metrics.series(self.records, key=key)

    def last(self, key: str) -> float | None:
        """The newest value of `key`, if there is one."""
        values = self.series(key)[1]
        return values[-1] if values else None

    def keys(self, prefix: str) -> list[str]:
        """All keys that begin with `prefix`, in the order of their first appearance."""
        return list(dict.fromkeys(key for record in self.records for key in record if key.startswith(prefix)))


def load_curve(path: str | Path) -> Curve:
    """A run directory, its metrics.jsonl, or a stored .json or .csv; raises HopeError if it is none of them."""
    path = Path(path)
    if path.is_dir() or path.name == "metrics.jsonl":
        directory = path if path.is_dir() else path.parent
        config = directory / "config.toml"
        known = loads(config.read_text(encoding="utf-8"), source=str(config)) if config.exists() else None
        return Curve(name=known.name if known else directory.name, records=metrics.read(directory / "metrics.jsonl"), config=known)
    readers = {".json": _read_json, ".csv": _read_csv, ".jsonl": lambda path: Curve(name=path.stem, records=metrics.read(path))}
    if path.suffix not in readers:
        raise HopeError(f"{path} is not a run directory, .json, .csv or .jsonl; name one of these")
    try:
        return readers[path.suffix](path)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise HopeError(f"{path} cannot be read as a curve: {' '.join(str(error).split())}") from error


def store_curve(curve: Curve, path: str | Path) -> None:
    """Writes a small .json of `curve`: every evaluation, and training lines averaged over equal blocks of steps.

    Raises HopeError if it cannot be written.
    """
    training = [record for record in curve.records if "loss" in record]
    block = max(1, -(-len(training) // STORED_TRAINING_LINES))
    averaged = [_average(training[first : first + block]) for first in range(0, len(training), block)]
    others = [record for record in curve.records if "loss" not in record]
    records = sorted((*averaged, *map(_rounded, others)), key=lambda record: record["step"])
    config = curve.config.model_dump(mode="json") if curve.config else None
    head = json.dumps({"name": curve.name, "averaged_over": block, "config": config})
    lines = ",\n".join(json.dumps(record) for record in records)
    try:
        replace_text(Path(path), text=f'{head[:-1]}, "records": [\n{lines}\n]}}\n')
    except OSError as error:
        raise HopeError(f"cannot write {path}: {error.strerror}; name another file with --store-curve") from error


def _average(block: list[dict]) -> dict:
    last = block[-1]
    means = {}
    for key in AVERAGED:
        values = [record[key] for record in block if record.get(key) is not None]
        if values:
            means[key] = sum(values) / len(values)
    return _rounded({"step": last["step"], "tokens": last.get("tokens", 0), "wall_s": last.get("wall_s", 0.0), **means})


def _rounded(record: dict) -> dict:
    return {key: float(f"{value:.6g}") if isinstance(value, float) else value for key, value in record.items()}


def _read_json(path: Path) -> Curve:
    stored = json.loads(path.read_text(encoding="utf-8"))
    config = RunConfig.model_validate_json(json.dumps(stored["config"])) if stored.get("config") else None
    return Curve(name=stored["name"], records=stored["records"], config=config)


def _read_csv(path: Path) -> Curve:
    with path.open(newline="", encoding="utf-8") as file:
        rows = [{key: float(cell) for key, cell in row.items() if cell} for row in csv.DictReader(file)]
    return Curve(name=path.stem, records=[{**row, "step": int(row["step"])} for row in rows])
