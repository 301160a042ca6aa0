"""When it is a hang and whose, how long a phase may take, and what a rank says of itself: engine.hangs and engine.phases alone."""

import pkgutil
import subprocess
import sys
import threading
import time
from dataclasses import replace

import pytest

from hope_pt.config.schema import EngineConfig, WatchdogConfig
from hope_pt.engine import collectives, hangs, phases
from hope_pt.engine.hangs import Observer, Report, culprits, is_hang, stacks, table, verdict_text, write_within
from hope_pt.engine.phases import Phases, limit_s, limits_beyond

WAITS = Report(phase="step", step=7, seconds=300, place="engine.step.f, line 5", place_s=299, collective=True, expired=True)
BUSY = replace(WAITS, place="data.loader.get, line 9", collective=False)
NAMES = {rank: f"rank {rank} of 4 (node{rank})" for rank in range(4)}


@pytest.mark.parametrize(
    ("reports", "expected"),
    [
        ([WAITS, BUSY], True),
        ([WAITS, replace(BUSY, expired=False)], False),  # one has a long task of its own, for which it has time
        ([replace(WAITS, expired=False), BUSY], True),
        ([replace(WAITS, expired=False), replace(WAITS, expired=False)], False),
        ([WAITS, WAITS], True),
        ([WAITS, None], False),
        ([BUSY], True),
        ([replace(BUSY, expired=False)], False),
        ([], False),
    ],
)
def test_a_hang_is_when_one_is_over_its_limit_and_no_other_has_both_time_and_work(reports, expected):
    assert is_hang(reports) is expected


@pytest.mark.parametrize(
    ("reports", "expected"),
    [
        ([WAITS, WAITS, None, BUSY], [2]),
        ([WAITS, BUSY, WAITS, WAITS], [1]),
        ([WAITS, BUSY, replace(BUSY, place_s=310), WAITS], [2]),
        ([WAITS, BUSY, BUSY, WAITS], [1, 2]),
        # Nobody does anything but wait: one is elsewhere, or a step further, or nothing tells them apart.
        ([WAITS, WAITS, replace(WAITS, place="engine.step.g, line 8"), WAITS], [2]),
        ([WAITS, WAITS, WAITS, replace(WAITS, step=8)], [3]),
        ([WAITS, replace(WAITS, place="engine.step.g, line 8")], []),
        ([WAITS, WAITS, WAITS, WAITS], []),
        # Waiting for a device looks like work: the one that differs from a majority, before the longest.
        ([replace(BUSY, place_s=301), replace(BUSY, place="nn.titans.f, line 3"), replace(BUSY, place_s=302), BUSY], [1]),
        ([replace(BUSY, place_s=301), replace(BUSY, place="nn.titans.f, line 3")], [0]),
        # All stand at the same place: who was looked at first is not to blame.
        ([BUSY] * 2 + [replace(BUSY, place_s=301)] + [BUSY] * 5, []),
        ([BUSY, replace(BUSY, place_s=310)], []),
        # Some came there together, which one says nothing.
        ([WAITS, BUSY, replace(BUSY, place_s=300), replace(BUSY, place_s=12)], [1, 2]),
        ([BUSY], [0]),
    ],
)
def test_the_culprit_of_a_hang(reports, expected):
    assert culprits(dict(enumerate(reports))) == expected


def test_the_line_of_a_hang_names_rank_phase_place_seconds_and_file():
    reports = dict(enumerate([WAITS, BUSY, WAITS, WAITS]))
    line = verdict_text(reports, named=[1], names=NAMES, file="stacks: logs/hang.txt")
    place = "300 s in phase step after step 7, in data.loader.get, line 9 for 299 s"
    assert line == f"rank 1 of 4 (node1) hangs: {place}; 3 of 4 ranks wait; stacks: logs/hang.txt"
    assert verdict_text(reports | {3: None}, named=[3], names=NAMES, file="") == "rank 3 of 4 (node3) hangs: no answer; 2 of 4 ranks wait"
    both = verdict_text(reports | {3: BUSY}, named=[1, 3], names=NAMES, file="")
    assert both == f"rank 1 of 4 (node1); rank 3 of 4 (node3) hang: {place}; 2 of 4 ranks wait"
    many = verdict_text(dict.fromkeys(range(12), BUSY), named=list(range(12)), names={rank: f"r{rank}" for rank in range(12)}, file="")
    assert many == f"r0; r1; r2; r3; r4; r5; r6; r7 and 4 others hang: {place}"


