"""The training engine: hope_pt.nn's blocks inside megatron-core. The only importer of megatron and, with testing, of torch.distributed.

`start(config)` -> `Plan` -> `TrainEngine(config, plan)` -> `.step(batch)` -> `StepResult`; `stop(plan)` at the end. docs/engine.md says
how the adapter plugs in. The names below are loaded on first use: importing megatron-core takes seconds.
"""

import importlib
from typing import TYPE_CHECKING

from hope_pt.engine.compat import prepare_import, quiet
from hope_pt.engine.launch import Launch

if TYPE_CHECKING:
    from hope_pt.engine.plan import Plan, ProcessGroups, check, start, stop
    from hope_pt.engine.step import StepResult, TrainEngine
    from hope_pt.engine.storage import prepare_write, read_shards
    from hope_pt.engine.tensor_files import read_full

__all__ = [
    "Launch",
    "Plan",
    "ProcessGroups",
    "StepResult",
    "TrainEngine",
    "check",
    "prepare_write",
    "read_full",
    "read_shards",
    "start",
    "stop",
]

_HOME = {
    "Plan": "plan",
    "ProcessGroups": "plan",
    "check": "plan",
    "start": "plan",
    "stop": "plan",
    "StepResult": "step",
    "TrainEngine": "step",
    "prepare_write": "storage",
    "read_shards": "storage",
    "read_full": "tensor_files",
}

prepare_import()


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    with quiet():
        return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
