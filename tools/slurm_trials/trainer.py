"""`hope` as it is, in one rank of a trial: what the loader hands out is recorded, and a fault may be injected. Started by Slurm.

    python -m tools.slurm_trials.trainer train CONFIG key=value ...

The ledger is `ledger-RANK` beside the run directory: a line `POSITION DIGEST` for each sample, written before the step has it.
TRIAL_FAULT="KIND RANK STEP" makes that rank of the first attempt hang after so many steps:

sleep       outside any collective
stop        SIGSTOP, as a lost machine looks
collective  in one that no other rank enters, while the others wait in one that it misses
loader      SIGSTOP to its reader process, so that its batches do not come
"""

import hashlib
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from hope_pt import cli, data, engine


def main() -> int:
    """The exit code of `hope`."""
    folder, rank = Path(os.environ["HOPE_RUN_DIR"]).parent, os.environ["SLURM_PROCID"]
    record_batches(folder / f"ledger-{rank}")
    kind, faulty, step = os.environ.get("TRIAL_FAULT", "none -1 0").split()
    if rank == faulty and os.environ["HOPE_ATTEMPT"] == "1":
        _inject(FAULTS[kind], step=int(step))
    return cli.main(sys.argv[1:])


def record_batches(path: Path) -> None:
    """Makes the loader write position and digest of every sample that it hands out, at once."""
    begin, following = data.Loader.__init__, data.Loader.__next__
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    rows: dict[int, range] = {}

    def begun(self: data.Loader, source: Any, **arguments: Any) -> None:
        rows[id(self)] = range(arguments.get("dp_rank", 0), arguments["global_batch_size"], arguments.get("dp_size", 1))
        begin(self, source, **arguments)

    def recorded(self: data.Loader) -> data.Batch:
        first = self.consumed
        batch = following(self)
        lines = [f"{first + row} {_digest(batch, index)}\n" for index, row in enumerate(rows[id(self)])]
        os.write(file, "".join(lines).encode())
        return batch

    data.Loader.__init__ = begun  # type: ignore[method-assign]
    data.Loader.__next__ = recorded  # type: ignore[method-assign]


def _digest(batch: data.Batch, row: int) -> str:
    parts = (batch.tokens_BT, batch.targets_BT, batch.loss_mask_BT, batch.doc_start_BT)
    return hashlib.sha256(b"".join(part[row].numpy().tobytes() for part in parts)).hexdigest()[:32]


def _inject(fault: Callable[[], None], *, step: int) -> None:
    """Makes the step after `step` steps begin with the fault."""
    original = engine.TrainEngine.step

    def faulty(self: engine.TrainEngine, batch: Any) -> Any:
        if self.num_steps_done == step:
            fault()
        return original(self, batch)

    engine.TrainEngine.step = faulty  # type: ignore[method-assign]


def _stop_reader() -> None:
    for process in multiprocessing.active_children():
        if process.pid is not None:
            os.kill(process.pid, signal.SIGSTOP)


def _receive_what_nobody_sends() -> None:
    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    torch.distributed.recv(torch.zeros(1), src=(rank + 1) % size)


FAULTS: dict[str, Callable[[], None]] = {
    "sleep": lambda: time.sleep(3600.0),
    "stop": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "collective": _receive_what_nobody_sends,
    "loader": _stop_reader,
}


if __name__ == "__main__":
    sys.exit(main())
