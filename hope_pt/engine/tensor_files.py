"""The files of sharded tensors, as any process can read them: no process groups, no megatron.

The format is torch.distributed.checkpoint's safetensors storage. Every rank that wrote has one file; its header holds names, shapes,
dtypes and where in the whole tensor each part belongs, so the files need no index. There is no pickle among them: a file from anywhere can
at worst be refused.
"""

import math
import warnings
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint import LoadPlanner
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from hope_pt.errors import CheckpointError


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
