"""What torch code costs beside FLOPs: bytes alive, kernels, bytes read and written. On any device, also meta, which holds none."""

import weakref
from collections import Counter
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class Walk(NamedTuple):
    """Launches of a kernel in which every program takes the tiles of a sequence one after the other."""

    kernel: str
    programs: int


class AllocationCounter(TorchDispatchMode):
    """Within it, `live` is the bytes of all storages that operations have made and that still exist, and `peak` the most so far.

    What autograd keeps for the backward pass is alive. Tensors of `outside` are not counted. Operators of hope_kernels are opened, so what
    they allocate inside counts while it lives; what one kernel of torch's own allocates and frees is not seen, nor an allocator's rounding
    and its free blocks.

    `kernels` counts the operations that are no views and do not only allocate, and the launches told to `launched`. `traffic` is the bytes
    of their arguments and results: what a device without any fusion or cache reads and writes; launches of one kernel on the same tensors,
    which take turns on their tiles, read and write them once. `walks` has the tiles that the programs of a launch take in sequence.
    """

    def __init__(self, outside: Iterable[torch.Tensor] = ()) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.kernels = self.traffic = 0
        self.walks: Counter[Walk] = Counter()
        self._outside = [tensor.untyped_storage() for tensor in outside]  # held, so that no new storage takes an address
        self._known = {storage._cdata for storage in self._outside}
        self._touched: dict[int, set[tuple[Any, ...]]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs the operation and counts storages that are new in its outputs."""
        if func.namespace == "hope_kernels":
            with self, torch.no_grad():
                # The implementation for devices with storage, on the meta device too, where the operator alone would make its results only.
                return func.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.CPU), *args, **(kwargs or {}))
        result = func(*args, **(kwargs or {}))
        results = _tensors(result)
        fresh = [self._count(tensor.untyped_storage()) for tensor in results]
        if (any(fresh) and not _only_allocates(func)) or func._schema.is_mutable:
            self.kernels += 1
            self.traffic += sum(tensor.nbytes for tensor in (*results, *_tensors(args)))
        return result

    def restart_peak(self) -> None:
        """Let `peak` begin again at what is alive now."""
        self.peak = self.live

    def launched(self, kernel: str, grid: tuple[int, ...], arguments: dict[str, Any]) -> None:
        """Count a launch that `hope_kernels.triton_support.without_launches` has caught."""
        self.kernels += 1
        for value in arguments.values():
            if isinstance(value, torch.Tensor):
                touched = self._touched.setdefault(value.untyped_storage()._cdata, set())
                part = (kernel, value.storage_offset(), value.shape)
                self.traffic += 0 if part in touched else value.nbytes
                touched.add(part)
        if "end_tile" in arguments:
            self.walks[Walk(kernel, grid[0])] += arguments["end_tile"] - arguments["first_tile"]

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
        self._touched.pop(key, None)
        self.live -= size


def _only_allocates(func: Any) -> bool:
    """empty, empty_like, new_empty and the like."""
    return func._schema.name.startswith(("aten::empty", "aten::new_empty"))


def _tensors(values: Any) -> list[torch.Tensor]:
    """The tensors among the arguments or results of an operation; they lie in lists at most one level deep."""
    found = []
    for value in values if isinstance(values, tuple | list) else (values,):
        if isinstance(value, torch.Tensor):
            found.append(value)
        elif isinstance(value, tuple | list):
            found += [inner for inner in value if isinstance(inner, torch.Tensor)]
    return found
