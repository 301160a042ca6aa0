"""What is saved comes back bit for bit; retention keeps what it should; damaged checkpoints are passed over and named."""

import json
import logging
import os
import threading

import pytest
import torch

from hope_pt import checkpoint, files
from hope_pt.checkpoint.manifest import _render
from hope_pt.engine.sharding import Shard
from hope_pt.errors import CheckpointError

SHARD_FILE = "rank-00000.safetensors"


def tensors_of(step: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    return {
        "model.a.weight": torch.randn(7, 3, generator=generator),
        "model.b": torch.randn((), generator=generator),
        "optim.a.exp_avg": torch.randn(7, 3, generator=generator, dtype=torch.float64),
        "optim.count": torch.arange(step % 7, 50, dtype=torch.uint8),
        "model.half": torch.randn(5, generator=generator).to(torch.bfloat16),
        "model.flag": torch.tensor([True, False]),
    }


def shards_of(tensors: dict[str, torch.Tensor]) -> list[Shard]:
    return [Shard(name, tensor) for name, tensor in tensors.items()]


def arguments(step: int, *, tensors=None, keep: int = 10, keep_every: int = 0) -> dict:
    shards = shards_of(tensors_of(step) if tensors is None else tensors)
    meta = {"step": step, "loss": 0.1 + step}
    return {"step": step, "shards": shards, "meta": meta, "layout": "", "keep": keep, "keep_every": keep_every}


def save(root, step: int, **options):
    return checkpoint.save(root, **arguments(step, **options))


def steps_in(root) -> list[str]:
    return sorted(path.name for path in root.iterdir() if path.is_dir())


def same(loaded: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    return loaded.keys() == expected.keys() and all(
        loaded[name].dtype == tensor.dtype and torch.equal(loaded[name], tensor) for name, tensor in expected.items()
    )


def test_tensors_and_meta_come_back_bit_for_bit(tmp_path):
    path = save(tmp_path, 500)
    loaded = checkpoint.load_newest(tmp_path)
    assert path == tmp_path / "step-00000500" == loaded.path
    assert (tmp_path / "latest").read_text() == "step-00000500\n"
    assert loaded.step == 500 and loaded.meta == {"step": 500, "loss": 500.1}
    assert same(loaded.tensors(), tensors_of(500))
    assert loaded.tensors(prefix="optim.").keys() == {"optim.a.exp_avg", "optim.count"}


def test_tensors_are_read_in_place(tmp_path):
    save(tmp_path, 5)
    targets = {name: torch.zeros_like(tensor) for name, tensor in tensors_of(5).items()}
    checkpoint.load_newest(tmp_path).read(shards_of(targets))
    assert same(targets, tensors_of(5))


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda wanted: wanted.pop("model.b"), r"0 tensors are missing \(\) and 1 are unknown \(model.b\)"),
        (lambda wanted: wanted.update({"model.c": torch.zeros(2)}), r"1 tensors are missing \(model.c\) and 0 are unknown"),
        (lambda wanted: wanted.update({"model.a.weight": torch.zeros(3, 7)}), r"model.a.weight is \(7, 3\) .* and \(3, 7\)"),
        (lambda wanted: wanted.update({"model.half": torch.zeros(5)}), r"model.half is \(5,\) torch.bfloat16 .* torch.float32 in this"),
    ],
    ids=["one less", "one more", "shape", "dtype"],
)
def test_only_what_is_stored_is_read(change, expected, tmp_path):
    save(tmp_path, 5)
    wanted = {name: torch.zeros_like(tensor) for name, tensor in tensors_of(5).items()}
    change(wanted)
    with pytest.raises(CheckpointError, match=expected):
        checkpoint.load_newest(tmp_path).read(shards_of(wanted))


def test_views_of_one_storage_are_saved_as_their_own_values(tmp_path):
    base = torch.arange(12.0).view(3, 4)
    save(tmp_path, 1, tensors={"m.rows": base[1:], "m.columns": base.T})
    loaded = checkpoint.load_newest(tmp_path).tensors()
    assert torch.equal(loaded["m.rows"], base[1:]) and torch.equal(loaded["m.columns"], base.T)


def test_nothing_there_is_none(tmp_path):
    assert checkpoint.load_newest(tmp_path / "absent") is None
    assert checkpoint.load_newest(tmp_path) is None


def test_no_file_is_a_pickle(tmp_path):
    path = save(tmp_path, 1)
    assert {file.name for file in path.iterdir()} == {"manifest.json", "meta.json", SHARD_FILE}


