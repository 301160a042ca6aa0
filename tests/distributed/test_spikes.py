"""The skip rule in the engine: an injected spike and an injected NaN move no parameter and let the clocks go on, under every layout alike.

The layer norm before the head is the place of injection: multiplied by 30 it makes a spike of loss and gradient, by NaN a value that is not
finite. It is itself again after the step.
"""

import functools
import json
import math

import pytest
import torch

from hope_pt.config.schema import RunConfig, SkipConfig
from hope_pt.engine import Launch, TrainEngine
from hope_pt.testing import EXACT, LAYOUT, deep_run, difference, run_distributed, tiny_model, tiny_run
from hope_pt.testing.layouts import part_at, running, with_engine

SKIP = SkipConfig(sigmas=6.0, window=8, in_a_row=3, in_window=6)
FACTORS = {9: 30.0, 11: math.nan, 12: 30.0}
"""Step (from 0) -> what the norm before the head is multiplied by."""
STEPS = 14
DROPPED = [step in FACTORS for step in range(STEPS)]


def config_of(config: RunConfig | None = None, **engine) -> RunConfig:
    # One period: a slow level would step with the gradients of earlier steps, dropped or not.
    config = config or tiny_run(model=tiny_model(periods=(1,)), steps=20, lr=1e-3)
    return with_engine(config.model_copy(update={"train": config.train.model_copy(update={"skip": SKIP})}), **engine)


def inject(trainer: TrainEngine, step: int):
    """One step, with the injection that is due."""
    weight = trainer.parameters.get("final_norm.weight")
    kept = None if weight is None else weight.detach().clone()
    if weight is not None:
        weight.data.mul_(FACTORS.get(step, 1.0))
    result = trainer.step(part_at(trainer, step))
    if weight is not None and step in FACTORS:
        weight.data.copy_(kept)
    return result


def train(launch: Launch, config: RunConfig, *, key: str = "", stored=None, steps: range = range(STEPS)):
    """Results and weights after every step, and the state at the end."""
    with running(config, launch=launch, key=key) as trainer:
        if stored:
            trainer.load_state(*stored)
        results, weights = [], []
        for step in steps:
            results.append(inject(trainer, step))
            weights.append(trainer.export())
        return results, weights, trainer.state()


@functools.cache
def alone():
    """The whole run in one process."""
    return train(Launch(), config_of())


def same_numbers(first, second) -> bool:
    """NaN is equal to NaN here."""
    return repr(first) == repr(second)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_dropped_steps_move_nothing_and_the_clock_goes_on(precision, caplog):
    config = config_of(tiny_run(model=tiny_model(periods=(1,)), steps=20, lr=1e-3, precision=precision))
    results, weights, (tensors, scalars) = train(Launch(), config)
    assert [result.skipped for result in results] == DROPPED
    assert [step for step, result in enumerate(results) if result.spike] == [9, 12]
    assert [result.skips for result in results][8:] == [0, 1, 1, 2, 3, 3]
    assert not any(result.diverged for result in results)
    assert math.isfinite(results[9].loss) and math.isfinite(results[9].grad_norm) and not math.isfinite(results[11].loss)
    for step in range(1, STEPS):
        assert (difference(weights[step], weights[step - 1]) == EXACT) == DROPPED[step], step
    assert scalars["clock"] == scalars["step"] == STEPS
    assert set(scalars["updates"].values()) == {STEPS - len(FACTORS)}, "no moment has seen a dropped gradient"
    assert all(tensor.isfinite().all() for tensor in tensors.values())
    said = [record.message for record in caplog.records if "was dropped" in record.message]
    assert [message.split(":")[0] for message in said] == ["step 10", "step 12", "step 13"]
    assert "loss is nan" in said[1] and "standard deviations" in said[0]


@pytest.mark.parametrize("saved_after", [5, 10, 12])
def test_a_resumed_run_decides_the_same_bit_for_bit(saved_after):
    config = config_of()
    whole, weights, end = alone()
    first, _, (tensors, scalars) = train(Launch(), config, steps=range(saved_after))
    scalars = json.loads(json.dumps(scalars))
    second, again, resumed = train(Launch(), config, stored=(tensors, scalars), steps=range(saved_after, STEPS))
    assert same_numbers(first + second, whole)
    assert difference(again[-1], weights[-1]) == EXACT
    assert resumed[1] == end[1] and resumed[1]["skips"]["skips"] == 3


def test_a_checkpoint_from_before_the_rule_loads_with_an_empty_history():
    config = config_of()
    _, _, (tensors, scalars) = train(Launch(), config, steps=range(10))
    del scalars["skips"]
    results, _, (_, scalars) = train(Launch(), config, stored=(tensors, scalars), steps=range(10, STEPS))
    # A spike is one by the history only.
    assert [result.skipped for result in results] == [False, True, False, False]
    assert scalars["skips"]["skips"] == 1 and len(scalars["skips"]["losses"]) == 3


def test_three_in_a_row_are_reported_as_diverged():
    config = config_of()
    with running(config, launch=Launch()) as trainer:
        trainer.parameters["final_norm.weight"].data.fill_(math.nan)
        results = [trainer.step(part_at(trainer, step)) for step in range(3)]
    assert [result.diverged for result in results] == ["", "", "3 steps in a row were dropped (train.skip.in_a_row = 3)"]


LAYOUTS = {
    "tp2": config_of(tensor_parallel=2, micro_batch_size=2),
    "pp2": config_of(pipeline_parallel=2),
    "dp2": config_of(micro_batch_size=2),
    "dp2 elements": config_of(distributed_optimizer=True, overlap_grad_reduce=True, overlap_param_gather=True),
    "dp2 layers": config_of(deep_run("muon", steps=20), distributed_optimizer=True),
    "cp2": config_of(context_parallel=2, micro_batch_size=2),
}


def train_layouts(launch: Launch):
    return {name: train(launch, config, key=f"{index}") for index, (name, config) in enumerate(LAYOUTS.items())}


@pytest.mark.distributed
@pytest.mark.slow
def test_all_ranks_of_every_layout_decide_the_same():
    ranks = run_distributed(train_layouts, world_size=2, timeout_s=110)
    single, _, _ = alone()
    for name in LAYOUTS:
        (results, weights, state), (others, others_weights, others_state) = (rank[name] for rank in ranks)
        assert same_numbers(results, others), name
        assert state[1] == others_state[1], name
        assert all(difference(own, other) == EXACT for own, other in zip(weights, others_weights, strict=True)), name
        assert [result.skipped for result in results] == DROPPED, name
        assert [step for step, result in enumerate(results) if result.spike] == [9, 12], name
        if name != "dp2 layers":
            moved = [not difference(weights[step], weights[step - 1]) == EXACT for step in range(1, STEPS)]
            assert moved == [not dropped for dropped in DROPPED[1:]], name
            finite = [step for step in range(STEPS) if math.isfinite(single[step].loss)]
            losses = [[results[step].loss for step in finite] for results in (results, single)]
            assert losses[0] == pytest.approx(losses[1], rel=LAYOUT), name


def last_bit(launch: Launch):
    """The second tensor-parallel rank sees other values than the first."""
    with running(config_of(tensor_parallel=2), launch=launch) as trainer:
        sums = torch.tensor([8.0 + launch.rank * 2**-40, 4.0], dtype=torch.float64)
        squares = torch.tensor(math.nan if launch.rank else 9.0)
        return trainer._agree(sums, squares)


@pytest.mark.distributed
def test_ranks_whose_values_differ_go_by_those_of_the_first():
    assert run_distributed(last_bit, world_size=2, timeout_s=60) == [(2.0, 3.0)] * 2
