"""Names are sizes, and comparisons are fair: compared configurations have the same size, data, optimizer and length."""

from pathlib import Path

import pytest
import torch

from hope_pt.config import load
from hope_pt.nn import HopeLM, count_parameters

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
SIZES = {"170m": (170e6, 15e9), "340m": (340e6, 15e9), "760m": (760e6, 30e9), "1p3b": (1.3e9, 100e9)}
COMPARED += [(f"hope_{size}", f"{twin}_{size}") for size in SIZES for twin in ("transformer", "titans")]


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


@pytest.mark.parametrize("twin", ["hope", "transformer", "titans"])
@pytest.mark.parametrize("name", SIZES)
def test_a_large_configuration_is_what_its_name_says(name, twin):
    parameters, tokens = SIZES[name]
    config = load(CONFIGS / f"{twin}_{name}.toml")
    batch = config.train.global_batch_size * config.data.seq_len
    assert count_parameters(config.model)["total"] == pytest.approx(parameters, rel=0.02)
    assert config.train.steps * batch == pytest.approx(tokens, rel=1e-4)
    assert (batch, config.data.seq_len, config.model.vocab_size) == (2**19, 4096, 2**15)
    assert (config.optim.weight_decay, config.optim.schedule, config.engine.precision) == (0.1, "cosine", "bf16")


@pytest.mark.parametrize("twin", ["hope", "transformer", "titans"])
@pytest.mark.parametrize("name", ["760m", "1p3b"])
def test_a_configuration_for_a_cluster_never_trains_on_its_cpus(name, twin):
    assert load(CONFIGS / f"{twin}_{name}.toml").engine.device == "cuda"
