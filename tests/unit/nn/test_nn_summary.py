"""What a model costs, against torch's own counters; and the names and ranges of its diagnostics."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from hope_pt.config.schema import CMSConfig, ModelConfig, TitansConfig
from hope_pt.nn import HopeLM, count_parameters, diagnostics, flops_per_token, parameter_class, state_bytes
from hope_pt.testing.models import PRESETS, random_tokens, small_config

ALL_PRESETS = [*PRESETS, "attention"]


@pytest.mark.parametrize("preset", ALL_PRESETS)
def test_parameters_are_counted_by_class(preset):
    model = HopeLM(small_config(preset))
    counts = count_parameters(model.config)
    assert counts.pop("total") == sum(counts.values()) == sum(p.numel() for p in model.parameters())
    assert counts["embedding"] == 50 * 24
    assert counts["cms.level0"] == counts["cms.level1"] == 2 * 3 * 24 * 16
    assert ("memories" in counts) == (preset != "attention")


def test_parameter_classes():
    classes = {name: parameter_class(name) for name, _ in HopeLM(small_config("momentum", momentum_init=0.4)).named_parameters()}
    assert classes["blocks.1.mixer.core.mem_weights.0"] == classes["blocks.0.mixer.core.proj_weights.1"] == "memories"
    assert classes["blocks.0.mixer.core.eta_bias"] == classes["blocks.0.mixer.core.conv_weight"] == "gates"
    assert classes["blocks.0.mixer.core.out_norm"] == classes["blocks.0.cms.levels.0.norm.weight"] == "norms"
    assert classes["blocks.0.cms.levels.1.w_up.weight"] == "cms.level1"
    assert classes["blocks.0.mixer.in_proj.weight"] == "projections"


@pytest.mark.parametrize("preset", ALL_PRESETS)
def test_state_bytes(preset):
    config = small_config(preset)
    assert state_bytes(config) == HopeLM(config).init_state(1).bytes()
    assert HopeLM(config).init_state(3).bytes() == 3 * state_bytes(config)


LENGTH = 256
RAGGED = 250


def model_of(mixer: str = "titans", **titans) -> ModelConfig:
    chunks = {"chunk_mem": 16, "chunk_proj": 64} | titans
    return ModelConfig(
        vocab_size=512, num_layers=1, width=128, num_heads=2, mixer=mixer, titans=TitansConfig(**chunks), cms=CMSConfig(hidden=96)
    )


def in_place_flops(total, a, b, out_shape=None, **options) -> int:
    """FLOPs of `total.baddbmm_(a, b)`, from shapes; torch's counter knows only the form that is not in place."""
    return 2 * a[0] * a[1] * a[2] * b[2]


def counted(config: ModelConfig, length: int) -> tuple[float, float]:
    """FLOPs per token of the forward and of the backward pass, as torch counts the matrix products that run."""
    model, tokens = HopeLM(config), random_tokens(1, length, vocab=config.vocab_size)
    totals = []
    with sdpa_kernel(SDPBackend.MATH):  # the fused kernels of a CPU are unknown to the counter
        for work in (lambda: totals.append(model.token_losses(tokens, tokens).sum()), lambda: totals[0].backward()):
            with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.baddbmm_: in_place_flops}) as counter:
                work()
            totals.append(counter.get_total_flops() / length)
    return totals[1], totals[2]


STATIC = {"static_k": True, "static_v": True, "static_eta": True, "static_alpha": True, "self_target": False, "normalize_v": False}


@pytest.mark.parametrize(
    "titans",
    [
        {},
        {"chunk_mem": 16, "chunk_proj": 16},
        {"save_every": 128},
        {"read": "anchor", "objective": "l2"},
        {"memory_hidden": 96, "adaptive_q": True},
        {"retention": False},
        {"update": "gd", "static_k": True},
        STATIC,
        {"momentum": "titans"},
        {"momentum": "titans", "read": "anchor", "save_every": 64},
        {"momentum": "titans", "dgd_scope": "layerwise"},
        {"momentum": "titans", "update": "gd", **STATIC},
        {"memory": "linear", "objective": "dot", **STATIC},
    ],
    ids=[
        "fast", "paper", "replayed", "anchor", "wide", "no-retention", "gd", "static",
        "momentum", "momentum-anchor", "layerwise", "titans", "gated-delta",
    ],
)  # fmt: skip
def test_flops_are_what_torch_counts(titans):
    """The formula follows the code product by product, so it is exact where the counter knows the operation."""
    config = model_of(**titans)
    forward, backward = counted(config, LENGTH)
    got = flops_per_token(config, seq_len=LENGTH)
    assert got["forward"] == pytest.approx(forward, rel=1e-9)
    assert got["backward"] + got["replay"] + got["head_replay"] == pytest.approx(backward, rel=1e-9)
    assert (got["replay"] > 0) == (LENGTH > config.titans.save_every)


