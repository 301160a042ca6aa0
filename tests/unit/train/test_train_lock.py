"""One writer: a second process is refused by name, a killed one lets go at once, a reused process id is not believed."""

import contextlib
import json
import os
import signal
import time

import pytest

from hope_pt.errors import HopeError, LockedError
from hope_pt.train import directory, lock
from hope_pt.train.lock import RunLock


class Holder:
    """A child process that holds the lock until it is killed, with a child of its own if asked."""

    def __init__(self, path, *, with_child: bool = False):
        ready, say = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            os.setpgid(0, 0)
            RunLock(path)
            if with_child:
                os.fork()
            os.write(say, b"x")
            time.sleep(60)
            os._exit(0)
        assert os.read(ready, 1) == b"x"
        os.close(ready)
        os.close(say)

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)


@pytest.fixture
def holder(tmp_path):
    process = Holder(tmp_path / "lock")
    yield process
    with contextlib.suppress(ProcessLookupError):
        process.kill()


def test_a_second_writer_is_refused_and_the_holder_named(holder, tmp_path):
    with pytest.raises(HopeError, match=f"is being written by process {holder.pid} on "):
        RunLock(tmp_path / "lock")


def test_kill_9_frees_the_lock_at_once(holder, tmp_path):
    holder.kill()
    RunLock(tmp_path / "lock").release()


def test_a_forked_child_does_not_keep_the_lock_of_its_dead_parent(tmp_path):
    holder = Holder(tmp_path / "lock", with_child=True)
    try:
        holder.kill()
        RunLock(tmp_path / "lock").release()
    finally:
        os.killpg(holder.pid, signal.SIGKILL)


def test_a_released_lock_can_be_taken_again_by_the_same_process(tmp_path):
    lock = RunLock(tmp_path / "lock")
    lock.release()
    lock.release()
    RunLock(tmp_path / "lock").release()


@pytest.mark.parametrize("content", ["", "{", "[1]", '{"host": 3}'])
def test_a_torn_record_of_a_dead_holder_is_no_obstacle(content, tmp_path):
    (tmp_path / "lock").write_text(content)
    RunLock(tmp_path / "lock").release()


def test_a_process_id_that_was_used_again_is_not_the_owner(holder, tmp_path):
    # A file system that grants every lock is played by another file with the same record.
    record = json.loads((tmp_path / "lock").read_text())
    (tmp_path / "other").write_text(json.dumps(record))
    with pytest.raises(HopeError, match="is being written by process"):
        RunLock(tmp_path / "other")
    (tmp_path / "other").write_text(json.dumps({**record, "started": record["started"] - 1}))
    RunLock(tmp_path / "other").release()


@pytest.mark.parametrize(("attempt", "code"), [(1, 2), (2, 1)])
def test_a_later_attempt_waits_for_the_lock_of_a_lost_node_and_may_be_repeated(attempt, code, holder, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(directory, "LOST_NODE_S", 0.2)
    monkeypatch.setattr(lock, "_LOOK_S", 0.05)
    with pytest.raises(LockedError, match=f"is being written by process {holder.pid} on ") as refused:
        directory.RunDirectory(tmp_path, attempt=attempt).open(rank=0)
    assert refused.value.exit_code == code
    assert [line.count("waiting up to") for line in caplog.messages] == [1] * (attempt - 1)


def test_a_lock_that_is_freed_meanwhile_is_taken(holder, tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "_LOOK_S", 0.05)
    monkeypatch.setattr(lock.time, "sleep", lambda seconds: holder.kill())
    RunLock(tmp_path / "lock", wait_s=60.0).release()
