"""The CPU shim: megatron-core on gloo, for machines without a GPU.

megatron-core names its device literally in three ways. Each is redirected where it is written, so that nothing outside megatron's own
files sees a change and no torch operation of the model passes through Python once more:

1. `torch.zeros(..., device="cuda")` and `torch.cuda.current_device()` in a few modules: those modules get a `torch` whose factories and
   whose `cuda` sub-module know only the CPU (`redirect`, once a process).
2. `param.type() == "torch.cuda.FloatTensor"` in the constructor of the mixed-precision optimizer: `cuda_type_names`, a torch function
   mode that is active there only.
3. `config.use_cpu_initialization` covers the layers' own weights (engine.model).

The alternative, one global torch function mode, is measured in docs/engine.md: it costs every small operation of the memory scan.
"""

import contextlib
import functools
import logging
import sys
from types import ModuleType
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_LOG = logging.getLogger(__name__)

# Modules of megatron.core that name a CUDA device and that the engine runs; the same files in 0.16.1 and 0.19.2.
REDIRECTED_MODULES = (
    "megatron.core.distributed.distributed_data_parallel",
    "megatron.core.distributed.param_and_grad_buffer",
    "megatron.core.optimizer.optimizer",
    "megatron.core.pipeline_parallel.p2p_communication",
    "megatron.core.pipeline_parallel.schedules",
    "megatron.core.tensor_parallel.layers",
    "megatron.core.tensor_parallel.mappings",
    "megatron.core.utils",
)
_FACTORIES = ("arange", "empty", "full", "ones", "rand", "randn", "tensor", "zeros", "empty_like", "zeros_like", "ones_like")
_CPU_TYPE_NAMES = {
    "torch.FloatTensor": "torch.cuda.FloatTensor",
    "torch.HalfTensor": "torch.cuda.HalfTensor",
    "torch.BFloat16Tensor": "torch.cuda.BFloat16Tensor",
}


def redirect() -> bool:
    """Give the loaded megatron modules of `REDIRECTED_MODULES` a CPU-only `torch`. True if this call changed something.

    Call it after megatron has been imported and only where there is no GPU. It is idempotent and lasts for the process: the device of a
    process does not change.
    """
    substitute = _cpu_torch()
    changed = [name for name in REDIRECTED_MODULES if getattr(sys.modules.get(name), "torch", None) is torch]
    for name in changed:
        vars(sys.modules[name])["torch"] = substitute
    if changed:
        _LOG.info("no GPU: CPU shim active in %d megatron-core modules, collectives over gloo", len(changed))
    return bool(changed)


def is_redirected() -> bool:
    """True if `redirect` has changed megatron in this process."""
    return any(getattr(sys.modules.get(name), "torch", torch) is not torch for name in REDIRECTED_MODULES)


def _cpu_torch() -> ModuleType:
    """A module with the contents of torch, but factories that read device="cuda" as the CPU, and a `cuda` that has one CPU device."""
    substitute, cuda = ModuleType("torch"), ModuleType("torch.cuda")
    vars(cuda).update(
        vars(torch.cuda),
        current_device=lambda: "cpu",
        synchronize=_nothing,
        empty_cache=_nothing,
        # Its result is only told to wait for CUDA-graph events and communication streams, which do not exist here.
        current_stream=_nothing,
    )
    # torch loads some of its sub-modules on first use, through __getattr__.
    vars(substitute).update(vars(torch), cuda=cuda, __getattr__=functools.partial(getattr, torch))
    vars(substitute).update({name: _on_cpu(getattr(torch, name)) for name in _FACTORIES})
    return substitute


def _nothing(*unused: Any) -> None:
    return None


def _on_cpu(factory):
    @functools.wraps(factory)
    def call(*args: Any, **kwargs: Any):
        if isinstance(kwargs.get("device"), str) and kwargs["device"].startswith("cuda"):
            kwargs["device"] = "cpu"
        return factory(*args, **kwargs)

    return call


class _CudaTypeNames(TorchFunctionMode):
    """`tensor.type()` without arguments answers as if the tensor were on a GPU."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func is torch.Tensor.type and isinstance(result, str):
            return _CPU_TYPE_NAMES.get(result, result)
        return result


def cuda_type_names(device: torch.device) -> contextlib.AbstractContextManager:
    """Context for the megatron constructor that compares type strings; does nothing on a GPU."""
    return _CudaTypeNames() if device.type == "cpu" else contextlib.nullcontext()
