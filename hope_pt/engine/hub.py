"""The hub of `engine.peers`: rank 0's thread, to which all ranks talk and which decides which of them has failed; and their language.

* a connection that closes without a word: the process is gone (killed, crashed, out of memory). Known at once, because the kernel
  closes the sockets of a dead process;
* a rank that reports an exception: failed, with that message;
* `silent_s` without a beat: stopped, its host is lost, or its interpreter is blocked by one long native call;
* `Launch.join_s` without a connection: it died before it could be heard, or was never started;
* a rank that is over the limit of its phase while no other one gets on (`engine.hangs`): all ranks are asked what they do now, and the
  answers name the culprit. Only if they confirm the hang do the ranks leave their stacks.
"""

import contextlib
import json
import os
import secrets
import select
import selectors
import socket
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hope_pt.engine.hangs import Report, culprits, gets_on, is_hang, table, verdict_text, write_within

EXIT_FAILED = 1
HANG = "hang.txt"


@dataclass(frozen=True)
class Limits:
    """Seconds."""

    beat_s: float = 1.0
    silent_s: float = 15.0
    unwind_s: float = 4.0
    """From the verdict to the forced end of a process whose main thread has not ended it."""
    answer_s: float = 2.5
    """For all ranks to say what they do; one that says nothing in this time does not answer. As long for each to write its stacks."""


@dataclass(frozen=True)
class Verdict:
    """Which rank ended the job: one line, the exit code of the others, and for a stopped rank its process, to be killed on its machine.

    hang: its main thread does not get on; if all ranks wait for each other, `rank` is the first one. stacks: every rank leaves its own.
    """

    rank: int
    text: str
    code: int = EXIT_FAILED
    home: str = ""
    pid: int = 0
    hang: bool = False
    stacks: bool = False


class Link:
    """Lines of JSON on a socket. Sending never fails: that the other side is gone is what `receive` says."""

    def __init__(self, connection: socket.socket):
        connection.settimeout(5.0)
        self._socket, self._lock, self._rest = connection, threading.Lock(), b""
        self._poll = select.poll()  # not select.select, which knows no file above number 1023
        self._poll.register(connection, select.POLLIN)
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
        if not self._poll.poll(1000 * timeout_s):
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


class Silence:
    """Seconds without a word, counted in steps of at most two beats: a job that is suspended as a whole and resumed raises no alarm."""

    def __init__(self, beat_s: float):
        self.seconds, self._longest, self._last = 0.0, 2 * beat_s, time.monotonic()

    def count(self, *, heard: bool) -> None:
        now = time.monotonic()
        self.seconds = 0.0 if heard else self.seconds + min(now - self._last, self._longest)
        self._last = now


def rank_name(rank: int, world_size: int, host: str) -> str:
    """As messages call it; `host` is empty where it is not known."""
    return f"rank {rank} of {world_size}" + (f" ({host})" if host else "")


def home() -> str:
    """Where process numbers mean the same: one boot of one kernel, one namespace. Empty where it cannot be told."""
    with contextlib.suppress(OSError):
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()}:{os.stat('/proc/self/ns/pid').st_ino}"
    return ""


@dataclass
class _Member:
    """What the hub knows of a rank."""

    rank: int
    link: Link
    silence: Silence
    host: str
    home: str
    pid: int
    report: Report | None = None

    @property
    def where(self) -> str:
        return self.report.where if self.report else "the start"


