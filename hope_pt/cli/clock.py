"""`--token-clock` and `--token-lr`, which `hope eval` and `hope generate` share: the token clock of a run, or another one."""

import argparse

from pydantic import ValidationError

from hope_pt.config.schema import RunConfig, TokenClockConfig
from hope_pt.errors import ConfigError


def token_clock(arguments: argparse.Namespace, config: RunConfig) -> TokenClockConfig:
    """The run's clock with what the arguments change; ConfigError if they do not fit each other or the model."""
    clock = config.token_clock.model_dump()
    levels = len(config.model.cms.periods)
    if arguments.token_clock is not None:
        clock["periods"] = _numbers(arguments.token_clock, int, "--token-clock", levels)
    if arguments.token_lr is not None:
        clock["lr"] = _numbers(arguments.token_lr, float, "--token-lr", levels)
    try:
        return TokenClockConfig(**clock)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(("token_clock", *map(str, first["loc"])))
        value = f" = {first['input']}" if first["loc"] else ""
        what = first["msg"].removeprefix("Value error, ")
        raise ConfigError(f"{key}{value}: {what}; see --token-clock, --token-lr") from None


def _numbers(text: str, kind: type, flag: str, levels: int) -> tuple:
    try:
        values = tuple(kind(part) for part in text.split(","))
    except ValueError:
        raise ConfigError(f"{flag} {text}: expected numbers with commas between them, for example 64,256,1024") from None
    if len(values) not in (1, levels):
        raise ConfigError(f"{flag} {text}: expected one number, or one for each of the {levels} CMS levels")
    return values * (levels // len(values))
