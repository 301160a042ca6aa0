"""Faults of disks, people and kills against checkpoints of two ranks, and the same faults against plain torch.distributed.checkpoint.

    python -m tools.checkpoint_faults [--trials 200] [--seed 0] [--out FILE]

Each trial begins with valid checkpoints of steps 100 and 200. Most kinds damage a file of step 200, every file in turn, and the right
answer is step 100. The others interrupt the save of step 300: one rank is killed, or its disk refuses, at each call of fsync, rename,
replace, unlink and rmdir; the rest of the job is then killed. The right answer is step 300 if its commit had happened, otherwise step 200,
and after it a save of step 400 must succeed. A trial is violated if the loader

    wrong       hands out values that are not those of the step it names;
    stale       hands out a step although a newer one is valid;
    unloadable  hands out nothing although there is a valid one;
    stuck       gives the right answer, but not step 400 after it.

The plain loader is what its users do: the newest directory that loads without an error. A file of step 200 that was damaged and yet gives
the right values is no violation of either. Exit code 1 if hope_pt's checkpoints have one.
"""

import argparse
import errno
import json
import logging
import os
import random
import shutil
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import checkpoint as dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor import Shard as Placement

import hope_pt.engine.storage  # noqa: F401  the jobs are forks: what is imported here they need not import
from hope_pt import checkpoint
from hope_pt.engine import Launch, sharding
from hope_pt.errors import CheckpointError, ParallelError
from hope_pt.testing import run_distributed
from tools.bench.common import environment

OLD, NEW, NEXT, LATER = 100, 200, 300, 400
RANKS = 2
VIOLATIONS = ("wrong", "stale", "unloadable", "stuck")
POINTS = ("fsync", "rename", "replace", "unlink", "rmdir")
TIMEOUT_S = 60.0


class Store(Protocol):
    """One way to keep checkpoints in a directory."""

    name: str

    def save(self, root: Path, step: int) -> None:
        """Collective."""

    def load(self, root: Path) -> tuple[int, dict[str, Tensor]] | None:
        """Step and whole tensors of the newest checkpoint that loads, in one process."""

    def files(self, root: Path, step: int) -> list[Path]:
        """Everything that belongs to a committed checkpoint."""

    def committed(self, root: Path, step: int) -> bool:
        """Whether the save of `step` has come to the point from which it counts."""


def values_of(step: int) -> dict[str, Tensor]:
    """What a checkpoint of `step` holds: two ranks have half of each tensor's rows."""
    generator = torch.Generator().manual_seed(step)
    names = [f"{root}.{part}" for root in ("model", "optim") for part in "abcd"]
    return {name: torch.randn(64, 64, generator=generator) for name in names}


class HopeStore:
    """hope_pt.checkpoint."""

    name = "hope_pt"

    def save(self, root: Path, step: int) -> None:
        rank = dist.get_rank()
        shards = [
            sharding.Shard(name, sharding.slice_of(value, axis=0, index=rank, count=RANKS), axis=0, index=rank, count=RANKS)
            for name, value in values_of(step).items()
        ]
        checkpoint.save(root, step=step, shards=shards, meta={"step": step}, layout="", keep=2, keep_every=0)

    def load(self, root: Path) -> tuple[int, dict[str, Tensor]] | None:
        try:
            newest = checkpoint.load_newest(root)
        except CheckpointError:
            return None
        return (newest.meta["step"], newest.tensors()) if newest else None

    def files(self, root: Path, step: int) -> list[Path]:
        return sorted((root / f"step-{step:08d}").iterdir())

    def committed(self, root: Path, step: int) -> bool:
        return (root / f"step-{step:08d}").exists()


class PlainStore:
    """torch.distributed.checkpoint with its defaults, one directory a step."""

    name = "torch.distributed.checkpoint"

    def save(self, root: Path, step: int) -> None:
        mesh, rank = init_device_mesh("cpu", (RANKS,)), dist.get_rank()
        state: dict[str, Any] = {
            name: DTensor.from_local(value.chunk(RANKS)[rank].contiguous(), mesh, [Placement(0)]) for name, value in values_of(step).items()
        }
        dcp.save({**state, "step": torch.tensor(step)}, checkpoint_id=root / str(step))

    def load(self, root: Path) -> tuple[int, dict[str, Tensor]] | None:
        for directory in sorted((path for path in root.iterdir() if path.is_dir()), key=lambda path: int(path.name), reverse=True):
            state = {**{name: torch.empty_like(value) for name, value in values_of(0).items()}, "step": torch.tensor(0)}
            try:
                dcp.load(state, checkpoint_id=directory)
            except (Exception, dcp.CheckpointException):
                continue
            return int(state.pop("step")), state
        return None

    def files(self, root: Path, step: int) -> list[Path]:
        return sorted((root / str(step)).iterdir())

    def committed(self, root: Path, step: int) -> bool:
        return (root / str(step) / ".metadata").exists()


