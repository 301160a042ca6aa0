"""What is saved comes back bit for bit; retention keeps what it should; damaged checkpoints are passed over and named."""

import json
import logging
import os

import pytest
import torch

from hope_pt import checkpoint
from hope_pt.checkpoint import files
from hope_pt.errors import CheckpointError


def tensors_of(step: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    return {
        "model.a.weight": torch.randn(7, 3, generator=generator),
        "model.b": torch.randn((), generator=generator),
        "optim.a.exp_avg": torch.randn(7, 3, generator=generator, dtype=torch.float64),
        "optim.empty": torch.zeros(0, 4),
        "rng.torch": torch.arange(step % 7, 50, dtype=torch.uint8),
        "model.half": torch.randn(5, generator=generator).to(torch.bfloat16),
        "model.flag": torch.tensor([True, False]),
    }


def save(root, step: int, *, keep: int = 10, keep_every: int = 0):
    return checkpoint.save(
        root, step=step, tensors=tensors_of(step), meta={"step": step, "loss": 0.1 + step}, keep=keep, keep_every=keep_every
    )


def steps_in(root) -> list[str]:
    return sorted(path.name for path in root.iterdir() if path.is_dir())


def test_tensors_and_meta_come_back_bit_for_bit(tmp_path):
    path = save(tmp_path, 500)
    loaded = checkpoint.load_newest(tmp_path)
    assert path == tmp_path / "step-00000500" == loaded.path
    assert (tmp_path / "latest").read_text() == "step-00000500\n"
    assert loaded.step == 500 and loaded.meta == {"step": 500, "loss": 500.1}
    expected = tensors_of(500)
    assert loaded.tensors.keys() == expected.keys()
    for name, tensor in expected.items():
        assert loaded.tensors[name].dtype == tensor.dtype and torch.equal(loaded.tensors[name], tensor), name


def test_views_of_one_storage_are_saved_as_their_own_values(tmp_path):
    base = torch.arange(12.0).view(3, 4)
    checkpoint.save(tmp_path, step=1, tensors={"m.rows": base[1:], "m.columns": base.T}, meta={}, keep=1, keep_every=0)
    loaded = checkpoint.load_newest(tmp_path).tensors
    assert torch.equal(loaded["m.rows"], base[1:]) and torch.equal(loaded["m.columns"], base.T)


def test_nothing_there_is_none(tmp_path):
    assert checkpoint.load_newest(tmp_path / "absent") is None
    assert checkpoint.load_newest(tmp_path) is None


def test_no_file_is_a_pickle(tmp_path):
    path = save(tmp_path, 1)
    assert {file.suffix for file in path.iterdir()} == {".json", ".safetensors"}


def test_retention_keeps_the_newest_and_the_multiples(tmp_path):
    for step in range(10, 80, 10):
        save(tmp_path, step, keep=2, keep_every=30)
    assert steps_in(tmp_path) == ["step-00000030", "step-00000060", "step-00000070"]


def test_an_old_checkpoint_stays_if_the_new_one_reads_back_wrong(tmp_path, monkeypatch):
    save(tmp_path, 1, keep=1)
    real = files.replace_text

    def flip_after_commit(path, *, text):
        real(path, text=text)
        victim = path.parent / text.strip() / "model.safetensors"
        data = bytearray(victim.read_bytes())
        data[-1] ^= 1
        victim.write_bytes(data)

    monkeypatch.setattr("hope_pt.checkpoint.write.replace_text", flip_after_commit)
    with pytest.raises(CheckpointError, match="model.safetensors has sha256"):
        save(tmp_path, 2, keep=1)
    assert checkpoint.load_newest(tmp_path).step == 1


def test_fallback_names_what_was_wrong(tmp_path, caplog):
    save(tmp_path, 1)
    victim = save(tmp_path, 2) / "optim.safetensors"
    victim.write_bytes(victim.read_bytes()[:-1])
    with caplog.at_level(logging.WARNING):
        assert checkpoint.load_newest(tmp_path).step == 1
    assert "step-00000002: optim.safetensors has" in caplog.text and "falling back to" in caplog.text


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
        checkpoint.save(tmp_path, step=1, tensors={}, meta={"loss": float("nan")}, keep=1, keep_every=0)
    assert os.listdir(tmp_path) == []


def test_another_format_is_refused_by_number(tmp_path):
    path = save(tmp_path, 1) / "manifest.json"
    from hope_pt.checkpoint.manifest import _render

    payload = json.loads(path.read_text())
    del payload["sha256"]
    path.write_text(_render({**payload, "format": 2}))
    with pytest.raises(CheckpointError, match="format 2, this version reads format 1"):
        checkpoint.load(path.parent)
