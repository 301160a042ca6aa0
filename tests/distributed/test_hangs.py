"""A rank that lives but does not get on ends the job: real processes, real collectives, limits of seconds.

Whole runs of training are in `tools/failure_trials.py`.
"""

import datetime
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import types
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from hope_pt.config.schema import WatchdogConfig
from hope_pt.engine import collectives
from hope_pt.engine.hub import Limits
from hope_pt.engine.launch import Launch
from hope_pt.engine.peers import Watch
from hope_pt.errors import HopeError

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(60)]

ROOT = Path(__file__).parents[2]
BEAT_S = 0.25
LIMITS = Limits(beat_s=BEAT_S, silent_s=4.0, unwind_s=1.0, answer_s=1.5)
STEP_S = 2
WATCHDOG = WatchdogConfig(setup_s=30, step_s=STEP_S, step_factor=0, checkpoint_s=3, evaluation_s=30)
DETECTED_S = 5.0
HOST = socket.gethostname()


@dataclass(frozen=True)
class Ended:
    """How a job ended. lines: what each rank wrote; written: hang files by name, with seconds from the start of the job."""

    codes: list[int]
    seconds: float
    lines: list[str]
    written: dict[str, tuple[float, str]]

    @property
    def verdict(self):
        """The line that all ranks have written, once each."""
        said = {line for text in self.lines for line in text.splitlines() if line.startswith("hope: ")}
        assert len(said) == 1 and all(text.count("hope: ") == 1 for text in self.lines), self.lines
        return said.pop().removeprefix("hope: ")


class Job:
    """Forked ranks that call `work(rank, watch)` under a Watch and end as the command line does."""

    def __init__(self, root, work, *, world_size):
        self.root, self.began = root, time.time()
        self.ranks = [self._start(rank, work, world_size) for rank in range(world_size)]

    def _start(self, rank, work, world_size):
        child = os.fork()
        if child:
            return child
        code = 70
        try:
            os.dup2(os.open(self.root / f"rank-{rank}.log", os.O_CREAT | os.O_WRONLY), 2)
            torch.set_num_threads(1)
            launch = Launch(rank=rank, world_size=world_size, master_addr=f"file://{self.root / 'store'}", join_s=10.0)
            with Watch(launch, limits=LIMITS) as watch:
                watch.configure(WATCHDOG, logs=self.root / "logs")
                if world_size > 1:
                    wait = datetime.timedelta(seconds=60)
                    address = f"file://{self.root / 'group'}"
                    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=world_size, timeout=wait)
                with watch.reporting():
                    work(rank, watch)
            code = 0
        except HopeError as error:
            os.write(2, f"hope: {error}\n".encode())
            code = error.exit_code
        except BaseException as error:
            os.write(2, f"{error!r}\n".encode())
        finally:
            os._exit(code)

    def end(self):
        codes = [os.waitstatus_to_exitcode(os.waitpid(rank, 0)[1]) for rank in self.ranks]
        files = {path.name: (path.stat().st_mtime - self.began, path.read_text()) for path in (self.root / "logs").glob("*.txt")}
        lines = [(self.root / f"rank-{rank}.log").read_text() for rank in range(len(self.ranks))]
        return Ended(codes=codes, seconds=time.time() - self.began, lines=lines, written=files)


def steps(watch, rank, *, at_step_3):
    """Steps with a reduction each; before the one of step 3 `at_step_3(rank)`, which says whether to take part in it."""
    for step in range(1000):
        watch.phases.enter("step", step=step)
        if step != 3 or at_step_3(rank):
            collectives.all_true(True)
        time.sleep(0.01)


def a_function_that_hangs():
    threading.Event().wait(50)


def elsewhere(call):
    call()


def of_ours(function):
    """As if it were in a module of the package: what is in a test is no place for the watch."""
    return types.FunctionType(function.__code__, {"__name__": "hope_pt.example"})


def hangs_in(rank_that_hangs):
    def at_step_3(rank):
        if rank == rank_that_hangs:
            a_function_that_hangs()
        return True

    return lambda rank, watch: steps(watch, rank, at_step_3=at_step_3)


@pytest.mark.parametrize(("culprit", "world_size"), [(1, 2), (0, 2), (2, 3)])
def test_a_rank_that_hangs_in_a_step_is_named_with_the_stacks_of_all(tmp_path, culprit, world_size):
    ended = Job(tmp_path, hangs_in(culprit), world_size=world_size).end()
    assert ended.codes == [1] * world_size
    name = f"rank {culprit} of {world_size} ({HOST})"
    assert ended.verdict.startswith(f"{name} hangs: {STEP_S} s in phase step after step 3, in the start"), ended.verdict
    assert ended.verdict.endswith(f"; {world_size - 1} of {world_size} ranks wait; stacks: {tmp_path}/logs/hang.txt")
    assert set(ended.written) == {"hang.txt"} | {f"hang-rank-{rank}.txt" for rank in range(world_size)}
    moment, text = ended.written["hang.txt"]
    assert STEP_S < moment < STEP_S + DETECTED_S
    assert ended.verdict in text and f"{name}: " in text and text.count("waits for other ranks\n") == world_size - 1
    assert "in a_function_that_hangs" in ended.written[f"hang-rank-{culprit}.txt"][1]
    others = [ended.written[f"hang-rank-{rank}.txt"][1] for rank in range(world_size) if rank != culprit]
    assert all("in all_true" in text and "hope-peers" in text for text in others)


