"""One rank fails: every rank ends, and says which one it was.

    rank 0: hub thread  <--one TCP connection each-->  client thread of every rank, of rank 0 too

Every client says each second where its main thread is; the hub answers each second that it lives. The hub decides:

* a connection that closes without a word: the process is gone (killed, crashed, out of memory). Known at once, because the kernel
  closes the sockets of a dead process;
* a rank that reports an exception: failed, with that message;
* `silent_s` without a beat: stopped, its host is lost, or its interpreter is blocked by one long native call;
* `Launch.join_s` without a connection: it died before it could be heard, or was never started.

The verdict goes to all clients, which decide alone if it is the hub that is gone or silent. A rank whose main thread is then thrown out of
its collective raises `PeerError` with the verdict; one that stays in it (NCCL waits for ever) is ended by its client thread. Nothing
here waits for the time limits of the backend.

What a rank sees of another one's death is a broken collective. That is a symptom and not reported as a failure of its own: the rank
waits for the verdict, and reports itself only when none comes.

One process starts no thread and no socket. docs/failures.md has the measurements and the limits.
"""

import contextlib
import json
import os
import secrets
import select
import selectors
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from hope_pt.engine.launch import Launch
from hope_pt.errors import HopeError, ParallelError

EXIT_FAILED = 1
_KEY = "hope_peers"


@dataclass(frozen=True)
class Limits:
    """Seconds."""

    beat_s: float = 1.0
    silent_s: float = 15.0
    unwind_s: float = 4.0
    """From the verdict to the forced end of a process whose main thread has not ended it."""


@dataclass(frozen=True)
class Verdict:
    """Which rank ended the job: one line, the exit code of the others, and for a stopped rank its process, to be killed on its machine."""

    rank: int
    text: str
    code: int = EXIT_FAILED
    home: str = ""
    pid: int = 0


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
        self._launch = launch
        self._limits = limits or Limits()
        self._link: _Link | None = None
        self._store: Any = None  # kept: rank 0's object is the server of the process group's store too
        self._hub: _Hub | None = None
        self._join_s = launch.join_s
        self._hub_host, self._hub_home, self._hub_pid = "", "", 0
        self._verdict: Verdict | None = None
        self._settled = threading.Event()
        self._own_failure = ""
        self._reporting = contextlib.ExitStack()

    def __enter__(self) -> "Watch":
        if self._launch.world_size > 1:
            self._join()
        self._reporting.enter_context(self.reporting())
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
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
                self._hub = hub = _Hub(launch.world_size, limits=self._limits, join_s=self._join_s)
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

    def _connect(self, address: dict[str, Any]) -> "_Link | None":
        """A connection that the hub has welcomed, or None after a moment."""
        for host in address["hosts"]:
            with contextlib.suppress(OSError):
                link = _Link(socket.create_connection((host, address["port"]), timeout=5.0))
                link.send(hello=self._launch.rank, token=address["token"], host=socket.gethostname(), home=_home(), pid=os.getpid())
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
        limits, silence, position, next_beat = self._limits, _Silence(self._limits.beat_s), _Position(), 0.0
        first = _name(0, self._launch.world_size, self._hub_host)
        while True:
            if time.monotonic() >= next_beat:
                next_beat = time.monotonic() + limits.beat_s
                self._link.send(where=position.read())
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
            if silence.seconds > limits.silent_s:
                text = f"{first} has been silent for {limits.silent_s:.0f} s (stopped, its host lost, or its interpreter blocked)"
                return self._end(Verdict(0, text, home=self._hub_home, pid=self._hub_pid))

    def _end(self, verdict: Verdict) -> None:
        """Lets the main thread end the process with the verdict; if it does not, ends it."""
        # Two machines whose home cannot be told have the same empty one: what is no home of ours must not be killed.
        if verdict.pid and verdict.home and verdict.home == _home() and verdict.rank != self._launch.rank:
            # A stopped process cannot end itself. Its connection is open, so its number is still its own. First the others notice too.
            time.sleep(2 * self._limits.beat_s)
            with contextlib.suppress(OSError):
                os.kill(verdict.pid, signal.SIGKILL)
        if self._hub:
            self._hub.told.wait(self._join_s)
        self._verdict = verdict
        self._settled.set()
        time.sleep(self._limits.unwind_s)
        # Not sys.stderr: the main thread may be stuck with its lock.
        with contextlib.suppress(OSError):
            os.write(2, (self._own_failure or f"hope: {verdict.text}\n").encode())
        os._exit(verdict.code)


