"""metrics.jsonl: exact floats, truncation to a step, torn lines, and clear errors."""

import json
import math
import random

import pytest

from hope_pt.errors import HopeError
from hope_pt.report import metrics
from hope_pt.report.metrics import MetricsFile


def write(path, steps):
    sink = MetricsFile(path)
    for step in steps:
        sink.write(step=step, values={"loss": 1 / (step + 1)})
    sink.sync()
    sink.close()


def test_floats_come_back_to_the_last_bit(tmp_path):
    draw = random.Random(0)
    values = [draw.uniform(-1, 1) * 10.0 ** draw.randint(-300, 300) for _ in range(500)]
    sink = MetricsFile(tmp_path / "m")
    for step, value in enumerate(values):
        sink.write(step=step, values={"loss": value})
    assert metrics.series(metrics.read(tmp_path / "m"), key="loss") == (list(range(500)), values)


def test_a_number_that_is_not_finite_is_our_bug_and_not_written(tmp_path):
    sink = MetricsFile(tmp_path / "m")
    with pytest.raises(ValueError, match="JSON compliant"):
        sink.write(step=1, values={"loss": math.nan})
    assert (tmp_path / "m").read_text() == ""


@pytest.mark.parametrize(("step", "expected"), [(-1, []), (0, [0]), (3, [0, 1, 2, 3]), (9, [0, 1, 2, 3, 4, 5])])
def test_truncation_keeps_the_lines_up_to_the_step(step, expected, tmp_path):
    write(tmp_path / "m", range(6))
    metrics.truncate(tmp_path / "m", step=step)
    assert [record["step"] for record in metrics.read(tmp_path / "m")] == expected


@pytest.mark.parametrize("torn", ['{"step": 6, "lo', '{"step": 6, "loss": 1.0}', "garbage\n"])
def test_truncation_removes_a_torn_line_and_writing_goes_on(torn, tmp_path):
    write(tmp_path / "m", range(6))
    with (tmp_path / "m").open("a") as file:
        file.write(torn)
    metrics.truncate(tmp_path / "m", step=6)
    write(tmp_path / "m", [6, 7])
    assert [record["step"] for record in metrics.read(tmp_path / "m")] == list(range(8))


def test_a_line_that_is_being_written_is_left_out_by_readers(tmp_path):
    write(tmp_path / "m", range(2))
    with (tmp_path / "m").open("a") as file:
        file.write('{"step": 2')
    assert [record["step"] for record in metrics.read(tmp_path / "m")] == [0, 1]


def test_a_damaged_line_is_named_by_number(tmp_path):
    (tmp_path / "m").write_text(json.dumps({"step": 1}) + "\nnonsense\n" + json.dumps({"step": 2}) + "\n")
    with pytest.raises(HopeError, match="m:2: not a JSON line"):
        metrics.read(tmp_path / "m")


def test_a_missing_file_says_what_to_name(tmp_path):
    with pytest.raises(HopeError, match="cannot read .*name a run directory"):
        metrics.read(tmp_path / "absent")
