"""State of the deep rules in checkpoints: within every interval, into other layouts, bf16 masters on their owners, dropped gradients.

Saved after five steps: within the intervals of both slow CMS levels and of M3's slow momentum.
"""

import json

import pytest
import torch

from hope_pt.engine import Launch
from hope_pt.errors import CheckpointError
from hope_pt.testing import EXACT, GRADIENT, LAYOUT, deep_run, difference, run_distributed
from hope_pt.testing.layouts import batch_at, part_at, running, with_engine

SAVED, END = 5, 8
RULES = ("m3", "muon", "momentum", "delta_momentum", "deep_momentum", "dgd")
SHARDED = {"distributed_optimizer": True}
LAYOUTS = {
    2: {"tp2": {"tensor_parallel": 2}, "pp2": {"pipeline_parallel": 2}, "dp2 sharded": SHARDED},
    4: {"tp2 dp2 sharded": {"tensor_parallel": 2, **SHARDED}},
}
NESTED = "m3, nested levels"
# Rules with state that has a shape of its own, M3, whose slow momentum has a clock, and levels that have all state twice.
RESHARDED = {
    "m3": {"tp2", "pp2", "dp2 sharded", "tp2 dp2 sharded"},
    "deep_momentum": {"tp2"},
    "dgd": {"tp2", "dp2 sharded"},
    NESTED: {"dp2 sharded"},
}
STATES = 2e-5
"""State after five steps under another layout: gradients differ by up to GRADIENT, all tensors together by less."""


def config_of(rule):
    return deep_run("m3", nested=True) if rule == NESTED else deep_run(rule)


def advance(trainer, steps):
    return [trainer.step(part_at(trainer, step)).loss for step in steps]


def save_and_continue(config, *, launch, key=""):
    """(tensors, scalars, losses after that, final state) of an uninterrupted run that was saved on its way."""
    with running(config, launch=launch, key=key) as trainer:
        advance(trainer, range(SAVED))
        tensors, scalars = trainer.state()
        return tensors, json.loads(json.dumps(scalars)), advance(trainer, range(SAVED, END)), trainer.state()


def resume(config, tensors, scalars, *, launch, key=""):
    other = config.model_copy(update={"train": config.train.model_copy(update={"seed": 7})})
    with running(other, launch=launch, key=key) as trainer:
        trainer.load_state(tensors, scalars)
        return advance(trainer, range(SAVED, END)), trainer.state()


@pytest.fixture(scope="module")
def saved():
    return {rule: save_and_continue(config_of(rule), launch=Launch()) for rule in RESHARDED}


@pytest.mark.parametrize("rule", [*RULES, NESTED])
def test_one_process_continues_bit_for_bit(rule, saved):
    config = config_of(rule)
    tensors, scalars, losses, final = saved[rule] if rule in saved else save_and_continue(config, launch=Launch())
    again, end = resume(config, tensors, scalars, launch=Launch())
    assert again == losses
    assert end[1] == final[1]
    assert difference(end[0], final[0]) == EXACT


def test_state_has_the_names_of_the_rule_and_whole_shapes(saved):
    weight, memory = "blocks.1.cms.levels.1.w_up.weight", "blocks.0.mixer.core.mem_weights.0"

    def shapes(rule, name):
        return {key.rpartition(".")[2]: tuple(value.shape) for key, value in saved[rule][0].items() if key.startswith(f"optim.{name}.")}

    whole = (24, 32)
    assert shapes("m3", weight) == dict.fromkeys(("fast", "second", "slow", "slow_sum", "slow_direction", "accumulated"), whole)
    assert shapes("deep_momentum", weight) == {"linear": whole, "second": whole, "accumulated": whole, "w1": (24, 4), "w2": (4, 32)}
    assert shapes("dgd", weight) == {"gram": (32, 32), "accumulated": whole}
    assert shapes("m3", memory) == {"momentum": (4, 8, 8)}
    assert shapes("m3", "embedding.weight") == {"exp_avg": (32, 32), "exp_avg_sq": (32, 32)}


def elsewhere(launch, cases):
    """Of every case: losses after loading one process's state; and whether a run of this layout continues itself bit for bit."""
    results = []
    for index, (config, tensors, scalars) in enumerate(cases):
        losses, _ = resume(config, tensors, scalars, launch=launch, key=f"{index}-there")
        own, own_scalars, on, final = save_and_continue(config, launch=launch, key=f"{index}-own")
        again, end = resume(config, own, own_scalars, launch=launch, key=f"{index}-again")
        same = again == on and end[1] == final[1] and difference(end[0], final[0]) == EXACT
        results.append((losses, own, own_scalars, same))
    return results


