"""The probes of the memories: surprise over tokens, and the loss of the targets that count."""

import math

import pytest
import torch

from hope_pt.nn import diagnostics
from hope_pt.nn.diagnostics import _p95
from hope_pt.testing.models import random_tokens, small_lm


def test_token_losses_count_the_targets_that_are_tokens():
    lm, tokens, targets = small_lm(), random_tokens(2, 24), random_tokens(2, 24, seed=1)
    targets[:, :10] = -100
    found = diagnostics(lm, tokens, targets_BT=targets)
    with torch.no_grad():
        log_p = torch.log_softmax(lm(tokens)[0].double(), -1)[:, 10:].gather(-1, targets[:, 10:].unsqueeze(-1))
    losses = sorted((-log_p).flatten().tolist())
    assert found["memory/token_loss"] == pytest.approx(sum(losses) / 28, rel=1e-6)
    assert found["memory/token_loss_p95"] == pytest.approx(losses[math.ceil(0.95 * 28) - 1], rel=1e-6)
    for layer in range(2):
        mean, high = (found[f"memory/layer{layer}/{name}"] for name in ("surprise", "surprise_p95"))
        assert 0 < mean < high < 10 * mean


def test_one_token_in_twenty_is_above():
    values = torch.arange(1.0, 41.0)[torch.randperm(40, generator=torch.Generator().manual_seed(0))].view(4, 10)
    assert _p95(values) == 38.0 and int((values > _p95(values)).sum()) == 2


def test_a_model_without_memories_has_nothing_to_say():
    assert diagnostics(small_lm("attention"), random_tokens(1, 8), targets_BT=random_tokens(1, 8)) == {}