@pytest.mark.parametrize("world_size", [2, 3])
def test_a_rank_past_a_collective_is_named_by_a_majority_and_shown_without_one(tmp_path, world_size):
    def at_step_3(rank):
        if rank == 1:
            of_ours(elsewhere)(dist.barrier)  # for the same group as the others
        return True

    ended = Job(tmp_path, lambda rank, watch: steps(watch, rank, at_step_3=at_step_3), world_size=world_size).end()
    assert ended.codes == [1] * world_size
    name = f"rank 1 of 3 ({HOST}) hangs:" if world_size == 3 else f"all ranks wait for each other, at 2 places: rank 0 of 2 ({HOST})"
    assert ended.verdict.startswith(f"{name} {STEP_S} s in phase step after step 3, in ")
    assert "in example.elsewhere, line " in ended.verdict
    assert "in barrier" in ended.written["hang-rank-1.txt"][1] and "in all_true" in ended.written["hang-rank-0.txt"][1]


def test_a_rank_that_is_a_step_ahead_of_the_others_is_named(tmp_path):
    def work(rank, watch):
        alone = [dist.new_group([member]) for member in range(3)][rank]
        pairs = dist.new_group([0, 1])
        for step in range(10):
            watch.phases.enter("step", step=step)
            # At step 3 rank 2 misses the reduction of all, and waits in that of step 4 for the others.
            dist.all_reduce(torch.zeros(1), group=alone)
            if rank < 2:
                dist.all_reduce(torch.zeros(1), group=pairs)
            if step == 3 and rank == 2:
                continue
            dist.barrier() if step == 3 else dist.all_reduce(torch.zeros(1))

    ended = Job(tmp_path, work, world_size=3).end()
    assert ended.verdict.startswith(f"rank 2 of 3 ({HOST}) hangs: {STEP_S} s in phase step after step 4, in the start")


def test_a_checkpoint_has_a_limit_of_its_own(tmp_path):
    def work(rank, watch):
        collectives.all_true(True)
        watch.phases.enter("checkpoint", step=5)
        if rank == 1:
            a_function_that_hangs()
        collectives.all_true(True)

    ended = Job(tmp_path, work, world_size=2).end()
    assert ended.verdict.startswith(f"rank 1 of 2 ({HOST}) hangs: 3 s in phase checkpoint after step 5")
    assert 3.0 < ended.written["hang.txt"][0] < 3.0 + DETECTED_S


def test_ranks_that_wait_for_one_with_a_long_task_of_its_own_raise_no_alarm(tmp_path):
    def work(rank, watch):
        for step in range(2):
            watch.phases.enter("evaluation" if rank == 0 else "step", step=step)
            if rank == 0:
                time.sleep(1.5 * STEP_S)
            collectives.all_true(True)

    ended = Job(tmp_path, work, world_size=3).end()
    assert ended.codes == [0, 0, 0] and not ended.written and ended.seconds > 3.0 * STEP_S, ended


def test_ranks_that_have_waited_for_one_with_a_long_task_have_their_own_time_after_it(tmp_path):
    def work(rank, watch):
        collective_s, values = 0.5 * STEP_S, torch.zeros(1 << 20)
        for step in range(3):
            if rank == 0:
                watch.phases.enter("evaluation", step=step)
                time.sleep(1.5 * STEP_S)
            # The others are in this phase from before; what it does is healthy, and most looks find all ranks in a collective.
            watch.phases.enter("step", step=step)
            end = time.monotonic() + collective_s
            while collectives.broadcast(time.monotonic() < end):
                dist.all_reduce(values)

    ended = Job(tmp_path, work, world_size=3).end()
    assert ended.codes == [0, 0, 0] and not ended.written, ended


def test_a_hang_after_a_long_task_of_one_rank_is_found_at_the_limit_from_then_on(tmp_path):
    def work(rank, watch):
        if rank == 0:
            watch.phases.enter("evaluation", step=0)
            time.sleep(2 * STEP_S)
        watch.phases.enter("step", step=0)
        collectives.all_true(True)
        if rank == 1:
            a_function_that_hangs()
        collectives.all_true(True)

    ended = Job(tmp_path, work, world_size=3).end()
    assert ended.verdict.startswith(f"rank 1 of 3 ({HOST}) hangs: "), ended.verdict
    assert 3 * STEP_S - 1 < ended.written["hang.txt"][0] < 3 * STEP_S + DETECTED_S


def test_a_job_that_is_suspended_and_resumed_raises_no_alarm(tmp_path):
    def work(rank, watch):
        for step in range(40):
            watch.phases.enter("step", step=step)
            collectives.all_true(True)
            time.sleep(0.1)

    job = Job(tmp_path, work, world_size=2)
    time.sleep(2.0)
    for rank in job.ranks:
        os.kill(rank, signal.SIGSTOP)
    time.sleep(STEP_S + LIMITS.silent_s)
    for rank in job.ranks:
        os.kill(rank, signal.SIGCONT)
    ended = job.end()
    assert ended.codes == [0, 0] and not ended.written, ended


