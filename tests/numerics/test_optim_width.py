"""Learning rates by width: what a network computes moves as much after some steps at every width, with the exponents of `groups`."""

import functools
import math

import pytest
import torch

from hope_pt.config.optim import DeepMomentumConfig, MomentumConfig, MuonConfig, OptimConfig
from hope_pt.optim import DeepOptimizer, Matrices, View, make_rule
from hope_pt.optim.groups import width_exponent

BASE, WIDTHS = 64, (64, 128, 256)
STEADY = (0.85, 1.15)
"""Growth of the movement from one width to the next, twice as wide: 0.88 to 1.10 as measured. Another exponent gives at most 0.78 or at
least 1.20, but for AdamW's 1/2, with 1.15 (also from 256 to 512, where its 1 gives 0.96): what is steady must be nearest to 1, too."""
CASES = {
    "adamw": OptimConfig(),
    "muon": OptimConfig(name="muon"),
    "muon spectral": OptimConfig(name="muon", muon=MuonConfig(scale="spectral")),
    "m3": OptimConfig(name="m3"),
    "delta momentum": OptimConfig(name="delta_momentum"),
    "orthogonalised momentum": OptimConfig(name="momentum", momentum=MomentumConfig(preconditioner="newton_schulz")),
    "deep momentum": OptimConfig(name="deep_momentum"),
    "orthogonal deep momentum": OptimConfig(name="deep_momentum", deep_momentum=DeepMomentumConfig(output="newton_schulz")),
}


def movement(optim, width, *, exponent):
    """How much the last hidden layer of a residual network has moved after six steps on a permutation of 64 tokens: root mean square."""
    generator = torch.Generator().manual_seed(0)
    embedding = torch.randn(64, width, generator=generator)
    weights = [torch.nn.Parameter(torch.randn(width, width, generator=generator) / width**0.5) for _ in range(3)]
    head, target = torch.randn(64, width, generator=generator) / width, torch.randperm(64, generator=generator)

    def hidden(tokens):
        x = embedding[tokens]
        for weight in weights:
            x = x + torch.tanh(torch.nn.functional.rms_norm(x, (width,)) @ weight.T)
        return x

    group = {"params": weights, "lr": 0.01 * (BASE / width) ** exponent}
    if optim.name == "adamw":
        optimizer = torch.optim.AdamW([group], betas=(0.9, 0.95), weight_decay=0.0)
    else:
        rules = {optim.name: make_rule(optim.name, optim=optim)}
        optimizer = DeepOptimizer([{**group, "rule": optim.name}], rules=rules, matrices=[Matrices(View(0))])
    before = hidden(torch.arange(64)).detach()
    for _ in range(6):
        tokens = torch.randint(64, (512,), generator=generator)
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(torch.nn.functional.rms_norm(hidden(tokens), (width,)) @ head.T, target[tokens]).backward()
        optimizer.step()
    return (hidden(torch.arange(64)).detach() - before).square().mean().sqrt().item()


@functools.cache
def growth(case, *, exponent):
    moved = [movement(CASES[case], width, exponent=exponent) for width in WIDTHS]
    return (moved[-1] / moved[0]) ** (1 / (len(WIDTHS) - 1))


@pytest.mark.parametrize("case", list(CASES))
def test_movement_does_not_depend_on_the_width(case):
    optim = CASES[case]
    exponent = width_exponent(optim.name, optim=optim)
    assert STEADY[0] < growth(case, exponent=exponent) < STEADY[1]


@pytest.mark.parametrize("case", list(CASES))
def test_another_exponent_does_not_transfer(case):
    optim = CASES[case]
    own = width_exponent(optim.name, optim=optim)
    off = {exponent: abs(math.log(growth(case, exponent=exponent))) for exponent in (0.0, 0.5, 1.0)}
    assert all(off[exponent] > 1.5 * off[own] for exponent in off if exponent != own), off