def flip(path: Path, *, old: Path, draw: random.Random) -> None:
    """One bit."""
    data = bytearray(path.read_bytes())
    data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    path.write_bytes(data)


def truncate(path: Path, *, old: Path, draw: random.Random) -> None:
    """The end is missing."""
    path.write_bytes(path.read_bytes()[: draw.randrange(path.stat().st_size)])


def append(path: Path, *, old: Path, draw: random.Random) -> None:
    """A few bytes too many."""
    path.write_bytes(path.read_bytes() + draw.randbytes(draw.randrange(1, 9)))


def zero(path: Path, *, old: Path, draw: random.Random) -> None:
    """The right length, and nothing in it: what a crashed host leaves of a file that was not synchronised."""
    path.write_bytes(bytes(path.stat().st_size))


def delete(path: Path, *, old: Path, draw: random.Random) -> None:
    """No file."""
    path.unlink()


def from_old_step(path: Path, *, old: Path, draw: random.Random) -> None:
    """The file of the same name of the older step."""
    shutil.copyfile(old / path.name, path)


def exchange(path: Path, *, old: Path, draw: random.Random) -> None:
    """Two files of the step under each other's names."""
    other = draw.choice(sorted(file for file in path.parent.iterdir() if file != path))
    kept = path.read_bytes()
    shutil.copyfile(other, path)
    other.write_bytes(kept)


def foreign(path: Path, *, old: Path, draw: random.Random) -> None:
    """A file of the older step beside the others, under a name that was free."""
    shutil.copyfile(old / path.name, path.with_name(f"rank-00009{path.suffix}"))


DAMAGE = (flip, truncate, append, zero, delete, from_old_step, exchange, foreign)


@dataclass(frozen=True)
class Interruption:
    """Of the save of NEXT: in `rank`, at the `number`-th of its POINTS. It leaves the file `mark` when it happens."""

    kind: str
    rank: int
    number: int
    mark: Path


