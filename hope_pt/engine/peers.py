"""One rank fails: every rank ends, and says which one it was.

    rank 0: hub thread  <--one TCP connection each-->  client thread of every rank, of rank 0 too

Every client says each second what its main thread does (`engine.hangs`); the hub (`engine.hub`) says each second that it lives and
whether any rank gets on, and decides which one has failed or hangs. The verdict goes to all clients, which decide alone if it is the hub
that is gone or silent. A rank whose main thread is then thrown out of its collective raises `PeerError` with the verdict; one that stays
in it (NCCL waits for ever) is ended by its client thread. Nothing here waits for the time limits of the backend.

What a rank sees of another one's death is a broken collective. That is a symptom and not reported as a failure of its own: the rank
waits for the verdict, and reports itself only when none comes.

One process has no socket, and a thread that ends it when a phase takes too long. docs/failures.md has the measurements and the limits.
"""

import contextlib
import json
import os
import signal
import socket
import threading
import time
import traceback
from collections.abc import Iterator
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any

from hope_pt.config.schema import WatchdogConfig
from hope_pt.engine.hangs import Observer, Report, stacks, verdict_text, write_within
from hope_pt.engine.hub import EXIT_FAILED, Hub, Limits, Link, Silence, Verdict, home, rank_name
from hope_pt.engine.launch import Launch
from hope_pt.engine.phases import Phases
from hope_pt.errors import HopeError, ParallelError

_KEY = "hope_peers"
_STACKS = "hang-rank-{}.txt"


class PeerError(ParallelError):
    """Another rank ended the job; the message names it."""

    def __init__(self, verdict: Verdict):
        super().__init__(verdict.text)
        self.exit_code = verdict.code


