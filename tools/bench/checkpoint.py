"""Seconds to save and load the state of hope_170m (weights and AdamW moments in fp32, 12 bytes a parameter) with two ranks.

Each rank has half of every divided tensor, as under tensor parallelism. "blocked" is how long training stands still: all of a synchronous
save, or of one in the background what happens before the thread starts and, once all threads are done, at the step boundaries. Beside it
plain torch.distributed.checkpoint, which writes the same tensors without hashes, verification or commit. Files stay in the page cache, so
the times of reading are those of hashing and copying; writing includes fsync. Medians of `--rounds` rounds: seconds, and CPU seconds of the
first rank with its threads, which do not depend on what else runs on the machine.

    python -m tools.bench.checkpoint [--rounds 3] [--out FILE]
"""

import argparse
import json
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import checkpoint as dcp

import hope_pt.engine.storage  # noqa: F401  the job is a fork: what is imported here it need not import
from hope_pt import checkpoint, config
from hope_pt.engine import Launch
from hope_pt.engine.sharding import Shard, shard_axis
from hope_pt.nn import HopeLM
from hope_pt.testing import run_distributed
from tools.bench.common import ROOT, environment

RANKS = 2
MODEL = "hope_170m"


def shards_of(shapes: dict[str, list[int]], *, rank: int) -> list[Shard]:
    """This rank's parts: divided tensors by halves, whole ones from the first rank."""
    shards = []
    for name, full in shapes.items():
        axis, shape = shard_axis(name), list(full)
        if axis is not None:
            shape[axis] //= RANKS
        elif rank:
            continue
        for stored in (f"model.{name}", f"optim.{name}.exp_avg", f"optim.{name}.exp_avg_sq"):
            shards.append(Shard(stored, torch.rand(shape), axis, rank if axis is not None else 0, RANKS if axis is not None else 1))
    return shards


class Stopwatch:
    """Seconds on the slowest rank and CPU seconds of this one, by name; one entry a call."""

    def __init__(self):
        self.seconds: dict[str, list[tuple[float, float]]] = {}

    def __call__(self, name: str, work: Callable, *arguments: Any, **options: Any) -> Any:
        dist.barrier()
        began, cpu = time.perf_counter(), time.process_time()
        result = work(*arguments, **options)
        dist.barrier()
        self.seconds.setdefault(name, []).append((time.perf_counter() - began, time.process_time() - cpu))
        return result


def measure(launch: Launch, root: Path, shapes: dict[str, list[int]], rounds: int) -> dict[str, Any]:
    """One rank of the job."""
    dist.init_process_group("gloo", init_method=launch.master_addr, rank=launch.rank, world_size=launch.world_size)
    shards = shards_of(shapes, rank=launch.rank)
    arguments: dict[str, Any] = {"shards": shards, "meta": {}, "layout": "two halves", "keep": 1, "keep_every": 0}
    watch = Stopwatch()
    for number in range(rounds):
        watch("save", checkpoint.save, root / "ours", step=2 * number, **arguments)
        watch("save in the background, until committed and verified", in_background, root / "ours", 2 * number + 1, arguments, watch)
        newest = watch("verify", checkpoint.load_newest, root / "ours")
        watch("read, same parts", newest.read, shards)
        # Names that differ by rank: tensors of their own, with nothing to resolve.
        state = {f"{launch.rank}.{shard.name}": shard.data for shard in shards}
        watch("plain save", dcp.save, dict(state), checkpoint_id=root / "plain")
        watch("plain load", dcp.load, dict(state), checkpoint_id=root / "plain")
        if launch.rank == 0:
            shutil.rmtree(root / "plain")
    watch("weights whole, in the first rank", newest.tensors if launch.rank == 0 else lambda prefix: None, prefix="model.")
    stored = sum(path.stat().st_size for path in newest.path.iterdir())
    medians = {name: [round(statistics.median(column), 2) for column in zip(*times)] for name, times in watch.seconds.items()}
    return {"bytes": stored, "seconds, cpu seconds": medians}


def in_background(root: Path, step: int, arguments: dict[str, Any], watch: Stopwatch) -> None:
    """A save in the background, asked for at step boundaries 50 ms apart; what blocks is the first entry and the sum of the second."""
    saving = watch("save in the background, blocked at its start", checkpoint.Saving, root, step=step, **arguments)
    boundaries = Stopwatch()
    while not boundaries("blocked", saving.advance, wait=False):
        time.sleep(0.05)
    blocked = tuple(map(sum, zip(*boundaries.seconds["blocked"])))
    watch.seconds.setdefault("save in the background, blocked at step boundaries", []).append((blocked[0], blocked[1]))


def main() -> None:
    """Prints the table."""
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--rounds", type=int, default=3)
    arguments.add_argument("--out", type=Path, help="write the figures here, with hardware, versions and commit")
    options = arguments.parse_args()
    model = HopeLM(config.load(ROOT / "configs" / f"{MODEL}.toml", []).model)
    shapes = {name: list(parameter.shape) for name, parameter in model.named_parameters()}
    del model
    with tempfile.TemporaryDirectory(prefix="hope-bench-") as directory:
        figures = run_distributed(measure, world_size=RANKS, timeout_s=1200, args=(Path(directory), shapes, options.rounds))[0]
    print(f"{MODEL}, {RANKS} ranks, {figures['bytes'] / 2**20:.0f} MiB")
    for name, (seconds, cpu) in figures["seconds, cpu seconds"].items():
        print(f"  {name:54}{seconds:8.2f} s{cpu:8.2f} CPU s")
    if options.out:
        options.out.write_text(json.dumps({"environment": environment(), "model": MODEL, "ranks": RANKS, **figures}, indent=1) + "\n")


if __name__ == "__main__":
    main()
