"""Level stacking (NL 7.3): a trained model with one MLP in every block becomes the start of one with levels of several frequencies.

    assign_by_depth   block i of L gets the period periods[i k // L]: k runs of blocks, the first ones fastest; no parameter changes
    clone_k           every MLP becomes k levels: the trained one is the slowest, before it stand k - 1 copies whose W_down is zero

Neither changes what the model computes. A copy with a zero W_down adds nothing to the stream and its W_down has a gradient from the first
step on; W_gate and W_up follow once W_down is not zero. The trained MLP is the slowest level because the slow levels are the ones that keep
what they know (SPEC 3), and what fast levels learn is added to it.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from hope_pt.config.schema import CMSConfig, ModelConfig
from hope_pt.errors import ConfigError
from hope_pt.nn.names import level_of


def assign_by_depth(config: ModelConfig, weights: Mapping[str, Tensor], *, periods: Sequence[int]) -> tuple[ModelConfig, dict[str, Tensor]]:
    """The model with a period for every block, and the same weights. ConfigError for other than one level, or more periods than blocks."""
    _check(config, periods)
    if len(periods) > config.num_layers:
        raise ConfigError(f"--periods {_text(periods)}: {len(periods)} frequencies for {config.num_layers} blocks; give at most as many")
    by_depth = tuple(periods[block * len(periods) // config.num_layers] for block in range(config.num_layers))
    return _with_cms(config, periods=(1,), depth_periods=by_depth), dict(weights)


def clone_k(config: ModelConfig, weights: Mapping[str, Tensor], *, periods: Sequence[int]) -> tuple[ModelConfig, dict[str, Tensor]]:
    """The model with a level for every period, and its weights by HopeLM's names. ConfigError for other than one level before, or after."""
    _check(config, periods)
    if len(periods) < 2:
        raise ConfigError(f"--periods {_text(periods)}: clone_k adds levels to the one there is; give two periods or more")
    stacked: dict[str, Tensor] = {}
    for name, value in weights.items():
        if level_of(name) is None:
            stacked[name] = value
            continue
        for index in range(len(periods) - 1):
            stacked[_at_level(name, index)] = torch.zeros_like(value) if name.endswith("w_down.weight") else value.clone()
        stacked[_at_level(name, len(periods) - 1)] = value
    return _with_cms(config, periods=tuple(periods), depth_periods=()), stacked


Stack = Callable[..., tuple[ModelConfig, dict[str, Tensor]]]
METHODS: dict[str, Stack] = {"assign_by_depth": assign_by_depth, "clone_k": clone_k}


def _check(config: ModelConfig, periods: Sequence[int]) -> None:
    if len(config.cms.periods) != 1:
        raise ConfigError(f"model.cms.periods = {list(config.cms.periods)}: levels are stacked on a model with one level in every block")
    if config.cms.variant != "sequential":
        raise ConfigError(f'model.cms.variant = "{config.cms.variant}": only a chain of levels is stacked; train with "sequential"')
    if not periods or min(periods) < 1 or any(slow <= fast for fast, slow in itertools.pairwise(periods)):
        raise ConfigError(f"--periods {_text(periods)}: expected steps of 1 or more, each larger than the one before, for example 1,4,16")


def _with_cms(config: ModelConfig, *, periods: tuple[int, ...], depth_periods: tuple[int, ...]) -> ModelConfig:
    cms = CMSConfig(hidden=config.cms.hidden, periods=periods, depth_periods=depth_periods, variant="sequential")
    return config.model_copy(update={"cms": cms})


def _at_level(name: str, level: int) -> str:
    """The name of the same parameter of another level."""
    return name.replace(".cms.levels.0.", f".cms.levels.{level}.", 1)


def _text(periods: Sequence[int]) -> str:
    return ",".join(map(str, periods))
