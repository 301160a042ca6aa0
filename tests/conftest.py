"""Which tests share a worker of pytest-xdist, and where Triton kernels run.

Without a GPU, Triton kernels run in its interpreter; the variable must be set before anything imports triton.
"""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


# Before xdist reads the marks.
@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Tests that start several processes wait for each other in one worker; of the others a file is one worker's."""
    for item in items:
        folder = item.path.parent.name
        item.add_marker(pytest.mark.xdist_group(folder if folder == "distributed" else item.path.name))
