"""Kill -9 of random ranks of the real trainer, a short series; `make slurm-trials` has the long one."""

import random

import pytest

from tools.slurm_trials.kills import KillTrials
from tools.slurm_trials.training import Bench

pytestmark = pytest.mark.timeout(1200)
KILLS = 20


def test_kills_at_random_moments_leave_no_trace(cluster, tmp_path):
    """Two runs of two ranks at a time, data parallel with asynchronous saves and tensor parallel."""
    seed = random.randrange(2**32)
    trials = KillTrials(Bench(cluster, tmp_path, steps=60), count=KILLS, order=("dp2", "tp2"), seed=seed)
    trials.run(parallel=2)
    assert trials.violations == [], f"seed {seed}"
    assert len(trials.kills) == KILLS and len(trials.figures()["moments"]) > 1
