"""220 faults of the disk and of people: a load gives exactly what was saved, or an error; never anything else.

Two checkpoints lie in a directory and one is damaged. The result must be bit-identical to the damaged one (the fault hit nothing that
matters) or to its predecessor, and in the second case the log must name the damaged one.
"""

import logging
import random
import shutil

import pytest
import torch

from hope_pt import checkpoint
from hope_pt.errors import CheckpointError

FAULTS = 220
OLD, NEW = 400, 500


def tensors_of(step: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    return {name: torch.randn(4, 5, generator=generator) for name in ("model.a", "model.b", "optim.a", "rng.torch")}


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    root = tmp_path_factory.mktemp("pristine")
    for step in (OLD, NEW):
        checkpoint.save(root, step=step, tensors=tensors_of(step), meta={"step": step, "x": step / 7}, keep=5, keep_every=0)
    return root


def flip(path, *, draw: random.Random) -> None:
    data = bytearray(path.read_bytes())
    data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    path.write_bytes(data)


def truncate(path, *, draw: random.Random) -> None:
    path.write_bytes(path.read_bytes()[: draw.randrange(path.stat().st_size)])


def append(path, *, draw: random.Random) -> None:
    path.write_bytes(path.read_bytes() + draw.randbytes(draw.randrange(1, 9)))


def delete(path, *, draw: random.Random) -> None:
    path.unlink()


def swap_with_old(path, *, draw: random.Random) -> None:
    other = path.parent.with_name(f"step-{OLD:08d}") / path.name
    shutil.copyfile(other, path)


def zero_page(path, *, draw: random.Random) -> None:
    path.write_bytes(bytes(path.stat().st_size))


@pytest.mark.parametrize("damage", [flip, truncate, append, delete, swap_with_old, zero_page], ids=lambda f: f.__name__)
def test_a_damaged_file_is_never_loaded(damage, pristine, tmp_path, caplog):
    names = sorted(path.name for path in (pristine / f"step-{NEW:08d}").iterdir())
    assert names == ["manifest.json", "meta.json", "model.safetensors", "optim.safetensors", "rng.safetensors"]
    for trial in range(FAULTS // 6 + 1):
        draw = random.Random(f"{damage.__name__} {trial}")
        root = tmp_path / str(trial)
        shutil.copytree(pristine, root)
        name = names[trial % len(names)]
        damage(root / f"step-{NEW:08d}" / name, draw=draw)
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            loaded = checkpoint.load_newest(root)
        assert loaded.step == OLD, f"{name} was damaged and step {loaded.step} was loaded"
        assert loaded.meta == {"step": OLD, "x": OLD / 7}
        assert all(torch.equal(loaded.tensors[key], value) for key, value in tensors_of(OLD).items())
        assert f"step-{NEW:08d}" in caplog.text and name in caplog.text


def test_a_whole_directory_under_another_steps_name_is_refused(pristine, tmp_path):
    root = tmp_path / "root"
    shutil.copytree(pristine, root)
    shutil.rmtree(root / f"step-{NEW:08d}")
    shutil.copytree(root / f"step-{OLD:08d}", root / f"step-{NEW:08d}")
    assert checkpoint.load_newest(root).step == OLD
    with pytest.raises(CheckpointError, match="manifest.json is that of step 400"):
        checkpoint.load(root / f"step-{NEW:08d}")


@pytest.mark.parametrize("content", [b"", b"step-00000400\n", b"\xff\xfe", b"../../etc\n"])
def test_the_pointer_is_only_a_hint(content, pristine, tmp_path):
    root = tmp_path / "root"
    shutil.copytree(pristine, root)
    (root / "latest").write_bytes(content)
    assert checkpoint.load_newest(root).step == NEW
