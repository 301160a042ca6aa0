"""CMS variants under parallel layouts: what one plain process computes.

"independent": a level's weight meets the stream behind a row-parallel matrix. With sequence parallelism every rank sees a part of the
tokens there, and the gradient of the weight is a sum over ranks, as that of a norm is. That gradient is one number, a sum over tokens and
channels which may cancel, so the six weights are compared together. "nested": initial states are optimizer state, cut like the moments,
and survive a checkpoint within an interval under any layout. "by depth": two blocks with clocks of their own. A start from stored weights
(`train.start_from`) is cut by the layout too.
"""

import functools

import pytest
import torch

from hope_pt import checkpoint
from hope_pt.config import to_toml
from hope_pt.config.optim import OptimConfig
from hope_pt.config.schema import CMSConfig, ModelConfig, TitansConfig
from hope_pt.engine.sharding import Shard
from hope_pt.nn import HopeLM
from hope_pt.testing import BF16_LOSS, EXACT, GRADIENT, LAYOUT, difference, run_distributed, tiny_run, worst_difference
from hope_pt.testing.layouts import part_at, running, train_all, train_plainly, with_engine
from hope_pt.train.start import load_start

CMS = {
    "independent": CMSConfig(hidden=24, periods=(1, 2, 3), variant="independent"),
    "nested": CMSConfig(hidden=24, periods=(1, 2, 4), variant="nested"),
    "nested m3": CMSConfig(hidden=24, periods=(1, 2, 4), variant="nested"),
    "by depth": CMSConfig(hidden=24, periods=(1,), depth_periods=(1, 3)),
}
OPTIM = {"nested m3": {"name": "m3", "matrix_lr": 2e-3}}
LAYOUTS = {
    "tp2": {"tensor_parallel": 2, "sequence_parallel": False},
    "tp2 sp": {"tensor_parallel": 2},
    "tp2 sp recompute": {"tensor_parallel": 2, "recompute": "block"},
    "pp2": {"pipeline_parallel": 2},
    "dp2 distributed": {"distributed_optimizer": True},
}
CASES = [("independent", layout) for layout in LAYOUTS]
CASES += [("nested", layout) for layout in ("tp2 sp", "pp2", "dp2 distributed")] + [("by depth", "pp2")]
CASES += [("nested m3", layout) for layout in ("tp2 sp", "dp2 distributed")]
STEPS = 3
DEEP = 1e-5
"""Weights after steps of a deep rule: an orthogonalised update has its full size whatever the gradient's, and keeps its rounding."""


def config_of(cms, **layout):
    model = ModelConfig(
        vocab_size=32,
        num_layers=2,
        width=32,
        num_heads=4,
        titans=TitansConfig(chunk_mem=4, chunk_proj=8, save_every=8),
        cms=CMS[cms],
    )
    config = tiny_run(model=model, seq_len=16, micro_batch_size=2)
    # An eps as large as that makes a weight's step proportional to its gradient.
    return with_engine(
        config.model_copy(update={"optim": OptimConfig(lr=1e-2, warmup_steps=2, clip=0.05, eps=1e-3, **OPTIM.get(cms, {}))}), **layout
    )


def weights_of(tensors):
    return {name: tensor for name, tensor in tensors.items() if name.endswith(".scale")}


def others_of(tensors):
    return {name: tensor for name, tensor in tensors.items() if not name.endswith(".scale")}


@functools.cache
def oracle(cms, steps=STEPS):
    return train_plainly(config_of(cms), steps=steps)


@functools.cache
def trained():
    configs = [config_of(cms, **LAYOUTS[layout]) for cms, layout in CASES]
    ranks = run_distributed(functools.partial(train_all, steps=STEPS), world_size=2, timeout_s=200, args=(configs,))
    return dict(zip(CASES, zip(*ranks, strict=True), strict=True))


@pytest.mark.distributed
@pytest.mark.timeout(240)
@pytest.mark.parametrize(("cms", "layout"), CASES)
def test_a_layout_computes_what_one_plain_process_computes(cms, layout):
    reference = oracle(cms)
    for run in trained()[cms, layout]:
        assert not isinstance(run, str), run
        assert run.losses == pytest.approx(reference.losses, rel=DEEP if cms in OPTIM else LAYOUT)
        weights, others = ([one(gradients) for gradients in (run.gradients, reference.gradients)] for one in (weights_of, others_of))
        assert cms != "independent" or difference(*weights) <= GRADIENT
        assert worst_difference(*others)[0] <= GRADIENT
        assert difference(run.weights, reference.weights) <= (DEEP if cms in OPTIM else LAYOUT)


