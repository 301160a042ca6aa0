"""Whose linear layers, norms and Adam the engine uses: `engine.provider`, chosen once, checked against what is installed, logged.

    "local"  megatron's column- and row-parallel linears, our RMSNorm, torch's fused AdamW: everywhere
    "te"     transformer-engine's linears, RMSNorm and FusedAdam: CUDA; the only one with fp8
    "apex"   megatron's linears, NVIDIA apex's RMSNorm and FusedAdam: CUDA

All linears have one contract: x [T, B, in] -> y [T, B, out], no bias, sharded and gathered as megatron's. docs/providers.md says what of
this has run on which hardware.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from hope_pt.config.schema import EngineConfig
from hope_pt.engine.compat import apex_problem, transformer_engine_problem
from hope_pt.errors import ConfigError

_FP8_CAPABILITY = (8, 9)


@dataclass(frozen=True)
class Provider:
    """What the model and the optimizer are built from.

    column, row: `(config, width_in, width_out, *, tp_group) -> nn.Module`. norm: a class, `(config, hidden_size, eps)`, as megatron calls
    it; its weight is marked for sequence parallelism. adam: `(groups, *, lr, betas, eps) -> torch.optim.Optimizer` with decoupled weight
    decay and, in its state, "step", "exp_avg" and "exp_avg_sq" of every parameter.
    """

    name: str
    column: Callable[..., nn.Module]
    row: Callable[..., nn.Module]
    norm: type[nn.Module]
    adam: Callable[..., torch.optim.Optimizer]


def choose(engine: EngineConfig, *, device: torch.device) -> Provider:
    """The provider of `engine.provider` for a model on `device`; a rehearsal (device meta) has the local one, whose shapes are the same.

    ConfigError if it is not installed, not NVIDIA's, or cannot run on the device: nothing falls back in silence.
    """
    _check_fp8(engine, device=device)
    if engine.provider == "local" or device.type == "meta":
        return _load("local")
    if device.type != "cuda":
        raise ConfigError(f'engine.provider = "{engine.provider}" needs a GPU and this run is on the {device.type}; set it to "local"')
    reason = {"te": transformer_engine_problem, "apex": apex_problem}[engine.provider]()
    if reason:
        raise ConfigError(f'engine.provider = "{engine.provider}": {reason}; see docs/providers.md, or set it to "local"')
    return _load(engine.provider)


def _load(name: str) -> Provider:
    """Of the module that is written against that package, and imports it."""
    module: Any = importlib.import_module(f"hope_pt.engine.parts_{name}")
    return Provider(name, module.Column, module.Row, module.Norm, module.adam)


def _check_fp8(engine: EngineConfig, *, device: torch.device) -> None:
    if not engine.fp8:
        return
    if engine.provider != "te":
        raise ConfigError(f'engine.fp8 = true with engine.provider = "{engine.provider}": only "te" has fp8 matrix products')
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < _FP8_CAPABILITY:
        raise ConfigError(f"engine.fp8 = true, but {torch.cuda.get_device_name(device)} has no fp8 matrix products; set it to false")
