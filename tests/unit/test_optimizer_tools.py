"""The optimizer experiments: their arithmetic, and each of them run for seconds. What they find is not tested."""

import json
import math
import sys

import numpy as np
import pytest
import torch

from hope_pt import config as configuration
from hope_pt.config.optim import MomentumConfig, OptimConfig
from hope_pt.errors import ConfigError
from hope_pt.nn import HopeLM
from hope_pt.optim.rules.base import NewtonSchulz
from hope_pt.optim.rules.momentum import reference
from tools.optimizers import common, compare, coordinate_check, step_time, toy
from tools.optimizers.common import Trial


def test_grid():
    assert common.grid(3e-3) == (1.5e-3, 3e-3, 6e-3, 1.2e-2)


def test_best_rate():
    scores = {1.0: 3.0, 2.0: 2.0, 4.0: math.inf}
    assert common.best_rate(scores) == 2.0 and not common.at_edge(scores)
    assert common.at_edge({1.0: 1.0, 2.0: 2.0}) and common.rate_text({1.0: 1.0, 2.0: 2.0}) == "1 (edge)"
    with pytest.raises(ConfigError, match="all rates diverged: 1, 2"):
        common.best_rate({1.0: math.inf, 2.0: math.inf})


@pytest.mark.parametrize(
    ("scores", "expected"), [({1.0: 1.0, 2.0: 2.0}, 0.5), ({1.0: 2.0, 2.0: 1.0}, 4.0), ({1.0: 2.0, 2.0: 1.0, 4.0: 3.0}, None)]
)
def test_beyond_edge(scores, expected):
    assert common.beyond_edge(scores) == expected


def test_tune_goes_beyond_the_edge_until_inside():
    asked = []

    def run_all(trials):
        asked.append([(trial.optimizer, trial.rate) for trial in trials])
        return [abs(math.log2(trial.rate) - (0 if trial.optimizer == "muon" else 5)) for trial in trials]

    scores = common.tune({"muon": (0.5, 1.0, 2.0), "m3": (0.5, 1.0, 2.0)}, run_all=run_all, extend=9)
    assert asked[1:] == [[("m3", rate)] for rate in (4.0, 8.0, 16.0, 32.0, 64.0)]
    assert common.best_rate(scores["m3"]) == 32.0 and not common.at_edge(scores["m3"])
    assert list(scores["m3"]) == sorted(scores["m3"])
    assert common.at_edge(common.tune({"m3": (0.5, 1.0, 2.0)}, run_all=run_all, extend=1)["m3"])


def test_markdown_and_spread():
    assert common.markdown(["a", "b"], [["1", "2"]]) == "| a | b |\n| --- | --- |\n| 1 | 2 |"
    assert common.spread_text(common.spread([1.0, 2.0, 6.0]), digits=1) == "3.0 (1.0 to 6.0)"


def test_write_leaves_no_number_that_json_lacks(tmp_path):
    path = common.write("x", {"a": [math.inf, (1.0, math.nan)], "b": {0.5: 2}}, folder=tmp_path)
    assert json.loads(path.read_text()) == {"a": [None, [1.0, None]], "b": {"0.5": 2}}


@pytest.fixture
def budget():
    return compare.Budget(steps=30, batch=2)


