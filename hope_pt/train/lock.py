"""One writer at a time in a run directory; the lock of a killed process is free at once.

The kernel's record lock (fcntl.lockf) decides. It is not flock, because forked reader processes would inherit that one and keep it
after their trainer was killed. The owner written into the file names the holder in messages, and stands in where the file system
grants every lock: a living owner on this host is believed. A network disk keeps the lock of a lost node until it has given the node up.
"""

import fcntl
import json
import logging
import os
import socket
import time
from pathlib import Path

from hope_pt.errors import LockedError

LOG = logging.getLogger(__name__)
_LOOK_S = 1.0
"""Seconds between two looks at a lock that another has."""


class RunLock:
    """Held from construction to `release` or the death of the process.

    Another holder has `wait_s` seconds to let go, then LockedError names it: with exit code 1 after a wait, 2 without.
    """

    def __init__(self, path: str | Path, *, wait_s: float = 0.0):
        self.path = Path(path)
        self._file = self.path.open("a+", encoding="utf-8")
        began = time.monotonic()
        while not self._take():
            held = f"{self.path.parent} is being written by {self._holder()}"
            waited = time.monotonic() - began
            if waited >= wait_s:
                self._file.close()
                after = f" after {waited:.0f} s" if wait_s else ""
                raise LockedError(f"{held}{after}; wait for it, stop it, or give this run another name", left=wait_s > 0)
            if waited < _LOOK_S:
                LOG.warning("%s, or was by an attempt whose node is lost; waiting up to %.0f s", held, wait_s)
            time.sleep(_LOOK_S)
        self._write({"host": socket.gethostname(), "pid": os.getpid(), "started": _start_time(os.getpid())})

    def release(self) -> None:
        """Lets go; a second call does nothing."""
        if not self._file.closed:
            self._write({})
            self._file.close()

    def _take(self) -> bool:
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
        return not _is_alive_here(self._read_owner())

    def _holder(self) -> str:
        owner = self._read_owner()
        return f"process {owner.get('pid', '?')} on {owner.get('host', '?')}"

    def _read_owner(self) -> dict:
        self._file.seek(0)
        try:
            owner = json.loads(self._file.read() or "{}")
        except ValueError:
            # Torn by the death of its writer.
            return {}
        return owner if isinstance(owner, dict) else {}

    def _write(self, owner: dict) -> None:
        self._file.seek(0)
        self._file.truncate()
        self._file.write(json.dumps(owner))
        self._file.flush()


def _is_alive_here(owner: dict) -> bool:
    """Whether the very process that wrote the record still runs on this host; a process id alone may have been used again."""
    if owner.get("host") != socket.gethostname() or not isinstance(owner.get("pid"), int):
        return False
    started = _start_time(owner["pid"])
    return started is not None and started == owner.get("started")


def _start_time(pid: int) -> int | None:
    """Start of a process in clock ticks since boot, or None where it does not run or the system does not tell (not Linux)."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    # The second field, the command in brackets, may hold spaces; the start time is the 22nd field. A zombie runs no more.
    fields = stat.rpartition(")")[2].split()
    return None if fields[0] == "Z" else int(fields[19])
