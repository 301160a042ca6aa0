"""Every parallel layout computes what one plain process computes: losses, gradients and weights after three steps.

The oracle is HopeLM with autograd and torch's AdamW, no engine. All layouts of one number of processes run in the same forked workers. CMS
levels have periods 1, 2 and 3, so after three steps one level is within an interval. Sequences of 16 tokens hold documents that start
anywhere, and their shards end within chunks. "paper" and "fast" are both chunk presets, scaled down, with momentum; "fused" is the default
rule, which has kernels of its own.

Tolerances: losses agree to 1e-6. A gradient is compared with float64: a layout may be as far from it as the plain fp32 model is, times
ROUNDING (the plain model itself is 2e-6 to 4e-6 from float64, because the chunk form subtracts). AdamW's eps is large enough here that a
weight's step is proportional to its gradient: with a small one the sign of a gradient that is zero up to rounding decides a whole step.
"""

import functools

import pytest
import torch

from hope_pt.config.optim import OptimConfig
from hope_pt.config.schema import CMSConfig, ModelConfig, TitansConfig
from hope_pt.engine import Launch, TrainEngine, start, stop
from hope_pt.errors import ConfigError, DataError, ParallelError
from hope_pt.testing import EXACT, LAYOUT, ROUNDING, difference, run_distributed, tiny_run
from hope_pt.testing.layouts import Trained, batch_at, train_all, train_on_engine, train_plainly, with_engine

STEPS = 3
TITANS = {
    "paper": TitansConfig(chunk_mem=4, chunk_proj=4, momentum="titans"),
    "fast": TitansConfig(chunk_mem=4, chunk_proj=8, save_every=8, momentum="titans"),
    "fused": TitansConfig(chunk_mem=4, chunk_proj=8, save_every=8),
}
MODELS = (*TITANS, "hope-attention", "transformer")
OVERLAP = {"distributed_optimizer": True, "overlap_grad_reduce": True, "overlap_param_gather": True}
STATE = {"context_mode": "state"}
LAYOUTS = {
    1: {
        "one process": {},
        "recompute": {"recompute": "block"},
    },
    2: {
        "tp2": {"tensor_parallel": 2, "sequence_parallel": False},
        "tp2 sp": {"tensor_parallel": 2},
        "tp2 sp recompute": {"tensor_parallel": 2, "recompute": "block"},
        "pp2": {"pipeline_parallel": 2},
        "pp2 uneven": {"pipeline_parallel": 2, "first_stage_layers": 1},
        "pp2 vpp2": {"pipeline_parallel": 2, "virtual_stages": 2},
        "cp2 heads": {"context_parallel": 2},
        "cp2 state": {"context_parallel": 2, **STATE},
        "cp2 state recompute": {"context_parallel": 2, "recompute": "block", **STATE},
        "dp2": {},
        "dp2 overlap": {"overlap_grad_reduce": True},
        "dp2 distributed": {"distributed_optimizer": True},
        "dp2 distributed overlap": OVERLAP,
    },
    # Where neither a pipeline nor data parallelism divides the four rows, one micro-batch: two of them are above.
    4: {
        "tp4 sp": {"tensor_parallel": 4, "micro_batch_size": 4},
        "pp4": {"pipeline_parallel": 4},
        "tp2 sp pp2": {"tensor_parallel": 2, "pipeline_parallel": 2},
        "cp4 heads": {"context_parallel": 4, "micro_batch_size": 4},
        "cp4 state": {"context_parallel": 4, "micro_batch_size": 4, **STATE},
        "cp2 heads tp2 sp": {"context_parallel": 2, "tensor_parallel": 2, "micro_batch_size": 4},
        "cp2 state tp2 sp": {"context_parallel": 2, "tensor_parallel": 2, "micro_batch_size": 4, **STATE},
        "cp2 state pp2": {"context_parallel": 2, "pipeline_parallel": 2, **STATE},
        "tp2 sp dp2": {"tensor_parallel": 2},
        "tp2 sp dp2 distributed overlap": {"tensor_parallel": 2, **OVERLAP},
        "pp2 vpp2 dp2 distributed overlap": {"pipeline_parallel": 2, "virtual_stages": 2, "micro_batch_size": 1, **OVERLAP},
    },
}
SEGMENTED = {
    1: {"one process": {}, "recompute": {"recompute": "block"}},
    2: {"tp2 sp": {"tensor_parallel": 2}, "pp2 vpp2": {"pipeline_parallel": 2, "virtual_stages": 2}, "cp2 heads": {"context_parallel": 2}},
}
# Variations of a mechanism that others show with every model.
ONE_MODEL = {
    "recompute", "tp2 sp recompute", "cp2 state recompute", "pp2 uneven", "dp2 overlap", "dp2 distributed", "cp2 state tp2 sp",
    "cp2 state pp2", "tp2 sp dp2 distributed overlap", "pp2 vpp2 dp2 distributed overlap",
}  # fmt: skip
CASES = [
    (model, size, layout)
    for model in MODELS
    for size, layouts in LAYOUTS.items()
    for layout in layouts
    if model == "fused" or layout not in ONE_MODEL
]