class _Hub:
    """Rank 0's side: who is there, who has finished, and the first verdict."""

    def __init__(self, world_size: int, *, limits: Limits, join_s: float):
        self.token = secrets.token_hex(16)
        self._world_size, self._limits, self._join_s = world_size, limits, join_s
        dual = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if dual else socket.AF_INET
        self._listener = socket.create_server(("", 0), family=family, dualstack_ipv6=dual, backlog=min(world_size, 1024))
        self.port = self._listener.getsockname()[1]
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._members: dict[int, _Member] = {}
        self._waiting = _Silence(limits.beat_s)
        self._verdict: Verdict | None = None
        self.told = threading.Event()

    def run(self) -> None:
        """Until all ranks are done; after a verdict, as long as the process lives."""
        next_tick = 0.0
        while not self._all_done():
            for key, _ in self._selector.select(self._limits.beat_s):
                if key.fileobj is self._listener:
                    link = _Link(self._listener.accept()[0])
                    self._selector.register(link, selectors.EVENT_READ)
                else:
                    self._read(key.fileobj)  # type: ignore[arg-type]
            if time.monotonic() >= next_tick:
                next_tick = time.monotonic() + self._limits.beat_s
                self._tell(beat=True)
                self._check()
        self._tell(over=True)

    @property
    def joining_s(self) -> float:
        """Seconds for which ranks may still join; 0 when all have."""
        return 0.0 if len(self._members) == self._world_size else max(self._join_s - self._waiting.seconds, 0.0)

    def _all_done(self) -> bool:
        return len(self._members) == self._world_size and all(member.done for member in self._members.values())

    def _read(self, link: "_Link") -> None:
        try:
            messages = link.receive(timeout_s=0.0)
        except OSError:
            self._selector.unregister(link)
            link.close()
            gone = next((member for member in self._members.values() if member.link is link), None)
            if gone and not gone.done:
                self._decide(gone.rank, f"was killed or crashed: its process is gone; last seen in {gone.where}")
            return
        for message in messages:
            self._take(link, message)

    def _take(self, link: "_Link", message: dict[str, Any]) -> None:
        if message.get("token") == self.token:
            self._welcome(link, message)
        member = next((member for member in self._members.values() if member.link is link), None)
        if member is None:
            return
        member.silence.count(heard=True)
        member.where = message.get("where", member.where)
        member.done = member.done or "done" in message
        if "failed" in message:
            self._decide(member.rank, f"failed: {message['failed']}", code=message["code"])

    def _welcome(self, link: "_Link", hello: dict[str, Any]) -> None:
        rank = hello["hello"]
        link.send(welcome=(socket.gethostname(), _home(), os.getpid()))
        if rank in self._members:
            self._decide(rank, f"was started twice: on {self._members[rank].host} and on {hello['host']}")
        else:
            self._members[rank] = _Member(rank, link, _Silence(self._limits.beat_s), hello["host"], hello["home"], hello["pid"])
        if self._verdict is not None:
            link.send(verdict=asdict(self._verdict))

    def _check(self) -> None:
        self._waiting.count(heard=len(self._members) == self._world_size)
        late = self._waiting.seconds > self._join_s
        if self._verdict is not None:
            # A rank that is still starting hears the verdict when it joins.
            if late or len(self._members) == self._world_size:
                self.told.set()
            return
        if late:
            missing = [rank for rank in range(self._world_size) if rank not in self._members]
            others = f" (nor {len(missing) - 1} others)" if len(missing) > 1 else ""
            text = f"has not joined within {self._join_s:.0f} s (HOPE_JOIN_S){others}: killed before it was heard, or never started"
            self._decide(missing[0], text)
        for member in self._members.values():
            member.silence.count(heard=member.done)
            if member.silence.seconds > self._limits.silent_s:
                text = (
                    f"has been silent for {self._limits.silent_s:.0f} s (stopped, its host lost, or its interpreter blocked); last seen in "
                )
                self._decide(member.rank, text + member.where, stopped=True)

    def _decide(self, rank: int, text: str, *, code: int = EXIT_FAILED, stopped: bool = False) -> None:
        """The first verdict is the one; a stopped rank has to be killed."""
        if self._verdict is not None:
            return
        member = self._members.get(rank)
        name = _name(rank, self._world_size, member.host if member else "")
        home, pid = (member.home, member.pid) if member and stopped else ("", 0)
        self._verdict = Verdict(rank, f"{name} {text}", code, home, pid)
        self._tell(verdict=asdict(self._verdict))
        self._check()

    def _tell(self, **message: Any) -> None:
        # Rank 0 last: its process may end as soon as it knows.
        for rank in sorted(self._members, reverse=True):
            self._members[rank].link.send(**message)


