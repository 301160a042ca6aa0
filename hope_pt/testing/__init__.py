"""Helpers for tests, shipped with the library: forked workers, tiny configurations, random batches, named tolerances."""

from hope_pt.testing.batches import RandomBatch, random_batch
from hope_pt.testing.configs import deep_run, tiny_model, tiny_run
from hope_pt.testing.distributed import run_distributed
from hope_pt.testing.tolerances import BF16_GRADIENT, BF16_LOSS, EXACT, GRADIENT, LAYOUT, ROUNDING, difference, worst_difference

__all__ = [
    "BF16_GRADIENT",
    "BF16_LOSS",
    "GRADIENT",
    "EXACT",
    "LAYOUT",
    "ROUNDING",
    "RandomBatch",
    "deep_run",
    "difference",
    "random_batch",
    "run_distributed",
    "tiny_model",
    "tiny_run",
    "worst_difference",
]
