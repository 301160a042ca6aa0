"""Tiny configurations for tests: seconds on one core, every mechanism switched on."""

from typing import Literal

from hope_pt.config.schema import (
    CMSConfig,
    DataConfig,
    EngineConfig,
    ModelConfig,
    MQARConfig,
    OptimConfig,
    RunConfig,
    TitansConfig,
    TrainConfig,
)


def tiny_model(*, mixer: Literal["titans", "attention"] = "titans", periods: tuple[int, ...] = (1, 2, 3)) -> ModelConfig:
    """Two blocks of width 16 with two heads; chunks of 4 and 8 tokens; unequal CMS periods."""
    return ModelConfig(
        vocab_size=32,
        num_layers=2,
        width=16,
        num_heads=2,
        mixer=mixer,
        titans=TitansConfig(chunk_mem=4, chunk_proj=8, save_every=8),
        cms=CMSConfig(hidden=24, periods=periods),
    )


def tiny_run(
    *,
    model: ModelConfig | None = None,
    steps: int = 8,
    global_batch_size: int = 4,
    micro_batch_size: int = 1,
    precision: Literal["fp32", "bf16"] = "fp32",
    seq_len: int = 20,
    lr: float = 1e-2,
    clip: float = 1.0,
) -> RunConfig:
    """A run on the CPU. `seq_len` is no multiple of the chunk lengths on purpose."""
    model = model or tiny_model()
    gap = (model.titans.conv_width - 1) * model.num_layers + 1
    return RunConfig(
        name="tiny",
        model=model,
        data=DataConfig(source="mqar", seq_len=seq_len, mqar=MQARConfig(gap=gap)),
        optim=OptimConfig(lr=lr, warmup_steps=2, clip=clip),
        engine=EngineConfig(micro_batch_size=micro_batch_size, precision=precision, device="cpu", timeout_s=90),
        train=TrainConfig(steps=steps, global_batch_size=global_batch_size),
    )
