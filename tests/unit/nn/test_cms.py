"""The variants of the continuum memory system: values and all gradients against a twin written out by hand, scales, names, costs."""

import pytest
import torch
from pydantic import ValidationError

from hope_pt.config.schema import CMSConfig, ModelConfig, RunConfig
from hope_pt.nn import HopeLM, Parts, count_parameters, flops_per_token, parameter_class
from hope_pt.nn.cms import CMS
from hope_pt.optim import rule_of
from hope_pt.testing import tiny_run
from hope_pt.testing.models import random_tokens

WIDTH, HIDDEN = 12, 20
VARIANTS = {"sequential": (1, 2, 3), "independent": (1, 2, 3), "nested": (1, 2, 4)}


def model_of(variant, *, width=WIDTH, hidden=HIDDEN, periods=None, mixer="attention"):
    cms = CMSConfig(hidden=hidden, periods=periods or VARIANTS[variant], variant=variant)
    return ModelConfig(vocab_size=40, num_layers=2, width=width, num_heads=2, mixer=mixer, cms=cms)


def random_cms(variant, **options):
    """In float64, all parameters away from their start."""
    cms = CMS(model_of(variant, **options), parts=Parts.local(2)).double()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in cms.parameters():
            parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64) + (parameter.dim() == 1))
    return cms


def by_hand(variant, x, p, *, levels):
    """NL eq. 70 and 74 one number after another: x [T, D], p the parameters by name."""

    def mlp(level, u):
        def get(name):
            return p[f"levels.{level}.{name}"]

        n = u / torch.sqrt((u * u).sum(-1, keepdim=True) / WIDTH + 1e-6) * get("norm.weight")
        a, b = n @ get("w_gate.weight").T, n @ get("w_up.weight").T
        return (a / (1 + torch.exp(-a)) * b) @ get("w_down.weight").T

    if variant == "independent":
        return x + sum(p[f"levels.{level}.scale"] * mlp(level, x) for level in range(levels))
    for level in range(levels):
        x = x + mlp(level, x)
    return x


@pytest.mark.parametrize(
    ("variant", "levels"), [(variant, levels) for variant in VARIANTS for levels in (1, 2, 5) if (variant, levels) != ("nested", 1)]
)
def test_values_and_all_gradients_are_those_of_the_twin(variant, levels):
    cms = random_cms(variant, periods=tuple(2**level for level in range(levels)))
    generator = torch.Generator().manual_seed(4)
    x, upstream = (torch.randn(7, WIDTH, generator=generator, dtype=torch.float64) for _ in range(2))
    leaves = [x, *cms.parameters()]
    x.requires_grad_()
    y = cms(x)
    expected = by_hand(variant, x, dict(cms.named_parameters()), levels=levels)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    ours, theirs = (torch.autograd.grad(out, leaves, upstream) for out in (y, expected))
    for one, other in zip(ours, theirs, strict=True):
        assert bool((other != 0).any())
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


def test_independent_levels_do_not_see_each_other_and_a_chain_does():
    """Whether the input of the last level depends on the first one."""
    x = torch.randn(5, WIDTH, dtype=torch.float64)
    for variant, sees in (("independent", False), ("sequential", True)):
        cms = random_cms(variant)
        last = cms.levels[2]
        inputs = []
        last.norm.register_forward_pre_hook(lambda module, args, inputs=inputs: inputs.append(args[0]))
        cms(x)
        with torch.no_grad():
            cms.levels[0].w_down.weight.add_(1.0)
        cms(x)
        assert torch.equal(inputs[0], inputs[1]) != sees


def test_the_sum_starts_at_the_scale_of_the_chain():
    """What the CMS adds to the stream at the initial values, root mean square over tokens and channels, within 5 %."""
    added = {}
    x = torch.randn(256, 256, generator=torch.Generator().manual_seed(0))
    for variant in ("sequential", "independent"):
        cms = HopeLM(model_of(variant, width=256, hidden=192)).blocks[1].cms
        with torch.no_grad():
            added[variant] = (cms(x) - x).square().mean().sqrt().item()
    assert added["independent"] == pytest.approx(added["sequential"], rel=0.05)
    assert 0.1 < added["independent"] < 1


