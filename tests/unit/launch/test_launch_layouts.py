"""Every layout of docs/layouts.md is a layout: its arithmetic holds, the real engine builds it for its whole world size, and the tables
of it and of docs/scaling.md say what the planner says."""

import re
from pathlib import Path

import pytest

from hope_pt.launch.dry_run import dry_run
from hope_pt.launch.gpus import budget
from hope_pt.launch.weights import held
from hope_pt.nn import count_parameters
from tools import layout_tables
from tools.layout_tables import COMPARED, H100, LAYOUT, LAYOUTS, SCALED, SCALING, rows

ROOT = Path(__file__).resolve().parents[3]
TABLE = rows(LAYOUTS, LAYOUT)
# Following the operations of a scan in plain torch takes seconds, so one size; kernels and the attention of the transformers take none.
TRACED = {"titans_170m", *(row.name for row in TABLE if row.name.startswith(("hope_", "transformer_")))}


def named(row):
    return f"{row.name}-{row.gpus}-{row.documents}-{'+'.join(row.changes)}"


def test_the_table_has_every_configuration_at_every_size():
    names = {path.stem for path in (ROOT / "configs").glob("*.toml") if re.search(r"_(170m|340m|760m|1p3b)$", path.stem)}
    assert {(row.name, row.gpus) for row in TABLE} >= {(name, gpus) for name in names for gpus in (8, 32, 64)}
    assert all(not row.changes for row in TABLE if row.gpus == 8), "the configurations themselves are for 8 GPUs"


@pytest.mark.parametrize("row", TABLE, ids=named)
def test_a_layout_can_be_built(row):
    config, _ = row.planned()
    mesh, ranks = dry_run(config, world_size=row.gpus)
    assert mesh.world_size == row.gpus
    assert [rank.parameters for rank in ranks] == [sum(p.numel for p in held(config, mesh, stage=rank.stage)) for rank in ranks]
    if mesh.tensor == mesh.pipeline == 1:
        assert ranks[0].parameters == count_parameters(config.model)["total"]
    lines = config.engine.micro_batch_size * mesh.num_microbatches * mesh.data
    assert lines == config.train.global_batch_size * config.train.segments


@pytest.mark.parametrize("row", TABLE, ids=named)
def test_the_table_says_what_the_planner_says(row):
    """To the last printed digit: GB sent, and of the configurations in TRACED the peak and the seconds of a step."""
    if row.name not in TRACED:
        assert layout_tables.gigabytes_sent(row) == row.cells[1]
        return
    assert layout_tables.layout_cells(row) == row.cells
    assert float(row.cells[0]) <= budget(H100) / 1e9


@pytest.mark.parametrize("row", rows(LAYOUTS, COMPARED), ids=named)
def test_the_table_of_both_implementations_says_what_the_planner_says(row):
    """The kernels in every row, plain torch, which takes seconds to follow, in those of one kind."""
    if (row.name, row.documents) == ("hope_1p3b", 4):
        assert layout_tables.compared_cells(row) == row.cells
    else:
        assert layout_tables.pair_cell(layout_tables.planned_costs(row, backend="triton")) == row.cells[1]


@pytest.mark.parametrize("row", rows(SCALING, SCALED), ids=named)
def test_the_table_of_scaling_says_what_the_planner_says(row):
    assert layout_tables.scaled_cells(row) == row.cells


def test_a_table_is_rewritten_without_its_surroundings():
    """Stale numbers of a row are replaced; layout, changes, other lines and a row of another table stay."""
    stale = "2.50 s\n| hope_170m | 8 | `engine.micro_batch_size=2` | 1.0 | 2.00 | 3.00 |\n| hope_170m | 3 |\n"
    found = layout_tables.rewritten(stale, LAYOUT, lambda row: (row.name, str(row.gpus), *row.changes))
    assert found == stale.replace("1.0 | 2.00 | 3.00", "hope_170m | 8 | engine.micro_batch_size=2")


def test_every_row_of_every_table_is_compared():
    """A row whose form no pattern knows would go stale unseen."""
    written = [line for line in LAYOUTS.read_text().splitlines() if re.match(r"\| \w+ \| \d+ \|", line)]
    assert len(written) == len(TABLE) + len(rows(LAYOUTS, COMPARED))
    assert [row.gpus for row in rows(SCALING, SCALED)] == [8, 64, 256, 1024]
