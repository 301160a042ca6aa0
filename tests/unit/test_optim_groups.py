"""Parameter groups: every canonical name gets the documented rule, and the table adds up."""

import pytest

from hope_pt.config.schema import CMSConfig
from hope_pt.optim import Rule, group_parameters, rule_of, table
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
