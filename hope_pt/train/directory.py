"""The directory of a run, `out/name`.

`config.toml`, `code.txt`, `tokenizer.model`, `metrics.jsonl`, `checkpoints/`, `logs/rank-N.log`, `status.json`, `lock`.
Only the first rank writes outside `logs/`, and only while it holds the lock.
"""

import json
import logging
import os
import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hope_pt.errors import HopeError
from hope_pt.files import replace_text
from hope_pt.train.lock import RunLock

LOST_NODE_S = 120.0
"""Seconds that a later attempt of a batch job gives a network disk to free the lock of a lost node."""
LOG_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


class _RankLog(logging.FileHandler):
    """A log that a full disk cannot turn into tracebacks on the console; what matters on a full disk fails loudly by itself."""

    def handleError(self, record: logging.LogRecord) -> None:
        """Drops the line."""


class RunDirectory:
    """Paths of one run; `open` makes this process its writer. attempt: how often a batch job has started it."""

    def __init__(self, path: str | Path, *, attempt: int = 1):
        self.path, self.attempt = Path(path), attempt
        self.config = self.path / "config.toml"
        self.code = self.path / "code.txt"
        self.tokenizer = self.path / "tokenizer.model"
        self.metrics = self.path / "metrics.jsonl"
        self.checkpoints = self.path / "checkpoints"
        self.logs = self.path / "logs"
        self.status = self.path / "status.json"
        self._lock: RunLock | None = None
        self._handler: _RankLog | None = None

    def open(self, *, rank: int) -> None:
        """Creates the directory, takes the lock (first rank only) and begins this rank's log; LockedError if another process has it."""
        with self._writing():
            self.logs.mkdir(parents=True, exist_ok=True)
            if rank == 0:
                self._lock = RunLock(self.path / "lock", wait_s=LOST_NODE_S if self.attempt > 1 else 0.0)
            self._handler = _RankLog(self.logs / f"rank-{rank}.log", encoding="utf-8")
        self._handler.setFormatter(logging.Formatter(LOG_FORMAT))
        logging.getLogger("hope_pt").addHandler(self._handler)

    def begin_session(self, *, config_text: str, code: str, tokenizer: Path | None, step: int) -> None:
        """Writes the resolved configuration and a copy of the tokenizer; appends the code's version and changes to those before."""
        with self._writing():
            if tokenizer is not None:
                shutil.copyfile(tokenizer, self.tokenizer)
            replace_text(self.config, text=config_text)
            with self.code.open("a", encoding="utf-8") as file:
                file.write(f"# session from step {step}, {time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime())}\n{code}\n")

    def write_status(self, *, state: str, step: int, num_steps: int, message: str = "", reason: str = "", checkpoint: int = 0) -> None:
        """Replaces status.json; one key a line, because batch scripts read it. The first rank only.

        state: running, done, stopped (asked to, by `reason`: usr1, usr2, term or stop; saved), failed, diverged or interrupted. checkpoint:
        step of the newest one, 0 before the first.
        """
        status = {
            "state": state,
            "step": step,
            "num_steps": num_steps,
            "message": message,
            "reason": reason,
            "checkpoint": checkpoint,
            "attempt": self.attempt,
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "time": time.time(),
        }
        with self._writing():
            replace_text(self.status, text=json.dumps(status, indent=1) + "\n")

    def note(self, text: str) -> None:
        """A line for this rank's log only: the console shows the same error in its own way."""
        if self._handler is not None:
            self._handler.handle(logging.makeLogRecord({"name": __name__, "levelno": logging.ERROR, "levelname": "ERROR", "msg": text}))

    def close(self) -> None:
        """Ends the log and lets the lock go."""
        if self._handler is not None:
            logging.getLogger("hope_pt").removeHandler(self._handler)
            self._handler.close()
            self._handler = None
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise HopeError(
                f"cannot write to {self.path}: {error.strerror or error}; mend the disk, or set out to a directory that can be written"
            ) from error
