"""Deep rules under parallel layouts: parameters after ten steps do not depend on the layout.

Two blocks with four heads, CMS periods 1, 2 and 3, clipping at every step, weight decay. The rules of whole matrices (Newton-Schulz, the
delta term, the MLP of deep momentum, the inputs of DGD) are those of `optim.name`; the initial states of the memories have Muon, a matrix
for every head. "sharded" is `engine.distributed_optimizer`: whole parameters on their owners.

eps of all second moments is large: with a small one an entry whose gradient is zero up to rounding moves by a whole step.
"""

import functools

import pytest
import torch

from hope_pt.config.schema import (
    CMSConfig,
    DeepMomentumConfig,
    M3Config,
    ModelConfig,
    MomentumConfig,
    OptimConfig,
    TitansConfig,
)
from hope_pt.engine import Launch
from hope_pt.testing import difference, run_distributed, tiny_run, worst_difference
from hope_pt.testing.layouts import train_all, train_on_engine, with_engine

STEPS = 10
PARAMETERS = 1e-5
"""Ten steps of another order of summation; Newton-Schulz enlarges what is small in a gradient, the memories' gates feel it most."""
EPS = 1e-3
SHARDED = {"distributed_optimizer": True, "overlap_grad_reduce": True}
TWO = {"tp2": {"tensor_parallel": 2}, "pp2": {"pipeline_parallel": 2}, "dp2 sharded": SHARDED}
FOUR = {"tp4": {"tensor_parallel": 4}, "tp2 dp2 sharded": {"tensor_parallel": 2, **SHARDED}}
RULES = ("m3", "muon", "momentum", "delta_momentum", "deep_momentum", "dgd")
CASES = [
    *((rule, layout) for rule in ("m3", "muon") for layout in (*TWO, *FOUR)),
    *((rule, layout) for rule in RULES[2:] for layout in ("tp2", "dp2 sharded")),
]


def config_of(rule, *, precision="fp32", **layout):
    model = ModelConfig(
        vocab_size=32, num_layers=2, width=32, num_heads=4, titans=TitansConfig(chunk_mem=8, chunk_proj=16),
        cms=CMSConfig(hidden=24, periods=(1, 2, 3)),
    )  # fmt: skip
    optim = OptimConfig(
        name=rule, memory="muon", lr=1e-2, warmup_steps=2, clip=0.05, eps=EPS, base_width=16,
        m3=M3Config(slow_every=4, eps=EPS),
        momentum=MomentumConfig(eps=EPS),
        deep_momentum=DeepMomentumConfig(hidden=4, eps=EPS),
    )  # fmt: skip
    config = tiny_run(model=model, seq_len=16, micro_batch_size=2, precision=precision, steps=STEPS)
    return with_engine(config.model_copy(update={"optim": optim}), **layout)


@functools.cache
def alone(rule):
    return train_on_engine(Launch(), config_of(rule), steps=STEPS)


@functools.cache
def trained(size):
    layouts = {2: TWO, 4: FOUR}[size]
    cases = [case for case in CASES if case[1] in layouts]
    configs = [config_of(rule, **layouts[layout]) for rule, layout in cases]
    ranks = run_distributed(functools.partial(train_all, steps=STEPS), world_size=size, timeout_s=170, args=(configs,))
    return {case: [rank[index] for rank in ranks] for index, case in enumerate(cases)}


@pytest.mark.distributed
@pytest.mark.timeout(300)
@pytest.mark.parametrize(("rule", "layout"), CASES)
def test_parameters_after_ten_steps_do_not_depend_on_the_layout(rule, layout):
    runs = trained(2 if layout in TWO else 4)[rule, layout]
    reference = alone(rule)
    for run in runs:
        assert not isinstance(run, str), run
        assert run.losses == pytest.approx(reference.losses, rel=PARAMETERS)
        assert difference(run.weights, reference.weights) <= PARAMETERS
        assert worst_difference(run.weights, reference.weights)[0] <= 10 * PARAMETERS
        assert all(torch.equal(run.weights[name], runs[0].weights[name]) for name in run.weights)