def test_the_line_of_a_hang_without_a_culprit_has_every_place():
    place = "300 s in phase step after step 7, in engine.step.f, line 5 for 299 s"
    same = verdict_text({0: WAITS, 1: WAITS}, named=[], names=NAMES, file="")
    assert same == f"all ranks wait for each other, at the same place: {NAMES[0]} {place}"
    busy = verdict_text({0: BUSY, 1: BUSY}, named=[], names=NAMES, file="")
    assert busy == f"all ranks hang, at the same place: {NAMES[0]} {place.replace('engine.step.f, line 5', 'data.loader.get, line 9')}"
    further = replace(WAITS, step=8, seconds=20)
    other = "20 s in phase step after step 8, in engine.step.f, line 5 for 299 s"
    apart = verdict_text({0: WAITS, 1: further, 2: WAITS, 3: further}, named=[], names=NAMES, file="see")
    assert apart == f"all ranks wait for each other, at 2 places: {NAMES[0]} {place}; {NAMES[1]} {other}; see"


def test_the_table_has_a_line_for_every_rank():
    reports = {0: WAITS, 1: replace(BUSY, expired=False), 2: None, 3: None}
    lines = table("the verdict", reports, last={0: WAITS, 1: BUSY, 2: BUSY, 3: None}, names=NAMES).splitlines()
    assert lines[0].endswith("  the verdict") and lines[1] == ""
    assert lines[2:] == [
        f"{NAMES[0]}: {WAITS}; waits for other ranks; over its limit",
        f"{NAMES[1]}: {BUSY}; waits for no other rank",
        f"{NAMES[2]}: does not answer; last heard: {BUSY}",
        f"{NAMES[3]}: does not answer; last heard: nothing",
    ]


@pytest.mark.parametrize(
    ("name", "step_s", "expected"),
    [
        ("setup", 9.0, 1.0),
        ("first_step", 9.0, 2.0),
        ("step", 0.0, 3.0),
        ("step", 0.25, 3.0),
        ("step", 9.0, 90.0),
        ("checkpoint", 9.0, 5.0),
        ("evaluation", 9.0, 6.0),
        ("close", 9.0, 5.0),
    ],
)
def test_the_limit_of_a_phase(name, step_s, expected):
    limits = WatchdogConfig(setup_s=1, first_step_s=2, step_s=3, step_factor=10, checkpoint_s=5, evaluation_s=6)
    assert limit_s(name, limits=limits, step_s=step_s) == expected
    none = WatchdogConfig(setup_s=0, first_step_s=0, step_s=0, step_factor=10, checkpoint_s=0, evaluation_s=0)
    assert limit_s(name, limits=none, step_s=step_s) == 0


class Clock:
    """Stands for time.monotonic."""

    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(time, "monotonic", clock)
    return clock


def test_the_typical_step_is_the_first_one_until_there_is_another_and_then_the_median_of_the_last(clock):
    now = Phases()
    assert (now.now.name, now.now.step, now.step_s) == ("setup", 0, 0.0)

    def spend(seconds, name, then):
        now.enter(name, step=1)
        clock.now += seconds
        now.enter(then, step=2)

    spend(60.0, "first_step", "checkpoint")
    assert now.step_s == 60.0
    spend(1.0, "step", "evaluation")
    assert now.step_s == 1.0
    spend(100.0, "evaluation", "close")
    spend(4.0, "step", "step")
    assert now.step_s == 2.5
    for _ in range(phases._WINDOW):
        spend(8.0, "step", "checkpoint")
    assert now.step_s == 8.0 and len(now._steps) == phases._WINDOW
    assert (now.now.name, now.now.step) == ("checkpoint", 2)


def test_a_look_counts_two_beats_at_most_and_begins_again_with_a_phase(clock):
    now, limits = Phases(), WatchdogConfig(setup_s=2, step_s=4, step_factor=0)
    observer = Observer(now, beat_s=1.0)
    seen = []
    for passes in (1.0, 1.0, 1.5, 3600.0):
        clock.now += passes
        seen.append(observer.look(limits))
    # An hour is what a job sees that was suspended.
    assert [report.seconds for report in seen] == [1, 2, 3, 5]
    assert [report.expired for report in seen] == [False, False, True, True]
    # This test is the main thread, and no function of ours is on its stack.
    assert {report.place for report in seen} == {"the start"} and [report.place_s for report in seen] == [0, 1, 2, 4]
    now.enter("step", step=3)
    report = observer.look(limits)
    assert (report.phase, report.step, report.seconds, report.place_s, report.expired) == ("step", 3, 0, 0, False)
    clock.now += 0.5
    now.enter("step", step=4)
    clock.now += 1.0
    assert observer.look(limits).seconds == 1


