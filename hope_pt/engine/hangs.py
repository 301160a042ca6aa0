"""A rank that lives but does not get on: what every rank says of itself, when that is a hang, who causes it, and the stacks.

    main thread --Phases--> Observer (watching thread of the same rank) --Report, each beat--> hub: `is_hang`, then `culprits`
                                              ^-- each beat: `gets_on`, does some rank? --'

A rank's clock stands still while it waits for others of which one gets on, so that it is not over its limit when that one has finished.

Nothing of torch is imported here: a collective is known by the module of a frame.
"""

import contextlib
import os
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from hope_pt.config.schema import WatchdogConfig
from hope_pt.engine.phases import Phases, limit_s

_WAITING = (
    "torch.distributed",
    "megatron.core.pipeline_parallel.p2p_communication",
    "megatron.core.distributed.finalize_model_grads",
    "megatron.core.distributed.param_and_grad_buffer",
    "hope_pt.engine.collectives",
    "hope_pt.engine.peers",
    "hope_pt.engine.step.TrainEngine._agree",
)
"""Modules whose functions wait for other ranks, directly or through a handle, and functions that do."""
_PASSED = ("torch", "threading")
"""Modules through which such a function waits: no work of a rank's own is looked for in them."""
_NOT_A_PLACE = ("hope_pt.engine.collectives", "hope_pt.engine.peers", "hope_pt.engine.hub", "hope_pt.engine.stopwatch", __name__)
"""Where everybody waits for the others, or passes through: what called it says more."""
_NAMED = 8
_SAME_S = 2
"""Ranks that came to a place at the same time differ by less: each looks at another moment, and sends whole seconds."""


@dataclass(frozen=True)
class Report:
    """What a rank does. seconds: in its phase; place_s: in the function of `place`; collective: waits for others; expired: too long.

    Seconds for which it waited while another rank got on do not count for `expired`.
    """

    phase: str
    step: int
    seconds: int
    place: str
    place_s: int
    collective: bool
    expired: bool

    @property
    def spot(self) -> tuple[int, str, str]:
        """The same for ranks that have come equally far."""
        return self.step, self.phase, self.place

    @property
    def where(self) -> str:
        """Place and seconds."""
        return f"{self.place} for {self.place_s} s" if self.place_s else self.place

    def __str__(self) -> str:
        return f"{self.seconds} s in phase {self.phase} after step {self.step}, in {self.where}"


class Observer:
    """Looks at the main thread from another one, in seconds of at most two beats a look: a job that was suspended has not hung."""

    def __init__(self, phases: Phases, *, beat_s: float):
        self._phases, self._longest, self._last = phases, 2 * beat_s, time.monotonic()
        self._serial, self._seconds, self._function, self._place_s = -1, 0.0, "", 0.0
        self._waited = 0.0

    def look(self, limits: WatchdogConfig, *, others_get_on: bool = False) -> Report:
        """Counts the time since the last look. `others_get_on`: if this rank waits, it is for one that has time and a task of its own."""
        phase, now = self._phases.now, time.monotonic()
        same_phase = phase.serial == self._serial
        passed, self._last = min(now - (self._last if same_phase else phase.began), self._longest), now
        frame = sys._current_frames().get(threading.main_thread().ident or 0)
        function, line = _place(frame)
        collective = _waits(frame)
        same_place = same_phase and function == self._function
        self._seconds = self._seconds * same_phase + passed
        self._waited = self._waited * same_phase + passed * (collective and others_get_on)
        self._place_s = self._place_s + passed if same_place else 0.0
        self._serial, self._function = phase.serial, function
        self._phases.waited = (phase.serial, self._waited)
        limit = limit_s(phase.name, limits=limits, step_s=self._phases.step_s)
        return Report(
            phase=phase.name,
            step=phase.step,
            seconds=int(self._seconds),
            place=f"{function}, line {line}" if line else function,
            place_s=int(self._place_s),
            collective=collective,
            expired=bool(limit) and self._seconds - self._waited > limit,
        )


def _place(frame: FrameType | None) -> tuple[str, int]:
    """The innermost function of ours, and its line."""
    while frame is not None:
        module = _module(frame)
        if module.startswith("hope_pt.") and module not in _NOT_A_PLACE:
            return f"{module.removeprefix('hope_pt.')}.{frame.f_code.co_qualname}", frame.f_lineno
        frame = frame.f_back
    return "the start", 0


def _waits(frame: FrameType | None) -> bool:
    """The innermost function decides: one that a waiting function has called does work of its own."""
    while frame is not None:
        module = _module(frame)
        called = f"{module}.{frame.f_code.co_qualname}."
        if any(called.startswith(f"{name}.") for name in _WAITING):
            return True
        if module.partition(".")[0] not in _PASSED:
            return False
        frame = frame.f_back
    return False