def finished(config, *, state="done", losses=()):
    """A run directory as the trainer leaves it."""
    directory = compare.Path(config.out) / config.name
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.toml").write_text(configuration.to_toml(config))
    (directory / "status.json").write_text(json.dumps({"state": state}))
    lines = [{"step": index + 1, "loss": loss, "wall_s": index + 1.0} for index, loss in enumerate(losses)]
    lines.append({"step": len(losses), "eval/loss": 3.0})
    (directory / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_compare_configures_the_trial(budget, tmp_path):
    config = compare.run_config(Trial("m3", 6e-3, 2), budget=budget, base_rate=3e-3, out=tmp_path)
    assert (config.optim.name, config.optim.lr, config.optim.matrix_lr, config.train.seed, config.data.seed) == ("m3", 3e-3, 6e-3, 2, 2)
    plain = compare.run_config(Trial("adamw", 6e-3, 0), budget=budget, base_rate=3e-3, out=tmp_path)
    assert (plain.optim.lr, plain.optim.matrix_lr) == (6e-3, 0.0)
    assert plain.optim.warmup_steps == 3 and plain.train.global_batch_size == 2 and plain.model == config.model


def test_compare_runs_nothing_twice(budget, tmp_path, monkeypatch):
    ran = []

    def command(module, *arguments):
        config = configuration.load(arguments[1])
        ran.append(config.name)
        rate = config.optim.matrix_lr or config.optim.lr
        finished(config, losses=[5.0] * 27 + [1.0 + abs(math.log2(rate / 6e-3)) + 0.1 * config.train.seed] * 3)

    monkeypatch.setattr(compare, "_python", command)
    options = {"budget": budget, "names": ["adamw", "muon"], "seeds": 3, "extend": 1, "workers": 1, "out": tmp_path}
    scores, runs = compare.compare(**options)
    assert len(ran) == len(set(ran)) == 4 + 4 + 2 * 2
    assert common.best_rate(scores["muon"]) == 6e-3 and [round(run.score, 6) for run in runs["muon"]] == [1.0, 1.1, 1.2]
    first, ran[:] = list(ran), []
    assert compare.compare(**options)[0] == scores and not ran
    (tmp_path / budget.name / first[0] / "status.json").write_text('{"state": "failed"}')
    assert compare.compare(**options)[0] == scores and ran == first[:1]


def test_compare_takes_divergence_as_a_score(budget, tmp_path):
    config = compare.run_config(Trial("muon", 1.0, 0), budget=budget, base_rate=3e-3, out=tmp_path)
    assert compare.ended(config) is None
    finished(config, state="diverged", losses=[5.0])
    assert compare.ended(config) == "diverged" and compare.load_run(config).score == math.inf
    other = compare.run_config(Trial("muon", 1.0, 0), budget=compare.Budget(steps=30, batch=2, heldout=7), base_rate=3e-3, out=tmp_path)
    assert compare.ended(other) is None


def test_compare_table_and_figure(tmp_path):
    steps = 30
    runs = {
        name: [compare.Run(np.linspace(6, end + seed / 10, steps), end) for seed in range(2)]
        for name, end in (("adamw", 4.0), ("muon", 3.0))
    }
    scores = {"adamw": {1e-3: 4.2, 2e-3: 4.1, 4e-3: 5.0}, "muon": {1e-3: 3.2, 2e-3: 3.3}}
    runs["muon"].append(compare.Run(np.empty(0), 3.0))
    assert compare.smooth(runs["muon"]).shape == (2, steps) and compare.smooth(runs["muon"][2:]).size == 0
    found = compare.rows(scores, runs, {name: {"step_s": 0.2, "optimizer_s": 0.01} for name in runs})
    lines = compare.table(found, scores=scores).splitlines()
    assert lines[2].startswith("| muon | 3.000 (3.000 to 3.000) |") and "0.001 (edge)" in lines[2]
    assert "| 0.002 | 0.001 0.002 0.004 | 200.0 | 10.0 |" in lines[3]
    path = tmp_path / "compare.png"
    common.save_figure(
        lambda axes: compare.draw(axes, runs, step_s=dict.fromkeys(runs, 0.2), tokens_per_step=512), path=path, panels=2, size=(6, 3)
    )
    assert path.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("setting", [(5.0, 0.5, 3.0), (1.0, 1.0, 6.0)])
def test_toy_gradient_is_that_of_psi(setting):
    point = torch.tensor([[-3.5, 2.0], [0.3, -0.7]], dtype=torch.float64, requires_grad=True)
    k, a, w = setting
    r, theta = point.unbind(-1)
    (r**2 + k * (r - theta + a * torch.sin(w * r)) ** 2).sum().backward()
    np.testing.assert_allclose(toy.gradient(point.detach().numpy(), setting), point.grad.numpy(), rtol=1e-12)
    assert toy.psi(np.zeros(2), setting) == 0


def test_toy_unit_delta_is_the_projects_rule():
    config = MomentumConfig(decay=0.9, preconditioner="none")
    generator = np.random.default_rng(0)
    m, lr = generator.normal(size=(1, 2)), 0.03
    for g in generator.normal(size=(5, 1, 2)):
        state = {"momentum": torch.tensor(m / lr * 0.1), "second": torch.zeros(1, 2, dtype=torch.float64)}
        direction, _ = reference(torch.tensor(g), state, number=1, config=config, delta=1.0, orthogonalise=NewtonSchulz())
        m = toy.delta_unit(m, g, np.array([[lr]]), np.array([[0.9]]))
        # The rule averages, (1 - c) P(g), where the toy sums lr g.
        np.testing.assert_allclose(direction.numpy() * lr / 0.1, m, rtol=1e-12)


def test_toy_counts_steps_to_stay_below():
    values = np.array([[1.0, 1.0, 0.0], [1e-4, 1.0, 0.0], [1.0, 1e-4, 0.0], [1e-4, np.nan, 0.0]])
    assert toy.steps_to_converge(values).tolist() == [3, 4, 0]
    rows = toy.sweep(steps=60, decays=(0.9,), settings=[(1.0, 0.25, 1.0)])
    assert 0 < rows[0]["gradient descent"]["steps"] <= 60 and rows[0]["delta (literal)"]["steps"] is None
    assert toy.counts(rows, method="gradient descent", other="delta (literal)") == (1, 0, 0)
    assert "1 of 1" in toy.table(rows)


def test_digits_runs_every_rule():
    pytest.importorskip("sklearn", reason="scikit-learn is not installed")
    from tools.optimizers import digits

    data = digits.digits()
    assert [len(part[1]) for part in (data.train, data.choose, data.report)] == [1197, 240, 360]
    for name in digits.OPTIMIZERS:
        found = digits.run(Trial(name, 1e-3, 0), base_rate=1e-3, settings=digits.Settings(steps=3, batch=4, every=2))
        assert [step for step, *_ in found["curve"]] == [2, 3] and math.isfinite(found["choose_loss"])


def test_digits_gives_matrices_the_rule_and_the_rest_adamw():
    pytest.importorskip("sklearn", reason="scikit-learn is not installed")
    from tools.optimizers import digits

    model = digits.VisionTransformer()
    adamw, deep = digits.optimizers(model, name="m3", rate=2e-3, base_rate=5e-4, optim=OptimConfig())
    counts = [sum(param.numel() for group in one.param_groups for param in group["params"]) for one in (adamw, deep)]
    assert counts[1] == 2 * 12 * 64 * 64 and sum(counts) == sum(param.numel() for param in model.parameters())
    assert {group["lr"] for group in deep.param_groups} == {2e-3} and {group["lr"] for group in adamw.param_groups} == {5e-4}
    # A patch is 2 x 2 pixels that lie together.
    images = torch.zeros(1, 8, 8)
    images[0, 2:4, 6:8] = 1
    seen = []
    model.patch.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    model(images)
    assert seen[0].sum(-1).flatten().nonzero().flatten().tolist() == [7] and seen[0][0, 7].tolist() == [1.0] * 4


def test_coordinate_slopes_and_verdict():
    widths = [64, 128, 256]
    assert coordinate_check.slope(widths, [1.0, 2.0, 4.0]) == pytest.approx(1)
    rows = [
        {"optimizer": "adamw", "width": width, "base_width": base, "changes": {5: {"all": {"logits": 1.0 if base else width / 64}}}}
        for width, base in ((64, 0), (128, 0), (128, 64), (256, 0), (256, 64))
    ]
    off, on = coordinate_check.coordinates(rows, widths)
    assert off["slopes"]["logits"] == pytest.approx(1) and not off["flat"]
    assert on["slopes"]["logits"] == pytest.approx(0, abs=1e-9) and on["flat"]
    assert "| adamw | 5 | all | off | +1.00 | no |" in coordinate_check.coordinate_table([off, on])


def test_coordinate_changes_are_split_by_parameter():
    config = coordinate_check.case_config(coordinate_check.Case("adamw", 64, 0, 1e-3, 1, True))
    lm = HopeLM(config.model)
    first = {name: value.clone() for name, value in lm.state_dict().items()}
    tokens_BT = torch.arange(64).view(1, 64)
    with torch.no_grad():
        lm.embedding.weight.mul_(1.5)
    found = coordinate_check.changes_of(lm, first, tokens_BT, config)
    assert set(found["matrices"].values()) == {0.0} and found["all"] == found["others"]
    assert all(torch.equal(value, first[name]) for name, value in lm.state_dict().items())
    with torch.no_grad():
        lm.blocks[1].cms.levels[0].w_down.weight.mul_(1.5)
    found = coordinate_check.changes_of(lm, first, tokens_BT, config)
    assert found["all"]["block 0"] == 0 < found["all"]["block 1"] and found["matrices"] == found["all"]
    before = coordinate_check.activations(lm, tokens_BT)["logits"]
    with torch.no_grad():
        lm.blocks[1].cms.levels[0].w_down.weight.mul_(1.5)
        after = lm(tokens_BT)[0]
    assert found["all"]["logits"] == pytest.approx(float((after - before).square().mean().sqrt()))


def test_coordinate_cases():
    cases = list(coordinate_check.coordinate_cases(["adamw"], [64, 128], steps=5))
    assert [(case.width, case.base_width) for case in cases] == [(64, 0), (128, 0), (128, 64)]
    config = coordinate_check.case_config(cases[2])
    assert config.model.head_width == 32 and config.optim.base_width == 64 and config.model.cms.hidden == 128
    grid = list(coordinate_check.transfer_cases(["m3"], [64, 128, 256], steps=5, rates=(1.0, 2.0)))
    assert [(case.width, case.base_width, case.rate) for case in grid][2:] == [(256, 0, 1.0), (256, 0, 2.0), (256, 64, 1.0), (256, 64, 2.0)]


def test_transfer_finds_the_best_rate():
    rows = [
        {"optimizer": "muon", "width": width, "base_width": base, "rate": rate, "steps": 8, "losses": [9.0] * 7 + [abs(rate - best)]}
        for (width, base), best in (((64, 0), 2.0), ((256, 0), 1.0), ((256, 64), 2.0))
        for rate in (0.5, 1.0, 2.0, 4.0)
    ]
    found = coordinate_check.transfers(rows, [64, 256])
    assert [row["best_rate"] for row in found] == [2.0, 1.0, 2.0]
    assert coordinate_check.transfer_table(found).count("|") > 20


def test_bad_arguments_are_told_in_one_line(capsys):
    wrong = (["--optimizers", "adamw,muno"], "unknown optimizer 'muno'; choose from adamw, muon"), (["--budget", "220"], "not STEPS,BATCH")
    for arguments, message in wrong:
        with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit):
            patch.setattr(sys, "argv", ["compare", *arguments])
            compare.main()
        assert message in capsys.readouterr().err
    assert compare.budget_of("3,4") == compare.Budget(3, 4) and common.optimizers("m3,muon") == ("m3", "muon")


