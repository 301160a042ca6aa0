"""Signals and the files STOP and SAVE: the run ends or saves at a step, and what continues it computes what one session would have."""

import json
import os
import signal
import subprocess
import sys
import threading

import pytest

from hope_pt import train
from hope_pt.checkpoint import load_newest
from hope_pt.checkpoint.manifest import list_steps
from hope_pt.config.schema import CheckpointConfig, EvalConfig
from hope_pt.data import Loader, open_source
from hope_pt.engine import Launch
from hope_pt.report import metrics
from hope_pt.signals import STOP_SIGNALS, noted, shielded
from hope_pt.testing.configs import tiny_run
from hope_pt.train.hooks.base import StepRecord
from hope_pt.train.hooks.checkpoint import CheckpointHook
from hope_pt.train.wishes import Wishes

STEPS = 12


def settings(out, *, num_workers=0):
    config = tiny_run(steps=STEPS, seq_len=32)
    return config.model_copy(
        update={
            "out": str(out),
            "data": config.data.model_copy(update={"num_workers": num_workers}),
            "checkpoint": CheckpointConfig(every=0),
            "eval": EvalConfig(every=5, at_start=False, sequences=2, diagnostics_every=0, levels_every=3),
        }
    )


def curve(config):
    records = metrics.read(f"{config.out}/{config.name}/metrics.jsonl")
    clocks = {"tokens_per_s", "data_s", "wall_s", "time"}
    return [{key: value for key, value in record.items() if key not in clocks and "_s" not in key} for record in records]


@pytest.fixture
def after_step(monkeypatch):
    """Calls functions of this process after given steps, before the ranks agree."""
    calls = {}
    plain = Wishes.after_step

    def wrapped(self, record):
        calls.pop(record.step, lambda: None)()
        plain(self, record)

    monkeypatch.setattr(Wishes, "after_step", wrapped)
    return calls


@pytest.mark.parametrize("number", sorted(STOP_SIGNALS), ids=STOP_SIGNALS.get)
def test_a_signal_ends_the_run_after_a_checkpoint_and_it_continues_exactly(number, tmp_path, after_step):
    whole, config = settings(tmp_path / "whole"), settings(tmp_path / "stopped")
    train.run(whole)
    before = signal.getsignal(number)
    after_step[7] = lambda: os.kill(os.getpid(), number)
    result = train.run(config, launch=Launch(attempt=3))
    assert (result.steps, result.stopped) == (7, STOP_SIGNALS[number])
    assert signal.getsignal(number) == before
    status = json.loads((result.path / "status.json").read_text())
    assert {key: status[key] for key in ("state", "reason", "step", "checkpoint", "attempt", "num_steps")} == {
        "state": "stopped",
        "reason": STOP_SIGNALS[number],
        "step": 7,
        "checkpoint": 7,
        "attempt": 3,
        "num_steps": STEPS,
    }
    assert train.run(config).stopped == ""
    assert json.loads((result.path / "status.json").read_text())["checkpoint"] == STEPS
    assert curve(config) == curve(whole)
    last = load_newest(tmp_path / "whole" / config.name / "checkpoints"), load_newest(result.path / "checkpoints")
    assert [one.meta["engine"] for one in last][0] == [one.meta["engine"] for one in last][1]
    files = [sorted((one.path).glob("*.safetensors")) for one in last]
    assert [file.read_bytes() for file in files[0]] == [file.read_bytes() for file in files[1]]


def test_a_stop_file_ends_the_run_once(tmp_path, after_step):
    config = settings(tmp_path)
    directory = tmp_path / config.name
    after_step[4] = lambda: (directory / "STOP").touch()
    assert train.run(config).stopped == "stop"
    assert not (directory / "STOP").exists() and list_steps(directory / "checkpoints") == [4]
    (directory / "STOP").touch()
    result = train.run(config)
    assert (result.steps, result.stopped) == (4, "stop"), "asked before the first step: it takes none"
    assert train.run(config).steps == STEPS


def test_a_save_file_saves_and_nothing_else(tmp_path, after_step):
    config = settings(tmp_path)
    directory = tmp_path / config.name
    directory.mkdir()
    (directory / "SAVE").touch()
    after_step[5] = lambda: (directory / "SAVE").touch()
    assert train.run(config).stopped == ""
    assert not (directory / "SAVE").exists() and list_steps(directory / "checkpoints") == [1, 5, STEPS]


