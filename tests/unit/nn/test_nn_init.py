"""Initial values: first loss ln V, a pure function of the name, every parameter learns."""

import math

import pytest
import torch

from hope_pt.config.schema import CMSConfig, ModelConfig, TitansConfig
from hope_pt.nn import HopeLM
from hope_pt.nn.init import init_tensor
from hope_pt.testing.models import PRESETS, random_tokens, small_config

SIZES = {
    "tiny": {"vocab_size": 32, "num_layers": 2, "width": 16, "num_heads": 2, "cms": CMSConfig(hidden=24)},
    "small": {"vocab_size": 512, "num_layers": 4, "width": 64, "num_heads": 4, "cms": CMSConfig(hidden=48)},
    "deep": {"vocab_size": 2048, "num_layers": 12, "width": 96, "num_heads": 2, "cms": CMSConfig(hidden=72)},
    "large": {"vocab_size": 8192, "num_layers": 2, "width": 512, "num_heads": 8, "cms": CMSConfig(hidden=384)},
}


@pytest.mark.parametrize("mixer", ["titans", "attention"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("name", SIZES)
def test_first_loss_is_the_logarithm_of_the_vocabulary(name, tied, mixer):
    """Within 2 %, in expectation over uniform next tokens (exact: no sampling of targets)."""
    model = HopeLM(ModelConfig(**SIZES[name], mixer=mixer, tie_embeddings=tied))
    vocab = model.config.vocab_size
    with torch.no_grad():
        logits, _ = model(random_tokens(2, 192, vocab=vocab))
    loss = (logits.logsumexp(-1) - logits.mean(-1)).mean().item()
    assert loss == pytest.approx(math.log(vocab), rel=0.02)


@pytest.mark.parametrize("repeats", [False, True], ids=["independent", "repeated"])
def test_first_loss_of_sampled_text(repeats):
    """Also where every token repeats its predecessor, which a tied head would favour or punish."""
    model = HopeLM(ModelConfig(**SIZES["large"]))
    tokens = random_tokens(2, 193, vocab=8192)
    with torch.no_grad():
        loss = model.token_losses(tokens[:, :-1], tokens[:, :-1] if repeats else tokens[:, 1:]).mean().item()
    assert loss == pytest.approx(math.log(8192), rel=0.02)


def test_every_parameter_is_a_pure_function_of_its_name_and_the_seed():
    config = small_config("momentum")
    model = HopeLM(config, seed=3)
    torch.manual_seed(1)  # the global generator plays no part
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, init_tensor(name, tuple(parameter.shape), config=config, seed=3))
    other = dict(HopeLM(config, seed=4).named_parameters())
    random = [name for name, p in model.named_parameters() if p.unique().numel() > 1]
    assert len(random) > 20
    assert not any(torch.equal(model.get_parameter(name), other[name]) for name in random)
    first, second = (model.get_parameter(f"blocks.{i}.mixer.in_proj.weight") for i in range(2))
    assert not torch.equal(first, second)


def test_gates_start_where_the_configuration_says():
    config = small_config("momentum", eta_init=0.1, forget_init=0.01, momentum_init=0.7)
    core = HopeLM(config).blocks[0].mixer.core
    torch.testing.assert_close(core.eta_bias.sigmoid(), torch.full((3,), 0.1))
    torch.testing.assert_close((-torch.nn.functional.softplus(core.alpha_bias)).exp(), torch.full((3,), 0.99))
    torch.testing.assert_close(core.mu_bias.sigmoid(), torch.full((3,), 0.7))


def test_an_unknown_name_is_refused():
    with pytest.raises(ValueError, match="no initialisation rule"):
        init_tensor("blocks.0.mixer.core.surprise", (3,), config=small_config(), seed=0)


ALL_PRESETS = [*PRESETS, "attention"]


@pytest.mark.parametrize("preset", ALL_PRESETS)
def test_every_parameter_gets_a_gradient(preset):
    """At the initial values, in fp32; of a head-first parameter every head, of a stack every memory, of a matrix most entries."""
    model = HopeLM(small_config(preset))
    tokens = random_tokens(4, 41)
    model.token_losses(tokens[:, :-1], tokens[:, 1:]).mean().backward()
    for name, parameter in model.named_parameters():
        grad = parameter.grad
        assert grad is not None and grad.isfinite().all(), name
        parts = grad.flatten(0, 1) if "proj_weights" in name else grad if ".core." in name else grad.unsqueeze(0)
        assert all(bool((part != 0).any()) for part in parts), f"a part of {name} gets no gradient"
        if name not in ("embedding.weight", "head.weight"):
            assert (grad != 0).double().mean() > 0.9, name


def test_the_memories_are_trained_through_their_writes_too():
    """With reads at the anchor, k, v, eta and alpha act on the output through the memory's writes alone; their memories learn."""
    model = HopeLM(small_config("fast", read="anchor", momentum="titans"))
    tokens = random_tokens(2, 41)
    model.token_losses(tokens[:, :-1], tokens[:, 1:]).mean().backward()
    for block in model.blocks:
        for index, name in enumerate(block.mixer.core.stack):
            assert all(bool((w.grad[:, index] != 0).any()) for w in block.mixer.core.proj_weights), name


@pytest.mark.parametrize("width", [64, 192])
def test_memories_start_as_a_moderate_change_of_their_input(width):
    """M(z) - z = W1 silu(W2 z) with both matrices at unit gain: for unit variance neither nothing nor more than z itself."""
    core = HopeLM(ModelConfig(vocab_size=8, num_layers=1, width=width, num_heads=2, titans=TitansConfig())).blocks[0].mixer.core
    w2, w1 = (w[0] for w in core.mem_weights)
    z = torch.randn(100, width // 2, generator=torch.Generator().manual_seed(0))
    change = torch.nn.functional.silu(z @ w2.mT) @ w1.mT
    assert 0.1 * z.norm() < change.norm() < z.norm()
