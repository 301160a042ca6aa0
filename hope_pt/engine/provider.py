"""Whose linear layers, norms and Adam the engine uses: `engine.provider`, checked once against what is installed."""

import torch

from hope_pt.config.schema import EngineConfig
from hope_pt.engine.compat import Capabilities
from hope_pt.errors import ConfigError


def check(engine: EngineConfig, *, found: Capabilities, device: torch.device) -> None:
    """ConfigError if the chosen provider is not installed or cannot run on `device`: nothing falls back in silence."""
    available = {"local": True, "te": found.transformer_engine, "apex": found.apex}
    if not available[engine.provider]:
        raise ConfigError(f'engine.provider = "{engine.provider}" is not installed here; install it, or set engine.provider = "local"')
