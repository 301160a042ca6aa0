"""Which implementation of the scans a plan is made for, and why where that is not what the GPUs would run.

A plan is for GPUs unless engine.device = "cpu", on whatever machine it is made: the kernels are followed, not run.
"""

import contextlib
import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass

from hope_kernels.backend import scan_obstacle
from hope_pt.config.schema import ModelConfig, RunConfig
from hope_pt.errors import ConfigError
from hope_pt.launch.allocations import AllocationCounter
from hope_pt.nn.titans import memory_rule


@dataclass(frozen=True)
class Scans:
    """backend: of model.titans, as planned. note: one line for whoever reads the plan, or ""."""

    backend: str
    note: str = ""


def scans(config: RunConfig) -> Scans:
    """The scans of a plan of `config`. Raises ConfigError where titans.backend = "triton" cannot run."""
    model, wanted = config.model, config.model.titans.backend
    if model.mixer != "titans" or wanted not in ("auto", "triton"):
        return Scans(wanted)
    if config.engine.device == "cpu":
        return Scans("chunked")
    titans = model.titans
    rule = memory_rule(titans)
    obstacle = scan_obstacle(rule, width=model.head_width, hidden=model.memory_hidden, conv_width=titans.conv_width)
    if wanted == "triton" and obstacle:
        raise ConfigError(f'model.titans.backend = "triton" cannot run: {obstacle}; use "auto" or "chunked"')
    if obstacle:
        return Scans("chunked", f"the scans run in plain torch: {obstacle}")
    if importlib.util.find_spec("triton") is None:
        return Scans("chunked", _imitated("triton is not installed on this machine"))
    return Scans("triton")


def _imitated(reason: str) -> str:
    return f"memory and time are those of plain torch; with the fused kernels a step is faster and may need more memory: {reason}"


def planned_model(config: RunConfig) -> ModelConfig:
    """config.model with the scans that are planned."""
    titans = config.model.titans.model_copy(update={"backend": scans(config).backend})
    return config.model.model_copy(update={"titans": titans})


@contextlib.contextmanager
def following(model: ModelConfig, counter: AllocationCounter) -> Iterator[None]:
    """Within it the model's code may be run on the meta device: `counter` counts, and launches of kernels are counted instead of made."""
    with contextlib.ExitStack() as stack:
        if model.mixer == "titans" and model.titans.backend == "triton":
            from hope_kernels.triton_support import without_launches

            stack.enter_context(without_launches(counter.launched))
        stack.enter_context(counter)
        yield
