"""Saving and loading within an interval, bf16 with fp32 masters, dropped gradients."""

import contextlib
import json

import pytest
import torch

from hope_pt.config.schema import TitansConfig
from hope_pt.engine import Launch, TrainEngine, start, stop
from hope_pt.errors import CheckpointError
from hope_pt.nn.init import init_tensor
from hope_pt.testing import BF16_GRADIENT, BF16_LOSS, EXACT, LAYOUT, difference, random_batch, run_distributed, tiny_model, tiny_run
from hope_pt.testing.layouts import train_all, train_on_engine, with_engine

STEPS = 7


@contextlib.contextmanager
def running(config, *, launch=None):
    plan = start(config, launch=launch)
    try:
        yield TrainEngine(config, plan)
    finally:
        stop(plan)


def batch_at(config, step):
    rows, length = config.train.global_batch_size, config.data.seq_len
    return random_batch(batch=rows, length=length, vocab_size=config.model.vocab_size, seed=step)


def advance(trainer, steps):
    """Losses of the given steps; the batch is a function of the step."""
    plan = trainer.plan
    return [trainer.step(batch_at(trainer.config, step).part(dp_rank=plan.dp_rank, dp_size=plan.dp_size)).loss for step in steps]


@pytest.mark.parametrize("saved_after", [1, 2, 3, 5])
@pytest.mark.parametrize(("mixer", "precision"), [("titans", "fp32"), ("titans", "bf16"), ("attention", "fp32")])
def test_a_loaded_run_continues_bit_for_bit(mixer, precision, saved_after):
    config = tiny_run(model=tiny_model(mixer=mixer), global_batch_size=2, precision=precision, steps=STEPS)
    with running(config) as trainer:
        advance(trainer, range(saved_after))
        tensors, scalars = trainer.state()
        scalars = json.loads(json.dumps(scalars))
        losses = advance(trainer, range(saved_after, STEPS))
        final = trainer.state()
    other_seed = config.model_copy(update={"train": config.train.model_copy(update={"seed": 7})})
    with running(other_seed) as restored:
        restored.load_state(tensors, scalars)
        assert restored.num_steps_done == saved_after
        assert advance(restored, range(saved_after, STEPS)) == losses
        again = restored.state()
    assert again[1] == final[1]
    assert difference(again[0], final[0]) == EXACT


def test_state_is_flat_fp32_and_holds_open_intervals_only():
    config = tiny_run(global_batch_size=1)
    with running(config) as trainer:
        advance(trainer, range(3))
        tensors, scalars = trainer.state()
    assert all(tensor.dtype == torch.float32 and tensor.device.type == "cpu" for tensor in tensors.values())
    assert scalars["step"] == scalars["clock"] == 3
    open_levels = {name.split(".")[5] for name in tensors if name.endswith(".accumulated")}
    # Level 0 steps at once, level 2 (period 3) has just stepped, level 1 (period 2) holds the gradient of step 3.
    assert open_levels == {"1"}
    updates = {name.split(".")[4]: count for name, count in scalars["updates"].items() if ".cms.levels." in name}
    assert updates == {"0": 3, "1": 1, "2": 1}


def continue_on_two(launch, config, tensors, scalars):
    with running(config, launch=launch) as trainer:
        trainer.load_state(tensors, scalars)
        return advance(trainer, range(3, 5))


def test_a_state_loads_into_another_layout():
    config = tiny_run(global_batch_size=2)
    with running(config) as trainer:
        advance(trainer, range(3))
        tensors, scalars = trainer.state()
        losses = advance(trainer, range(3, 5))
    for rank_losses in run_distributed(continue_on_two, world_size=2, timeout_s=75, args=(config, tensors, scalars)):
        assert rank_losses == pytest.approx(losses, rel=LAYOUT)


def test_a_state_of_another_model_is_refused():
    config = tiny_run()
    with running(config) as trainer:
        tensors, scalars = trainer.state()
        fewer = dict(tensors)
        del fewer["model.embedding.weight"]
        with pytest.raises(CheckpointError, match=r"of another model: model.embedding.weight is missing"):
            trainer.load_state(fewer, scalars)
        with pytest.raises(CheckpointError, match=r"model.embedding.weight is \(3, 3\) in the checkpoint and \(32, 16\)"):
            trainer.load_state({**tensors, "model.embedding.weight": torch.zeros(3, 3)}, scalars)


@pytest.mark.parametrize("mixer", ["titans", "attention"])
def test_bf16_trains_with_fp32_masters(mixer):
    config = tiny_run(model=tiny_model(mixer=mixer), precision="bf16", global_batch_size=2, steps=12)
    with running(config) as trainer:
        initial = trainer.export()
        for name, weight in initial.items():
            assert torch.equal(weight, init_tensor(name, tuple(weight.shape), config=config.model, seed=0)), "masters start unrounded"
        losses = [trainer.step(batch_at(config, 0)).loss for _ in range(12)]
        weights = trainer.export()
        parameters = {name: parameter.detach() for name, parameter in trainer.parameters.items()}
    assert losses[-1] < 0.9 * losses[0]
    for name, parameter in parameters.items():
        per_head_or_channel = ".core." in name or name.endswith("norm.weight")
        assert parameter.dtype == (torch.float32 if per_head_or_channel else torch.bfloat16), name
        assert torch.equal(parameter, weights[name].to(parameter.dtype)), name
    rounded = {name: weight.bfloat16().float() for name, weight in weights.items()}
    assert difference(weights, rounded) > 1e-4, "masters carry more than bf16"


