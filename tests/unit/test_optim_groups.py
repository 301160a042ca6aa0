"""Parameter groups: every canonical name gets the documented rule, and the table adds up."""

import pytest
from pydantic import ValidationError

from hope_pt.config.optim import DeepMomentumConfig, M3Config, MomentumConfig, MuonConfig, OptimConfig
from hope_pt.config.schema import CMSConfig, RunConfig, TrainConfig
from hope_pt.nn import HopeLM
from hope_pt.optim import Rule, View, group_parameters, rule_of, table
from hope_pt.testing import tiny_model

CONFIG = tiny_model().model_copy(update={"cms": CMSConfig(hidden=24, periods=(1, 4, 16))})


@pytest.mark.parametrize(
    ("name", "ndim", "rule"),
    [
        ("embedding.weight", 2, Rule("embedding", False)),
        ("head.weight", 2, Rule("embedding", False)),
        ("final_norm.weight", 1, Rule("norm", False)),
        ("blocks.0.norm.weight", 1, Rule("norm", False)),
        ("blocks.0.mixer.in_proj.weight", 2, Rule("matrix", True)),
        ("blocks.1.mixer.out_proj.weight", 2, Rule("matrix", True)),
        ("blocks.0.mixer.core.mem_weights.0", 3, Rule("memory", False)),
        ("blocks.0.mixer.core.proj_weights.1", 4, Rule("memory", False)),
        ("blocks.0.mixer.core.conv_weight", 3, Rule("gate", False)),
        ("blocks.0.mixer.core.eta_bias", 1, Rule("gate", False)),
        ("blocks.0.mixer.core.eta_weight", 2, Rule("gate", False)),
        ("blocks.0.mixer.core.out_norm", 2, Rule("gate", False)),
        ("blocks.0.cms.levels.0.w_up.weight", 2, Rule("cms", True, 1)),
        ("blocks.0.cms.levels.1.w_gate.weight", 2, Rule("cms", True, 4)),
        ("blocks.1.cms.levels.2.w_down.weight", 2, Rule("cms", True, 16)),
        ("blocks.1.cms.levels.2.norm.weight", 1, Rule("cms-norm", False, 16)),
    ],
)
def test_rule(name, ndim, rule):
    assert rule_of(name, ndim=ndim, config=CONFIG) == rule


def test_groups_hold_every_parameter_once_and_the_table_counts_them():
    shapes = {
        "embedding.weight": (32, 16),
        "blocks.0.mixer.in_proj.weight": (64, 16),
        "blocks.0.cms.levels.1.w_up.weight": (24, 16),
        "blocks.1.cms.levels.1.w_up.weight": (24, 16),
    }
    groups = group_parameters(shapes, config=CONFIG)
    assert sorted(name for group in groups for name in group.names) == sorted(shapes)
    lines = table(shapes, config=CONFIG).splitlines()
    assert len(lines) == 1 + len(groups) == 4
    assert lines[3].split()[:7] == ["cms", "adamw", "x1", "4", "yes", "2", "768"]


OPTIM = OptimConfig(name="m3", levels=("muon", "adamw", "delta_momentum"), memory="momentum")


@pytest.mark.parametrize(
    ("name", "ndim", "optimizer"),
    [
        ("blocks.0.mixer.in_proj.weight", 2, "m3"),
        ("blocks.1.mixer.out_proj.weight", 2, "m3"),
        ("blocks.0.cms.levels.0.w_up.weight", 2, "muon"),
        ("blocks.0.cms.levels.1.w_gate.weight", 2, "adamw"),
        ("blocks.1.cms.levels.2.w_down.weight", 2, "delta_momentum"),
        ("blocks.1.cms.levels.2.norm.weight", 1, "adamw"),
        ("blocks.1.cms.levels.0.scale", 1, "adamw"),
        ("blocks.0.mixer.core.mem_weights.0", 3, "momentum"),
        ("blocks.0.mixer.core.proj_weights.1", 4, "momentum"),
        ("blocks.0.mixer.core.conv_weight", 3, "adamw"),
        ("blocks.0.mixer.core.eta_weight", 2, "adamw"),
        ("embedding.weight", 2, "adamw"),
        ("head.weight", 2, "adamw"),
        ("final_norm.weight", 1, "adamw"),
    ],
)
def test_optimizer(name, ndim, optimizer):
    assert rule_of(name, ndim=ndim, config=CONFIG, optim=OPTIM).optimizer == optimizer


def test_levels_have_the_name_where_none_are_given():
    assert rule_of("blocks.0.cms.levels.2.w_up.weight", ndim=2, config=CONFIG, optim=OptimConfig(name="muon")).optimizer == "muon"


def test_periods_by_depth_and_restarts():
    deep = CONFIG.model_copy(update={"cms": CMSConfig(periods=(1,), depth_periods=(2, 8))})
    assert [rule_of(f"blocks.{block}.cms.levels.0.w_up.weight", ndim=2, config=deep).period for block in range(2)] == [2, 8]
    nested = CONFIG.model_copy(update={"cms": CMSConfig(periods=(1, 4, 16), variant="nested")})
    rules = [rule_of(f"blocks.0.cms.levels.{level}.norm.weight", ndim=1, config=nested) for level in range(3)]
    assert [(rule.period, rule.restart) for rule in rules] == [(1, 4), (4, 16), (16, 0)]


