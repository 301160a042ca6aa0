"""Every layout of docs/layouts.md is a layout: its arithmetic holds, and the real engine builds it for its whole world size."""

import re
from pathlib import Path

import pytest

from hope_pt.config import load
from hope_pt.launch.dry_run import dry_run
from hope_pt.launch.weights import held
from hope_pt.nn import count_parameters

ROOT = Path(__file__).resolve().parents[3]
ROW = re.compile(r"^\| (\w+_(?:170m|340m|760m|1p3b)) \| (\d+) \| ([^|]*) \|", re.MULTILINE)
TABLE = [
    (name, int(gpus), re.findall(r"[\w.]+=\w+", changes)) for name, gpus, changes in ROW.findall((ROOT / "docs/layouts.md").read_text())
]


def test_the_table_has_every_configuration_at_every_size():
    names = {path.stem for path in (ROOT / "configs").glob("*.toml") if re.search(r"_(170m|340m|760m|1p3b)$", path.stem)}
    assert {(name, gpus) for name, gpus, changes in TABLE} >= {(name, gpus) for name in names for gpus in (8, 32, 64)}
    assert all(not changes for name, gpus, changes in TABLE if gpus == 8), "the configurations themselves are for 8 GPUs"


@pytest.mark.parametrize(("name", "gpus", "changes"), TABLE, ids=lambda value: "+".join(value) if isinstance(value, list) else str(value))
def test_a_layout_can_be_built(name, gpus, changes):
    config = load(ROOT / "configs" / f"{name}.toml", changes)
    mesh, ranks = dry_run(config, world_size=gpus)
    assert mesh.world_size == gpus
    assert [rank.parameters for rank in ranks] == [sum(p.numel for p in held(config, mesh, stage=rank.stage)) for rank in ranks]
    if mesh.tensor == mesh.pipeline == 1:
        assert ranks[0].parameters == count_parameters(config.model)["total"]
    rows = config.engine.micro_batch_size * mesh.num_microbatches * mesh.data
    assert rows == config.train.global_batch_size * config.train.segments