def model_of(name):
    attention = name in ("hope-attention", "transformer")
    return ModelConfig(
        vocab_size=32,
        num_layers=4,
        width=32,
        num_heads=4,
        mixer="attention" if attention else "titans",
        titans=TitansConfig() if attention else TITANS[name],
        cms=CMSConfig(hidden=24, periods=(1,) if name == "transformer" else (1, 2, 3)),
    )


def config_of(name, **layout):
    config = tiny_run(model=model_of(name), seq_len=16, micro_batch_size=2)
    config = config.model_copy(update={"optim": OptimConfig(lr=1e-2, warmup_steps=2, clip=0.05, eps=1e-3)})
    return with_engine(config, **layout)


@functools.cache
def oracle(name, segments=1, dtype=torch.float32):
    return train_plainly(config_of(name, segments=segments), steps=STEPS, dtype=dtype)


@functools.cache
def trained(size):
    """{(model, layout): what each rank returned} of all layouts of one number of processes."""
    keys = [(model, layout) for model, number, layout in CASES if number == size]
    configs = [config_of(model, **LAYOUTS[size][layout]) for model, layout in keys]
    segmented = [("fused", layout, 4) for layout in SEGMENTED.get(size, {})]
    configs += [config_of(model, segments=segments, **SEGMENTED[size][layout]) for model, layout, segments in segmented]
    ranks = run_distributed(functools.partial(train_all, steps=STEPS), world_size=size, timeout_s=600, args=(configs,))
    return dict(zip(keys + segmented, zip(*ranks, strict=True), strict=True))


def assert_equal(runs, *, reference, truth):
    failures = [run for run in runs if isinstance(run, str)]
    assert not failures, failures
    for run in runs:
        assert run.losses == runs[0].losses, "ranks report one loss"
        assert run.grad_norms == pytest.approx(reference.grad_norms, rel=3e-5)
        assert difference(run.weights, runs[0].weights) == EXACT
    run: Trained = runs[0]
    assert run.losses == pytest.approx(reference.losses, rel=LAYOUT)
    assert difference(run.gradients, truth.gradients) <= ROUNDING * difference(reference.gradients, truth.gradients)
    for name in reference.gradients:
        one = {name: truth.gradients[name]}
        own, limit = difference({name: run.gradients[name]}, one), difference({name: reference.gradients[name]}, one)
        assert own <= max(10 * limit, 1e-5), name
    assert difference(run.weights, reference.weights) <= LAYOUT


@pytest.mark.distributed
@pytest.mark.timeout(660)
@pytest.mark.parametrize(("model", "size", "layout"), CASES)
def test_a_layout_computes_what_one_plain_process_computes(model, size, layout):
    assert_equal(trained(size)[model, layout], reference=oracle(model), truth=oracle(model, dtype=torch.float64))


@pytest.mark.distributed
@pytest.mark.timeout(660)
@pytest.mark.parametrize(("size", "layout"), [(size, layout) for size, layouts in SEGMENTED.items() for layout in layouts])
def test_segments_carry_the_state_and_cut_the_gradient(size, layout):
    runs = trained(size)["fused", layout, 4]
    assert_equal(runs, reference=oracle("fused", 4), truth=oracle("fused", 4, torch.float64))
    whole = oracle("fused")
    assert runs[0].losses[0] == pytest.approx(whole.losses[0], rel=LAYOUT), "the forward pass is that of the whole sequence"
    assert difference(runs[0].gradients, whole.gradients) > 1e-3, "the gradient is not"


