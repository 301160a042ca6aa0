"""The files of sharded tensors, as any process can read them: no process groups, no megatron.

The format is torch.distributed.checkpoint's safetensors storage. Every rank that wrote has one file; its header holds names, shapes,
dtypes and where in the whole tensor each part belongs, so the files need no index. There is no pickle among them: a file from anywhere can
at worst be refused. They are read by torch's reader. Its writer is not used, because it holds every tensor three times; here one pass over
the caller's memory writes and hashes.
"""

import hashlib
import json
import math
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint import LoadPlanner
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from hope_pt.errors import CheckpointError

_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


@dataclass(frozen=True)
class Part:
    """A piece of a named tensor, on the CPU, and where it begins in the whole one."""

    name: str
    data: Tensor
    offset: tuple[int, ...]


def write_parts(path: Path, parts: Sequence[Part]) -> tuple[int, str]:
    """Writes and fsyncs one file with parts of different tensors; its size in bytes and the sha256 of what was meant to be in it."""
    # Larger elements first: then each tensor is aligned to its own.
    parts = sorted(parts, key=lambda part: (-part.data.element_size(), part.name))
    places = json.dumps({part.name: {"saved_offsets": part.offset} for part in parts})
    header: dict = {"__metadata__": {"DCP_SHARDING_INFO": places, "DCP_VERSION": "1.0", "format": "pt"}}
    end = 0
    for part in parts:
        begin, end = end, end + part.data.nbytes
        header[part.name] = {"dtype": _DTYPES[part.data.dtype], "shape": list(part.data.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    digest, size = hashlib.sha256(), 0
    pieces: list[bytes | memoryview] = [len(text).to_bytes(8, "little"), text, *(_bytes(part.data) for part in parts)]
    with path.open("wb") as file:
        for piece in pieces:
            digest.update(piece)
            size += file.write(piece)
        file.flush()
        os.fsync(file.fileno())
    return size, digest.hexdigest()


def _bytes(data: Tensor) -> memoryview:
    """The tensor's memory, not copied."""
    return data.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data


class _KnownReader(HuggingFaceStorageReader):
    """Reads tensors with headers that have been read before; the ranks of a job need not open all files each."""

    def __init__(self, directory: Path, metadata: Metadata):
        super().__init__(str(directory))
        self._metadata = metadata

    def read_metadata(self) -> Metadata:
        return self._metadata


def read_metadata(directory: Path) -> Metadata:
    """Names, whole shapes, dtypes and parts of everything that is stored in `directory`.

    Raises CheckpointError if a file is not of this format, or if the parts do not make whole tensors.
    """
    try:
        metadata = HuggingFaceStorageReader(str(directory)).read_metadata()
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise CheckpointError(f"{directory}: cannot be read: {error}") from error
    for name, stored in stored_tensors(metadata).items():
        if sum(math.prod(chunk.sizes) for chunk in stored.chunks) != math.prod(stored.size):
            raise CheckpointError(f"{directory}: parts of {name} are missing or stored twice")
    return metadata


def stored_tensors(metadata: Metadata) -> dict[str, TensorStorageMetadata]:
    """Name -> `.size`, `.properties.dtype` and `.chunks` of every stored tensor."""
    return {name: stored for name, stored in metadata.state_dict_metadata.items() if isinstance(stored, TensorStorageMetadata)}


def fill(targets: dict, directory: Path, *, metadata: Metadata, planner: LoadPlanner | None = None) -> None:
    """Reads into `targets` in place, which the planner understands (tensors by name for torch's default). CheckpointError if it fails."""
    try:
        with warnings.catch_warnings():
            # That no process groups are used is what is meant.
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            dcp.load(targets, storage_reader=_KnownReader(directory, metadata), planner=planner, no_dist=True)
    except dcp.CheckpointException as error:
        raise CheckpointError(f"{directory}: cannot be read: {error}") from error


def read_full(directory: str | Path, *, prefix: str = "") -> dict[str, Tensor]:
    """Whole tensors on the CPU by name, of the names that begin with `prefix`, whatever layout wrote them."""
    directory = Path(directory)
    metadata = read_metadata(directory)
    tensors = {
        name: torch.empty(stored.size, dtype=stored.properties.dtype)
        for name, stored in stored_tensors(metadata).items()
        if name.startswith(prefix)
    }
    fill(tensors, directory, metadata=metadata)
    return tensors
