"""Head and loss with the vocabulary divided over ranks: the module against torch's cross-entropy, and training where its weight is special.

Every layout with the default model is in test_engine_layouts.py; here are heads with a weight of their own, and all implementations.
"""

import functools

import pytest
import torch
import torch.nn.functional as F

from hope_pt.engine import TrainEngine, start, stop
from hope_pt.engine.head import VocabularyHead
from hope_pt.errors import ConfigError
from hope_pt.testing import EXACT, LAYOUT, ROUNDING, difference, run_distributed, tiny_model, tiny_run
from hope_pt.testing.layouts import train_all, train_plainly, with_engine

ROWS, TOKENS, WIDTH, VOCABULARY = 3, 8, 12, 40
OVERLAP = {"distributed_optimizer": True, "overlap_grad_reduce": True, "overlap_param_gather": True}
STEPS = 3


def problem() -> dict[str, torch.Tensor]:
    """Hidden states [T, B, D], W [V, D], targets [B, T], some ignored, and a gradient for every loss, some zero."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(*shape, generator=generator) for shape in ((TOKENS, ROWS, WIDTH), (VOCABULARY, WIDTH)))
    targets = torch.randint(VOCABULARY, (ROWS, TOKENS), generator=generator)
    targets[0, :2], targets[1, 0], targets[1, 1] = -100, 0, VOCABULARY - 1
    upstream = torch.randn(ROWS, TOKENS, generator=generator)
    upstream[2, :3] = 0.0
    return {"hidden": hidden, "weight": weight, "targets": targets, "upstream": upstream}


def torchs(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Losses and gradients of all logits in one process."""
    case = problem()
    hidden, weight = (case[name].to(dtype).requires_grad_() for name in ("hidden", "weight"))
    losses = F.cross_entropy((hidden @ weight.T).permute(1, 2, 0), case["targets"], reduction="none")
    losses.backward(case["upstream"].to(dtype))
    return {"losses": losses.detach(), "hidden": hidden.grad, "weight": weight.grad}


def run_head(launch, sequence_parallel: bool) -> dict[str, dict[str, torch.Tensor]]:
    """Losses and this rank's share of the gradients, by implementation."""
    engine = {"tensor_parallel": launch.world_size, "sequence_parallel": sequence_parallel}
    plan = start(with_engine(tiny_run(model=tiny_model(mixer="attention")), **engine), launch=launch)
    try:
        case, group = problem(), plan.groups.tensor
        own = torch.nn.Parameter(case["weight"].chunk(group.size())[group.rank()].clone())
        found = {}
        for backend in ("chunked", "reference"):
            own.grad = None
            hidden = case["hidden"].chunk(group.size())[group.rank()] if sequence_parallel else case["hidden"]
            hidden = hidden.clone().requires_grad_()
            head = VocabularyHead(own, group=group, sequence_parallel=sequence_parallel, backend=backend)
            losses = head(hidden, case["targets"])
            losses.backward(case["upstream"])
            found[backend] = {"losses": losses.detach(), "hidden": hidden.grad, "weight": own.grad}
        return found
    finally:
        stop(plan)


@pytest.mark.distributed
@pytest.mark.parametrize("sequence_parallel", [False, True], ids=["whole", "sequence-parallel"])
def test_losses_and_gradients_are_torchs(sequence_parallel):
    reference, truth = torchs(torch.float32), torchs(torch.float64)
    ranks = run_distributed(run_head, world_size=2, timeout_s=60, args=(sequence_parallel,))
    for backend in ("chunked", "reference"):
        parts = [rank[backend] for rank in ranks]
        whole = {name: torch.cat([part[name] for part in parts]) for name in ("hidden", "weight")}
        if not sequence_parallel:
            assert difference({"hidden": parts[0]["hidden"]}, {"hidden": parts[1]["hidden"]}) == EXACT
            whole["hidden"] = parts[0]["hidden"]
        assert difference({"losses": parts[0]["losses"]}, {"losses": parts[1]["losses"]}) == EXACT
        for name, found in {**whole, "losses": parts[0]["losses"]}.items():
            limit = max(LAYOUT / 2, ROUNDING * difference({name: reference[name]}, {name: truth[name]}))
            assert difference({name: found}, {name: truth[name]}) <= limit, (backend, name)


LAYOUTS = {
    2: {
        "tp2": {"tensor_parallel": 2, "sequence_parallel": False},
        "tp2 sp": {"tensor_parallel": 2},
        "pp2": {"pipeline_parallel": 2},
        "dp2 distributed overlap": OVERLAP,
    },
    4: {"tp2 sp pp2": {"tensor_parallel": 2, "pipeline_parallel": 2}},
}
CASES = [(size, layout, tied) for size, layouts in LAYOUTS.items() for layout in layouts for tied in (True, False)]


def config_of(tied: bool, backend: str = "auto", **layout):
    model = tiny_model(mixer="attention").model_copy(update={"tie_embeddings": tied, "head_backend": backend})
    config = tiny_run(model=model, seq_len=16, micro_batch_size=2)
    return with_engine(config.model_copy(update={"optim": config.optim.model_copy(update={"eps": 1e-3})}), **layout)


@functools.cache
def oracle(tied: bool, dtype: torch.dtype = torch.float32):
    return train_plainly(config_of(tied), steps=STEPS, dtype=dtype)


@functools.cache
def trained(size: int):
    """{(layout, tied): what each rank returned} of one set of processes."""
    keys = [(layout, tied) for number, layout, tied in CASES if number == size]
    configs = [config_of(tied, **LAYOUTS[size][layout]) for layout, tied in keys]
    ranks = run_distributed(functools.partial(train_all, steps=STEPS), world_size=size, timeout_s=110, args=(configs,))
    return dict(zip(keys, zip(*ranks, strict=True), strict=True))


@pytest.mark.distributed
@pytest.mark.parametrize(("size", "layout", "tied"), CASES)
def test_training_is_that_of_one_plain_process(size, layout, tied):
    reference, truth = oracle(tied), oracle(tied, torch.float64)
    runs = trained(size)[layout, tied]
    assert not [run for run in runs if isinstance(run, str)], runs
    for run in runs:
        assert run.losses == runs[0].losses == pytest.approx(reference.losses, rel=LAYOUT)
        assert difference(run.weights, runs[0].weights) == EXACT
    gradients, weights = runs[0].gradients, runs[0].weights
    assert difference(gradients, truth.gradients) <= ROUNDING * difference(reference.gradients, truth.gradients)
    assert difference(weights, reference.weights) <= LAYOUT


def test_a_forced_backend_that_cannot_run_is_refused(monkeypatch):
    def refuse(backend, *, device):
        raise ValueError(f'backend "{backend}" cannot run here')

    monkeypatch.setattr("hope_pt.engine.step.head_backend", refuse)
    config = config_of(True, "triton")
    plan = start(config)
    try:
        with pytest.raises(ConfigError, match='model.head_backend: backend "triton" cannot run here'):
            TrainEngine(config, plan)
    finally:
        stop(plan)
