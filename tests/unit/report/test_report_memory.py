"""Heat maps of memories and updates: one panel a level, rows in order, old runs without them, values that colours cannot show."""

import re

import pytest

from hope_pt.report import plots
from hope_pt.report.curves import Curve
from hope_pt.report.memory import memory, updates
from hope_pt.report.page import page
from hope_pt.testing.configs import tiny_run


def line(step, **values):
    return {"step": step, **{f"optim/{key}": value for key, value in values.items()}}


@pytest.fixture
def run():
    records = []
    for step in range(2, 13):
        values = {"matrix/update_ratio": 1e-3, "matrix/drift": 0.1, "level0/since": 0, "level1/since": step % 4, "skipped_share": 0.0}
        values |= {f"level0/block{block}/update_ratio": 10.0 ** -(block + 1) for block in range(11)}
        if step % 4 == 0:
            values |= {f"level1/block{block}/update_ratio": None if block else 0.5 for block in range(11)}
        records.append(line(step, **values))
    return Curve(name="run", records=records, config=tiny_run())


def test_every_level_has_a_panel_with_its_blocks_in_order(run, monkeypatch):
    drawn = []
    monkeypatch.setattr(plots, "heat_map", lambda curve, *, rows, title, unit, log=False: drawn.append((title, rows, log)) or "<svg>")
    updates(run)
    titles = {title: (rows, log) for title, rows, log in drawn if rows}
    assert list(titles) == [
        "Level 0: relative update", "Level 1: relative update", "Others: relative update",
        "Others: drift from the start", "Steps since the last update",
    ]  # fmt: skip
    assert list(titles["Level 0: relative update"][0]) == [str(block) for block in range(11)]
    assert titles["Level 0: relative update"][1] and not titles["Others: drift from the start"][1]
    assert titles["Steps since the last update"][0] == {"level0": "optim/level0/since", "level1": "optim/level1/since"}


def test_the_page_shows_them_and_says_how_to_read_them(run):
    text = page([run])
    assert "<h2>Updates by level and block</h2>" in text and "logarithmic colours" in text
    assert text == page([run])
    assert len(re.findall("Level [01]: relative update", text)) == 2


def test_a_run_from_before_has_no_section():
    old = Curve(name="old", records=[{"step": 1, "loss": 2.0, "memory/layer0/drift": 0.5}], config=tiny_run())
    assert updates(old) == "" and "<svg" in memory(old)
    assert "Updates by level and block" not in page([old])
    assert "optim/matrix/update_norm" in page([old]).partition("Not measured in this run")[2]


@pytest.mark.parametrize("values", [(0.0, 0.0), (0.0, 1.0), (None, 1.0), (1.0, 1.0)])
def test_colours_of_zeros_and_of_equal_values(values):
    records = [line(step, **{"matrix/update_ratio": value}) for step, value in enumerate(values, 1)]
    assert "<svg" in plots.heat_map(Curve(name="c", records=records), rows={"a": "optim/matrix/update_ratio"}, title="t", log=True)
