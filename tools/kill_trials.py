"""`kill -9` of a real trainer at random moments, saves included: what it computes in the end must not show it.

    python tools/kill_trials.py [--kills 10] [--steps 60] [--seed 0] [--workers 0] [--out FILE]

A reference run trains without interruption. Then the same run is killed again and again, and started again with the same command, until
it has taken its steps; when it is done and kills are left, another begins. Half of the kills come at a random time after the start,
half a random moment after a save has begun to write. Compared with the reference, exactly: the lines of metrics.jsonl but for its
clocks, the bytes of every tensor of the last checkpoint, and the digest of every batch that was read at each step, by any session (no
sample lost or repeated). Each trainer is a fork of this process, which has imported everything but started nothing: a start takes
a fraction of a second instead of seconds. Exit code 0 without, 1 with violations; the figures are printed as JSON.
"""

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path

import hope_pt.engine.step  # noqa: F401  the trainers are forks: what is imported here they need not import
from hope_pt import checkpoint, cli, data
from hope_pt.report import metrics

CONFIG = """
name = "run"
[model]
vocab_size = 32
num_layers = 2
width = 16
num_heads = 2
[model.titans]
chunk_mem = 4
chunk_proj = 8
save_every = 8
[model.cms]
hidden = 24
periods = [1, 2, 3]
[data]
source = "mqar"
seq_len = 32
[optim]
lr = 1e-2
warmup_steps = 5
[engine]
micro_batch_size = 4
device = "cpu"
threads = 1
[checkpoint]
every = 4
keep = 2
[eval]
every = 10
sequences = 8
diagnostics_every = 7
[train]
global_batch_size = 8
steps = 60
"""
DONE = "done"
CLOCKS = ("tokens_per_s", "data_s", "wall_s", "time")


def main() -> int:
    """Runs the trials and prints the result."""
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--kills", type=int, default=10)
    arguments.add_argument("--steps", type=int, default=60)
    arguments.add_argument("--seed", type=int, default=0)
    arguments.add_argument("--workers", type=int, default=0, help="reader processes of each trainer")
    arguments.add_argument("--out", type=Path, help="write the result here too")
    options = arguments.parse_args()
    with tempfile.TemporaryDirectory(prefix="hope-kill-") as directory:
        result = trials(Path(directory), kills=options.kills, steps=options.steps, seed=options.seed, workers=options.workers)
    text = json.dumps(result, indent=1)
    print(text)
    if options.out:
        options.out.write_text(text + "\n", encoding="utf-8")
    return 1 if result["violations"] else 0


def trials(root: Path, *, kills: int, steps: int, seed: int, workers: int) -> dict:
    """The figures of `kills` kills, over as many runs as they need."""
    (root / "run.toml").write_text(CONFIG, encoding="utf-8")
    overrides = [f"train.steps={steps}", f"data.num_workers={workers}"]
    began = time.monotonic()
    _wait(_start(root, out="reference", overrides=overrides))
    duration = time.monotonic() - began
    reference = _outcome(root, out="reference")
    draw = random.Random(seed)
    moments: Counter[str] = Counter()
    violations: list[str] = []
    runs = 0
    while sum(moments.values()) < kills:
        runs += 1
        out = f"trial-{runs}"
        moment = ""
        while moment != DONE:
            child = _start(root, out=out, overrides=overrides)
            if sum(moments.values()) < kills:
                moment = _kill(child, run=root / out / "run", draw=draw, duration=duration)
                moments[moment] += moment != DONE
            else:
                _wait(child)
                moment = DONE
        violations += [f"{out}: {line}" for line in _differences(reference, _outcome(root, out=out))]
        shutil.rmtree(root / out)
    return {
        "kills": sum(moments.values()),
        "moments": {moment: count for moment, count in moments.items() if moment != DONE},
        "runs": runs,
        "steps": steps,
        "workers": workers,
        "seed": seed,
        "seconds": round(time.monotonic() - began, 1),
        "violations": violations,
    }


def _start(root: Path, *, out: str, overrides: list[str]) -> int:
    """Forks a trainer; returns its process id."""
    child = os.fork()
    if child:
        return child
    log = os.open(root / f"{out}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    _record_batches(root / f"{out}.ledger")
    code = 70
    try:
        code = cli.main(["train", str(root / "run.toml"), f"out={root / out}", *overrides])
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def _record_batches(path: Path) -> None:
    """Makes the loader write step and digest of every batch that it hands out, at once."""
    original = data.Loader.__next__
    ledger = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def recorded(self: data.Loader) -> data.Batch:
        batch = original(self)
        digest = hashlib.sha256(batch.tokens_BT.numpy().tobytes() + batch.targets_BT.numpy().tobytes()).hexdigest()
        os.write(ledger, f"{self.consumed} {digest}\n".encode())
        return batch

    data.Loader.__next__ = recorded  # type: ignore[method-assign]


def _kill(child: int, *, run: Path, draw: random.Random, duration: float) -> str:
    """Kills `child` at a random moment of a run of `duration` seconds and says at which, or DONE if it had finished before."""
    in_save = draw.random() < 0.5
    earliest = time.monotonic() + draw.uniform(0.0, duration)
    delay = draw.uniform(0.0, 0.01)
    while time.monotonic() < earliest or (in_save and not _is_saving(run)):
        if os.waitpid(child, os.WNOHANG)[0]:
            return DONE
        time.sleep(0.0002)
    if in_save:
        time.sleep(delay)
    os.kill(child, signal.SIGKILL)
    if _wait(child) != -signal.SIGKILL:
        return DONE
    if _is_saving(run):
        return "in a save"
    return "between saves" if (run / "metrics.jsonl").exists() else "before the first step"


def _is_saving(run: Path) -> bool:
    return any((run / "checkpoints").glob(".tmp-*"))


def _wait(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _outcome(root: Path, *, out: str) -> dict:
    """Everything that must not depend on kills."""
    run = root / out / "run"
    newest = checkpoint.load_newest(run / "checkpoints")
    if newest is None:
        raise SystemExit(f"{run} has no checkpoint; its log:\n{(root / f'{out}.log').read_text()}")
    ledger: dict[int, set[str]] = {}
    for line in (root / f"{out}.ledger").read_text().splitlines():
        consumed, digest = line.split()
        ledger.setdefault(int(consumed), set()).add(digest)
    records = metrics.read(run / "metrics.jsonl")
    return {
        "metrics": [{key: value for key, value in record.items() if key not in CLOCKS} for record in records],
        "step": newest.step,
        "consumed": newest.meta["consumed_samples"],
        "tensors": {name: hashlib.sha256(tensor.numpy().tobytes()).hexdigest() for name, tensor in newest.tensors().items()},
        "ledger": ledger,
    }


def _differences(reference: dict, outcome: dict) -> list[str]:
    lines = [f"{key} differs" for key in ("step", "consumed", "ledger") if reference[key] != outcome[key]]
    names = sorted(reference["tensors"].keys() | outcome["tensors"].keys())
    lines += [f"{name} differs" for name in names if reference["tensors"].get(name) != outcome["tensors"].get(name)]
    pairs = zip(reference["metrics"], outcome["metrics"], strict=False)
    different = next((index for index, (ours, theirs) in enumerate(pairs) if ours != theirs), None)
    if different is not None:
        lines.append(f"metrics line {different + 1} differs: {reference['metrics'][different]} and {outcome['metrics'][different]}")
    if len(reference["metrics"]) != len(outcome["metrics"]):
        lines.append(f"metrics has {len(outcome['metrics'])} lines, the reference {len(reference['metrics'])}")
    return lines


if __name__ == "__main__":
    sys.exit(main())
