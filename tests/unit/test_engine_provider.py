"""The choice of linears, norms and Adam; transformer-engine and apex with stand-ins, because neither installs without a GPU."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hope_pt.config.schema import EngineConfig
from hope_pt.engine import provider
from hope_pt.engine.fused_adam import step_per_parameter
from hope_pt.errors import CheckpointError, ConfigError
from hope_pt.optim import Clocked

FAKES = Path(__file__).parent / "fakes"
CUDA, CPU = torch.device("cuda"), torch.device("cpu")
PERIODS = (1, 2, 3)
# Trains 4 steps with the local provider, and with the stand-in's through a checkpoint within an interval.
TRAIN = """
import dataclasses, sys, torch
from hope_pt import engine
from hope_pt.engine import provider
from hope_pt.testing import tiny_run
from hope_pt.testing.batches import random_batch

config = tiny_run()
plan = engine.start(config)


def train(plan, save_after=-1):
    trainer, losses = engine.TrainEngine(config, plan), []
    for step in range(4):
        losses.append(trainer.step(random_batch(batch=4, length=20, vocab_size=32, seed=step)).loss)
        if step == save_after:
            stored = trainer.state()
            trainer = engine.TrainEngine(config, plan)
            trainer.load_state(*stored)
    return torch.tensor(losses, dtype=torch.float64), {type(module).__module__ for piece in trainer.models for module in piece.modules()}


chosen = provider.choose(config.engine.model_copy(update={"provider": sys.argv[1]}), device=torch.device("cuda"))
losses, _ = train(plan)
other = dataclasses.replace(plan, provider=chosen)
found, modules = train(other, save_after=1)
# Rounding of two implementations, through 4 steps at a rate of 1e-2.
assert torch.allclose(found, losses, rtol=1e-5, atol=0), found - losses
assert "hope_pt.engine.parts_" + sys.argv[1] in modules, modules
engine.stop(plan)
print(chosen.name, chosen.norm.__module__, [base.__module__ for base in chosen.column.__mro__[:3]])
"""


@pytest.mark.timeout(180)
@pytest.mark.parametrize("name", ["te", "apex"])
def test_the_engine_trains_alike_on_the_parts_of_a_provider(name, tmp_path):
    # A package of such a name may not lie in the repository: pytest or a person could import it.
    for source in (FAKES / name).rglob("*.py"):
        target = tmp_path / source.relative_to(FAKES / name).parent / source.name.replace("package.py", "__init__.py")
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, target)
    path = os.pathsep.join([str(tmp_path), str(FAKES / "common"), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", TRAIN, name], env=environment, capture_output=True, text=True, timeout=170)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.startswith(f"{name} ")


@pytest.mark.parametrize("name", ["te", "apex"])
def test_a_provider_that_is_not_installed_is_refused_in_one_line(name):
    with pytest.raises(ConfigError, match=rf'^engine.provider = "{name}": not installed; see docs/providers.md, or set it to "local"$'):
        provider.choose(EngineConfig(provider=name), device=CUDA)


@pytest.mark.parametrize("name", ["te", "apex"])
def test_only_local_parts_run_on_the_cpu_and_a_rehearsal_has_them(name):
    with pytest.raises(ConfigError, match=rf'engine.provider = "{name}" needs a GPU and this run is on the cpu; set it to "local"'):
        provider.choose(EngineConfig(provider=name), device=CPU)
    assert provider.choose(EngineConfig(provider=name), device=torch.device("meta")).name == "local"


def test_fp8_needs_transformer_engine():
    with pytest.raises(ConfigError, match='engine.fp8 = true with engine.provider = "local": only "te"'):
        provider.choose(EngineConfig(fp8=True), device=CPU)


def test_the_choice_is_frozen():
    chosen = provider.choose(EngineConfig(), device=CPU)
    assert chosen.name == "local"
    with pytest.raises(AttributeError):
        chosen.name = "te"


@pytest.fixture
def fused(monkeypatch):
    """A FusedAdam with the bookkeeping of NVIDIA's: one step a group, raised by every call; the step of an empty group is an error."""
    monkeypatch.syspath_prepend(str(FAKES / "common"))
    import fake_adam

    return fake_adam.FusedAdam


def parameters():
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(3, 2, generator=generator)) for _ in range(2 * len(PERIODS))]


def groups(params):
    return [{"params": params[2 * i : 2 * i + 2], "period": period, "weight_decay": 0.1 * i} for i, period in enumerate(PERIODS)]


def run(optimizer, params, *, first, last, skipped=5):
    for call in range(first, last + 1):
        generator = torch.Generator().manual_seed(call)
        for param in params:
            param.grad = None if call == skipped else torch.randn(3, 2, generator=generator)
        optimizer.step()


@pytest.mark.parametrize("save_after", [0, 1, 4, 5, 7])
def test_fused_adam_under_unequal_clocks_is_adamw_and_resumes_at_any_step(fused, save_after):
    options = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8}
    expected, params = parameters(), parameters()
    run(Clocked(torch.optim.AdamW(groups(expected), **options)), expected, first=1, last=12)

    optimizer = Clocked(step_per_parameter(fused)(groups(params), **options))
    run(optimizer, params, first=1, last=save_after)
    stored = optimizer.state_dict()
    resumed = [torch.nn.Parameter(param.detach().clone()) for param in params]
    optimizer = Clocked(step_per_parameter(fused)(groups(resumed), **options))
    optimizer.load_state_dict({**optimizer.state_dict(), "state": stored["state"], "num_calls": stored["num_calls"]})
    run(optimizer, resumed, first=save_after + 1, last=12)

    for ours, theirs in zip(resumed, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)
    state = optimizer.state_dict()["state"]
    # Call 5 had no gradients: the group of period 1 missed an update, the slow ones got what the rest of their interval had.
    assert [int(state[index]["step"]) for index in range(6)] == [11, 11, 6, 6, 4, 4]


def test_bare_fused_adam_would_count_the_calls_of_a_sleeping_group(fused):
    """Why the adapter exists: without it the bias correction of a slow group is that of another update."""
    options = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8}
    expected, params = parameters(), parameters()
    run(Clocked(torch.optim.AdamW(groups(expected), **options)), expected, first=1, last=6, skipped=0)
    run(Clocked(fused(groups(params), **options)), params, first=1, last=6, skipped=0)
    torch.testing.assert_close(params[0], expected[0], rtol=1e-6, atol=1e-7)
    assert (params[-1] - expected[-1]).abs().max() > 1e-3


def test_updates_that_differ_within_a_group_are_refused_by_fused_adam(fused):
    params = parameters()
    optimizer = step_per_parameter(fused)(groups(params), lr=1e-2)
    run(optimizer, params, first=1, last=2)
    stored = optimizer.state_dict()
    stored["state"][1]["step"] = torch.tensor(7.0)
    with pytest.raises(CheckpointError, match='group 0 have had 2 to 7 updates .*engine.provider = "local"'):
        optimizer.load_state_dict(stored)


def test_apex_zero_grad_without_an_argument_is_never_called(fused, monkeypatch):
    monkeypatch.setattr(fused, "zero_grad", lambda self: pytest.fail("called"), raising=False)
    params = parameters()
    optimizer = Clocked(step_per_parameter(fused)(groups(params), lr=1e-2))
    run(optimizer, params, first=1, last=1)
    params[0].grad = torch.ones(3, 2)
    optimizer.zero_grad(set_to_none=True)
    assert all(param.grad is None for param in params)
