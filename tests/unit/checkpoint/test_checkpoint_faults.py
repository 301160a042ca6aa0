"""The short lane of tools/checkpoint_faults.py, and what that tool does not draw: a load gives exactly what was saved, or says why not."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hope_pt import checkpoint
from hope_pt.checkpoint.manifest import describe, write_manifest
from hope_pt.engine.sharding import Shard
from hope_pt.errors import CheckpointError

ROOT = Path(__file__).resolve().parents[3]
OLD, NEW = 400, 500


def test_twenty_faults_of_two_ranks_and_of_the_plain_library(tmp_path):
    paths = os.pathsep.join(str(ROOT / part) for part in (".", "kernels", "data_prep"))
    command = [sys.executable, "-W", "ignore", "-m", "tools.checkpoint_faults", "--trials", "20", "--out", str(tmp_path / "result.json")]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=110, env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stdout + done.stderr
    stores = json.loads((tmp_path / "result.json").read_text())["stores"]
    ours, plain = stores["hope_pt"], stores["torch.distributed.checkpoint"]
    assert ours["violations"]["all"] == 0
    assert sum(seen["right"] for seen in ours["kinds"].values()) == 20
    assert sum(seen["trials"] for seen in plain["kinds"].values()) == 20


@pytest.fixture
def root(tmp_path):
    for step in (OLD, NEW):
        shards = [Shard("model.a", torch.full((3, 2), float(step)))]
        checkpoint.save(tmp_path / "root", step=step, shards=shards, meta={"step": step}, layout="", keep=5, keep_every=0)
    return tmp_path / "root"


def test_a_whole_directory_under_another_steps_name_is_refused(root):
    shutil.rmtree(root / f"step-{NEW:08d}")
    shutil.copytree(root / f"step-{OLD:08d}", root / f"step-{NEW:08d}")
    assert checkpoint.load_newest(root).step == OLD
    with pytest.raises(CheckpointError, match="manifest.json is that of step 400"):
        checkpoint.load(root / f"step-{NEW:08d}")


def test_a_file_that_is_not_in_the_manifest_is_refused(root):
    """The reader takes names and places from the headers of all files, so one too many would be read."""
    newest = root / f"step-{NEW:08d}"
    shard = next((root / f"step-{OLD:08d}").glob("*.safetensors"))
    shutil.copyfile(shard, newest / "rank-00001.safetensors")
    assert checkpoint.load_newest(root).step == OLD
    with pytest.raises(CheckpointError, match="rank-00001.safetensors is not in the manifest"):
        checkpoint.load(newest)


def test_a_pickle_is_never_opened(root, tmp_path):
    """A checkpoint from a stranger may have a perfect manifest; what its file is called does not make it one that is unpickled."""
    newest = root / f"step-{NEW:08d}"
    shard = next(newest.glob("*.safetensors"))
    evil = f"cos\nsystem\n(S'touch {tmp_path / 'executed'}'\ntR."
    shard.write_text(evil)
    (newest / ".metadata").write_text(evil)
    files = {path.name: describe(path) for path in newest.iterdir() if path.name != "manifest.json"}
    write_manifest(newest, step=NEW, layout="", files=files)
    found = checkpoint.load_newest(root)
    assert found.step == NEW
    with pytest.raises(CheckpointError, match="step-00000500: cannot be read"):
        found.tensors()
    with pytest.raises(CheckpointError, match="step-00000500: cannot be read"):
        found.read([Shard("model.a", torch.zeros(3, 2))])
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("content", [b"", b"step-00000400\n", b"\xff\xfe", b"../../etc\n"])
def test_the_pointer_is_only_a_hint(content, root):
    (root / "latest").write_bytes(content)
    assert checkpoint.load_newest(root).step == NEW
