"""Comparisons are fair: the configurations that are compared have the same size within 2 %, the same data, optimizer and length."""

from pathlib import Path

import pytest
import torch

from hope_pt.config import load
from hope_pt.nn import HopeLM

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
COMPARED = [
    ("hope_tiny", name)
    for name in (
        "transformer_tiny",
        "hope_tiny_memory_off",
        "hope_tiny_static",
        "titans_tiny",
        "gated_delta_tiny",
        "ttt_mlp_tiny",
        "linear_attention_tiny",
    )
] + [("mqar_hope", "mqar_memory_off"), ("mqar_hope", "mqar_transformer")]


def size(name: str) -> int:
    """Parameters without the embedding."""
    lm = HopeLM(load(CONFIGS / f"{name}.toml").model, device=torch.device("meta"))
    return sum(parameter.numel() for parameter in lm.parameters()) - lm.embedding.weight.numel()


@pytest.mark.parametrize(("reference", "other"), COMPARED)
def test_compared_models_have_the_same_size_and_the_same_run(reference, other):
    a, b = load(CONFIGS / f"{reference}.toml"), load(CONFIGS / f"{other}.toml")
    assert size(other) == pytest.approx(size(reference), rel=0.02)
    assert (a.data, a.optim, a.train, a.eval) == (b.data, b.optim, b.train, b.eval)
    assert (a.model.vocab_size, a.model.width, a.model.num_layers) == (b.model.vocab_size, b.model.width, b.model.num_layers)
