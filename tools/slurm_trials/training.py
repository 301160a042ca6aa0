"""The tiny training run of the trials: its settings and layouts, the run without interruption, and what no interruption may change.

Compared exactly: the lines of metrics.jsonl but for clocks, the bytes of the last checkpoint's tensors, and the ledger, which has for every
position of the sample order the digests of what any rank was given there (`tools.slurm_trials.trainer` writes it).
"""

import hashlib
import json
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hope_pt import checkpoint
from tools.kill_trials import CLOCKS
from tools.slurm_trials.cluster import ROOT, Cluster, Run, wait

TINY = (
    *("model.vocab_size=64", "model.num_layers=2", "model.width=16", "model.num_heads=2", "model.titans.chunk_mem=4"),
    *("model.titans.chunk_proj=8", "model.cms.hidden=24", "model.cms.periods=[1, 3, 5]"),
    *("data.source=mqar", "data.seq_len=32", "data.num_workers=0", "optim.warmup_steps=2", "optim.schedule=wsd"),
    *("engine.precision=fp32", "engine.device=cpu", "engine.threads=1", "engine.micro_batch_size=1"),
    *("train.global_batch_size=4", "checkpoint.asynchronous=false", "checkpoint.keep_every=0", "eval.every=0", "eval.at_start=false"),
    *("eval.sequences=4", "eval.diagnostics_every=0"),
)
SAVE_EVERY = 7
"""Has no multiple in common with the periods of the CMS levels within a run."""
MEASURES = ("eval.every=9", "eval.diagnostics_every=11")
SECONDS = 400.0
"""Most that a run without interruption, or the rest of one, may take."""


@dataclass(frozen=True)
class Layout:
    """Virtual nodes, tasks on each, and the settings that go with them."""

    nodes: int
    tasks: int
    overrides: tuple[str, ...]


LAYOUTS = {
    "dp2": Layout(2, 1, ("engine.tensor_parallel=1", "checkpoint.asynchronous=true")),
    "tp2": Layout(2, 1, ("engine.tensor_parallel=2",)),
    "tp1": Layout(1, 2, ("engine.tensor_parallel=1",)),
    "tp2dp2": Layout(2, 2, ("engine.tensor_parallel=2", "checkpoint.asynchronous=true")),
    "tp2dp4": Layout(2, 4, ("engine.tensor_parallel=2",)),
}


def settings(steps: int, *, every: int) -> list[str]:
    """Overrides of the 1.3B configuration: `steps` steps, a checkpoint after each `every` of them (0: the last only)."""
    return [*TINY, f"train.steps={steps}", f"checkpoint.every={every}"]


def status(run: Run) -> dict[str, Any]:
    """What status.json says, {} before it does."""
    file = run.path / "status.json"
    return json.loads(file.read_text()) if file.exists() else {}


def finish(run: Run, job: str, *, seconds: float = SECONDS) -> None:
    """Waits for the end of a job that ends with all its steps; AssertionError with the log if it ends otherwise."""
    state = run.wait(job, seconds=seconds)
    assert state == "COMPLETED" and status(run).get("state") == "done", f"job {job} is {state}: {status(run)}\n{run.log}"


def records(run: Run) -> list[dict[str, Any]]:
    """Whole lines of metrics.jsonl; one may be torn while it is written."""
    file = run.path / "metrics.jsonl"
    lines = file.read_text().split("\n")[:-1] if file.exists() else []
    return [json.loads(line) for line in lines]


def curve(run: Run) -> list[dict[str, Any]]:
    """Lines of metrics.jsonl without clocks."""
    return [{key: value for key, value in record.items() if key not in CLOCKS and "stragglers/" not in key} for record in records(run)]


def weights(run: Run, step: int) -> dict[str, str]:
    """Hashes of the tensor files of a checkpoint."""
    files = (run.path / "checkpoints" / f"step-{step:08d}").glob("*.safetensors")
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def ledger(run: Run) -> dict[int, set[str]]:
    """Position in the sample order -> digests of the samples that were handed out there, by all ranks and sessions."""
    found: dict[int, set[str]] = {}
    for file in run.path.parent.glob("ledger-*"):
        for line in file.read_text().split("\n")[:-1]:
            position, digest = line.split()
            found.setdefault(int(position), set()).add(digest)
    return found


@dataclass(frozen=True)
class Outcome:
    """What must not depend on interruptions."""

    metrics: list[dict[str, Any]]
    weights: dict[str, str]
    consumed: int
    ledger: dict[int, set[str]]