@pytest.mark.parametrize("titans", [{}, {"momentum": "titans"}, {"retention": False}, {"read": "anchor"}], ids=str)
def test_flops_of_a_sequence_in_unequal_pieces(titans):
    """A replay runs products for unused gradients too, of zeros; the formula leaves a few of them out."""
    config = model_of(save_every=75, **titans)
    forward, backward = counted(config, RAGGED)
    got = flops_per_token(config, seq_len=RAGGED)
    assert got["forward"] == pytest.approx(forward, rel=1e-9)
    assert got["backward"] + got["replay"] + got["head_replay"] == pytest.approx(backward, rel=0.01)


def test_flops_of_attention():
    """torch's plain attention runs the whole score matrix and keeps it: twice the causal half, and no scores again backward."""
    config = model_of("attention")
    forward, backward = counted(config, LENGTH)
    got = flops_per_token(config, seq_len=LENGTH)
    whole = got["attention"] * 2 * LENGTH / (LENGTH + 1)
    assert got["forward"] - got["attention"] + whole == pytest.approx(forward, rel=1e-9)
    assert got["backward"] + got["head_replay"] - 2.5 * got["attention"] + 2 * whole == pytest.approx(backward, rel=1e-9)


@pytest.mark.parametrize("mixer", ["titans", "attention"])
def test_flops_add_up(mixer):
    flops = flops_per_token(model_of(mixer, save_every=64), seq_len=LENGTH)
    assert flops["training"] == pytest.approx(sum(flops[name] for name in ("forward", "backward", "replay", "head_replay", "solves")))
    parts = [flops[name] for name in ("projections", "cms", "head", "memory" if mixer == "titans" else "attention")]
    assert flops["forward"] == pytest.approx(sum(parts))
    assert flops["head"] == 2 * 128 * 512
    assert (flops["solves"] > 0) == (flops["replay"] > 0) == (mixer == "titans")


@pytest.mark.parametrize("preset", list(PRESETS))
def test_diagnostics(preset):
    model = HopeLM(small_config(preset))
    metrics = diagnostics(model, random_tokens(2, 21))
    names = ("eta_mean", "alpha_mean", "surprise", "surprise_p95", "norm_ratio", "norm_ratio_max", "drift")
    assert set(metrics) == {f"memory/layer{i}/{name}" for i in range(2) for name in names}
    for i in range(2):
        values = {name: metrics[f"memory/layer{i}/{name}"] for name in names}
        assert 0 < values["eta_mean"] < 1 and 0.5 <= values["alpha_mean"] < 1
        assert 0 < values["surprise"] < values["surprise_p95"] and values["drift"] > 0
        assert values["norm_ratio"] <= values["norm_ratio_max"]


def test_diagnostics_are_those_of_the_forward_pass():
    """norm_ratio against the state that a forward pass of whole chunks returns; a memory that is off does not move."""
    model, tokens = HopeLM(small_config("momentum")), random_tokens(2, 24)
    metrics = diagnostics(model, tokens)
    with torch.no_grad():
        _, state = model(tokens, return_state=True)
    for i, layer in enumerate(state.layers):
        start = model.blocks[i].mixer.core.mem_weights
        end = (layer["mem.0"].square().sum((-2, -1)) + layer["mem.1"].square().sum((-2, -1))).sqrt()
        begin = sum(w.square().sum((-2, -1)) for w in start).sqrt()
        assert metrics[f"memory/layer{i}/norm_ratio"] == pytest.approx((end / begin).mean().item(), rel=1e-4)
    off = diagnostics(HopeLM(small_config("fast", memory_off=True)), tokens)
    for i in range(2):
        assert off[f"memory/layer{i}/eta_mean"] == off[f"memory/layer{i}/drift"] == 0
        assert off[f"memory/layer{i}/norm_ratio"] == off[f"memory/layer{i}/alpha_mean"] == 1
    assert diagnostics(HopeLM(small_config("attention")), tokens) == {}