def trials(root: Path, *, store: Store, count: int, seed: int) -> dict[str, Counter[str]]:
    """`count` faults, spread over the kinds; for each kind how often which outcome ("right" or a violation) was seen."""
    pristine = root / "pristine"
    for step in (OLD, NEW):
        _job(store, pristine, step)
    interruptions = _interruptions(store, root)
    outcomes: dict[str, Counter[str]] = {}
    # Interruptions cannot be varied further, so at most each of them once; damage can.
    chosen = random.Random(seed).sample(interruptions, k=min(count // 2, len(interruptions)))
    for number in range(count):
        trial = root / "trial"
        shutil.copytree(pristine, trial)
        if number < len(chosen):
            kind, outcome = chosen[number].kind, _interrupt(store, trial, chosen[number])
        else:
            kind, outcome = _damage(store, trial, number=number - len(chosen), draw=random.Random(f"{seed} {number}"))
        outcomes.setdefault(kind, Counter())[outcome] += 1
        shutil.rmtree(trial)
    shutil.rmtree(root)
    return outcomes


def _damage(store: Store, root: Path, *, number: int, draw: random.Random) -> tuple[str, str]:
    """Damages one file of NEW; kinds and files take turns. Kind and outcome."""
    damage = DAMAGE[number % len(DAMAGE)]
    files = store.files(root, NEW)
    damage(files[number // len(DAMAGE) % len(files)], old=store.files(root, OLD)[0].parent, draw=draw)
    return damage.__name__, _outcome(store, root, expected=OLD)


def _interrupt(store: Store, root: Path, interruption: Interruption) -> str:
    """Interrupts the save of NEXT; the outcome, which counts another save too."""
    interruption.mark.unlink(missing_ok=True)
    with suppress(ParallelError):
        _job(store, root, NEXT, interruption)
    if not interruption.mark.exists():
        raise SystemExit(f"{interruption} did not happen")
    outcome = _outcome(store, root, expected=NEXT if store.committed(root, NEXT) else NEW)
    if outcome != "right":
        return outcome
    _job(store, root, LATER)
    return "right" if _outcome(store, root, expected=LATER) == "right" else "stuck"


def _outcome(store: Store, root: Path, *, expected: int) -> str:
    loaded = store.load(root)
    if loaded is None:
        return "unloadable"
    step, tensors = loaded
    values = values_of(step)
    if tensors.keys() != values.keys() or not all(torch.equal(tensors[name], value) for name, value in values.items()):
        return "wrong"
    return "stale" if step < expected else "right"


def _interruptions(store: Store, root: Path) -> list[Interruption]:
    """One for each call of one of the POINTS that each rank makes in a save."""
    shutil.copytree(root / "pristine", root / "counting")
    calls = _job(store, root / "counting", NEXT)
    return [
        Interruption(kind, rank, number, mark=root / "interrupted")
        for kind in ("kill before", "kill after", "disk full")
        for rank, made in enumerate(calls)
        for number in range(1, made + 1)
    ]


def _job(store: Store, root: Path, step: int, interruption: Interruption | None = None) -> list[int]:
    """Saves with RANKS processes; the number of calls of POINTS that each made. ParallelError if it was interrupted."""
    return run_distributed(_save, world_size=RANKS, timeout_s=TIMEOUT_S, args=(store, root, step, interruption))


def _save(launch: Launch, store: Store, root: Path, step: int, interruption: Interruption | None) -> int:
    dist.init_process_group("gloo", init_method=launch.master_addr, rank=launch.rank, world_size=launch.world_size)
    calls = Counter[str]()
    for name in POINTS:
        mine = interruption if interruption and interruption.rank == launch.rank else None
        setattr(os, name, partial(_call, getattr(os, name), calls, mine))
    store.save(root, step)
    return calls.total()


def _call(real: Callable, calls: Counter[str], interruption: Interruption | None, /, *arguments: Any, **options: Any) -> Any:
    calls["all"] += 1
    here = ""
    if interruption and interruption.number == calls["all"]:
        here = interruption.kind
        interruption.mark.touch()
    if here == "disk full":
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    if here == "kill before":
        os._exit(9)
    result = real(*arguments, **options)
    if here == "kill after":
        os._exit(9)
    return result


def run(*, count: int, seed: int, stores: list[Store]) -> dict[str, Any]:
    """The figures of `count` faults against each store."""
    result: dict[str, Any] = {"trials": count, "seed": seed, "ranks": RANKS, "stores": {}}
    for store in stores:
        began = time.monotonic()
        with tempfile.TemporaryDirectory(prefix="hope-faults-") as directory:
            outcomes = trials(Path(directory) / store.name, store=store, count=count, seed=seed)
        kinds = {kind: {"trials": seen.total(), **seen} for kind, seen in outcomes.items()}
        by_name = {name: sum(seen[name] for seen in outcomes.values()) for name in VIOLATIONS}
        violations = {**by_name, "all": sum(by_name.values())}
        result["stores"][store.name] = {"violations": violations, "seconds": round(time.monotonic() - began, 1), "kinds": kinds}
    return result


def _show(result: dict[str, Any]) -> None:
    for name, figures in result["stores"].items():
        print(f"\n{name}: {figures['violations']['all']} violations in {result['trials']} trials ({figures['seconds']} s)")
        columns = ("trials", "right", *VIOLATIONS)
        print(f"  {'fault':14}" + "".join(f"{column:>12}" for column in columns))
        for kind, seen in sorted(figures["kinds"].items()):
            print(f"  {kind:14}" + "".join(f"{seen.get(column, 0):12}" for column in columns))


def main() -> int:
    """Runs the trials and prints a table for each store."""
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--trials", type=int, default=200, help="against each store")
    arguments.add_argument("--seed", type=int, default=0)
    arguments.add_argument("--out", type=Path, help="write the figures here, with hardware, versions and commit")
    options = arguments.parse_args()
    # Both loaders say a lot about files that were damaged on purpose.
    logging.disable(logging.ERROR)
    warnings.simplefilter("ignore")
    result = run(count=options.trials, seed=options.seed, stores=[HopeStore(), PlainStore()])
    _show(result)
    if options.out:
        options.out.write_text(json.dumps({"environment": environment(), **result}, indent=1) + "\n", encoding="utf-8")
    return 1 if result["stores"][HopeStore.name]["violations"]["all"] else 0


if __name__ == "__main__":
    sys.exit(main())