class Hub:
    """Who is there, who has finished, and the first verdict; `told` is set when all ranks that can know the verdict do.

    What a message costs does not grow with the job: its thread is one of the process that launches kernels.
    """

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
        self._by_link: dict[Link, _Member] = {}
        self._unfinished = set(range(world_size))
        self._waiting = Silence(limits.beat_s)
        self._verdict: Verdict | None = None
        self._asked: float | None = None  # when all ranks were asked what they do
        self._ask_after = 0.0
        self._answers: dict[int, Report] = {}
        self.logs: Path | None = None
        self.told = threading.Event()

    def run(self) -> None:
        """Until all ranks are done; after a verdict, as long as the process lives."""
        next_tick = 0.0
        while self._unfinished:
            for key, _ in self._selector.select(self._limits.beat_s):
                if key.fileobj is self._listener:
                    link = Link(self._listener.accept()[0])
                    self._selector.register(link, selectors.EVENT_READ)
                else:
                    self._read(key.fileobj)  # type: ignore[arg-type]
            if time.monotonic() >= next_tick:
                next_tick = time.monotonic() + self._limits.beat_s
                self._tell(beat=True, gets_on=gets_on(self._reports()))
                self._check()
            if self._asked is not None and self._verdict is None:
                self._judge(since=self._asked)
        self._tell(over=True)

    @property
    def joining_s(self) -> float:
        """Seconds for which ranks may still join; 0 when all have."""
        return 0.0 if len(self._members) == self._world_size else max(self._join_s - self._waiting.seconds, 0.0)

    def _read(self, link: Link) -> None:
        try:
            messages = link.receive(timeout_s=0.0)
        except OSError:
            self._selector.unregister(link)
            link.close()
            gone = self._by_link.get(link)
            if gone and gone.rank in self._unfinished:
                self._decide(gone.rank, f"was killed or crashed: its process is gone; last seen in {gone.where}")
            return
        for message in messages:
            self._take(link, message)

    def _take(self, link: Link, message: dict[str, Any]) -> None:
        if message.get("token") == self.token:
            self._welcome(link, message)
        member = self._by_link.get(link)
        if member is None:
            return
        member.silence.count(heard=True)
        if "report" in message:
            member.report = Report(**message["report"])
        if "answer" in message:
            self._answers[member.rank] = Report(**message["answer"])
        if "done" in message:
            self._unfinished.discard(member.rank)
        if "failed" in message:
            self._decide(member.rank, f"failed: {message['failed']}", code=message["code"])

    def _welcome(self, link: Link, hello: dict[str, Any]) -> None:
        rank = hello["hello"]
        link.send(welcome=(socket.gethostname(), home(), os.getpid()))
        if rank in self._members:
            self._decide(rank, f"was started twice: on {self._members[rank].host} and on {hello['host']}")
        else:
            member = _Member(rank, link, Silence(self._limits.beat_s), hello["host"], hello["home"], hello["pid"])
            self._members[rank] = self._by_link[link] = member
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
        self._suspect()
        for member in self._members.values():
            member.silence.count(heard=member.rank not in self._unfinished)
            if member.silence.seconds > self._limits.silent_s:
                text = (
                    f"has been silent for {self._limits.silent_s:.0f} s (stopped, its host lost, or its interpreter blocked); last seen in "
                )
                self._decide(member.rank, text + member.where, stopped=True)

    def _reports(self) -> list[Report | None]:
        """The last words of those that have not finished."""
        return [self._members[rank].report if rank in self._members else None for rank in self._unfinished]

    def _suspect(self) -> None:
        """Asks all ranks when their last words look like a hang."""
        if self._asked is None and time.monotonic() >= self._ask_after and is_hang(self._reports()):
            self._asked, self._answers = time.monotonic(), {}
            self._tell(ask=str(self.logs or ""))

    def _judge(self, *, since: float) -> None:
        """When all ranks have answered, or had the time: the verdict, or none if the answers say that the job goes on."""
        if self._unfinished - self._answers.keys() and time.monotonic() < since + self._limits.answer_s:
            return
        reports = {rank: self._answers.get(rank) for rank in sorted(self._unfinished)}
        if not is_hang([report or self._members[rank].report for rank, report in reports.items()]):
            self._asked, self._ask_after = None, time.monotonic() + self._limits.answer_s
            return
        named = culprits(reports)
        text = verdict_text(reports, named=named, names=self._names(), file=self._see())
        self._tabulate(text, reports)
        first = named[0] if named else 0
        process = self._process(first, stopped=bool(named) and reports[first] is None)
        self._pass(Verdict(first, text, EXIT_FAILED, *process, hang=True, stacks=True))

    def _tabulate(self, text: str, reports: dict[int, Report | None]) -> None:
        last = {rank: member.report for rank, member in self._members.items()}
        if self.logs:
            write_within(self._limits.answer_s, self.logs / HANG, lambda: table(text, reports, last=last, names=self._names()))

    def _see(self) -> str:
        return f"stacks: {self.logs / HANG}" if self.logs else ""

    def _names(self) -> dict[int, str]:
        return {rank: rank_name(rank, self._world_size, member.host) for rank, member in self._members.items()}

    def _decide(self, rank: int, text: str, *, code: int = EXIT_FAILED, stopped: bool = False) -> None:
        """The first verdict is the one; a stopped rank has to be killed."""
        if self._verdict is not None:
            return
        member = self._members.get(rank)
        text = f"{rank_name(rank, self._world_size, member.host if member else '')} {text}"
        if stopped and self.logs:
            text = f"{text}; {self._see()}"
            self._tabulate(text, {other: None if other == rank else self._members[other].report for other in sorted(self._unfinished)})
        self._pass(Verdict(rank, text, code, *self._process(rank, stopped=stopped), stacks=stopped))

    def _process(self, rank: int, *, stopped: bool) -> tuple[str, int]:
        """Home and number of a process that cannot end itself."""
        member = self._members.get(rank)
        return (member.home, member.pid) if member and stopped else ("", 0)

    def _pass(self, verdict: Verdict) -> None:
        self._verdict = verdict
        self._tell(verdict=asdict(verdict))
        self._check()

    def _tell(self, **message: Any) -> None:
        # Rank 0 last: its process may end as soon as it knows.
        for rank in sorted(self._members, reverse=True):
            self._members[rank].link.send(**message)