def test_the_weights_of_all_levels_have_moved():
    """Else the comparison above says nothing of them."""
    moved = {name: abs(float(weight) - 1) for name, weight in weights_of(oracle("independent").weights).items()}
    assert len(moved) == 6 and min(moved.values()) > 1e-5


def test_the_variants_are_not_the_chain():
    """Restarts and clocks by depth have changed the weights within these steps."""
    config = config_of("nested")
    chain = CMSConfig(hidden=24, periods=(1, 2, 4))
    plain = train_plainly(config.model_copy(update={"model": config.model.model_copy(update={"cms": chain})}), steps=STEPS)
    assert difference(oracle("nested").weights, plain.weights) > 1e-4
    levels = [name for name in oracle("by depth").weights if ".cms.levels.0.w_up" in name]
    start, end = (oracle("by depth", steps=steps).weights for steps in (1, 2))
    assert [not torch.equal(start[name], end[name]) for name in levels] == [True, False]


def pass_on(launch, layouts, *, between):
    """Each layout takes `between` steps and hands its state on: losses of all steps, and the last weights."""
    losses, state = [], None
    for index, layout in enumerate(layouts):
        with running(config_of("nested", **LAYOUTS[layout]), launch=launch, key=f"{index}") as trainer:
            if state is not None:
                trainer.load_state(*state)
            losses += [trainer.step(part_at(trainer, trainer.num_steps_done)).loss for _ in range(between)]
            state, weights = trainer.state(), trainer.export()
    return losses, weights, sorted({name.rpartition(".")[2] for name in state[0]})


@pytest.mark.distributed
@pytest.mark.timeout(240)
def test_nested_levels_continue_within_an_interval_under_any_layout():
    """Saved after steps 3 and 6: the second level is within its interval of four, the first within its of two after 3."""
    layouts = ("tp2 sp", "dp2 distributed", "tp2 sp")
    ranks = run_distributed(functools.partial(pass_on, between=3), world_size=2, timeout_s=200, args=(layouts,))
    (losses, weights, keys), (_, other, _) = ranks
    assert difference(weights, other) == EXACT
    assert {"initial", "initial_sum", "initial_state_exp_avg", "initial_state_exp_avg_sq"} <= set(keys)
    assert losses == pytest.approx(oracle("nested", steps=9).losses, rel=LAYOUT)
    assert difference(weights, oracle("nested", steps=9).weights) <= LAYOUT


def begin(launch, configs):
    """Weights and first loss of each layout after a start from stored weights."""
    found = []
    for index, config in enumerate(configs):
        with running(config, launch=launch, key=f"{index}") as trainer:
            load_start(config, engine=trainer, fingerprint="of the data")
            found.append((trainer.export(), trainer.step(part_at(trainer, 0)).loss, trainer.optimizer.num_calls))
    return found


@pytest.mark.distributed
@pytest.mark.timeout(240)
def test_every_layout_begins_with_the_stored_weights(tmp_path):
    layouts = [LAYOUTS[name] for name in ("tp2 sp", "pp2", "dp2 distributed")] + [{"tensor_parallel": 2, "precision": "bf16"}]
    lm = HopeLM(config_of("independent").model, seed=7)
    shards = [Shard(f"model.{name}", value) for name, value in lm.state_dict().items()]
    meta = {"config": to_toml(config_of("independent")), "fingerprint": "of the data"}
    checkpoint.save(tmp_path, step=0, shards=shards, meta=meta, layout="one process", keep=1, keep_every=0)
    configs = []
    for layout in layouts:
        config = config_of("independent", **layout)
        train = config.train.model_copy(update={"start_from": str(tmp_path)})
        configs.append(config.model_copy(update={"train": train}))
    ranks = run_distributed(begin, world_size=2, timeout_s=200, args=(configs,))
    for index, (weights, loss, calls) in [pair for found in ranks for pair in enumerate(found)]:
        assert difference(weights, lm.state_dict()) == EXACT
        assert calls == 1
        assert loss == pytest.approx(ranks[0][0][1], rel=BF16_LOSS if index == 3 else LAYOUT)
    assert ranks[0][0][1] != pytest.approx(oracle("independent").losses[0], rel=1e-4), "other weights than those of the seed"
