"""A Slurm of three virtual nodes for the scenarios; they run with `make test-slurm`, not with the other tests."""

import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from tools.slurm_trials.cluster import ROOT, CannotStart, Cluster, Run, started

TRAINER = ROOT / "tests" / "slurm" / "trainer.py"


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    if os.environ.get("HOPE_TEST_SLURM") != "1":
        pytest.skip("a virtual Slurm cluster: run make test-slurm-short or make test-slurm")
    with ExitStack() as stack:
        try:
            made = stack.enter_context(started(nodes=3))
        except CannotStart as reason:
            pytest.skip(str(reason))
        yield made


@pytest.fixture
def run(cluster, tmp_path) -> Iterator[Run]:
    """A run without jobs, with the stand-in for the trainer; what is left of its jobs is cancelled."""
    yield Run(cluster, tmp_path / "run", str(TRAINER))
    cluster.clear()
    shutil.rmtree(tmp_path, ignore_errors=True)