def test_a_save_in_the_background_counts_once_it_is_advanced_to_its_end(tmp_path, monkeypatch):
    """The writer is held back, as by a slow disk."""
    release, real = threading.Event(), os.fsync

    def slow(descriptor):
        if threading.current_thread().name == "checkpoint":
            assert release.wait(10)
        real(descriptor)

    monkeypatch.setattr(os, "fsync", slow)
    saving = checkpoint.Saving(tmp_path, **arguments(8))
    assert not saving.advance(wait=False) and checkpoint.load_newest(tmp_path) is None
    release.set()
    assert saving.advance(wait=True)
    loaded = checkpoint.load_newest(tmp_path)
    assert loaded.step == 8 and same(loaded.tensors(), tensors_of(8))


def test_an_abandoned_save_leaves_only_what_the_next_one_removes(tmp_path):
    save(tmp_path, 1)
    saving = checkpoint.Saving(tmp_path, **arguments(2))
    saving.abandon()
    del saving
    assert checkpoint.load_newest(tmp_path).step == 1
    save(tmp_path, 3)
    assert sorted(os.listdir(tmp_path)) == ["latest", "step-00000001", "step-00000003"]


def test_retention_keeps_the_newest_and_the_multiples(tmp_path):
    for step in range(10, 80, 10):
        save(tmp_path, step, keep=2, keep_every=30)
    assert steps_in(tmp_path) == ["step-00000030", "step-00000060", "step-00000070"]


def test_an_old_checkpoint_stays_if_the_new_one_reads_back_wrong(tmp_path, monkeypatch):
    save(tmp_path, 1, keep=1)
    real = files.replace_text

    def flip_after_commit(path, *, text):
        real(path, text=text)
        victim = path.parent / text.strip() / SHARD_FILE
        data = bytearray(victim.read_bytes())
        data[-1] ^= 1
        victim.write_bytes(data)

    monkeypatch.setattr("hope_pt.checkpoint.write.replace_text", flip_after_commit)
    with pytest.raises(CheckpointError, match=f"{SHARD_FILE} has sha256"):
        save(tmp_path, 2, keep=1)
    assert checkpoint.load_newest(tmp_path).step == 1


def test_fallback_names_what_was_wrong(tmp_path, caplog):
    save(tmp_path, 1)
    victim = save(tmp_path, 2) / SHARD_FILE
    victim.write_bytes(victim.read_bytes()[:-1])
    with caplog.at_level(logging.WARNING):
        assert checkpoint.load_newest(tmp_path).step == 1
    assert f"step-00000002: {SHARD_FILE} has" in caplog.text and "falling back to" in caplog.text


def test_only_damaged_checkpoints_are_an_error_not_a_fresh_start(tmp_path):
    (save(tmp_path, 1) / "meta.json").unlink()
    with pytest.raises(CheckpointError, match="none of the 1 checkpoints .* meta.json is missing"):
        checkpoint.load_newest(tmp_path)


def test_a_missing_newest_directory_is_said(tmp_path, caplog):
    save(tmp_path, 1)
    files.remove_tree(save(tmp_path, 2))
    assert checkpoint.load_newest(tmp_path).step == 1
    assert "names 'step-00000002', which is not there" in caplog.text


def test_a_damaged_checkpoint_of_the_same_step_makes_room_and_a_valid_one_does_not(tmp_path):
    (save(tmp_path, 3) / "meta.json").write_text("{}")
    save(tmp_path, 3)
    assert checkpoint.load_newest(tmp_path).step == 3
    assert steps_in(tmp_path) == ["damaged-step-00000003", "step-00000003"]
    with pytest.raises(CheckpointError, match="exists already"):
        save(tmp_path, 3)
    assert checkpoint.load_newest(tmp_path).step == 3


def test_set_aside_newer_takes_refused_ones_out_of_the_count(tmp_path):
    save(tmp_path, 1)
    (save(tmp_path, 2) / "meta.json").unlink()
    checkpoint.set_aside_newer(tmp_path, step=1)
    save(tmp_path, 3, keep=2)
    assert steps_in(tmp_path) == ["damaged-step-00000002", "step-00000001", "step-00000003"]


def test_leftovers_of_dead_writers_are_removed(tmp_path):
    (tmp_path / ".tmp-step-00000001-99999").mkdir()
    (tmp_path / ".tmp-step-00000001-99999" / "model.safetensors").write_bytes(b"half")
    (tmp_path / ".tmp-latest-99999").write_text("half")
    save(tmp_path, 2)
    assert sorted(os.listdir(tmp_path)) == ["latest", "step-00000002"]


def test_meta_must_be_finite_json(tmp_path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        checkpoint.save(tmp_path, **{**arguments(1), "meta": {"loss": float("nan")}})
    assert os.listdir(tmp_path) == []


def test_another_format_is_refused_by_number(tmp_path):
    path = save(tmp_path, 1) / "manifest.json"
    payload = json.loads(path.read_text())
    del payload["sha256"]
    path.write_text(_render({**payload, "format": 1}))
    with pytest.raises(CheckpointError, match="format 1, this version reads format 2"):
        checkpoint.load(path.parent)
