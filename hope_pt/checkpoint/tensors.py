"""Storage of a checkpoint's tensors: one safetensors file for each first name component (`model.a.b` goes to model.safetensors).

This module is the whole interface between a checkpoint and its tensors (`write_tensors`, `read_tensors`); for states that are
sharded over ranks, megatron-core's dist_checkpointing takes its place behind the same two functions.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

SUFFIX = ".safetensors"


def write_tensors(directory: Path, *, tensors: Mapping[str, Tensor]) -> None:
    """Writes every tensor (any shape, dtype and device; read back on the CPU) under its name.

    Raises OSError where the disk refuses, ValueError for a name that is not `group.rest`.
    """
    groups: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        group, dot, rest = name.partition(".")
        if not (dot and rest and group.isidentifier()):
            raise ValueError(f"tensor name {name!r} is not of the form group.rest")
        # A clone gives each tensor its own storage: safetensors refuses views of a shared one.
        groups.setdefault(group, {})[name] = tensor.detach().to("cpu").clone(memory_format=torch.contiguous_format)
    for group, members in groups.items():
        try:
            save_file(members, directory / f"{group}{SUFFIX}")
        except SafetensorError as error:
            raise OSError(str(error)) from error


def read_tensors(directory: Path) -> dict[str, Tensor]:
    """Every tensor of the directory, on the CPU, by name; raises OSError for a file that is not safetensors."""
    tensors: dict[str, Tensor] = {}
    for path in sorted(directory.glob(f"*{SUFFIX}")):
        try:
            tensors.update(load_file(path))
        except SafetensorError as error:
            raise OSError(f"{path.name}: {error}") from error
    return tensors
