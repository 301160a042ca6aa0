"""Small language models for tests: presets scaled down, parameters moved off their start so that no term is near zero."""

from typing import Any

import torch

from hope_pt.config.schema import CMSConfig, ModelConfig, TitansConfig
from hope_pt.nn import HopeLM

VOCAB = 50
PRESETS: dict[str, dict[str, Any]] = {
    "paper": {"chunk_mem": 4, "chunk_proj": 4},
    "fast": {"chunk_mem": 2, "chunk_proj": 8},
    "literal": {"chunk_mem": 4, "chunk_proj": 8, "objective": "l2", "normalize_v": False},
    "momentum": {"chunk_mem": 4, "chunk_proj": 8, "momentum": "titans", "adaptive_q": True},
    "layerwise": {"chunk_mem": 4, "chunk_proj": 8, "dgd_scope": "layerwise", "read": "anchor", "save_every": 8},
    "gated-delta": {
        "chunk_mem": 4, "chunk_proj": 4, "memory": "linear", "objective": "dot", "self_target": False, "normalize_v": False,
        "static_k": True, "static_v": True, "static_eta": True, "static_alpha": True,
    },
}  # fmt: skip
"""Both chunk presets (16/16 and 64/256) scaled down, and settings that reach every branch of the mixer."""


def small_config(preset: str = "fast", **titans: Any) -> ModelConfig:
    """Two blocks of width 24 with three heads. preset: a key of PRESETS, or "attention"."""
    settings = PRESETS["fast" if preset == "attention" else preset]
    return ModelConfig(
        vocab_size=VOCAB,
        num_layers=2,
        width=24,
        num_heads=3,
        mixer="attention" if preset == "attention" else "titans",
        titans=TitansConfig(**{**settings, **titans}),
        cms=CMSConfig(hidden=16, periods=(1, 2)),
    )


def small_lm(preset: str = "fast", *, noise: float = 0.1, **titans: Any) -> HopeLM:
    """A float64 model of `small_config` whose parameters were moved by Gaussian noise; its memories write strongly."""
    model = HopeLM(small_config(preset, **titans)).double()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(noise * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
    return model


def random_tokens(batch: int, length: int, *, vocab: int = VOCAB, seed: int = 0) -> torch.Tensor:
    """Uniform tokens [B, T]."""
    return torch.randint(0, vocab, (batch, length), generator=torch.Generator().manual_seed(seed))