def test_the_clock_of_a_rank_stands_still_while_it_waits_for_one_that_gets_on(clock, monkeypatch):
    now, limits = Phases(), WatchdogConfig(step_s=4, step_factor=0)
    observer = Observer(now, beat_s=1.0)
    waits = [True]
    monkeypatch.setattr(hangs, "_waits", lambda frame: waits[0])

    def look(passes, *, collective, others_get_on):
        clock.now += passes
        waits[0] = collective
        return observer.look(limits, others_get_on=others_get_on)

    now.enter("step", step=3)
    for second in range(1, 31):
        report = look(1.0, collective=True, others_get_on=True)
        assert (report.seconds, report.expired) == (second, False)
    # It works itself, or waits where nobody gets on: that counts.
    seen = [look(1.0, collective=False, others_get_on=True) for _ in range(2)]
    assert not any(report.expired for report in seen)
    assert not look(1.0, collective=True, others_get_on=False).expired
    assert not look(1.0, collective=True, others_get_on=False).expired
    assert look(1.0, collective=True, others_get_on=False).expired
    # What a step waited is not its length; the next phase begins at nothing.
    now.enter("step", step=4)
    assert now.step_s == 5.0
    for _ in range(4):
        assert not look(1.0, collective=False, others_get_on=False).expired
    assert look(1.0, collective=False, others_get_on=False).expired
    now.enter("close", step=5)
    assert now.step_s == 5.0


@pytest.mark.parametrize("name", hangs._WAITING)
def test_every_name_for_waiting_is_a_module_or_a_function(name):
    assert pkgutil.resolve_name(name)


def test_limits_that_a_collective_does_not_wait_for_are_known_and_by_default_there_are_none():
    assert limits_beyond(EngineConfig().timeout_s, limits=WatchdogConfig()) == []
    limits = WatchdogConfig(step_s=0, checkpoint_s=600, evaluation_s=599)
    assert limits_beyond(600, limits=limits) == ["setup_s = 1800", "first_step_s = 1800", "step_s = 0", "checkpoint_s = 600"]


def seen_from_a_thread(observer, limits):
    reports = []
    thread = threading.Thread(target=lambda: reports.append(observer.look(limits)))
    thread.start()
    thread.join()
    return reports[0]


def test_a_collective_is_known_by_the_module_of_a_frame_and_its_place_is_who_called_it(monkeypatch):
    observer, limits, seen, looked = Observer(Phases(), beat_s=1.0), WatchdogConfig(), [], threading.Event()

    def look():
        seen.append(observer.look(limits))
        looked.set()

    def waiting():
        looked.clear()
        threading.Timer(0.05, look).start()
        return looked.wait

    # As a collective waits: in a function that is not Python's, or of a library below it.
    monkeypatch.setattr(collectives, "size", waiting())
    collectives.gather(1)
    monkeypatch.setattr(collectives, "size", lambda: 1)
    with collectives.together():
        assert waiting()(10)
    # Work of its own that a function for waiting has called.
    monkeypatch.setattr(collectives, "size", lambda: waiting()(10))
    collectives.gather(1)
    assert [report.collective for report in seen] == [True, False, False]
    assert {report.place for report in seen} == {"the start"}


def test_the_place_is_the_innermost_function_of_ours_with_its_line():
    now = Phases()

    class Slow:
        def __format__(self, _):
            reports.append(seen_from_a_thread(Observer(now, beat_s=1.0), WatchdogConfig()))
            return "slow"

    reports = []
    with pytest.raises(KeyError):
        limit_s(type("Name", (str,), {"__hash__": lambda self: hash(f"{Slow()}")})(), limits=WatchdogConfig(), step_s=0.0)
    assert reports[0].place.startswith("engine.phases.limit_s, line ") and not reports[0].collective


def test_the_stacks_are_those_of_all_threads_the_main_one_first():
    done = threading.Event()

    def a_function_of_another_thread():
        done.wait(10)

    other = threading.Thread(target=a_function_of_another_thread, name="other")
    other.start()
    texts = []
    writer = threading.Thread(target=lambda: texts.append(stacks("rank 3")))
    writer.start()
    writer.join()
    done.set()
    other.join()
    assert texts[0].splitlines()[0].endswith("  rank 3")
    assert texts[0].index("thread MainThread") < texts[0].index("thread other")
    assert "in test_the_stacks" in texts[0] and "in a_function_of_another_thread" in texts[0] and "in stacks" not in texts[0]


def test_writing_gives_up_in_time_and_forgives_a_disk_that_fails(tmp_path, capfd):
    began = time.monotonic()
    write_within(0.2, tmp_path / "logs" / "a.txt", lambda: time.sleep(2.0) or "late")
    assert time.monotonic() - began < 1.0
    write_within(5.0, tmp_path / "logs" / "b.txt", lambda: "in time\n")
    assert (tmp_path / "logs" / "b.txt").read_text() == "in time\n"
    write_within(5.0, tmp_path / "logs" / "b.txt" / "c.txt", lambda: "nowhere")
    write_within(5.0, None, lambda: "to a person\n")
    assert capfd.readouterr().err == "to a person\n"


def test_the_watch_needs_no_torch():
    code = "import hope_pt.engine.peers, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
