"""The loader: the same global batches for any ranks, workers and resume point; a lost worker is an error, not a hang."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hope_pt.config.schema import DataConfig
from hope_pt.data import Loader, open_source
from hope_pt.errors import ConfigError, DataError

SEQ_LEN = 64
ROOT = Path(__file__).resolve().parents[3]


def setup(corpus, **extra):
    config = DataConfig(path=str(corpus), seq_len=SEQ_LEN, shuffle_block=100, seed=3, **extra)
    return open_source(config, split="train"), config


def take(loader, steps):
    with loader:
        return [next(loader) for _ in range(steps)]


def same(a, b):
    return all(torch.equal(getattr(a, k), getattr(b, k)) for k in vars(a))


def merge(parts):
    """Global batch of the ranks' parts: rank r holds the rows g with g % ranks == r."""
    return torch.stack([p.tokens_BT for p in parts], dim=1).flatten(0, 1)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(dp_size=st.sampled_from([1, 2, 4]), per_rank=st.integers(1, 3), start=st.integers(0, 5000), done=st.integers(0, 4))
def test_global_batches_do_not_depend_on_ranks_or_resume(corpus, dp_size, per_rank, start, done):
    source, config = setup(corpus)
    size = dp_size * per_rank
    whole = take(Loader(source, config=config, global_batch_size=size, start_sample=start), done + 3)[done:]
    begin = start + done * size
    ranks = [
        take(Loader(source, config=config, global_batch_size=size, dp_rank=r, dp_size=dp_size, start_sample=begin), 3)
        for r in range(dp_size)
    ]
    for step in range(3):
        assert torch.equal(merge([r[step] for r in ranks]), whole[step].tokens_BT)


@pytest.mark.parametrize("dp_size, start", [(1, 0), (2, 37)])
def test_workers_give_the_same_batches(corpus, dp_size, start):
    source, config = setup(corpus)
    _, threaded = setup(corpus, num_workers=2)
    place = {"global_batch_size": 8, "dp_rank": dp_size - 1, "dp_size": dp_size, "start_sample": start}
    alone = take(Loader(source, config=config, **place), 7)
    helped = take(Loader(source, config=threaded, **place), 7)
    assert all(same(a, b) for a, b in zip(alone, helped, strict=True))


def test_two_epochs_hold_every_sample_twice_and_consumed_counts(corpus):
    source, config = setup(corpus)
    loader = Loader(source, config=config, global_batch_size=source.num_samples)
    first, second = next(loader), next(loader)
    assert loader.consumed == 2 * source.num_samples
    assert not torch.equal(first.tokens_BT, second.tokens_BT)
    assert sorted(first.tokens_BT.tolist()) == sorted(second.tokens_BT.tolist())


def test_indivisible_batch_is_refused(corpus):
    source, config = setup(corpus)
    with pytest.raises(ConfigError, match="global_batch_size = 9 is not a multiple of the data-parallel degree 2"):
        Loader(source, config=config, global_batch_size=9, dp_size=2)


@pytest.mark.timeout(100)
def test_killed_worker_is_named(corpus):
    source, config = setup(corpus, num_workers=2)
    with Loader(source, config=config, global_batch_size=4) as loader:
        next(loader)
        victim = loader._pool._processes[1]
        os.kill(victim.pid, signal.SIGKILL)
        with pytest.raises(DataError, match=rf"data worker 1 \(pid {victim.pid}\) died with exit code -9"):
            for _ in range(8):
                next(loader)


SCRIPT = """
import sys, time
from hope_pt.config.schema import DataConfig
from hope_pt.data import Loader, open_source
if __name__ == "__main__":
    config = DataConfig(path=sys.argv[1], seq_len=64, num_workers=2)
    loader = Loader(open_source(config, split="train"), config=config, global_batch_size=4)
    next(loader)
    print(*[p.pid for p in loader._pool._processes], flush=True)
    time.sleep(60)
"""


def alive(pid):
    """Is there such a process, other than as a zombie?"""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.timeout(110)
def test_workers_go_with_a_killed_trainer(corpus, tmp_path):
    (tmp_path / "run.py").write_text(SCRIPT)
    trainer = subprocess.Popen([sys.executable, str(tmp_path / "run.py"), str(corpus)], cwd=ROOT, stdout=subprocess.PIPE, text=True,
                               env={**os.environ, "PYTHONPATH": str(ROOT)})  # fmt: skip
    with trainer:
        workers = [int(pid) for pid in trainer.stdout.readline().split()]
        assert len(workers) == 2 and all(map(alive, workers))
        trainer.kill()
    deadline = time.monotonic() + 60
    while any(map(alive, workers)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(map(alive, workers))


@pytest.mark.timeout(100)
def test_error_in_a_worker_arrives_as_it_is(damaged, monkeypatch):
    monkeypatch.setattr("hope_pt.data.shards.CHECK_AT_OPEN_BYTES", 0)
    source, config = setup(damaged, num_workers=1)
    for shard in (damaged / "train").glob("*.mds"):
        shard.write_bytes(b"\0" * shard.stat().st_size)
    with Loader(source, config=config, global_batch_size=4) as loader:
        with pytest.raises(DataError, match=r"data worker 0: shard .* is damaged"):
            next(loader)


@pytest.mark.timeout(100)
def test_a_reader_that_cannot_be_killed_holds_nobody_up(corpus, monkeypatch, caplog):
    source, config = setup(corpus, num_workers=1)
    loader = Loader(source, config=config, global_batch_size=4)
    next(loader)
    (victim,) = loader._pool._processes
    os.kill(victim.pid, signal.SIGSTOP)
    monkeypatch.setattr(victim, "kill", lambda: None)
    began = time.monotonic()
    loader.close()
    took = time.monotonic() - began
    os.kill(victim.pid, signal.SIGKILL)
    assert took < 10
    assert f"hope-data-worker-0 (pid {victim.pid}) does not die of SIGKILL" in caplog.text


@pytest.mark.timeout(100)
def test_closed_loader_leaves_no_process(corpus):
    source, config = setup(corpus, num_workers=2)
    loader = Loader(source, config=config, global_batch_size=4)
    processes = loader._pool._processes
    next(loader)
    loader.close()
    deadline = time.monotonic() + 30
    while any(p.is_alive() for p in processes) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(p.is_alive() for p in processes)
