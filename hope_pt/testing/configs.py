"""Tiny configurations for tests: seconds on one core, every mechanism switched on."""

from typing import Literal

from hope_pt.config.optim import DeepMomentumConfig, M3Config, MomentumConfig, OptimConfig, OptimizerName
from hope_pt.config.schema import CMSConfig, DataConfig, EngineConfig, ModelConfig, MQARConfig, RunConfig, TitansConfig, TrainConfig


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


def deep_run(rule: OptimizerName, *, precision: Literal["fp32", "bf16"] = "fp32", nested: bool = False, steps: int = 10) -> RunConfig:
    """Two blocks with four heads, all matrices with `rule` and the memories with Muon; clipped, decayed, CMS periods 1, 2 and 3.

    nested: levels that return to initial states, with periods 1, 2 and 4.

    The slow momentum of M3 has period 4. eps of all second moments is large: with a small one an entry whose gradient is zero up to
    rounding moves by a whole step.
    """
    model = ModelConfig(
        vocab_size=32,
        num_layers=2,
        width=32,
        num_heads=4,
        titans=TitansConfig(chunk_mem=8, chunk_proj=16),
        cms=CMSConfig(hidden=24, periods=(1, 2, 4), variant="nested") if nested else CMSConfig(hidden=24, periods=(1, 2, 3)),
    )
    eps = 1e-3
    optim = OptimConfig(
        name=rule,
        memory="muon",
        lr=1e-2,
        warmup_steps=2,
        clip=0.05,
        eps=eps,
        base_width=16,
        m3=M3Config(slow_every=4, eps=eps),
        momentum=MomentumConfig(eps=eps),
        deep_momentum=DeepMomentumConfig(hidden=4, eps=eps),
    )
    config = tiny_run(model=model, seq_len=16, micro_batch_size=2, precision=precision, steps=steps)
    return config.model_copy(update={"optim": optim})
