"""Training through the token clock by the engine: losses and gradients are those of `meta_loss` on a plain HopeLM."""

import contextlib

import pytest
import torch

from hope_pt.config.schema import TokenClockConfig
from hope_pt.engine import TrainEngine, start, stop
from hope_pt.errors import ConfigError
from hope_pt.nn import HopeLM
from hope_pt.nn.token_clock import ClockedLM, meta_loss
from hope_pt.testing import LAYOUT, difference, random_batch, run_distributed, tiny_model, tiny_run

CLOCK = TokenClockConfig(periods=(4, 8), lr=(0.05, 0.05), meta_train=True)


def config_of(mixer="attention", **engine):
    model = tiny_model(mixer=mixer, periods=(1, 1))
    model = model.model_copy(update={"num_layers": 1, "titans": model.titans.model_copy(update={"backend": "reference"})})
    config = tiny_run(model=model, micro_batch_size=1, global_batch_size=2, clip=1e9, seq_len=10)
    return config.model_copy(update={"token_clock": CLOCK, "engine": config.engine.model_copy(update=engine)})


def batch_for(config):
    return random_batch(batch=config.train.global_batch_size, length=config.data.seq_len, vocab_size=config.model.vocab_size, seed=0)


@contextlib.contextmanager
def running(config, launch=None):
    plan = start(config, launch=launch)
    try:
        yield TrainEngine(config, plan)
    finally:
        stop(plan)


@pytest.mark.parametrize("mixer", ["attention", "titans"])
def test_losses_and_gradients_are_those_of_the_plain_model(mixer):
    config = config_of(mixer)
    batch = batch_for(config)
    lm = HopeLM(config.model, seed=config.train.seed)
    losses = meta_loss(ClockedLM(lm, CLOCK, differentiable=True), batch.tokens_BT, batch.targets_BT, doc_start_BT=batch.doc_start_BT)
    loss = (losses * batch.loss_mask_BT).sum() / batch.loss_mask_BT.sum()
    loss.backward()
    with running(config) as engine:
        assert difference({"losses": engine.token_losses(batch)}, {"losses": losses.detach()}) <= LAYOUT
        result = engine.step(batch)
        gradients = {name: parameter.main_grad.clone() for name, parameter in engine.parameters.items()}
    assert result.loss == pytest.approx(loss.item(), rel=LAYOUT)
    assert difference(gradients, {name: parameter.grad for name, parameter in lm.named_parameters()}) <= 3 * LAYOUT
    plain = lm.token_losses(batch.tokens_BT, batch.targets_BT, doc_start_BT=batch.doc_start_BT)
    assert difference({"losses": plain.detach()}, {"losses": losses.detach()}) > 1e-4


def train_shard(launch, config, batch):
    torch.set_num_threads(1)
    with running(config, launch) as engine:
        part = batch.part(dp_rank=engine.plan.dp_rank, dp_size=engine.plan.dp_size)
        return engine.step(part).loss, engine.export()


@pytest.mark.distributed
def test_two_data_parallel_ranks_are_one():
    config = config_of()
    batch = batch_for(config)
    (whole,) = run_distributed(train_shard, world_size=1, timeout_s=90, args=(config, batch))
    halves = run_distributed(train_shard, world_size=2, timeout_s=90, args=(config, batch))
    for loss, weights in halves:
        assert loss == pytest.approx(whole[0], rel=LAYOUT)
        assert difference(weights, whole[1]) <= 3 * LAYOUT


@pytest.mark.parametrize(
    ("engine", "message"),
    [({"recompute": "block"}, "engine.recompute = none only"), ({"precision": "bf16"}, "engine.precision = fp32 only")],
)
def test_what_this_path_does_not_have_is_refused(engine, message):
    with pytest.raises(ConfigError, match=message), running(config_of(**engine)):
        pass


@pytest.mark.parametrize(("key", "optim"), [("optim.name", {"name": "dgd"}), ("optim.levels", {"levels": ("muon", "dgd")})])
def test_a_rule_that_needs_the_inputs_of_the_layers_is_refused(key, optim):
    config = config_of()
    config = config.model_copy(update={"optim": config.optim.model_copy(update=optim)})
    with pytest.raises(ConfigError, match=f'"dgd" in {key}: .* choose another rule'), running(config):
        pass