def test_counted_cost_of_m3_is_nine_eighths_of_muons():
    muon, m3 = step_time.counted("muon"), step_time.counted("m3")
    assert m3["update_flops"] == pytest.approx(muon["update_flops"] * 9 / 8)
    assert muon["update_flops"] / 8 <= muon["fullest_rank_flops"] < muon["update_flops"] / 4
    assert step_time.counted("adamw")["update_flops"] == 0
    # Issue 5: at most a tenth of a step of 0.5M tokens, divided over 8 ranks.
    assert m3["share_of_training_flops"] < 0.1


def test_slow_momentum_is_measured_as_often_as_it_moves(monkeypatch):
    numbers = []

    def seconds(optimizer):
        optimizer.step()
        number = int(optimizer.state[optimizer.param_groups[0]["params"][0]]["step"])
        numbers.append(number)
        return 9.0 if number % 8 == 0 else 1.0

    monkeypatch.setattr(step_time, "_seconds", seconds)
    config = step_time.config_of("m3", layers=1)
    shapes = {"blocks.0.cms.levels.0.w_up.weight": (6, 4)}
    (group,) = step_time.groups_of(shapes, config)
    assert step_time.update_s(group, shapes, config, repeats=2) == pytest.approx((7 * 1 + 9) / 8)
    assert numbers == [2, 3, 8, 8]