def test_the_weight_of_a_level_is_a_parameter_of_its_level():
    config = model_of("independent")
    names = [name for name, _ in HopeLM(config).named_parameters() if name.endswith(".scale")]
    assert names == [f"blocks.{block}.cms.levels.{level}.scale" for block in range(2) for level in range(3)]
    for name in names:
        level = int(name.split(".")[4])
        rule = rule_of(name, ndim=1, config=config)
        assert (rule.period, rule.decay) == (config.cms.periods[level], False)
        assert parameter_class(name) == f"cms.level{level}"


def test_costs():
    """The weights are the only parameters more, and no matrix product is."""
    chain, weighted = model_of("sequential"), model_of("independent")
    ours, theirs = count_parameters(weighted), count_parameters(chain)
    assert {name: ours[name] - theirs[name] for name in theirs if ours[name] != theirs[name]} == {
        "cms.level0": 2, "cms.level1": 2, "cms.level2": 2, "total": 6,
    }  # fmt: skip
    assert flops_per_token(weighted, seq_len=32) == flops_per_token(chain, seq_len=32)
    assert count_parameters(model_of("nested")) == theirs


@pytest.mark.parametrize("mixer", ["titans", "attention"])
def test_every_parameter_of_an_independent_model_gets_a_gradient(mixer):
    model = HopeLM(model_of("independent", mixer=mixer))
    tokens = random_tokens(4, 33, vocab=40)
    model.token_losses(tokens[:, :-1], tokens[:, 1:]).mean().backward()
    assert all(parameter.grad is not None and bool((parameter.grad != 0).any()) for parameter in model.parameters())


def test_in_bf16_the_weight_leaves_the_stream_in_bf16():
    cms = CMS(model_of("independent"), parts=Parts.local(2))
    for level in cms.levels:
        for linear in (level.w_gate, level.w_up, level.w_down):
            linear.to(torch.bfloat16)
    assert cms(torch.randn(3, WIDTH).bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"variant": "nested", "periods": (1,)}, "two levels"),
        ({"variant": "nested", "periods": (1, 3, 8)}, r"multiples of those before, got \[1, 3, 8\]"),
        ({"variant": "nested", "periods": (2, 2)}, "multiples"),
        ({"variant": "nested", "periods": (4, 2)}, "multiples"),
        ({"periods": ()}, "at least one level"),
        ({"periods": (1, 4), "depth_periods": (1, 4)}, r"depth_periods.*periods = \[1\]"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings, text):
    with pytest.raises(ValidationError, match=text):
        CMSConfig(**settings)


def test_nested_levels_are_refused_where_updates_are_counted_by_group():
    run = tiny_run(model=model_of("nested"))
    with pytest.raises(ValidationError, match='needs engine.provider = "local"'):
        RunConfig.model_validate({**run.model_dump(), "engine": {"provider": "apex", "micro_batch_size": 1}})


def test_periods_by_depth_name_every_block():
    with pytest.raises(ValidationError, match="3 entries for num_layers = 2"):
        ModelConfig(vocab_size=8, num_layers=2, width=8, num_heads=2, cms=CMSConfig(periods=(1,), depth_periods=(1, 2, 3)))


def test_clocks_of_levels_and_blocks():
    assert [CMSConfig(periods=(1, 4, 16)).period(level, block=7) for level in range(3)] == [1, 4, 16]
    assert [CMSConfig(periods=(1, 4, 16), variant="nested").restart(level) for level in range(3)] == [4, 16, 0]
    assert CMSConfig(periods=(1, 4, 16)).restart(0) == 0
    by_depth = CMSConfig(periods=(1,), depth_periods=(1, 1, 8))
    assert [by_depth.period(0, block=block) for block in range(3)] == [1, 1, 8]