def test_groups_of_deep_rules_have_one_shape_and_one_view():
    shapes = {name: tuple(param.shape) for name, param in HopeLM(CONFIG).named_parameters()}
    groups = group_parameters(shapes, config=CONFIG, optim=OPTIM)
    assert sorted(name for group in groups for name in group.names) == sorted(shapes)
    for group in groups:
        assert (group.view is None) == (group.rule.optimizer == "adamw")
        assert group.view is None or len({shapes[name] for name in group.names}) == 1
    # A square w_down is divided by columns, the other two by rows.
    square = {f"blocks.0.cms.levels.0.{part}.weight": (16, 16) for part in ("w_gate", "w_up", "w_down")}
    assert [(len(group.names), group.view) for group in group_parameters(square, config=CONFIG, optim=OPTIM)] == [
        (2, View(0)),
        (1, View(1)),
    ]


def test_delta_gradient_descent_takes_projections_whole():
    (group,) = group_parameters({"blocks.0.mixer.in_proj.weight": (64, 16)}, config=CONFIG, optim=OptimConfig(name="dgd"))
    assert group.view == View(0)


@pytest.mark.parametrize(
    ("settings", "scale"),
    [
        ({}, 1 / 4),
        ({"name": "muon"}, 1 / 2),
        ({"name": "muon", "muon": MuonConfig(scale="spectral")}, 1.0),
        ({"name": "m3"}, 1 / 2),
        ({"name": "m3", "m3": M3Config(mode="literal")}, 1.0),
        ({"name": "momentum"}, 1 / 4),
        ({"name": "delta_momentum", "momentum": MomentumConfig(preconditioner="none")}, 1.0),
        ({"name": "momentum", "momentum": MomentumConfig(preconditioner="newton_schulz")}, 1 / 2),
        ({"name": "deep_momentum"}, 1 / 4),
        ({"name": "deep_momentum", "deep_momentum": DeepMomentumConfig(output="newton_schulz", preconditioner="none")}, 1 / 2),
        ({"name": "dgd"}, 1.0),
        ({"name": "muon", "lr": 1e-3, "matrix_lr": 3e-3}, 3 / 2),
        ({"lr": 1e-3, "matrix_lr": 3e-3}, 1 / 4),
    ],
)
def test_learning_rate_by_width(settings, scale):
    """Tuned at a quarter of the width. Embedding, norms and gates keep the rate."""
    optim = OptimConfig(base_width=CONFIG.width // 4, **settings)
    for name in ("blocks.0.mixer.in_proj.weight", "blocks.0.cms.levels.1.w_down.weight"):
        assert rule_of(name, ndim=2, config=CONFIG, optim=optim).lr_scale == pytest.approx(scale)
    assert rule_of("blocks.0.mixer.core.mem_weights.0", ndim=3, config=CONFIG, optim=optim).lr_scale == 1 / 4
    for name, ndim in (("embedding.weight", 2), ("final_norm.weight", 1), ("blocks.0.mixer.core.eta_weight", 2)):
        assert rule_of(name, ndim=ndim, config=CONFIG, optim=optim).lr_scale == 1.0


def test_the_table_prints_rule_and_scale():
    optim = OptimConfig(name="muon", lr=1e-3, matrix_lr=2e-3)
    line = table({"blocks.0.cms.levels.1.w_up.weight": (24, 16)}, config=CONFIG, optim=optim).splitlines()[1]
    assert line.split()[:7] == ["cms", "muon", "x2", "4", "yes", "1", "384"]


def run_config(**settings):
    settings = {"model": CONFIG, **settings}
    return RunConfig(name="x", data={"source": "mqar", "mqar": {"gap": 50}}, train=TrainConfig(steps=1), **settings)


def test_wrong_levels_are_refused():
    with pytest.raises(ValidationError, match=r"optim.levels has 2 entries, model.cms.periods 3"):
        run_config(optim=OptimConfig(levels=("m3", "m3")))
    run_config(optim=OptimConfig(levels=("m3", "m3", "dgd")))


def test_settings_that_would_do_nothing_are_refused():
    fast = CONFIG.model_copy(update={"cms": CMSConfig(periods=(1, 1))})
    by_depth = CONFIG.model_copy(update={"cms": CMSConfig(periods=(1,), depth_periods=(1,) * CONFIG.num_layers)})
    for cap in ("level_step_cap", "level_total_cap"):
        for model, key in ((fast, "periods = .1, 1."), (by_depth, "depth_periods")):
            with pytest.raises(ValidationError, match=rf"optim.{cap} = 0.01 is for levels .* model.cms.{key}"):
                run_config(model=model, optim=OptimConfig(**{cap: 0.01}))
        run_config(optim=OptimConfig(**{cap: 0.01}))
    with pytest.raises(ValidationError, match="optim.matrix_lr = 0.01 is for matrices that do not have AdamW"):
        run_config(optim=OptimConfig(matrix_lr=0.01))
    run_config(optim=OptimConfig(matrix_lr=0.01, levels=("adamw", "adamw", "muon")))
    run_config(optim=OptimConfig(matrix_lr=0.01, memory="muon"))


def test_delta_gradient_descent_is_for_linear_layers():
    with pytest.raises(ValidationError, match="inputs of a linear layer"):
        OptimConfig(memory="dgd")
    nested = CONFIG.model_copy(update={"cms": CMSConfig(periods=(1, 4), variant="nested")})
    with pytest.raises(ValidationError, match='"dgd" keeps the inputs'):
        RunConfig(
            name="x", model=nested, data={"source": "mqar", "mqar": {"gap": 50}}, train=TrainConfig(steps=1), optim=OptimConfig(name="dgd")
        )