@pytest.mark.distributed
@pytest.mark.timeout(300)
@pytest.mark.parametrize("size", LAYOUTS)
def test_state_goes_into_any_layout_and_comes_out_of_it(size, saved):
    cases = [(rule, layout) for rule, layouts in RESHARDED.items() for layout in LAYOUTS[size] if layout in layouts]
    inputs = [(with_engine(config_of(rule), **LAYOUTS[size][layout]), *saved[rule][:2]) for rule, layout in cases]
    for rank in run_distributed(elsewhere, world_size=size, timeout_s=200, args=(inputs,)):
        for (rule, layout), (losses, tensors, scalars, same) in zip(cases, rank, strict=True):
            assert losses == pytest.approx(saved[rule][2], rel=LAYOUT), (rule, layout)
            assert same, f"{rule} {layout} does not continue itself bit for bit"
            # The history of the skip rule has losses and norms, which agree up to rounding.
            exact = [{key: value for key, value in found.items() if key != "skips"} for found in (scalars, saved[rule][1])]
            assert exact[0] == exact[1], (rule, layout)
            history, before = scalars["skips"], saved[rule][1]["skips"]
            assert history["losses"] == pytest.approx(before["losses"], rel=LAYOUT), (rule, layout)
            assert history["norms"] == pytest.approx(before["norms"], rel=GRADIENT), (rule, layout)
            assert (history["steps"], history["dropped"]) == (before["steps"], before["dropped"]), (rule, layout)
            assert difference(tensors, saved[rule][0]) <= STATES, (rule, layout)


def test_a_checkpoint_of_another_optimizer_is_refused(saved):
    tensors, scalars = saved["m3"][:2]
    with running(deep_run("muon"), launch=Launch()) as trainer:
        with pytest.raises(
            CheckpointError, match=r'of another optimizer: blocks\.0\.\S+ has the state of "m3" there .* give it "muon" here'
        ):
            trainer.load_state(tensors, scalars)


@pytest.mark.parametrize(("rule", "precision"), [("m3", "fp32"), ("m3", "bf16"), ("dgd", "fp32")])
def test_a_non_finite_gradient_changes_no_state_and_the_clocks_go_on(rule, precision):
    with running(deep_run(rule, precision=precision), launch=Launch()) as trainer:
        advance(trainer, [0])
        before, _ = trainer.state()
        weight = trainer.parameters["final_norm.weight"]
        kept = weight.detach().clone()
        weight.data.fill_(float("nan"))
        result = trainer.step(batch_at(trainer.config, 1))
        weight.data.copy_(kept)
        after, scalars = trainer.state()
        assert result.skipped and scalars["clock"] == 2
        # Step 2 ends the interval of level 1, which steps with the gradient of step 1 alone.
        changed = {name for name in before.keys() & after.keys() if not torch.equal(before[name], after[name])}
        assert changed and all(".cms.levels.1." in name for name in changed)
        assert all(".cms.levels.1." in name for name in before.keys() ^ after.keys())
        assert not trainer.step(batch_at(trainer.config, 2)).skipped


def masters(launch, configs):
    results = []
    for index, config in enumerate(configs):
        with running(config, launch=launch, key=f"{index}") as trainer:
            advance(trainer, range(4))
            weights = trainer.export()
            rounded = all(torch.equal(parameter, weights[name].to(parameter.dtype)) for name, parameter in trainer.parameters.items())
            results.append((weights, rounded, sorted(trainer.optimizer.pieces), trainer.optimizer.num_calls))
    return results


@pytest.mark.distributed
def test_bf16_masters_are_on_their_owners_and_weights_on_all():
    config = deep_run("m3", precision="bf16")
    (first, whole), (second, _) = run_distributed(masters, world_size=2, timeout_s=110, args=([with_engine(config, **SHARDED), config],))
    assert first[1] and second[1], "every rank has the rounding of the masters"
    assert set(first[2]).isdisjoint(second[2]) and sorted(first[2] + second[2]) == whole[2]
    # The norm of the gradient is summed in another order, which moves the factor of the clipping by its last bits.
    assert difference(first[0], whole[0]) <= LAYOUT
    assert difference(first[0], {name: value.bfloat16().float() for name, value in first[0].items()}) > 1e-4