@dataclass
class _Member:
    """What the hub knows of a rank."""

    rank: int
    link: "_Link"
    silence: "_Silence"
    host: str
    home: str
    pid: int
    where: str = "the start"
    done: bool = False


class _Link:
    """Lines of JSON on a socket. Sending never fails: that the other side is gone is what `receive` says."""

    def __init__(self, connection: socket.socket):
        connection.settimeout(5.0)
        self._socket, self._lock, self._rest = connection, threading.Lock(), b""
        self.unread: list[dict[str, Any]] = []

    def fileno(self) -> int:
        return self._socket.fileno()

    def send(self, **message: Any) -> None:
        with self._lock, contextlib.suppress(OSError):
            self._socket.sendall(json.dumps(message).encode() + b"\n")

    def receive(self, *, timeout_s: float) -> list[dict[str, Any]]:
        """The messages that have arrived, none after `timeout_s`; ConnectionError when the other side is gone."""
        if self.unread:
            unread, self.unread = self.unread, []
            return unread
        if not select.select([self._socket], [], [], timeout_s)[0]:
            return []
        data = self._socket.recv(1 << 16)
        if not data:
            raise ConnectionError("closed")
        *lines, self._rest = (self._rest + data).split(b"\n")
        try:
            messages = [json.loads(line) for line in lines]
        except ValueError:
            raise ConnectionError("not one of ours") from None
        return [message for message in messages if isinstance(message, dict)]

    def close(self) -> None:
        self._socket.close()


class _Silence:
    """Seconds without a word, counted in steps of at most two beats: a job that is suspended as a whole and resumed raises no alarm."""

    def __init__(self, beat_s: float):
        self.seconds, self._longest, self._last = 0.0, 2 * beat_s, time.monotonic()

    def count(self, *, heard: bool) -> None:
        now = time.monotonic()
        self.seconds = 0.0 if heard else self.seconds + min(now - self._last, self._longest)
        self._last = now


class _Position:
    """Where the main thread is, in our code, and since when it has been seen there."""

    def __init__(self) -> None:
        self._place, self._since = "", time.monotonic()

    def read(self) -> str:
        place = _innermost(sys._current_frames().get(threading.main_thread().ident or 0))
        if place != self._place:
            self._place, self._since = place, time.monotonic()
        seconds = int(time.monotonic() - self._since)
        return f"{place} for {seconds} s" if seconds else place


def _innermost(frame: Any) -> str:
    while frame is not None:
        module = str(frame.f_globals.get("__name__", ""))
        if module.startswith("hope_pt.") and module != __name__:
            return f"{module.removeprefix('hope_pt.')}.{frame.f_code.co_qualname}, line {frame.f_lineno}"
        frame = frame.f_back
    return "the start"


def _name(rank: int, world_size: int, host: str) -> str:
    return f"rank {rank} of {world_size}" + (f" ({host})" if host else "")


def _home() -> str:
    """Where process numbers mean the same: one boot of one kernel, one namespace. Empty where it cannot be told."""
    with contextlib.suppress(OSError):
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()}:{os.stat('/proc/self/ns/pid').st_ino}"
    return ""


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
