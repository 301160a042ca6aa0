"""Ranks save and load as one: what goes wrong on one of them is the same answer on all, and every byte is read by somebody."""

import errno
import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from hope_pt import checkpoint
from hope_pt.checkpoint import manifest
from hope_pt.engine import Launch, collectives, storage  # noqa: F401  the workers are forks: what is imported here they need not import
from hope_pt.engine.sharding import Shard, slice_of
from hope_pt.errors import CheckpointError, ParallelError
from hope_pt.testing import run_distributed

RANKS = 2


def values_of(step: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    return {"model.rows": torch.randn(4, 6, generator=generator), "model.columns": torch.randn(3, 8, generator=generator)}


def shards_of(step: int, *, index: int, count: int) -> list[Shard]:
    axes = {"model.rows": 0, "model.columns": 1}
    return [
        Shard(name, slice_of(value, axis=axes[name], index=index, count=count).contiguous(), axes[name], index, count)
        for name, value in values_of(step).items()
    ]


def save(root: Path, step: int) -> Path:
    shards = shards_of(step, index=collectives.rank(), count=collectives.size())
    return checkpoint.save(root, step=step, shards=shards, meta={"step": step}, layout="two", keep=9, keep_every=0)


def job(launch: Launch, func, *arguments):
    dist.init_process_group("gloo", init_method=launch.master_addr, rank=launch.rank, world_size=launch.world_size)
    return func(launch.rank, *arguments)


def together(func, *arguments, world_size: int = RANKS) -> list:
    return run_distributed(job, world_size=world_size, timeout_s=60, args=(func, *arguments))


def save_steps(rank: int, root: Path, steps: list[int]) -> list[str]:
    return [str(save(root, step)) for step in steps]


def test_parts_of_two_ranks_are_read_whole_and_as_any_other_parts(tmp_path):
    together(save_steps, tmp_path, [1])
    names = {path.name for path in (tmp_path / "step-00000001").iterdir()}
    assert names == {"manifest.json", "meta.json", "rank-00000.safetensors", "rank-00001.safetensors"}
    found = checkpoint.load_newest(tmp_path)
    assert all(torch.equal(found.tensors()[name], value) for name, value in values_of(1).items())
    for index, count in [(0, 1), (0, 2), (1, 2), (0, 4), (3, 4)]:
        wanted = shards_of(0, index=index, count=count)
        found.read(wanted)
        assert all(torch.equal(mine.data, theirs.data) for mine, theirs in zip(wanted, shards_of(1, index=index, count=count), strict=True))


def fill_the_disk_of_rank_1(rank: int, root: Path) -> str:
    save(root, 1)
    if rank == 1:

        def full(descriptor):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        real, os.fsync = os.fsync, full
    with pytest.raises(CheckpointError) as caught:
        save(root, 2)
    if rank == 1:
        os.fsync = real
    save(root, 3)
    return str(caught.value)


def test_a_full_disk_of_one_rank_ends_the_save_of_all_and_names_it(tmp_path):
    messages = together(fill_the_disk_of_rank_1, tmp_path)
    assert messages[0] == messages[1]
    assert messages[0].startswith(f"rank 1 cannot write {tmp_path}/step-00000002: No space left on device; earlier checkpoints are intact")
    assert sorted(os.listdir(tmp_path)) == ["latest", "step-00000001", "step-00000003"]


def load_and_count(rank: int, root: Path) -> tuple[int, list[str]]:
    hashed = []
    real = manifest._sha256
    manifest._sha256 = lambda path: (hashed.append(f"{path.parent.name}/{path.name}"), real(path))[1]
    return checkpoint.load_newest(root).step, hashed


@pytest.mark.parametrize("damaged", [0, 1])
def test_ranks_divide_the_reading_and_agree_on_what_is_damaged(damaged, tmp_path):
    together(save_steps, tmp_path, [1, 2])
    victim = sorted((tmp_path / "step-00000002").glob("rank-*"))[damaged]
    data = bytearray(victim.read_bytes())
    data[-1] ^= 1
    victim.write_bytes(data)
    (first, by_first), (second, by_second) = together(load_and_count, tmp_path)
    assert first == second == 1
    assert not set(by_first) & set(by_second)
    files = {f"step-00000001/{path.name}" for path in (tmp_path / "step-00000001").iterdir()} - {"step-00000001/manifest.json"}
    assert files <= set(by_first) | set(by_second)


def save_one_part_twice(rank: int, root: Path) -> Path:
    return checkpoint.save(root, step=1, shards=shards_of(1, index=0, count=2), meta={}, layout="", keep=1, keep_every=0)


def test_parts_that_do_not_make_whole_tensors_are_not_saved(tmp_path):
    """A bug, not a mistake of the user's: the first rank raises what megatron says of it, and the job ends."""
    with pytest.raises(ParallelError, match="Invalid access pattern|closed by peer"):
        together(save_one_part_twice, tmp_path)
    assert checkpoint.load_newest(tmp_path) is None


def wait_for_the_slow_rank(rank: int, root: Path) -> list[tuple[bool, bool]]:
    """Rank 1 writes slowly: (advance's answer, committed?) at each boundary; equal on both ranks, and true only at the end."""
    import threading

    held, real = threading.Event(), os.fsync
    if rank == 1:

        def slow(descriptor):
            held.wait(10)
            real(descriptor)

        os.fsync = slow
    shards = shards_of(4, index=rank, count=RANKS)
    saving = checkpoint.Saving(root, step=4, shards=shards, meta={}, layout="", keep=1, keep_every=0)
    seen = []
    for _ in range(3):
        seen.append((saving.advance(wait=False), (root / "step-00000004").exists()))
    held.set()
    seen.append((saving.advance(wait=True), (root / "step-00000004").exists()))
    return seen


def test_a_save_in_the_background_is_committed_when_all_ranks_have_written(tmp_path):
    expected = [(False, False)] * 3 + [(True, True)]
    assert together(wait_for_the_slow_rank, tmp_path) == [expected, expected]