class Watch:
    """Watches the job from its first moment to its last; a context manager around all that a rank does.

    Entering it connects the ranks: ParallelError if the first one cannot be reached within `launch.join_s`. Leaving it without an exception
    waits until all ranks have done so and raises PeerError if one fails instead. Leaving it with an exception tells the others.
    From a verdict on the process has `unwind_s` seconds to live.
    """

    def __init__(self, launch: Launch, *, limits: Limits | None = None):
        self.phases = Phases()
        self._launch = launch
        self._limits = limits or Limits()
        self._link: Link | None = None
        self._store: Any = None  # kept: rank 0's object is the server of the process group's store too
        self._hub: Hub | None = None
        self._join_s = launch.join_s
        self._hub_host, self._hub_home, self._hub_pid = "", "", 0
        self._verdict: Verdict | None = None
        self._settled = threading.Event()
        self._own_failure = ""
        self._watchdog = WatchdogConfig()
        self._observer = Observer(self.phases, beat_s=self._limits.beat_s)
        self._others_get_on = False
        self._said: Report | None = None
        self._left = threading.Event()
        self._logs: Path | None = None
        self._reporting = contextlib.ExitStack()

    def configure(self, limits: WatchdogConfig, *, logs: Path) -> None:
        """From now on a phase may take as long as `limits` says, until then as long as their defaults; stacks go to the folder `logs`."""
        self._watchdog, self._logs = limits, logs
        if self._hub:
            self._hub.logs = logs

    def __enter__(self) -> "Watch":
        if self._launch.world_size > 1:
            self._join()
        else:
            threading.Thread(target=self._watch_alone, name="hope-watch", daemon=True).start()
        self._reporting.enter_context(self.reporting())
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        self._left.set()
        self._reporting.__exit__(kind, error, trace)
        if error is None and self._link is not None:
            self._link.send(done=True)
            self._settled.wait()
            if self._verdict is not None:
                raise PeerError(self._verdict)

    @contextlib.contextmanager
    def reporting(self) -> Iterator[None]:
        """Tells the others of an exception that leaves it, before any clean-up outside it, which could hang.

        A broken collective becomes PeerError as soon as it is known which rank broke it.
        """
        try:
            yield
        except BaseException as error:
            if self._link is None or self._own_failure or isinstance(error, PeerError):
                raise
            from hope_pt.engine.collectives import is_broken

            if is_broken(error):
                # A stopped rank is named after silent_s; a few seconds more, then the failure must be this rank's own.
                # Rank 0 learns a verdict when all that may still join have.
                joining_s = self._hub.joining_s if self._hub else 0.0
                self._settled.wait(self._limits.silent_s + 7 * self._limits.beat_s + joining_s)
                if self._verdict is not None:
                    raise PeerError(self._verdict) from error
            self._report(error)
            raise

    def _report(self, error: BaseException) -> None:
        self._own_failure = "".join(traceback.format_exception(error))
        message = " ".join(str(error).split())
        if not isinstance(error, HopeError):
            message = f"{type(error).__name__}: {message}"
        assert self._link is not None
        self._link.send(failed=message, code=error.exit_code if isinstance(error, HopeError) else EXIT_FAILED)
        # Until the verdict has come back, which on rank 0 means that all know it: the hub dies with this process.
        self._settled.wait(self._join_s if self._hub else 2 * self._limits.beat_s)

    def _join(self) -> None:
        from torch.distributed import DistError

        launch = self._launch
        deadline = time.monotonic() + self._join_s
        try:
            self._store = _open_store(launch, join_s=self._join_s)
            if launch.rank == 0:
                self._hub = hub = Hub(launch.world_size, limits=self._limits, join_s=self._join_s)
                self._store.set(_KEY, json.dumps({"hosts": [_host(launch), socket.gethostname()], "port": hub.port, "token": hub.token}))
                threading.Thread(target=hub.run, name="hope-peers-hub", daemon=True).start()
            while self._link is None and time.monotonic() < deadline:
                # Read again each time: a launcher that restarts a job keeps its store, with the address of the hub that is gone.
                self._link = self._connect(json.loads(self._store.get(_KEY)))
        except (DistError, OSError) as error:
            raise self._unreachable() from error
        if self._link is None:
            raise self._unreachable()
        threading.Thread(target=self._listen, name="hope-peers", daemon=True).start()

    def _unreachable(self) -> ParallelError:
        launch = self._launch
        return ParallelError(
            f"rank 0 of {launch.world_size} cannot be reached at {launch.master_addr}:{launch.master_port} within {self._join_s:.0f} s "
            f"(HOPE_JOIN_S): it was killed or has not started, or MASTER_ADDR and MASTER_PORT are not its host and a free port (said rank "
            f"{launch.rank})"
        )

    def _connect(self, address: dict[str, Any]) -> Link | None:
        """A connection that the hub has welcomed, or None after a moment."""
        for host in address["hosts"]:
            with contextlib.suppress(OSError):
                link = Link(socket.create_connection((host, address["port"]), timeout=5.0))
                link.send(hello=self._launch.rank, token=address["token"], host=socket.gethostname(), home=home(), pid=os.getpid())
                first, *link.unread = link.receive(timeout_s=5.0) or [{}]
                if "welcome" in first:
                    self._hub_host, self._hub_home, self._hub_pid = first["welcome"]
                    return link
                link.close()
        time.sleep(0.2)
        return None

    def _listen(self) -> None:
        """Body of the client thread: beats, and waits for the end."""
        assert self._link is not None
        limits, silence, next_beat = self._limits, Silence(self._limits.beat_s), 0.0
        first = rank_name(0, self._launch.world_size, self._hub_host)
        while True:
            if time.monotonic() >= next_beat:
                next_beat = time.monotonic() + limits.beat_s
                self._link.send(report=self._look())
            try:
                messages = self._link.receive(timeout_s=limits.beat_s)
            except OSError:
                return self._end(Verdict(0, f"{first} was killed or crashed: its process is gone"))
            silence.count(heard=bool(messages))
            for message in messages:
                if "over" in message:
                    return self._settled.set()
                if "verdict" in message:
                    return self._end(Verdict(**message["verdict"]))
                self._others_get_on = message.get("gets_on", self._others_get_on)
                if "ask" in message:
                    # Before the configuration has been read only rank 0 may know a folder.
                    self._logs = self._logs or (Path(message["ask"]) if message["ask"] else None)
                    self._link.send(answer=self._look())
            if silence.seconds > limits.silent_s:
                text = f"{first} has been silent for {limits.silent_s:.0f} s (stopped, its host lost, or its interpreter blocked)"
                return self._end(Verdict(0, text, home=self._hub_home, pid=self._hub_pid, stacks=True))

    def _watch_alone(self) -> None:
        """Body of the only thread of a job of one process."""
        while not self._left.wait(self._limits.beat_s):
            report = Report(**self._look())
            if report.expired:
                file = f"stacks: {self._logs / _STACKS.format(0)}" if self._logs else ""
                names = {0: rank_name(0, 1, socket.gethostname())}
                return self._end(Verdict(0, verdict_text({0: report}, named=[0], names=names, file=file), hang=True, stacks=True))

    def _look(self) -> dict[str, Any]:
        """What the main thread does now, as it is sent."""
        self._said = self._observer.look(self._watchdog, others_get_on=self._others_get_on)
        return asdict(self._said)

    def _write_stacks(self) -> None:
        title, logs = f"rank {self._launch.rank} of {self._launch.world_size}: {self._said}", self._logs
        write_within(self._limits.answer_s, logs / _STACKS.format(self._launch.rank) if logs else None, lambda: stacks(title))

    def _end(self, verdict: Verdict) -> None:
        """Lets the main thread end the process with the verdict; if it does not, ends it."""
        if verdict.stacks:
            self._write_stacks()
        # Two machines whose home cannot be told have the same empty one: what is no home of ours must not be killed.
        if verdict.pid and verdict.home and verdict.home == home() and verdict.rank != self._launch.rank:
            # A stopped process cannot end itself. Its connection is open, so its number is still its own. First the others notice too.
            time.sleep(2 * self._limits.beat_s)
            with contextlib.suppress(OSError):
                os.kill(verdict.pid, signal.SIGKILL)
        if self._hub:
            self._hub.told.wait(self._join_s)
        self._verdict = verdict
        self._settled.set()
        # The rank that hangs goes first: its end breaks the collectives in which the others wait, and they clean up.
        goes_first = verdict.hang and verdict.rank == self._launch.rank
        time.sleep(self._limits.beat_s if goes_first else self._limits.unwind_s)
        # Not sys.stderr: the main thread may be stuck with its lock.
        with contextlib.suppress(OSError):
            os.write(2, (self._own_failure or f"hope: {verdict.text}\n").encode())
        os._exit(verdict.code)


def _host(launch: Launch) -> str:
    return socket.gethostname() if "://" in launch.master_addr else launch.master_addr


def _open_store(launch: Launch, *, join_s: float) -> Any:
    """A store for the address of the hub. The process group's own, at the same address, shares rank 0's server."""
    from torch.distributed import FileStore, TCPStore

    if "://" in launch.master_addr:
        return FileStore(launch.master_addr.partition("://")[2] + ".peers", launch.world_size)
    address = (launch.master_addr, launch.master_port)
    # torchrun has a server of its own there, which rank 0 must not replace.
    is_server = launch.rank == 0 and not _listens(address)
    deadline = time.monotonic() + join_s
    # A TCPStore that finds nobody takes more than twice its time limit.
    while not is_server and not _listens(address):
        if time.monotonic() > deadline:
            raise ConnectionError("nobody listens")
        time.sleep(0.2)
    return TCPStore(*address, is_master=is_server, timeout=timedelta(seconds=join_s), wait_for_workers=False, multi_tenant=True)


def _listens(address: tuple[str, int]) -> bool:
    try:
        socket.create_connection(address, timeout=2.0).close()
    except OSError:
        return False
    return True
