"""Sharded tensors to and from a shared disk, through megatron-core's dist_checkpointing: any layout writes, any layout reads.

    write:  Shard -> ShardedTensor -> do the parts of all ranks make whole tensors? -> one file of this rank
    read:   headers of all files -> load plan: which stored parts meet which Shard -> Shard.data, in place

ShardedTensor, the check of the sharding and the load planner are megatron's; the files are torch.distributed.checkpoint's safetensors
storage (engine.tensor_files) and not megatron's torch_dist format. That one keeps its index and its common values as pickles, which differ
between the supported versions, and writes through a forked process and a manager process that outlive a killed trainer.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.strategies.torch import MCoreLoadPlanner, mcore_to_pyt_state_dict
from megatron.core.dist_checkpointing.validation import determine_global_metadata, validate_sharding_integrity
from torch.distributed.checkpoint.metadata import Metadata

from hope_pt.engine import collectives
from hope_pt.engine.sharding import Shard
from hope_pt.engine.tensor_files import Part, fill, read_metadata, stored_tensors, write_parts
from hope_pt.errors import CheckpointError


def prepare_write(shards: Sequence[Shard], directory: Path) -> Callable[[], dict[str, tuple[int, str]]]:
    """Collective. The work that writes and fsyncs this rank's file in the existing `directory`; it returns {name: (bytes, sha256)}.

    That work is not collective and may run in a thread; the shards must not change before its end. Over all ranks every part of every
    tensor must be listed once; a rank may have none. The work raises OSError.
    """
    # A thread that writes must not touch a GPU: it would open a context on the first one.
    entries = {shard.name: _sharded(shard, data=shard.data.detach().cpu()) for shard in shards}
    if len(entries) != len(shards):
        raise ValueError("one rank lists two parts of one tensor")
    with collectives.joined():
        validate_sharding_integrity(determine_global_metadata(entries)[1])
    parts = [Part(name, entry.data, entry.global_offset) for name, entry in entries.items()]
    path = directory / f"rank-{collectives.rank():05d}.safetensors"
    return lambda: {path.name: write_parts(path, parts)} if parts else {}


def read_shards(shards: Sequence[Shard], directory: Path) -> None:
    """Collective. Fills every `shard.data` in place; any number of ranks may ask for the same part.

    Raises CheckpointError on all ranks if over all of them other tensors are asked for than are stored, or other shapes or dtypes.
    """
    metadata: Metadata | None = None
    with collectives.together():
        if collectives.rank() == 0:
            metadata = read_metadata(directory)
    metadata = collectives.broadcast(metadata)
    assert metadata is not None
    _check(shards, metadata=metadata, directory=directory)
    with collectives.together(), collectives.joined():
        targets = mcore_to_pyt_state_dict({shard.name: [_sharded(shard, data=shard.data)] for shard in shards}, is_loading=True)
        planner = MCoreLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
        fill(targets, directory, metadata=metadata, planner=planner)


def _sharded(shard: Shard, *, data: torch.Tensor) -> ShardedTensor:
    offsets = [] if shard.axis is None else [(shard.axis, shard.index, shard.count)]
    return ShardedTensor.from_rank_offsets(shard.name, data, *offsets)


def _check(shards: Sequence[Shard], *, metadata: Metadata, directory: Path) -> None:
    """CheckpointError unless the ranks together ask for exactly what is stored, in its shapes and dtypes."""
    stored = stored_tensors(metadata)
    asked = {name for names in collectives.gather([shard.name for shard in shards]) for name in names}
    missing, unknown = sorted(asked - stored.keys()), sorted(stored.keys() - asked)
    if missing or unknown:
        raise CheckpointError(
            f"{directory} is of another model: {len(missing)} tensors are missing ({', '.join(missing[:3])}) and "
            f"{len(unknown)} are unknown ({', '.join(unknown[:3])}); resume with the configuration that wrote it"
        )
    with collectives.together():
        for shard in shards:
            there, here = stored[shard.name], (shard.full_shape, shard.data.dtype)
            if here != (tuple(there.size), there.properties.dtype):
                raise CheckpointError(
                    f"{directory}: {shard.name} is {tuple(there.size)} {there.properties.dtype} in the checkpoint and {here[0]} {here[1]} "
                    "in this model; resume with the configuration that wrote it"
                )
