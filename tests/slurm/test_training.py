"""The real trainer under the real batch scripts: two virtual nodes of two ranks, tensor parallel 2, data parallel 2, gloo.

Every job imports torch four times on the machine's cores, so a scenario takes a minute; the protocol itself is test_protocol.py's.
"""

import json
import os
import random
import signal

import pytest

from tools.slurm_trials import training as tiny
from tools.slurm_trials.stops import by_preemption, by_requeue, by_signal
from tools.slurm_trials.training import curve, finish, weights

pytestmark = pytest.mark.timeout(600)


def settings(steps: int, *, every: int = 4) -> list[str]:
    return [*tiny.settings(steps, every=every), "engine.tensor_parallel=2"]


@pytest.fixture
def training(run):
    """The run with the repository's trainer in place of the stand-in, alone on its virtual nodes."""
    run.command = str(run.root / ".venv" / "bin" / "hope")
    return run


def test_hope_1p3b_trains_on_two_nodes_to_its_end(training):
    finish(training, training.submit(*settings(6)))
    assert [line["step"] for line in curve(training) if "loss" in line] == list(range(1, 7))
    assert "rank 0 at n1:" in training.log and training.actions == ["done"]


@pytest.mark.slow
def test_a_killed_rank_leaves_no_trace_in_the_curve(training, tmp_path):
    """Killed between two checkpoints, at a step that is no multiple of the CMS periods; the uninterrupted run comes after it."""
    job = training.submit(*settings(30))
    training.wait_for_step(7, seconds=200)
    os.kill(random.choice(training.processes()), signal.SIGKILL)
    finish(training, job)
    assert training.actions == ["requeue", "done"]
    killed, found = curve(training), weights(training, 30)
    training.path = tmp_path / "reference"
    finish(training, training.submit(*settings(30)))
    assert curve(training) == killed and weights(training, 30) == found and found


@pytest.mark.slow
def test_a_mistake_of_a_person_is_not_restarted(training):
    job = training.submit(*settings(6), "optim.lrr=1")
    assert training.wait(job, seconds=200) == "FAILED"
    assert training.actions == ["user"] and "did you mean optim.lr" in training.log


@pytest.mark.slow
@pytest.mark.parametrize("stop", [by_signal, by_requeue, by_preemption])
def test_an_agreed_stop_loses_no_step_and_leaves_no_trace(training, tmp_path, stop):
    job = training.submit(*settings(40, every=0))
    training.wait_for_step(7, seconds=200)
    stop(training, job)
    training.wait_for_log("attempt 2 from step", seconds=200)
    finish(training, job)
    resumed = int(training.attempts[-2].partition("step=")[2].split()[0])
    assert resumed >= 7, "without periodic checkpoints only the agreed one can be there"
    stopped, found = curve(training), weights(training, 40)
    training.path = tmp_path / "reference"
    finish(training, training.submit(*settings(40, every=0)))
    assert curve(training) == stopped and weights(training, 40) == found


@pytest.mark.slow
def test_a_stop_file_saves_and_ends_without_a_restart(training):
    job = training.submit(*settings(400, every=0))
    training.wait_for_step(7, seconds=200)
    (training.path / "STOP").touch()
    assert training.wait(job, seconds=200) == "COMPLETED"
    assert training.actions == ["stopped"]
    assert json.loads((training.path / "status.json").read_text())["reason"] == "stop"