def test_bf16_agrees_with_fp32():
    first = {}
    for precision in ("fp32", "bf16"):
        config = tiny_run(precision=precision, global_batch_size=2)
        with running(config) as trainer:
            first[precision] = trainer.step(batch_at(config, 0))
    assert first["bf16"].loss == pytest.approx(first["fp32"].loss, rel=BF16_LOSS)
    assert first["bf16"].grad_norm == pytest.approx(first["fp32"].grad_norm, rel=BF16_GRADIENT)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_non_finite_gradient_is_dropped_and_the_clocks_go_on(precision):
    config = tiny_run(global_batch_size=1, precision=precision)
    with running(config) as trainer:
        advance(trainer, [0])
        before, _ = trainer.state()
        weight = trainer.parameters["final_norm.weight"]
        kept = weight.detach().clone()
        weight.data.fill_(float("nan"))
        result = trainer.step(batch_at(config, 1))
        weight.data.copy_(kept)
        after, scalars = trainer.state()
        assert result.skipped
        # Step 2 ends the interval of level 1, which steps with the gradient of step 1 alone.
        moved = {name for name in before if name.startswith("model.") and not torch.equal(before[name], after[name])}
        assert moved and all(".cms.levels.1." in name for name in moved)
        assert scalars["clock"] == 2
        assert not trainer.step(batch_at(config, 2)).skipped


BF16_LAYOUTS = {
    "tp2 sp": {"tensor_parallel": 2},
    "pp2": {"pipeline_parallel": 2},
    "cp2 heads": {"context_parallel": 2},
    "cp2 state": {"context_parallel": 2, "context_mode": "state"},
    "dp2": {},
    "dp2 distributed": {"distributed_optimizer": True, "overlap_grad_reduce": True, "overlap_param_gather": True},
}


def train_layouts(launch, configs):
    return train_all(launch, configs, steps=3)


def test_bf16_layouts_agree_and_shards_of_masters_are_the_masters():
    config = tiny_run(precision="bf16", global_batch_size=4, micro_batch_size=2)
    whole = train_on_engine(Launch(), config, steps=3)
    configs = [with_engine(config, **layout) for layout in BF16_LAYOUTS.values()]
    ranks = run_distributed(train_layouts, world_size=2, timeout_s=110, args=(configs,))
    found = dict(zip(BF16_LAYOUTS, ranks[0], strict=True))
    for layout, run in found.items():
        assert not isinstance(run, str), run
        assert run.losses == pytest.approx(whole.losses, rel=BF16_LOSS), layout
        assert run.grad_norms[0] == pytest.approx(whole.grad_norms[0], rel=BF16_GRADIENT), layout
    # The norm of the gradient is summed in another order, which moves the factor of the clipping by its last bits.
    assert difference(found["dp2 distributed"].weights, found["dp2"].weights) <= LAYOUT


CONTROLS = {
    "memory off": TitansConfig(chunk_mem=4, chunk_proj=8, memory_off=True),
    "static": TitansConfig(chunk_mem=4, chunk_proj=8, static_k=True, static_v=True, static_eta=True, static_alpha=True),
    "no retention": TitansConfig(chunk_mem=4, chunk_proj=8, retention=False),
}


def test_parameters_without_a_gradient_do_not_stop_an_overlapped_reduction():
    """A control that writes nothing leaves gates unused; megatron starts a reduction when every parameter has reported its gradient."""
    base = tiny_run(global_batch_size=2)
    overlap = {"distributed_optimizer": True, "overlap_grad_reduce": True, "overlap_param_gather": True}
    configs = [base.model_copy(update={"model": base.model.model_copy(update={"titans": titans})}) for titans in CONTROLS.values()]
    ranks = run_distributed(train_layouts, world_size=2, timeout_s=110, args=([with_engine(c, **overlap) for c in configs],))
    for control, config, run in zip(CONTROLS, configs, ranks[0], strict=True):
        assert not isinstance(run, str), f"{control}: {run}"
        assert run.losses == pytest.approx(train_on_engine(Launch(), config, steps=3).losses, rel=1e-5), control


def losses_after_a_step(launch, config):
    with running(config, launch=launch) as trainer:
        advance(trainer, [0])
        held = batch_at(config, 9)
        losses, lm = trainer.token_losses(held), trainer.to_lm()
        return losses, lm.token_losses(held.tokens_BT, held.targets_BT, doc_start_BT=held.doc_start_BT).detach() if lm else None


def test_losses_between_steps_are_those_of_the_updated_weights():
    """With overlap the new weights are gathered by the next forward pass, whichever that is."""
    config = with_engine(tiny_run(), distributed_optimizer=True, overlap_grad_reduce=True, overlap_param_gather=True)
    (first, reference), (second, nothing) = run_distributed(losses_after_a_step, world_size=2, timeout_s=75, args=(config,))
    assert difference({"losses": first}, {"losses": reference}) <= LAYOUT
    assert torch.equal(first, second) and nothing is None