def test_a_persons_wish_is_stronger_than_a_time_limit(tmp_path):
    record = StepRecord(1, 1.0, 0.1, 1.0, False, 0, 1, 1.0, 0.0, 0.0)
    with noted() as signals:
        wishes = Wishes(tmp_path, signals=signals)
        os.kill(os.getpid(), signal.SIGUSR1)
        wishes.after_step(record)
        assert wishes.reason == "usr1"
        (tmp_path / "STOP").touch()
        wishes.after_step(record)
        assert wishes.reason == "stop"
        os.kill(os.getpid(), signal.SIGTERM)
        wishes.after_step(record)
        assert wishes.reason == "term"
        os.kill(os.getpid(), signal.SIGUSR2)
        wishes.after_step(record)
        assert wishes.reason == "term"


def test_a_stop_file_that_comes_after_the_agreement_stops_the_next_session(tmp_path, after_step, monkeypatch):
    config = settings(tmp_path)
    directory = tmp_path / config.name
    after_step[4] = lambda: os.kill(os.getpid(), signal.SIGUSR1)
    saved = CheckpointHook.after_step

    def late(self, record):
        if self._wishes.reason:
            (directory / "STOP").touch()
        saved(self, record)

    monkeypatch.setattr(CheckpointHook, "after_step", late)
    assert train.run(config).stopped == "usr1"
    assert train.run(config).stopped == "stop"


def test_a_run_that_is_asked_to_stop_measures_when_it_continues(tmp_path, after_step):
    """What was due at that step is measured by the next session, and the lines are those of one session."""
    whole, config = settings(tmp_path / "whole"), settings(tmp_path / "stopped")
    train.run(whole)
    after_step[5] = lambda: os.kill(os.getpid(), signal.SIGUSR1)
    train.run(config)
    assert not any("eval/loss" in record for record in curve(config))
    train.run(config)
    assert curve(config) == curve(whole) and sum("eval/loss" in record for record in curve(config)) == 3


def test_a_wish_during_the_measurements_before_the_first_step_is_heard(tmp_path, monkeypatch):
    config = settings(tmp_path)
    monkeypatch.setattr(CheckpointHook, "start", lambda self, step: os.kill(os.getpid(), signal.SIGUSR1))
    result = train.run(config)
    assert (result.steps, result.stopped) == (0, "usr1")


def test_a_stop_at_the_last_step_is_a_run_that_is_done(tmp_path, after_step):
    config = settings(tmp_path)
    after_step[STEPS] = lambda: (tmp_path / config.name / "STOP").touch()
    result = train.run(config)
    assert (result.steps, result.stopped) == (STEPS, "")
    assert json.loads((result.path / "status.json").read_text())["state"] == "done"
    assert not (result.path / "STOP").exists()


def test_reader_processes_do_not_see_the_signals_and_end_with_their_loader():
    config = tiny_run(seq_len=32).data.model_copy(update={"num_workers": 2})
    source = open_source(config, split="train", vocab_size=tiny_run().model.vocab_size)
    loader = Loader(source, config=config, global_batch_size=2)
    processes = loader._pool._processes
    next(loader)
    for process in processes:
        for number in STOP_SIGNALS:
            os.kill(process.pid, number)
    for _ in range(6):
        next(loader)
    assert all(process.is_alive() for process in processes)
    loader.close()
    assert not any(process.is_alive() for process in processes)


def test_a_signal_that_comes_while_processes_are_started_is_not_lost():
    received = []
    before = signal.signal(signal.SIGUSR1, lambda number, frame: received.append(number))
    try:
        with shielded():
            os.kill(os.getpid(), signal.SIGUSR1)
            child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(30)"])
        assert received == [signal.SIGUSR1]
        child.send_signal(signal.SIGTERM)
        with pytest.raises(subprocess.TimeoutExpired):
            child.wait(0.5)
        child.kill()
        child.wait()
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_a_run_in_another_thread_has_no_signals_and_files_still_work(tmp_path, after_step):
    config, results = settings(tmp_path), []
    after_step[3] = lambda: (tmp_path / config.name / "STOP").touch()
    thread = threading.Thread(target=lambda: results.append(train.run(config)))
    thread.start()
    thread.join()
    assert results[0].steps == 3
