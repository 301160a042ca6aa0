"""What a model costs, against torch's own counters; and the names and ranges of its diagnostics."""

import pytest
import torch
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


def model_of(mixer: str, **titans) -> ModelConfig:
    return ModelConfig(
        vocab_size=512, num_layers=2, width=128, num_heads=2, mixer=mixer, titans=TitansConfig(**titans), cms=CMSConfig(hidden=96)
    )


def in_place_flops(total, a, b, out_shape=None, **options) -> int:
    """FLOPs of `total.baddbmm_(a, b)`, from shapes; torch's counter knows only the form that is not in place."""
    return 2 * a[0] * a[1] * a[2] * b[2]


def counted(config: ModelConfig, length: int) -> tuple[dict[str, float], float]:
    """Forward FLOPs per token of (projections, cms, head) and of everything, as torch counts matrix products."""
    model = HopeLM(config)
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping={torch.ops.aten.baddbmm_: in_place_flops}) as counter:
        model(random_tokens(1, length, vocab=config.vocab_size))
    by_module = {name: sum(flops.values()) / length for name, flops in counter.get_flop_counts().items()}
    found = {
        "projections": sum(v for name, v in by_module.items() if name.endswith(("in_proj", "out_proj"))),
        "cms": sum(v for name, v in by_module.items() if name.endswith(".cms")),
        "core": sum(v for name, v in by_module.items() if name.endswith(".core")),
    }
    total = counter.get_total_flops() / length
    return found | {"head": total - sum(v for name, v in by_module.items() if name.count(".") == 2 and "blocks" in name)}, total


DENSE = {"titans": {}, "attention": {}, "momentum": {"momentum": "titans"}}


@pytest.mark.parametrize("name", DENSE)
def test_dense_flops_are_what_torch_counts(name):
    """Projections and CMS: exact; with momentum the input projection has one more column per head (2 of 514, under 1 %)."""
    config = model_of("attention" if name == "attention" else "titans", **DENSE[name])
    wanted, _ = counted(config, 256)
    got = flops_per_token(config, seq_len=256)
    assert got["projections"] == pytest.approx(wanted["projections"], rel=0.01 if name == "momentum" else 1e-9)
    assert got["cms"] == pytest.approx(wanted["cms"], rel=1e-9)
    assert got["head"] == 2 * 128 * 512


MEMORY_TOLERANCE = 0.25
"""torch counts matrix products only (not the triangular solves) and counts full C x C products where half is used; the formula is a
model of the scan, to be right to a quarter."""


@pytest.mark.parametrize(
    "titans",
    [
        {},
        {"chunk_mem": 16, "chunk_proj": 16},
        {"read": "anchor"},
        {"self_target": False, "static_k": True, "static_v": True, "static_eta": True, "static_alpha": True},
        {"memory_hidden": 128},
    ],
    ids=["fast", "paper", "anchor", "titans", "wide"],
)
def test_memory_flops_are_what_torch_counts(titans):
    config = model_of("titans", **titans)
    wanted, _ = counted(config, 2048)
    assert flops_per_token(config, seq_len=2048)["memory"] == pytest.approx(wanted["core"], rel=MEMORY_TOLERANCE)


def test_flops_add_up():
    for mixer in ("titans", "attention"):
        flops = flops_per_token(model_of(mixer), seq_len=256)
        forward, training = flops.pop("forward"), flops.pop("training")
        assert forward == pytest.approx(sum(flops.values()))
        assert training == pytest.approx(3 * forward + flops.get("memory", 0))


@pytest.mark.parametrize("preset", list(PRESETS))
def test_diagnostics(preset):
    model = HopeLM(small_config(preset))
    metrics = diagnostics(model, random_tokens(2, 21))
    names = ("eta_mean", "alpha_mean", "surprise", "norm_ratio", "norm_ratio_max", "drift")
    assert set(metrics) == {f"memory/layer{i}/{name}" for i in range(2) for name in names}
    for i in range(2):
        values = {name: metrics[f"memory/layer{i}/{name}"] for name in names}
        assert 0 < values["eta_mean"] < 1 and 0.5 <= values["alpha_mean"] < 1
        assert values["surprise"] > 0 and values["drift"] > 0
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