def _module(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__", ""))


def gets_on(reports: Collection[Report | None]) -> bool:
    """Some rank has both time left and something to do besides waiting for others. None: a rank not heard yet, which may have."""
    return any(report is None or not (report.expired or report.collective) for report in reports)


def is_hang(reports: Collection[Report | None]) -> bool:
    """Some rank is over its limit, and none gets on.

    So a job whose ranks wait for one that has a long task of its own goes on until the limit of that task.
    """
    return not gets_on(reports) and any(report is not None and report.expired for report in reports)


def culprits(reports: Mapping[int, Report | None]) -> list[int]:
    """The ranks that cause a hang; none if nothing tells them from the others. None: a rank that was asked and does not answer.

    1. those that do not answer;
    2. else those that wait for nobody, of them the ones longest in their place. If nobody waits for anybody, as it looks when all wait
       for their devices, those that differ from a majority come first, and where all are at the same place it is nobody;
    3. else those that wait elsewhere than a majority of more than half: they took another way, past a collective or into one.
    """
    silent = [rank for rank, report in reports.items() if report is None]
    if silent:
        return silent
    known = {rank: report for rank, report in reports.items() if report is not None}
    busy = {rank: report for rank, report in known.items() if not report.collective}
    if not busy or len(busy) == len(known) > 1:
        spots = {rank: report.spot for rank, report in known.items()}
        spot, count = Counter(spots.values()).most_common(1)[0]
        if not busy or 2 * count > len(spots):
            return [rank for rank in spots if spots[rank] != spot] if 2 * count > len(spots) else []
    longest = max(report.place_s for report in busy.values())
    return [rank for rank, report in busy.items() if report.place_s > longest - _SAME_S]


def verdict_text(reports: Mapping[int, Report | None], *, named: list[int], names: Mapping[int, str], file: str) -> str:
    """One line: who hangs, where and for how long. names: of the ranks, for people; file: what to read next."""
    if not named:
        # Of the ranks at one spot, the first speaks for all.
        spots = {report.spot: rank for rank, report in sorted(reports.items(), reverse=True) if report}
        do = "wait for each other" if any(report and report.collective for report in reports.values()) else "hang"
        text = f"all ranks {do}, at {'the same place' if len(spots) == 1 else f'{len(spots)} places'}: "
        text += "; ".join(f"{names[rank]} {reports[rank]}" for rank in sorted(spots.values())[:_NAMED])
    else:
        first = reports[named[0]]
        which = "; ".join(names[rank] for rank in named[:_NAMED]) + (f" and {len(named) - _NAMED} others" if len(named) > _NAMED else "")
        text = f"{which} {'hang' if len(named) > 1 else 'hangs'}: {first or 'no answer'}"
        waiting = sum(report is not None and report.collective for rank, report in reports.items() if rank not in named)
        text += f"; {waiting} of {len(reports)} ranks wait" if waiting else ""
    return f"{text}; {file}" if file else text


def table(text: str, reports: Mapping[int, Report | None], *, last: Mapping[int, Report | None], names: Mapping[int, str]) -> str:
    """hang.txt: the verdict and one line a rank; `last`: what those that do not answer said before."""
    lines = [f"{time.strftime('%Y-%m-%d %H:%M:%S')}  {text}", ""]
    for rank, report in reports.items():
        if report is None:
            lines.append(f"{names[rank]}: does not answer; last heard: {last[rank] or 'nothing'}")
        else:
            state = "waits for other ranks" if report.collective else "waits for no other rank"
            lines.append(f"{names[rank]}: {report}; {state}{'; over its limit' if report.expired else ''}")
    return "\n".join([*lines, ""])


def stacks(title: str) -> str:
    """The Python stacks of all threads of this process, the main thread first."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    main, own = threading.main_thread().ident, threading.get_ident()
    parts = [f"{time.strftime('%Y-%m-%d %H:%M:%S')}  {title}\n"]
    for thread, frame in sorted(sys._current_frames().items(), key=lambda item: item[0] != main):
        if thread != own:
            parts.append(f"thread {names.get(thread, thread)}, the innermost call last:\n{''.join(traceback.format_stack(frame))}")
    return "\n".join(parts)


def write_within(seconds: float, path: Path | None, text: Callable[[], str]) -> None:
    """`text()` to `path`, or to the standard error. Gives up after `seconds`: a disk that does not answer may be the cause of the hang."""

    def write() -> None:
        with contextlib.suppress(OSError):
            written = text()  # before the disk is waited for
            if path is None:
                os.write(2, written.encode())
            else:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(written, encoding="utf-8")

    writer = threading.Thread(target=write, name="hope-hang-writer", daemon=True)
    writer.start()
    writer.join(seconds)