def test_the_reference_run_moves_every_level_as_its_clock_says():
    initial = train_plainly(config_of("fast"), steps=0).weights
    after_two, after_three = (train_plainly(config_of("fast"), steps=steps).weights for steps in (2, 3))

    def moved(before, after):
        return {name.split(".")[4] for name in before if ".cms.levels." in name and not torch.equal(before[name], after[name])}

    assert moved(initial, after_two) == {"0", "1"}
    assert moved(after_two, after_three) == {"0", "2"}


def test_micro_batches_do_not_change_the_step():
    config = config_of("fast", micro_batch_size=4)
    run = train_on_engine(Launch(), config, steps=STEPS)
    assert_equal([run], reference=oracle("fast"), truth=oracle("fast", dtype=torch.float64))


def losses_by_rank(launch, config, rows):
    plan = start(config, launch=launch)
    try:
        batch = batch_at(config.model_copy(update={"train": config.train.model_copy(update={"global_batch_size": rows})}), 0)
        return TrainEngine(config, plan).token_losses(batch)
    finally:
        stop(plan)


@pytest.mark.distributed
@pytest.mark.parametrize("rows", [1, 7])
@pytest.mark.parametrize(
    "layout",
    [{"pipeline_parallel": 2, "virtual_stages": 2}, {"context_parallel": 2, **STATE}, {"tensor_parallel": 2, "segments": 4}, OVERLAP],
    ids=["pp2 vpp2", "cp2 state", "tp2 segments", "dp2 distributed overlap"],
)
def test_token_losses_are_whole_on_every_rank(layout, rows):
    config = config_of("fast", micro_batch_size=2, **layout)
    reference = losses_by_rank(Launch(), config_of("fast", micro_batch_size=2), rows)
    for losses in run_distributed(losses_by_rank, world_size=2, timeout_s=75, args=(config, rows)):
        assert difference({"losses": losses}, {"losses": reference}) <= LAYOUT


def test_a_second_engine_needs_the_first_to_stop():
    plan = start(config_of("fast"))
    try:
        with pytest.raises(ParallelError, match=r"call engine\.stop first"):
            start(config_of("fast"))
    finally:
        stop(plan)


def test_stop_leaves_no_group_behind():
    from megatron.core import parallel_state

    stop(start(config_of("fast")))
    left = [name for name, value in vars(parallel_state).items() if isinstance(value, torch.distributed.ProcessGroup)]
    assert not left
    assert not torch.distributed.is_initialized()


def test_rows_that_do_not_match_the_plan_are_refused():
    config = config_of("fast")
    plan = start(config)
    try:
        trainer = TrainEngine(config, plan)
        with pytest.raises(DataError, match="rank 0 was given 2 rows"):
            trainer.step(batch_at(config, 0).part(dp_rank=0, dp_size=2))
        empty = batch_at(config, 0)
        empty.loss_mask_BT.zero_()
        with pytest.raises(DataError, match="no token of the global batch"):
            trainer.step(empty)
    finally:
        stop(plan)


def one_rank_leaves(launch, config):
    plan = start(config, launch=launch)
    trainer = TrainEngine(config, plan)
    if plan.rank == 1:
        return ""
    try:
        trainer.step(batch_at(config, 0).part(dp_rank=plan.dp_rank, dp_size=plan.dp_size))
    except ParallelError as error:
        return str(error)
    return "no error"


def test_a_failed_collective_names_the_rank():
    message, _ = run_distributed(one_rank_leaves, world_size=2, timeout_s=75, args=(config_of("fast"),))
    assert message.startswith("rank 0 of 2: a collective failed: ")


def test_a_global_batch_that_cannot_be_divided_is_refused():
    with pytest.raises(ConfigError, match=r"train\.global_batch_size = 4 is not a multiple of 6 = 3"):
        start(config_of("fast"), launch=Launch(rank=0, world_size=3))
