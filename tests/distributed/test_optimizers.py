"""Deep rules under parallel layouts: parameters after ten steps do not depend on the layout.

The rules of whole matrices (Newton-Schulz, the delta term, the hidden layer of deep momentum, the inputs of DGD) are those of
`optim.name`; the initial states of the memories have Muon, a matrix for every head. "sharded" is `engine.distributed_optimizer`: whole
parameters on their owners. The same steps without engine and megatron are the oracle of the run on one process.
"""

import functools

import pytest
import torch
import torch.distributed as dist

from hope_pt.engine import Launch
from hope_pt.engine.matrices import matrices_of
from hope_pt.errors import ConfigError
from hope_pt.optim import Matrices, View
from hope_pt.testing import deep_run, difference, run_distributed, worst_difference
from hope_pt.testing.layouts import part_at, running, train_all, train_on_engine, train_plainly, with_engine

STEPS = 10
PARAMETERS = 1e-5
"""Ten steps with another order of summation. One parameter alone, the embedding most of all, whose small gradients AdamW enlarges: the
same over all weights together."""
SHARDED = {"distributed_optimizer": True, "overlap_grad_reduce": True}
TWO = {
    "tp2": {"tensor_parallel": 2},
    "pp2": {"pipeline_parallel": 2},
    "dp2 sharded": SHARDED,
    # The only sharded one here with two micro-batches.
    "cp2 sharded": {"context_parallel": 2, **SHARDED},
}
# The inputs of the layers, which no other rule has, under every axis: without sequence parallelism a column-parallel layer sees all tokens.
INPUTS = {"cp2": {"context_parallel": 2}, "tp2 whole": {"tensor_parallel": 2, "sequence_parallel": False}}
FOUR = {"tp4": {"tensor_parallel": 4, "micro_batch_size": 4}, "tp2 dp2 sharded": {"tensor_parallel": 2, **SHARDED}}
FEW = {"tp2", "dp2 sharded"}
RULES = ("m3", "muon", "momentum", "delta_momentum", "deep_momentum", "dgd")
NESTED = "m3, nested levels"
CASES = [
    (rule, layout)
    for rule in (*RULES, NESTED)
    for layout in (*TWO, *FOUR)
    if layout in FEW or rule == "m3" or (rule == "muon" and layout != "cp2 sharded")
]
CASES += [("dgd", layout) for layout in ("pp2", *INPUTS)]


def config_of(rule):
    return deep_run("m3", nested=True) if rule == NESTED else deep_run(rule)


@functools.cache
def alone(rule):
    return train_on_engine(Launch(), config_of(rule), steps=STEPS)


@functools.cache
def trained(size):
    layouts = {2: TWO | INPUTS, 4: FOUR}[size]
    cases = [case for case in CASES if case[1] in layouts]
    configs = [with_engine(config_of(rule), **layouts[layout]) for rule, layout in cases]
    ranks = run_distributed(functools.partial(train_all, steps=STEPS), world_size=size, timeout_s=170, args=(configs,))
    return {case: [rank[index] for rank in ranks] for index, case in enumerate(cases)}


@pytest.mark.distributed
@pytest.mark.timeout(300)
@pytest.mark.parametrize(("rule", "layout"), CASES)
def test_parameters_after_ten_steps_do_not_depend_on_the_layout(rule, layout):
    runs = trained(4 if layout in FOUR else 2)[rule, layout]
    reference = alone(rule)
    for run in runs:
        assert not isinstance(run, str), run
        assert run.losses == pytest.approx(reference.losses, rel=PARAMETERS)
        assert worst_difference(run.weights, reference.weights)[0] <= PARAMETERS
        assert all(torch.equal(run.weights[name], runs[0].weights[name]) for name in run.weights)


def test_rules_differ():
    """Else the comparison above would show nothing about them."""
    for rule in (*RULES[1:], NESTED):
        assert difference(alone(rule).weights, alone("m3").weights) > 1e-3, rule


def test_weights_whose_inputs_nobody_saw_are_an_error():
    """Else the rule would be plain gradient descent."""
    with running(deep_run("dgd"), launch=Launch()) as trainer:
        trainer.step(part_at(trainer, 0))
        trainer.optimizer._inputs.collected.close()
        with pytest.raises(KeyError, match="weight"):
            trainer.step(part_at(trainer, 1))


def test_the_engine_does_what_plain_torch_does():
    assert worst_difference(alone("m3").weights, train_plainly(deep_run("m3"), steps=STEPS).weights)[0] <= PARAMETERS


def test_a_learning_rate_of_their_own():
    """optim.matrix_lr moves the matrices and nothing else, in the first step."""
    base = deep_run("muon")
    own = base.model_copy(update={"optim": base.optim.model_copy(update={"matrix_lr": 3 * base.optim.lr})})
    first, other = (train_on_engine(Launch(), config, steps=1).weights for config in (base, own))
    moved = {name for name in first if not torch.equal(first[name], other[name])}
    assert moved == {name for name in first if name.endswith("_proj.weight") or "_weights." in name or ".levels.0.w_" in name}


def apply_sharded(launch, views, stacks):
    dist.init_process_group("gloo", init_method=launch.master_addr, rank=launch.rank, world_size=launch.world_size)
    found = []
    for view, (first, second, own) in zip(views, stacks, strict=True):
        matrices = matrices_of(view, ndim=first.dim() - 1, group=dist.group.WORLD)
        local = [x.chunk(launch.world_size, view.axis + 1)[launch.rank].contiguous() for x in (first, second)]
        found.append(matrices.apply(_mix, *local, constants=[matrices.rows(local[0])], own=[own]))
    return found


def _mix(first, second, rows, own):
    return first @ second.mT @ first / rows, own + second.sum((1, 2), keepdim=True)


@pytest.mark.distributed
@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_that_share_the_matrices_compute_on_whole_ones(ranks):
    """Column-parallel, row-parallel and interleaved parameters in stacks that do not divide evenly; some ranks have nothing to do."""
    kinds = ((View(0), (8, 6)), (View(1), (6, 8)), (View(0, (2, 2, 2, 1)), (28, 6)))
    views, stacks = [], []
    for view, shape in kinds:
        for count in (1, 3, 4):
            views.append(view)
            stacks.append((torch.randn(count, *shape), torch.randn(count, *shape), torch.randn(count * max(1, len(view.streams)), 1, 1)))
    results = run_distributed(apply_sharded, world_size=ranks, timeout_s=60, args=(views, stacks))
    for index, (view, (first, second, own)) in enumerate(zip(views, stacks, strict=True)):
        whole = Matrices(view)
        direction, new = whole.apply(_mix, first, second, constants=[whole.rows(first)], own=[own])
        torch.testing.assert_close(torch.cat([found[index][0] for found in results], view.axis + 1), direction)
        for found in results:
            torch.testing.assert_close(found[index][1], new)


def test_overlapped_gathers_do_not_go_with_whole_parameters():
    overlapped = with_engine(deep_run("m3"), overlap_param_gather=True, **SHARDED)
    with pytest.raises(
        ConfigError, match='overlap_param_gather = true does not go with "m3" and "muon": .* set engine.overlap_param_gather'
    ):
        with running(overlapped, launch=Launch()):
            pass