def outcome(run: Run, *, step: int) -> Outcome:
    """Of a finished run of `step` steps."""
    newest = checkpoint.load_newest(run.path / "checkpoints")
    assert newest is not None and newest.step == step, f"{run.path} has {newest} in place of step {step}"
    return Outcome(curve(run), weights(run, step), newest.meta["consumed_samples"], ledger(run))


def differences(reference: Outcome, seen: Outcome) -> list[str]:
    """One sentence for each thing that is not the reference's, or not as it must be."""
    lines = []
    if not seen.weights or seen.weights != reference.weights:
        lines.append(f"weights of the last checkpoint differ: {seen.weights} and {reference.weights}")
    if seen.consumed != reference.consumed:
        lines.append(f"{seen.consumed} samples read, the reference {reference.consumed}")
    return lines + sample_differences(reference.ledger, seen.ledger, count=reference.consumed) + _curves(reference.metrics, seen.metrics)


def sample_differences(reference: dict[int, set[str]], seen: dict[int, set[str]], *, count: int) -> list[str]:
    """Samples that are missing, read twice as different ones, at another place than the reference has them, or twice in the reference."""
    lines = []
    missing = [position for position in range(count) if position not in seen]
    if missing:
        lines.append(f"samples lost at positions {missing[:5]} ({len(missing)})")
    wrong = [position for position in sorted(seen.keys() & reference.keys()) if seen[position] != reference[position]]
    if wrong:
        lines.append(f"other samples at positions {wrong[:5]} ({len(wrong)})")
    distinct = set().union(*(reference[position] for position in range(count) if position in reference))
    if len(distinct) != count:
        lines.append(f"the reference read {len(distinct)} different samples at {count} positions")
    return lines


def _curves(reference: Sequence[dict[str, Any]], seen: Sequence[dict[str, Any]]) -> list[str]:
    lines = []
    for number, (theirs, ours) in enumerate(zip(reference, seen), start=1):
        if theirs != ours:
            lines.append(f"metrics line {number} differs: {ours} and in the reference {theirs}")
            break
    if len(reference) != len(seen):
        lines.append(f"metrics has {len(seen)} lines, the reference {len(reference)}")
    return lines


@dataclass(frozen=True)
class Reference:
    """A run without interruption; seconds from its first process to its first step, and from there to its end."""

    outcome: Outcome
    startup: float
    training: float


class Bench:
    """Where trials run: a cluster, a folder, a length for all runs. Every run has the trials' wrapper around `hope`."""

    def __init__(self, cluster: Cluster, root: Path, *, steps: int):
        self.cluster, self.root, self.steps = cluster, root, steps
        self._references: dict[str, Reference] = {}
        self._program = root / "hope"
        text = f'#!/bin/sh\ncd "{ROOT}" && exec "{sys.executable}" -m tools.slurm_trials.trainer "$@"\n'
        self._program.write_text(text, encoding="utf-8")
        self._program.chmod(0o755)

    def make(self, name: str) -> Run:
        """A run; its log, ledger and run directory are in a folder of its own."""
        (self.root / name).mkdir(exist_ok=True)
        return Run(self.cluster, self.root / name / "run", str(self._program))

    def submit(self, run: Run, *, layout: str, overrides: Sequence[str] = (), **environment: str) -> str:
        """A job of this run; returns its number."""
        words = [*settings(self.steps, every=SAVE_EVERY), *MEASURES, *LAYOUTS[layout].overrides, *overrides]
        shape = {"nodes": LAYOUTS[layout].nodes, "tasks": LAYOUTS[layout].tasks}
        place: dict[str, Any] = {"shape": shape, **environment}
        return run.submit(*words, **place)

    def reference(self, layout: str) -> Reference:
        """The uninterrupted run of a layout, made at its first use."""
        if layout not in self._references:
            run = self.make(f"{layout}-reference")
            job = self.submit(run, layout=layout)
            wait(lambda: bool(run.processes()), seconds=120, what="the reference to start", shown=lambda: run.log)
            began = time.time()
            finish(run, job)
            first, ended = next(record["time"] for record in records(run) if "time" in record), time.time()
            self._references[layout] = Reference(outcome(run, step=self.steps), first - began, ended - first)
        return self._references[layout]

    def compare(self, run: Run, *, layout: str) -> list[str]:
        """What a finished run has that the reference has not."""
        return differences(self.reference(layout).outcome, outcome(run, step=self.steps))


def sentence(error: AssertionError) -> str:
    """The first line of it and the end of the log that follows."""
    first, _, log = str(error).partition("\n")
    return f"{first}\n{log[-1500:]}"


def spread(values: Sequence[float]) -> dict[str, float]:
    """Count, median and largest."""
    if not values:
        return {"count": 0}
    return {"count": len(values), "median": round(statistics.median(values), 1), "longest": round(max(values), 1)}
