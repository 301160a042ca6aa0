"""What torch code costs beside FLOPs: bytes alive, kernels, bytes read and written. On any device, also meta, which holds none."""

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class AllocationCounter(TorchDispatchMode):
    """Within it, `live` is the bytes of all storages that operations have made and that still exist, and `peak` the most so far.

    What autograd keeps for the backward pass is alive. Tensors of `outside` are not counted. What one kernel allocates and frees inside
    itself is not seen, nor an allocator's rounding and its free blocks. `kernels` counts the operations that are no views, and `traffic`
    the bytes of their arguments and results: what a device without any fusion or cache reads and writes.
    """

    def __init__(self, outside: Iterable[torch.Tensor] = ()) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.kernels = self.traffic = 0
        self._outside = [tensor.untyped_storage() for tensor in outside]  # held, so that no new storage takes an address
        self._known = {storage._cdata for storage in self._outside}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs the operation and counts storages that are new in its outputs."""
        result = func(*args, **(kwargs or {}))
        results = _tensors(result)
        fresh = [self._count(tensor.untyped_storage()) for tensor in results]
        if any(fresh) or func._schema.is_mutable:
            self.kernels += 1
            self.traffic += sum(tensor.nbytes for tensor in (*results, *_tensors(args)))
        return result

    def restart_peak(self) -> None:
        """Let `peak` begin again at what is alive now."""
        self.peak = self.live

    def _count(self, storage: torch.UntypedStorage) -> bool:
        """Whether the storage is a new one."""
        key = storage._cdata
        if key in self._known:
            return False
        size = storage.nbytes()
        self._known.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._forget, key, size).atexit = False
        return True

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size


def _tensors(values: Any) -> list[torch.Tensor]:
    """The tensors among the arguments or results of an operation; they lie in lists at most one level deep."""
    found = []
    for value in values if isinstance(values, tuple | list) else (values,):
        if isinstance(value, torch.Tensor):
            found.append(value)
        elif isinstance(value, tuple | list):
            found += [inner for inner in value if isinstance(inner, torch.Tensor)]
    return found
