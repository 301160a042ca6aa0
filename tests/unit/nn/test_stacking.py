"""Level stacking: the function does not change at the start, gradients reach every new level, frozen levels give the old model back."""

import pytest
import torch

from hope_pt.config.schema import CMSConfig, ModelConfig
from hope_pt.errors import ConfigError
from hope_pt.nn import HopeLM
from hope_pt.nn.stacking import METHODS, assign_by_depth, clone_k
from hope_pt.optim import Clocked, group_parameters, rule_of
from hope_pt.testing.models import random_tokens

VOCAB = 40
PERIODS = (1, 2, 8)


def trained(*, layers=3, mixer="attention", steps=30):
    """A model that has learned a little: each token follows its predecessor by one."""
    cms = CMSConfig(hidden=24, periods=(1,))
    lm = HopeLM(ModelConfig(vocab_size=VOCAB, num_layers=layers, width=16, num_heads=2, mixer=mixer, cms=cms), seed=1)
    optimizer = torch.optim.AdamW(lm.parameters(), lr=1e-2)
    for step in range(steps):
        optimizer.zero_grad()
        loss_of(lm, seed=step).backward()
        optimizer.step()
    return lm


@pytest.fixture(scope="module")
def lm():
    return trained()


def loss_of(lm, *, seed=0):
    start = random_tokens(8, 1, vocab=VOCAB, seed=seed)
    tokens = (start + torch.arange(13)) % VOCAB
    return lm.token_losses(tokens[:, :-1], tokens[:, 1:]).mean()


def stacked(lm, how, *, periods=PERIODS):
    config, weights = METHODS[how](lm.config, lm.state_dict(), periods=periods)
    made = HopeLM(config, seed=9)
    made.load_state_dict(weights)
    return made


def logits_of(lm):
    with torch.no_grad():
        return lm(random_tokens(3, 20, vocab=VOCAB))[0]


def optimizer_of(lm, *, lr, only=""):
    parameters = {name: parameter for name, parameter in lm.named_parameters() if only in name}
    groups = group_parameters({name: tuple(p.shape) for name, p in parameters.items()}, config=lm.config)
    rules = [{"params": [parameters[name] for name in group.names], "period": group.rule.period} for group in groups]
    return Clocked(torch.optim.AdamW(rules, lr=lr, weight_decay=0.1))


def train(lm, optimizer, *, steps):
    losses = []
    for step in range(steps):
        optimizer.zero_grad()
        loss = loss_of(lm, seed=100 + step)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("how", METHODS)
@pytest.mark.parametrize("mixer", ["attention", "titans"])
def test_the_function_does_not_change(how, mixer, lm):
    model = lm if mixer == "attention" else trained(mixer="titans", steps=2)
    assert (logits_of(stacked(model, how)) - logits_of(model)).abs().max() <= 1e-6


def test_a_trained_model_differs_from_an_untrained_one(lm):
    """Else the test above would pass for a stack that keeps nothing."""
    assert loss_of(lm) < 0.8 * loss_of(HopeLM(lm.config))


def test_by_depth_only_the_clocks_change(lm):
    config, weights = assign_by_depth(lm.config, lm.state_dict(), periods=(1, 8))
    assert config.cms.depth_periods == (1, 1, 8) and config.cms.periods == (1,)
    assert weights.keys() == lm.state_dict().keys()
    for block, period in enumerate(config.cms.depth_periods):
        for name, ndim in (("w_up.weight", 2), ("norm.weight", 1)):
            assert rule_of(f"blocks.{block}.cms.levels.0.{name}", ndim=ndim, config=config).period == period


@pytest.mark.parametrize(
    ("layers", "periods", "expected"),
    [(4, (1, 4), (1, 1, 4, 4)), (5, (1, 4), (1, 1, 1, 4, 4)), (6, (1, 4, 16), (1, 1, 4, 4, 16, 16)), (3, (2,), (2, 2, 2))],
)
def test_runs_of_blocks_share_a_period_the_first_ones_the_fastest(layers, periods, expected):
    config = ModelConfig(vocab_size=8, num_layers=layers, width=8, num_heads=2, cms=CMSConfig(periods=(1,)))
    assert assign_by_depth(config, {}, periods=periods)[0].cms.depth_periods == expected


