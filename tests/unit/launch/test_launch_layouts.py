"""Every layout of docs/layouts.md is a layout: its arithmetic holds, the real engine builds it for its whole world size, and the table says
what the planner says."""

import re
from pathlib import Path

import pytest

from hope_pt.config import load
from hope_pt.engine.mesh import check_mesh
from hope_pt.launch.communication import sent
from hope_pt.launch.dry_run import dry_run
from hope_pt.launch.estimate import stages_to_show
from hope_pt.launch.gpus import GPUS, budget
from hope_pt.launch.search import fullest_rank
from hope_pt.launch.speed import step_time
from hope_pt.launch.weights import held
from hope_pt.nn import count_parameters

ROOT = Path(__file__).resolve().parents[3]
ROW = re.compile(r"^\| (\w+_(?:170m|340m|760m|1p3b)) \| (\d+) \| ([^|]*) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|$", re.MULTILINE)
LAYOUTS = (ROOT / "docs/layouts.md").read_text()
ROWS = ROW.findall(LAYOUTS)
TABLE = [(name, int(gpus), re.findall(r"[\w.]+=\w+", changes)) for name, gpus, changes, *_ in ROWS]
DOCUMENTS, H100 = 4, GPUS["h100"]
# Following the operations of a scan in plain torch takes seconds, so one size; kernels and the attention of the transformers take none.
TRACED = {"titans_170m", *(name for name, *_ in TABLE if name.startswith(("hope_", "transformer_")))}
PAIR = r"([\d.]+, [\d.]+)"
COMPARED = re.compile(rf"^\| (\w+) \| (\d+) \| ([^|]*) \| (\d) \| {PAIR} \| {PAIR} \| ([\d.]+) \|$", re.MULTILINE)


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


@pytest.mark.parametrize(
    ("row", "layout"), list(zip(ROWS, TABLE, strict=True)), ids=[f"{one[0]}-{one[1]}-{'+'.join(one[2])}" for one in TABLE]
)
def test_the_table_says_what_the_planner_says(row, layout):
    """To the last printed digit: GB sent, and of the configurations in TRACED the peak and the seconds of a step."""
    name, gpus, changes = layout
    config = load(ROOT / "configs" / f"{name}.toml", changes)
    mesh = check_mesh(config, world_size=gpus)
    most = max(sent(config, mesh, stage=stage).total for stage in stages_to_show(mesh))
    assert f"{most / 1e9:.2f}" == row[4]
    if name in TRACED:
        fullest = fullest_rank(config, mesh, documents=DOCUMENTS).total
        assert (f"{fullest / 1e9:.1f}", f"{step_time(config, mesh, H100, documents=DOCUMENTS).total:.2f}") == (row[3], row[5])
        assert fullest <= budget(H100)


def compared(row, *, backend: str) -> tuple[float, float]:
    """(GB of the fullest rank, seconds of a step) of a row of the table of both implementations."""
    name, gpus, changes, documents, *_ = row
    changes = [*re.findall(r"[\w.]+=\w+", changes), f"model.titans.backend={backend}"]
    config = load(ROOT / "configs" / f"{name}.toml", changes)
    mesh, documents = check_mesh(config, world_size=int(gpus)), int(documents)
    fullest = fullest_rank(config, mesh, documents=documents).total
    return fullest / 1e9, step_time(config, mesh, H100, documents=documents).total


@pytest.mark.parametrize("row", COMPARED.findall(LAYOUTS), ids=lambda row: "-".join(row[i] for i in (0, 1, 3)))
def test_the_table_of_both_implementations_says_what_the_planner_says(row):
    """The kernels in every row, plain torch, which takes seconds to follow, in those of one kind."""
    peak, seconds = compared(row, backend="triton")
    assert f"{peak:.1f}, {seconds:.2f}" == row[5]
    if row[0] == "hope_1p3b" and row[3] == "4":
        peak, slower = compared(row, backend="chunked")
        assert (f"{peak:.1f}, {slower:.2f}", f"{slower / seconds:.1f}") == (row[4], row[6])
