"""Saves on a disk that is full: the last good checkpoint stays, the job says so in a sentence, and with new space the run goes on.

The checkpoints of one run, or its whole directory, lie on a small file system of their own, mounted before the cluster starts, because its
nodes have mounts of their own. Again and again it is filled but for a random part of what a checkpoint needs.
"""

import contextlib
import os
import random
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hope_pt import checkpoint
from tools.slurm_trials.cluster import Run, wait
from tools.slurm_trials.training import SAVE_EVERY, Bench, finish, records, sentence

LAYOUT = "dp2"
NAME = "full"
MIB = 32
_SENTENCE = "No space left on device"


@contextlib.contextmanager
def small_disk(root: Path, *, whole: bool) -> Iterator[None]:
    """The file system, at the checkpoints of the run that `trials` makes, or at all of it."""
    where = root / NAME / "run" / ("" if whole else "checkpoints")
    where.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={MIB}m", "tmpfs", str(where)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(where)], check=True)


def steps_for(count: int) -> int:
    """Steps of a run in which `count` saves can fail."""
    return 2 * SAVE_EVERY * (count + 2)


def trials(bench: Bench, *, count: int, seed: int) -> dict[str, Any]:
    """Fills the disk `count` times in one run; every second attempt saves while it trains."""
    draw, run = random.Random(seed), bench.make(NAME)
    found: list[dict[str, Any]] = []
    violations: list[str] = []
    try:
        for number in range(count):
            found.append(_fill_once(bench, run, draw=draw, asynchronous=number % 2 == 0))
            print(found[-1], flush=True)
            violations += [f"trial {number + 1}: {line}" for line in found[-1]["wrong"]]
        finish(run, bench.submit(run, layout=LAYOUT))
        violations += bench.compare(run, layout=LAYOUT)
    except AssertionError as error:
        violations.append(sentence(error))
        bench.cluster.clear()
    return {"saves": found, "steps": bench.steps, "violations": violations}


def _fill_once(bench: Bench, run: Run, *, draw: random.Random, asynchronous: bool) -> dict[str, Any]:
    """One job, from its start to the end that the full disk brings."""
    folder, said, recorded = run.path / "checkpoints", len(run.log), len(run.actions)
    start = max(_steps(folder), default=0)
    job = bench.submit(run, layout=LAYOUT, overrides=[f"checkpoint.asynchronous={str(asynchronous).lower()}"])
    run.wait_for_step(start + SAVE_EVERY + draw.randrange(SAVE_EVERY), seconds=200)
    wait(lambda: bool(_steps(folder)), seconds=60, what="a checkpoint", shown=lambda: run.log)
    # Checkpoints differ by a few blocks.
    part = draw.uniform(0.0, 0.9)
    need = _bytes(folder / f"step-{max(_steps(folder)):08d}")
    with _filled(folder) as fill:
        wait(lambda: fill(int(part * need)) or job not in run.cluster.queue(), seconds=200, what="the end", shown=lambda: run.log)
        state, log = run.cluster.job(job)["JobState"], run.log[said:]
        left = len(list(folder.glob(".tmp-*")))
        newest = checkpoint.load_newest(folder)
        kept = max(_steps(folder))
    sentences = [line.partition("hope: ")[2].replace(str(run.path), "RUN") for line in log.splitlines() if _SENTENCE in line]
    wrong = []
    if state == "COMPLETED":
        wrong.append("the disk did not stop the run")
    if newest is None or newest.step != kept or kept < start:
        wrong.append(f"the newest checkpoint that loads is {newest}, of {_steps(folder)}")
    if not sentences:
        wrong.append(f"nothing was said of the disk:\n{log}")
    if left > 1:
        wrong.append(f"{left} temporary directories are left")
    last = max(record["step"] for record in records(run))
    seen = {"free_part": round(part, 3), "asynchronous": asynchronous, "kept_step": kept, "last_step": last, "state": state}
    return {**seen, "action": "".join(run.actions[recorded:]), "sentence": sentences[0] if sentences else "", "wrong": wrong}


@contextlib.contextmanager
def _filled(folder: Path) -> Iterator[Any]:
    """A function that takes all but some bytes of the disk of `folder`; given back at the end of the block."""
    file = folder / "filler"
    with file.open("wb") as writer:

        def fill(free: int) -> bool:
            disk = os.statvfs(folder)
            more = disk.f_bavail * disk.f_frsize - free
            if more > 0:
                size = os.fstat(writer.fileno()).st_size
                with contextlib.suppress(OSError):
                    os.posix_fallocate(writer.fileno(), size, more)
            return False

        yield fill
    file.unlink()


def _steps(folder: Path) -> list[int]:
    return sorted(int(path.name[5:]) for path in folder.glob("step-*") if path.name[5:].isdigit())


def _bytes(folder: Path) -> int:
    """On the disk, in whole blocks."""
    return sum(path.stat().st_blocks * 512 for path in folder.iterdir())
