"""Helpers for tests, shipped with the library: forked workers, tiny configurations, named tolerances."""

from hope_pt.testing.configs import tiny_model, tiny_run
from hope_pt.testing.distributed import run_distributed
from hope_pt.testing.tolerances import EXACT, LAYOUT

__all__ = ["EXACT", "LAYOUT", "run_distributed", "tiny_model", "tiny_run"]
