"""Independent CMS levels under tensor, sequence and pipeline parallelism: what one plain process computes, the levels' weights above all.

A level's weight meets the stream behind a row-parallel matrix. With sequence parallelism every rank sees a part of the tokens there, and
the gradient of the weight is a sum over ranks, as that of a norm is. That gradient is one number, a sum over tokens and channels which may
cancel, so the six weights are compared together.
"""

import functools

import pytest

from hope_pt.config.schema import CMSConfig, ModelConfig, OptimConfig, TitansConfig
from hope_pt.testing import GRADIENT, LAYOUT, difference, run_distributed, tiny_run, worst_difference
from hope_pt.testing.layouts import train_all, train_plainly, with_engine

LAYOUTS = {
    "tp2": {"tensor_parallel": 2, "sequence_parallel": False},
    "tp2 sp": {"tensor_parallel": 2},
    "tp2 sp recompute": {"tensor_parallel": 2, "recompute": "block"},
    "pp2": {"pipeline_parallel": 2},
    "dp2 distributed": {"distributed_optimizer": True},
}
STEPS = 3


def config_of(**layout):
    model = ModelConfig(
        vocab_size=32,
        num_layers=2,
        width=32,
        num_heads=4,
        titans=TitansConfig(chunk_mem=4, chunk_proj=8, save_every=8),
        cms=CMSConfig(hidden=24, periods=(1, 2, 3), variant="independent"),
    )
    config = tiny_run(model=model, seq_len=16, micro_batch_size=2)
    # An eps as large as that makes a weight's step proportional to its gradient.
    return with_engine(config.model_copy(update={"optim": OptimConfig(lr=1e-2, warmup_steps=2, clip=0.05, eps=1e-3)}), **layout)


def weights_of(tensors):
    return {name: tensor for name, tensor in tensors.items() if name.endswith(".scale")}


def others_of(tensors):
    return {name: tensor for name, tensor in tensors.items() if not name.endswith(".scale")}


@functools.cache
def oracle():
    return train_plainly(config_of(), steps=STEPS)


@functools.cache
def trained():
    configs = [config_of(**layout) for layout in LAYOUTS.values()]
    ranks = run_distributed(functools.partial(train_all, steps=STEPS), world_size=2, timeout_s=200, args=(configs,))
    return dict(zip(LAYOUTS, zip(*ranks, strict=True), strict=True))


@pytest.mark.distributed
@pytest.mark.timeout(240)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_computes_what_one_plain_process_computes(layout):
    for run in trained()[layout]:
        assert not isinstance(run, str), run
        assert run.losses == pytest.approx(oracle().losses, rel=LAYOUT)
        weights, others = ([one(gradients) for gradients in (run.gradients, oracle().gradients)] for one in (weights_of, others_of))
        assert difference(*weights) <= GRADIENT
        assert worst_difference(*others)[0] <= GRADIENT
        assert difference(run.weights, oracle().weights) <= LAYOUT


def test_the_weights_of_all_levels_have_moved():
    """Else the comparison above says nothing of them."""
    moved = {name: abs(float(weight) - 1) for name, weight in weights_of(oracle().weights).items()}
    assert len(moved) == 6 and min(moved.values()) > 1e-5