@pytest.mark.parametrize("culprit", [0, 1])
def test_a_stopped_rank_is_found_by_its_silence_and_the_others_leave_their_stacks(tmp_path, culprit):
    def at_step_3(rank):
        if rank == culprit:
            time.sleep(3 * BEAT_S)  # it has been heard outside the collective, within its limit
            os.kill(os.getpid(), signal.SIGSTOP)
        return True

    ended = Job(tmp_path, lambda rank, watch: steps(watch, rank, at_step_3=at_step_3), world_size=3).end()
    assert ended.codes == [-signal.SIGKILL if rank == culprit else 1 for rank in range(3)]
    survivors = [rank for rank in range(3) if rank != culprit]
    lines = {ended.lines[rank].splitlines()[-1] for rank in survivors}
    assert len(lines) == 1
    assert lines.pop().startswith(
        f"hope: rank {culprit} of 3 ({HOST}) has been silent for 4 s (stopped, its host lost, or its interpreter "
    )
    # The hub, which writes the table, is a thread of rank 0.
    assert set(ended.written) == {f"hang-rank-{rank}.txt" for rank in survivors} | ({"hang.txt"} if culprit else set())
    assert all("in all_true" in ended.written[f"hang-rank-{rank}.txt"][1] for rank in survivors)
    if culprit:
        assert f"rank 1 of 3 ({HOST}): does not answer; last heard: " in ended.written["hang.txt"][1]


def test_a_rank_stopped_in_a_collective_is_named_because_it_does_not_answer(tmp_path):
    def at_step_3(rank):
        if rank == 0:
            (tmp_path / "hangs").touch()
            a_function_that_hangs()
        return True

    job = Job(tmp_path, lambda rank, watch: steps(watch, rank, at_step_3=at_step_3), world_size=2)
    while not (tmp_path / "hangs").exists():
        time.sleep(0.01)
    # Rank 1 has said that it waits, and rank 0 will be over its limit.
    time.sleep(3 * BEAT_S)
    os.kill(job.ranks[1], signal.SIGSTOP)
    ended = job.end()
    assert ended.codes == [1, -signal.SIGKILL]
    assert f"rank 1 of 2 ({HOST}) hangs: no answer; stacks: " in ended.lines[0]
    assert STEP_S < ended.written["hang.txt"][0] < STEP_S + DETECTED_S
    assert set(ended.written) == {"hang.txt", "hang-rank-0.txt"}


def test_one_process_that_hangs_ends_with_its_stacks(tmp_path):
    def work(rank, watch):
        watch.phases.enter("step", step=9)
        a_function_that_hangs()

    ended = Job(tmp_path, work, world_size=1).end()
    assert ended.codes == [1]
    assert ended.verdict.startswith(f"rank 0 of 1 ({HOST}) hangs: {STEP_S} s in phase step after step 9, in the start")
    assert ended.verdict.endswith(f"; stacks: {tmp_path}/logs/hang-rank-0.txt")
    moment, text = ended.written["hang-rank-0.txt"]
    assert STEP_S < moment < STEP_S + DETECTED_S and "in a_function_that_hangs" in text


def test_one_process_that_gets_on_raises_no_alarm(tmp_path):
    def work(rank, watch):
        for step in range(6):
            watch.phases.enter("step", step=step)
            time.sleep(0.4 * STEP_S)

    ended = Job(tmp_path, work, world_size=1).end()
    assert ended.codes == [0] and not ended.written and ended.seconds > 2 * STEP_S


def test_a_disk_that_does_not_answer_holds_up_neither_the_verdict_nor_the_end(tmp_path):
    (tmp_path / "logs").mkdir()
    for name in ("hang.txt", "hang-rank-0.txt", "hang-rank-1.txt"):
        os.mkfifo(tmp_path / "logs" / name)  # to open it for writing waits for a reader, who never comes
    job = Job(tmp_path, hangs_in(1), world_size=2)
    codes = [os.waitstatus_to_exitcode(os.waitpid(rank, 0)[1]) for rank in job.ranks]
    assert codes == [1, 1] and time.time() - job.began < 20.0
    assert Path(tmp_path / "rank-0.log").read_text().startswith(f"hope: rank 1 of 2 ({HOST}) hangs: ")


@pytest.mark.timeout(130)
def test_training_whose_reader_of_data_is_stuck_ends_with_the_rank_and_the_place_named(tmp_path):
    out = tmp_path / "result.json"
    command = [
        sys.executable,
        "-W",
        "ignore",
        "-m",
        "tools.hang_trials",
        "--only",
        "a reader of data",
        "--only",
        "world_size=2",
        "--out",
        str(out),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    (found,) = json.loads(out.read_text())["trials"]
    assert found["culprit"] == "right" and "in data.loader._Workers.get, line " in found["line"] and found["stacks"] == [0, 1]
