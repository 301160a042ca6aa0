"""Which tests share a worker of pytest-xdist, and where Triton kernels run.

Without a GPU, Triton kernels run in its interpreter; the variable must be set before anything imports triton.
"""

import os

import pytest
import torch
from xdist.scheduler import LoadScopeScheduling

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


class Workers(LoadScopeScheduling):
    """Tests that start several processes wait for each other in one worker; of the others a file is one worker's.

    Not the mark xdist_group, which pytest-xdist 3.8 silently ignores under pytest 9.2 (pytest-xdist#1386).
    """

    def _split_scope(self, nodeid):
        file = nodeid.partition("::")[0]
        return "distributed" if "distributed" in file.split("/")[:-1] else file


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    return Workers(config, log)
