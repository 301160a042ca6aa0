"""A writer that dies at any fsync, rename or removal, and a disk that is full at any of them, costs at most the newest checkpoint."""

import errno
import os
import shutil

import pytest
import torch

from hope_pt import checkpoint
from hope_pt.engine.sharding import Shard
from hope_pt.errors import CheckpointError

POINTS = ("fsync", "rename", "replace", "rmdir", "unlink")


def tensors_of(step: int) -> dict[str, torch.Tensor]:
    return {"model.a": torch.full((3, 3), float(step)), "optim.a": torch.full((2,), step / 3)}


def save(root, step: int, *, tensors=None, meta=None, keep: int = 2):
    shards = [Shard(name, tensor) for name, tensor in (tensors or tensors_of(step)).items()]
    return checkpoint.save(root, step=step, shards=shards, meta=meta or {"step": step}, layout="", keep=keep, keep_every=0)


def at_call(number: int, *, action, after: bool):
    """Patches the system calls of a save in this process so that `action` happens at the `number`-th of them; returns a counter."""
    calls = [0]

    def wrap(name):
        real = getattr(os, name)

        def call(*arguments, **options):
            calls[0] += 1
            if calls[0] == number and not after:
                action()
            result = real(*arguments, **options)
            if calls[0] == number and after:
                action()
            return result

        return call

    return calls, {name: wrap(name) for name in POINTS}


def count_calls(root, monkeypatch) -> int:
    calls, patches = at_call(0, action=lambda: None, after=False)
    with monkeypatch.context() as patch:
        for name, call in patches.items():
            patch.setattr(os, name, call)
        save(root, 4)
    return calls[0]


@pytest.fixture
def prepared(tmp_path):
    root = tmp_path / "prepared"
    for step in (1, 2, 3):
        save(root, step)
    # A leftover of a dead writer, so that its removal is among the points.
    (root / ".tmp-step-00000004-1").mkdir()
    return root


def check(root, *, at_least: int) -> int:
    loaded = checkpoint.load_newest(root)
    assert loaded.step >= at_least and loaded.meta == {"step": loaded.step}
    assert all(torch.equal(loaded.tensors()[name], value) for name, value in tensors_of(loaded.step).items())
    return loaded.step


def test_a_kill_at_every_point_of_a_save_leaves_a_valid_newest(prepared, tmp_path, monkeypatch):
    shutil.copytree(prepared, tmp_path / "count")
    points = count_calls(tmp_path / "count", monkeypatch)
    assert points >= 12
    seen = set()
    for number in range(1, points + 1):
        for after in (False, True):
            root = tmp_path / f"{number}-{after}"
            shutil.copytree(prepared, root)
            child = os.fork()
            if child == 0:
                _, patches = at_call(number, action=lambda: os._exit(9), after=after)
                for name, call in patches.items():
                    setattr(os, name, call)
                save(root, 4)
                os._exit(0)
            status = os.waitpid(child, 0)[1]
            assert os.waitstatus_to_exitcode(status) == 9, f"the kill at point {number} did not happen"
            seen.add(check(root, at_least=3))
            # The next writer can go on: it cleans up and commits.
            save(root, 5)
            assert check(root, at_least=5) == 5
            assert not list(root.glob(".tmp-*"))
    assert seen == {3, 4}, "both outcomes must occur, or the points do not cover the commit"


def test_a_full_disk_at_every_point_is_one_line_and_keeps_the_last_good_one(prepared, tmp_path, monkeypatch):
    shutil.copytree(prepared, tmp_path / "count")
    points = count_calls(tmp_path / "count", monkeypatch)

    def no_space():
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    for number in range(1, points + 1):
        root = tmp_path / str(number)
        shutil.copytree(prepared, root)
        _, patches = at_call(number, action=no_space, after=False)
        with monkeypatch.context() as patch:
            for name, call in patches.items():
                patch.setattr(os, name, call)
            with pytest.raises(CheckpointError, match="No space left on device") as caught:
                save(root, 4)
        assert "\n" not in str(caught.value)
        check(root, at_least=3)
        assert not list(root.glob(f".tmp-step-00000004-{os.getpid()}"))
        save(root, 5)
        assert check(root, at_least=5) == 5


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root; the injected errors above cover the rest")
def test_a_file_system_that_is_really_full(tmp_path):
    mount = tmp_path / "small"
    mount.mkdir()
    if os.system(f"mount -t tmpfs -o size=400k tmpfs {mount} 2>/dev/null") != 0:
        pytest.skip("this container may not mount")
    try:
        root = mount / "checkpoints"
        big = {"model.a": torch.ones(40_000)}
        save(root, 1, tensors=big, keep=1)
        for step in range(2, 22):
            with pytest.raises(CheckpointError, match="No space left on device.*earlier checkpoints are intact"):
                save(root, step, tensors={**big, "optim.a": torch.ones(40_000)}, keep=1)
            assert sorted(os.listdir(root)) == ["latest", "step-00000001"]
        loaded = checkpoint.load_newest(root)
        assert loaded.step == 1 and torch.equal(loaded.tensors()["model.a"], big["model.a"])
    finally:
        os.system(f"umount {mount}")
