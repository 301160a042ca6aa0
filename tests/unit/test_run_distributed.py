"""The helper that the distributed tests stand on: results by rank, named failures, hard time limits, no orphans."""

import os
import signal
import time

import psutil
import pytest
import torch

from hope_pt.errors import ParallelError
from hope_pt.testing import run_distributed


@pytest.fixture(autouse=True)
def no_orphans():
    """No process outlives the call; a fork server that an earlier test started may go on."""
    before = set(psutil.Process().children(recursive=True))
    yield
    assert not set(psutil.Process().children(recursive=True)) - before


def rank_and_tensor(launch, scale):
    return launch.rank, torch.full((2,), float(launch.rank * scale))


def test_results_come_back_by_rank():
    results = run_distributed(rank_and_tensor, world_size=3, timeout_s=20, args=(10,))
    assert [rank for rank, _ in results] == [0, 1, 2]
    assert [tensor.tolist() for _, tensor in results] == [[0.0, 0.0], [10.0, 10.0], [20.0, 20.0]]


def second_rank_fails(launch):
    if launch.rank == 1:
        raise ValueError("a message from rank one")
    time.sleep(60)


def test_a_failing_rank_is_named_with_its_traceback_and_the_others_end():
    began = time.monotonic()
    with pytest.raises(ParallelError, match=r"^rank 1 of 2 failed:(.|\n)*second_rank_fails(.|\n)*ValueError: a message from rank one"):
        run_distributed(second_rank_fails, world_size=2, timeout_s=50)
    assert time.monotonic() - began < 30


def one_rank_sleeps(launch):
    if launch.rank == 1:
        time.sleep(60)


def test_a_rank_that_hangs_is_killed_and_named():
    began = time.monotonic()
    with pytest.raises(ParallelError, match=r"^ranks \[1\] of 2 were still running after 3.0 s(.|\n)*one_rank_sleeps"):
        run_distributed(one_rank_sleeps, world_size=2, timeout_s=3.0)
    assert time.monotonic() - began < 30


def one_rank_dies(launch):
    if launch.rank == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)


def test_a_rank_that_dies_is_named():
    with pytest.raises(ParallelError, match="rank 0 of 2 died without a result"):
        run_distributed(one_rank_dies, world_size=2, timeout_s=50)


def nested(launch, folder):
    (folder / str(os.getpid())).touch()
    time.sleep(60)


def parent_that_is_killed(launch, folder):
    run_distributed(nested, world_size=2, timeout_s=60, args=(folder,))


def test_no_orphans_when_the_parent_is_killed(tmp_path):
    with pytest.raises(ParallelError, match="still running"):
        run_distributed(parent_that_is_killed, world_size=1, timeout_s=4.0, args=(tmp_path,))
    pids = [int(path.name) for path in tmp_path.iterdir()]
    assert len(pids) == 2
    deadline = time.monotonic() + 10
    while any(psutil.pid_exists(pid) and psutil.Process(pid).status() != "zombie" for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(psutil.pid_exists(pid) and psutil.Process(pid).status() != "zombie" for pid in pids)
