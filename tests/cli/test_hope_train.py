"""`hope train` as a user meets it: a run, its continuation, and each mistake exits 2 with one line and nothing damaged."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hope_pt import checkpoint, cli
from hope_pt.report import metrics
from hope_pt.train.lock import RunLock

ROOT = Path(__file__).resolve().parents[2]
CLOCKS = ("tokens_per_s", "data_s", "wall_s", "time")


def timeless(path) -> list[dict]:
    return [{key: value for key, value in record.items() if key not in CLOCKS} for record in metrics.read(path)]


def contents(directory) -> dict[str, bytes]:
    """Every file of a run that a refused command must not change: all but the log and the lock."""
    files = (path for path in directory.rglob("*") if path.is_file() and path.name != "lock" and path.parent.name != "logs")
    return {str(path.relative_to(directory)): path.read_bytes() for path in files}


def drop_after(run, *, step: int) -> None:
    """Makes a copied run look as if it had been killed after `step`."""
    for path in (run / "checkpoints").glob("step-*"):
        if int(path.name[5:]) > step:
            shutil.rmtree(path)


def test_a_run_leaves_what_it_should(finished):
    names = {path.name for path in finished.iterdir()}
    assert names == {
        "checkpoints", "code.txt", "config.toml", "lock", "logs", "metrics.jsonl", "status.json", "tokenizer.model",
    }  # fmt: skip
    records = metrics.read(finished / "metrics.jsonl")
    training = [record for record in records if "loss" in record]
    assert [record["step"] for record in training] == [1, 2, 3, 4, 5, 6]
    assert [record["tokens"] for record in training] == [4 * 48 * step for step in range(1, 7)]
    assert [record["step"] for record in records if "eval/bits_per_byte" in record] == [0, 3, 6]
    assert [record["step"] for record in records if "eval/trigram_bits_per_byte" in record] == [0]
    assert [record["step"] for record in records if "memory/layer1/drift" in record] == [0, 2, 4, 6]
    assert json.loads((finished / "status.json").read_text())["state"] == "done"
    assert checkpoint.load_newest(finished / "checkpoints").meta["consumed_samples"] == 24


def test_a_finished_run_has_nothing_to_do(run_copy, settings):
    before = contents(run_copy)
    assert cli.main(["train", str(settings), f"out={run_copy.parent}"]) == 0
    assert contents(run_copy) == before


@pytest.mark.parametrize("step", [2, 4])
def test_a_run_that_was_stopped_continues_to_the_same_bits(step, run_copy, finished, settings):
    drop_after(run_copy, step=step)
    assert cli.main(["train", str(settings), f"out={run_copy.parent}"]) == 0
    assert timeless(run_copy / "metrics.jsonl") == timeless(finished / "metrics.jsonl")
    ours, theirs = (checkpoint.load_newest(run / "checkpoints") for run in (run_copy, finished))
    assert ours.step == theirs.step == 6
    assert all(theirs.tensors()[name].equal(tensor) for name, tensor in ours.tensors().items())


def test_a_run_killed_before_its_first_checkpoint_starts_again(run_copy, finished, settings):
    shutil.rmtree(run_copy / "checkpoints")
    assert cli.main(["train", str(settings), f"out={run_copy.parent}"]) == 0
    assert timeless(run_copy / "metrics.jsonl") == timeless(finished / "metrics.jsonl")


def test_a_damaged_checkpoint_is_passed_over_and_said(run_copy, finished, settings, capsys):
    victim = next((run_copy / "checkpoints" / "step-00000006").glob("*.safetensors"))
    data = bytearray(victim.read_bytes())
    data[-7] ^= 4
    victim.write_bytes(data)
    assert cli.main(["train", str(settings), f"out={run_copy.parent}"]) == 0
    said = capsys.readouterr().err
    assert f"step-00000006: {victim.name} has sha256" in said and "falling back to" in said
    assert timeless(run_copy / "metrics.jsonl") == timeless(finished / "metrics.jsonl")
    assert sorted(path.name for path in (run_copy / "checkpoints").glob("damaged-*")) == ["damaged-step-00000006"]


def test_a_longer_run_continues_where_the_schedule_allows(run_copy, settings, capsys):
    drop_after(run_copy, step=4)
    assert cli.main(["train", str(settings), f"out={run_copy.parent}", "train.steps=8"]) == 0
    assert metrics.series(metrics.read(run_copy / "metrics.jsonl"), key="loss")[0] == list(range(1, 9))


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("optim.lrr=1", "optim.lrr .*unknown key; did you mean optim.lr"),
        ("optim.lr=fast", "optim.lr = \"fast\" .*expected a number"),
        ("train.steps=2.5", "train.steps = 2.5 .*expected an integer"),
        ("model.num_heads=3", "num_heads = 3 does not divide width = 16"),
        ("data.seq_len=99", "99"),
        ("model.vocab_size=200", "model.vocab_size = 200"),
        ("engine.tensor_parallel=2", "groups of .* = 2; start a multiple of 2"),
        ("engine.micro_batch_size=3", "not a multiple"),
    ],
)  # fmt: skip
def test_a_wrong_key_or_value_is_one_line(override, expected, settings, tmp_path, fails):
    line = fails("train", settings, f"out={tmp_path}", override)
    assert re.search(expected, line), line
    assert not (tmp_path / "run").exists()


def test_no_configuration_and_no_data(settings, tmp_path, fails):
    assert "no such configuration" in fails("train", tmp_path / "absent.toml")
    assert str(tmp_path / "nowhere") in fails("train", settings, f"out={tmp_path}", f'data.path="{tmp_path / "nowhere"}"')
    assert os.listdir(tmp_path) == []


def test_missing_and_damaged_shards(settings, cli_corpus, tmp_path, fails):
    copy = shutil.copytree(cli_corpus, tmp_path / "corpus")
    shard = next((copy / "train").glob("shard*"))
    whole = shard.read_bytes()
    shard.write_bytes(whole[:5000] + bytes([whole[5000] ^ 1]) + whole[5001:])
    assert shard.name in fails("train", settings, f"out={tmp_path}", f'data.path="{copy}"')
    shard.unlink()
    assert shard.name in fails("train", settings, f"out={tmp_path}", f'data.path="{copy}"')
    assert not list(tmp_path.glob("run/checkpoints/*"))


def test_another_configuration_or_other_data_is_refused_on_resume(run_copy, settings, other_corpus, fails):
    drop_after(run_copy, step=4)
    before = contents(run_copy)
    line = fails("train", settings, f"out={run_copy.parent}", "optim.lr=0.5", "train.seed=1")
    assert "optim.lr: 0.01 -> 0.5; train.seed: 0 -> 1" in line and "another name" in line
    line = fails("train", settings, f"out={run_copy.parent}", f'data.path="{other_corpus}"')
    assert line.count("fingerprint") == 2 and "up to step 4" in line
    assert contents(run_copy) == before


def test_another_configuration_is_refused_before_the_first_checkpoint_too(run_copy, settings, fails):
    shutil.rmtree(run_copy / "checkpoints")
    assert "optim.lr: 0.01 -> 0.5" in fails("train", settings, f"out={run_copy.parent}", "optim.lr=0.5")


def test_a_second_writer_is_refused(run_copy, settings, fails):
    holder = os.fork()
    if holder == 0:
        RunLock(run_copy / "lock")
        (run_copy.parent / "ready").touch()
        time.sleep(60)
        os._exit(0)
    try:
        while not (run_copy.parent / "ready").exists():
            pass
        before = contents(run_copy)
        assert f"is being written by process {holder}" in fails("train", settings, f"out={run_copy.parent}")
        assert contents(run_copy) == before
    finally:
        os.kill(holder, 9)
        os.waitpid(holder, 0)


def test_a_run_that_diverges_exits_93_and_keeps_its_last_good_state(settings, tmp_path, fails):
    line = fails("train", settings, f"out={tmp_path}", "optim.lr=1e30", "optim.warmup_steps=0", "eval.at_start=false", code=93)
    assert "step " in line and "lower optim.lr" in line
    assert json.loads((tmp_path / "run" / "status.json").read_text())["state"] == "diverged"
    assert "lower optim.lr" in (tmp_path / "run" / "logs" / "rank-0.log").read_text()


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root")
def test_a_full_disk_while_saving_exits_2_and_the_last_good_checkpoint_continues(settings, finished, tmp_path, fails):
    mount = tmp_path / "small"
    mount.mkdir()
    # Room for the run's start and two checkpoints, not for a third beside them.
    size = sum(path.stat().st_size for path in (finished / "checkpoints" / "step-00000002").iterdir())
    if os.system(f"mount -t tmpfs -o size={int(2.6 * size)} tmpfs {mount} 2>/dev/null") != 0:
        pytest.skip("this container may not mount")
    try:
        line = fails("train", settings, f"out={mount}")
        assert "No space left on device" in line and "earlier checkpoints are intact" in line
        kept = sorted(path.name for path in (mount / "run" / "checkpoints").glob("*step-*"))
        assert kept == ["step-00000002", "step-00000004"]
        os.system(f"mount -o remount,size=64m {mount}")
        assert cli.main(["train", str(settings), f"out={mount}"]) == 0
        assert timeless(mount / "run" / "metrics.jsonl") == timeless(finished / "metrics.jsonl")
    finally:
        os.system(f"umount -l {mount}")


def test_help_is_fast_and_loads_no_torch():
    code = "import sys; from hope_pt import cli; cli.parser().format_help(); print({'torch', 'numpy', 'pydantic'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout == "set()\n"
