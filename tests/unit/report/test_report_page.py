"""Curves in and out, the same page every time, values that are missing, and numbers against a hand calculation."""

import pytest

from hope_pt.errors import HopeError
from hope_pt.report import plots
from hope_pt.report.curves import Curve, load_curve, store_curve
from hope_pt.report.page import page
from hope_pt.report.samples import Sample
from hope_pt.report.tables import comparison, final_loss
from hope_pt.testing.configs import tiny_run


@pytest.fixture
def curve():
    training = [
        {
            "step": n,
            "loss": 4.0 / n,
            "lr": 0.1,
            "grad_norm": None if n == 3 else 1.0,
            "tokens": 10 * n,
            "tokens_per_s": 5.0,
            "wall_s": 2.0 * n,
        }
        for n in range(1, 451)
    ]
    evaluation = [
        {"step": n, "eval/loss": 3.0, "eval/bits_per_byte": 2.0, "eval/trigram_bits_per_byte": 1.5, "eval/loss_at_context/0001-0001": 5.0}
        for n in (0, 450)
    ]
    memory = [{"step": 0, "memory/layer0/drift": 0.5, "memory/layer1/drift": 0.25}, {"step": 9, "memory/layer1/drift": 1.0}]
    return Curve(name="a<b", records=[*evaluation[:1], *memory, *training, *evaluation[1:]], config=tiny_run())


def test_a_stored_curve_is_small_and_averages_blocks(curve, tmp_path):
    store_curve(curve, tmp_path / "c.json")
    stored = load_curve(tmp_path / "c.json")
    assert (stored.name, stored.config) == (curve.name, curve.config)
    steps, losses = stored.series("loss")
    # 450 lines in blocks of 3: the first block holds steps 1 to 3.
    assert len(steps) == 150 and steps[:2] == [3, 6] and steps[-1] == 450
    assert losses[0] == pytest.approx((4 + 2 + 4 / 3) / 3, rel=1e-5)
    assert stored.series("eval/bits_per_byte") == ([0, 450], [2.0, 2.0])
    assert (tmp_path / "c.json").stat().st_size < 40_000


def test_csv_has_empty_cells_where_a_line_has_no_value(tmp_path):
    (tmp_path / "c.csv").write_text("step,loss,eval/loss\n1,2.5,\n2,2.25,3.5\n")
    curve = load_curve(tmp_path / "c.csv")
    assert curve.series("loss") == ([1, 2], [2.5, 2.25]) and curve.series("eval/loss") == ([2], [3.5])


@pytest.mark.parametrize(("name", "content"), [("a.json", "{}"), ("a.json", "["), ("a.csv", "step,loss\nx,1\n"), ("a.csv", "loss\n1\n")])
def test_a_file_that_is_no_curve_is_named(name, content, tmp_path):
    (tmp_path / name).write_text(content)
    with pytest.raises(HopeError, match=f"{name} cannot be read as a curve"):
        load_curve(tmp_path / name)


def test_the_page_is_the_same_every_time_and_escapes_names(curve):
    curves = [curve, Curve(name="other", records=curve.records[:40])]
    samples = [Sample(prompt="<i>", text="1 < 2")]
    text = page(curves, samples=samples)
    assert text == page(curves, samples=samples)
    assert "a&lt;b" in text and "a<b" not in text and "<i>" not in text and "1 &lt; 2" in text
    assert "eval/passkey_accuracy" in text.partition("Not measured in this run")[2]


def test_a_run_without_any_line_still_has_a_page():
    assert "<h1>empty</h1>" in page([Curve(name="empty", records=[])])


def test_the_table_holds_final_values(curve):
    assert final_loss(curve) == pytest.approx(sum(4.0 / n for n in range(401, 451)) / 50)
    table = comparison([curve, Curve(name="other", records=[])])
    assert "<td>450</td>" in table and "<td>2</td>" in table and "passkey" not in table and "<td>–</td>" in table


def test_a_memory_value_that_was_not_finite_stays_blank(curve):
    assert "<svg" in plots.heat_map(curve, rows={"0": "memory/layer0/drift", "1": "memory/layer1/drift"}, title="t")
    assert plots.heat_map(curve, rows={"0": "memory/layer0/surprise"}, title="t") == ""


def test_running_mean_is_over_what_is_there():
    assert plots.running_mean([4.0, 2.0, 0.0, 2.0], window=2).tolist() == [4.0, 3.0, 1.0, 1.0]
