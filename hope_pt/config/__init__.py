"""Run configuration: schema, loading with did-you-mean, and comparison."""

from hope_pt.config.load import config_hash, diff, flatten, load, loads, to_toml
from hope_pt.config.schema import DataConfig, ModelConfig, MQARConfig, RunConfig

__all__ = ["DataConfig", "MQARConfig", "ModelConfig", "RunConfig", "config_hash", "diff", "flatten", "load", "loads", "to_toml"]
