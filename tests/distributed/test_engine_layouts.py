"""One process against two and four, and every micro-batch size: equal losses, gradients and parameters over three optimizer steps.

Three steps with CMS periods 1, 2 and 3 cover a level in mid-interval, one that has ended an interval and begun another, and one that ends
its interval with the last step. Rows have different numbers of counted tokens, so a mean of means would show.
"""

import functools

import pytest
import torch

from hope_pt.engine import Launch, TrainEngine, start, stop
from hope_pt.errors import ConfigError, DataError, ParallelError
from hope_pt.testing import GRADIENT, LAYOUT, difference, random_batch, run_distributed, tiny_model, tiny_run, worst_difference

STEPS = 3
ROWS = 4


def config_for(mixer="titans", *, micro_batch_size=1):
    # Adam divides small gradients by their own size; a larger epsilon keeps rounding from becoming a whole step.
    config = tiny_run(model=tiny_model(mixer=mixer), global_batch_size=ROWS, micro_batch_size=micro_batch_size)
    return config.model_copy(update={"optim": config.optim.model_copy(update={"eps": 1e-3})})


def batch_at(config, step):
    return random_batch(batch=ROWS, length=config.data.seq_len, vocab_size=config.model.vocab_size, seed=step)


def train(launch, config):
    """Losses, gradient norms, the first step's gradients and the final parameters, as one rank sees them."""
    plan = start(config, launch=launch)
    trainer = TrainEngine(config, plan)
    results, gradients = [], {}
    for step in range(STEPS):
        results.append(trainer.step(batch_at(config, step).part(dp_rank=plan.dp_rank, dp_size=plan.dp_size)))
        if not gradients:
            gradients = {name: parameter.main_grad.clone() for name, parameter in trainer.parameters.items()}
    weights, (state, _) = trainer.export(), trainer.state()
    stop(plan)
    pending = {name: tensor for name, tensor in state.items() if name.endswith("accumulated")}
    return {"results": results, "gradients": gradients, "weights": weights, "pending": pending}


@functools.cache
def one_process(mixer):
    return train(Launch(), config_for(mixer))


def assert_equal_runs(run, reference):
    for step, (result, expected) in enumerate(zip(run["results"], reference["results"], strict=True)):
        assert result.loss == pytest.approx(expected.loss, rel=LAYOUT)
        assert result.grad_norm == pytest.approx(expected.grad_norm, rel=GRADIENT if step else LAYOUT)
        assert (result.lr, result.skipped) == (expected.lr, False)
    assert difference(run["gradients"], reference["gradients"]) <= LAYOUT
    assert worst_difference(run["gradients"], reference["gradients"]) <= (GRADIENT, "")
    assert difference(run["weights"], reference["weights"]) <= LAYOUT
    assert difference(run["pending"], reference["pending"]) <= GRADIENT


@pytest.mark.parametrize("dp_size", [2, 4])
@pytest.mark.parametrize("mixer", ["titans", "attention"])
def test_data_parallel_ranks_compute_what_one_process_computes(mixer, dp_size):
    ranks = run_distributed(train, world_size=dp_size, timeout_s=75, args=(config_for(mixer),))
    for run in ranks:
        assert_equal_runs(run, one_process(mixer))
        assert [result.loss for result in run["results"]] == [result.loss for result in ranks[0]["results"]]
        assert difference(run["weights"], ranks[0]["weights"]) == 0.0


@pytest.mark.parametrize("micro_batch_size", [2, 4])
@pytest.mark.parametrize("mixer", ["titans", "attention"])
def test_micro_batches_do_not_change_the_step(mixer, micro_batch_size):
    assert_equal_runs(train(Launch(), config_for(mixer, micro_batch_size=micro_batch_size)), one_process(mixer))


def test_the_reference_run_moves_every_level_as_its_clock_says():
    reference = one_process("titans")
    assert {name.split(".")[5] for name in reference["pending"]} == {"1"}, "only level 1 (period 2) is within an interval after step 3"
    assert reference["results"][0].loss != reference["results"][2].loss


@pytest.mark.parametrize(
    ("key", "words"),
    [("tensor_parallel", "tensor parallelism"), ("pipeline_parallel", "pipeline"), ("context_parallel", "context")],
)
def test_other_axes_are_refused_by_name(key, words):
    config = config_for()
    config = config.model_copy(update={"engine": config.engine.model_copy(update={key: 2})})
    with pytest.raises(ParallelError, match=rf"engine\.{key} = 2: {words}"):
        start(config)


def test_a_global_batch_that_cannot_be_divided_is_refused():
    with pytest.raises(ConfigError, match=r"train\.global_batch_size = 4 is not a multiple of 3"):
        start(config_for(), launch=Launch(rank=0, world_size=3))


def test_a_second_engine_needs_the_first_to_stop():
    plan = start(config_for())
    try:
        with pytest.raises(ParallelError, match=r"call engine\.stop first"):
            start(config_for())
    finally:
        stop(plan)


def test_stop_leaves_no_group_behind():
    from megatron.core import parallel_state

    stop(start(config_for()))
    left = [name for name, value in vars(parallel_state).items() if isinstance(value, torch.distributed.ProcessGroup)]
    assert not left
    assert not torch.distributed.is_initialized()


def test_rows_that_do_not_match_the_plan_are_refused():
    config = config_for()
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
    message, _ = run_distributed(one_rank_leaves, world_size=2, timeout_s=75, args=(config_for(),))
    assert message.startswith("rank 0 of 2: a collective failed: ")