def test_clones_have_the_trained_weights_and_add_nothing(lm):
    config, weights = clone_k(lm.config, lm.state_dict(), periods=PERIODS)
    assert config.cms.periods == PERIODS
    for block in range(3):
        for name in ("norm.weight", "w_gate.weight", "w_up.weight", "w_down.weight"):
            old = lm.state_dict()[f"blocks.{block}.cms.levels.0.{name}"]
            new = [weights[f"blocks.{block}.cms.levels.{level}.{name}"] for level in range(3)]
            assert torch.equal(new[2], old)
            assert all(torch.equal(value, old if name != "w_down.weight" else torch.zeros_like(old)) for value in new[:2])


def test_gradients_reach_every_new_level(lm):
    """At once the zero matrices, and the trained level as before; after one step of a level all of it."""
    made = stacked(lm, "clone_k")
    lm.zero_grad()
    loss_of(lm).backward()
    loss_of(made).backward()
    for block in range(3):
        was, now = (model.blocks[block].cms.levels for model in (lm, made))
        for old, new in zip(was[0].parameters(), now[2].parameters(), strict=True):
            torch.testing.assert_close(new.grad, old.grad, rtol=1e-4, atol=1e-7)
        assert all(bool((level.w_down.weight.grad != 0).any()) for level in now)
        assert not now[0].w_gate.weight.grad.any()
    train(made, optimizer_of(made, lr=1e-3), steps=2)
    made.zero_grad()
    loss_of(made).backward()
    for block in made.blocks:
        for level in block.cms.levels:
            assert all(bool((parameter.grad != 0).any()) for parameter in level.parameters())


@pytest.mark.parametrize("how", METHODS)
def test_training_goes_on_from_the_trained_loss(how, lm):
    made = stacked(lm, how)
    losses = train(made, optimizer_of(made, lr=3e-3), steps=24)
    assert losses[0] == pytest.approx(loss_of(lm, seed=100).item(), abs=1e-5)
    assert sum(losses[-4:]) < 0.9 * sum(losses[:4])


@pytest.mark.parametrize("how", METHODS)
def test_a_learning_rate_towards_zero_gives_the_old_model_back(how, lm):
    made = stacked(lm, how)
    train(made, optimizer_of(made, lr=1e-30), steps=9)
    assert torch.equal(logits_of(made), logits_of(lm))


def test_slow_levels_that_do_not_step_are_the_old_model(lm):
    """With everything but the CMS still: the slow level is the trained one bit for bit, and without the fast ones the model is the old."""
    made = stacked(lm, "clone_k", periods=(1, 1000))
    train(made, optimizer_of(made, lr=1e-2, only=".cms."), steps=5)
    assert not torch.equal(logits_of(made), logits_of(lm))
    with torch.no_grad():
        for block in made.blocks:
            block.cms.levels[0].w_down.weight.zero_()
    assert torch.equal(logits_of(made), logits_of(lm))
    by_depth = stacked(lm, "assign_by_depth", periods=(500, 1000))
    train(by_depth, optimizer_of(by_depth, lr=1e-2, only=".cms."), steps=5)
    assert torch.equal(logits_of(by_depth), logits_of(lm))


@pytest.mark.parametrize(
    ("how", "periods", "text"),
    [
        ("clone_k", (4,), "two periods or more"),
        ("clone_k", (1, 1), "each larger than the one before"),
        ("clone_k", (4, 1), "each larger"),
        ("assign_by_depth", (), "1 or more"),
        ("assign_by_depth", (0, 4), "1 or more"),
        ("assign_by_depth", (1, 2, 4, 8), "4 frequencies for 3 blocks"),
    ],
)
def test_wrong_periods_are_refused(how, periods, text, lm):
    with pytest.raises(ConfigError, match=text):
        METHODS[how](lm.config, lm.state_dict(), periods=periods)


@pytest.mark.parametrize("how", METHODS)
def test_an_independent_level_is_refused(how):
    """Its weight has no place in a chain."""
    config = ModelConfig(vocab_size=8, num_layers=3, width=8, num_heads=2, cms=CMSConfig(periods=(1,), variant="independent"))
    with pytest.raises(ConfigError, match=r'model.cms.variant = "independent": only a chain'):
        METHODS[how](config, HopeLM(config).state_dict(), periods=(1, 4))


@pytest.mark.parametrize("how", METHODS)
def test_a_model_with_levels_is_refused(how):
    config = ModelConfig(vocab_size=8, num_layers=3, width=8, num_heads=2, cms=CMSConfig(periods=(1, 4)))
    with pytest.raises(ConfigError, match=r"periods = \[1, 4\].*one level"):
        METHODS[how](config, {}, periods=(1, 4))
