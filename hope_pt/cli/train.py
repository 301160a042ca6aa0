"""`hope train CONFIG [key=value ...]`, and with `--dry-run --world-size N` the same job without running it."""

import argparse

from hope_pt import config
from hope_pt.cli.launcher import launch_from_environment
from hope_pt.engine.peers import Watch
from hope_pt.errors import ConfigError
from hope_pt.signals import noted


def run(arguments: argparse.Namespace) -> None:
    """Trains to the last step, continues to it, or stops where it is asked to, and says where the results lie."""
    if arguments.dry_run or arguments.world_size is not None:
        _rehearse(arguments)
        return
    launch = launch_from_environment()
    # A rank that waits for others, at the start or the end, must not die of a signal that asks it to stop.
    with noted() as signals, Watch(launch) as watch:
        settings = config.load(arguments.config, arguments.overrides)
        # After the configuration has been read: torch and megatron take seconds to import, an error in a key should not.
        from hope_pt import train

        result = train.run(settings, launch=launch, watch=watch, signals=signals)
    if launch.rank == 0 and result.stopped:
        print(f"{result.path}: asked to stop ({result.stopped}) after step {result.steps}; the same command continues")
    elif launch.rank == 0:
        print(f"{result.path}: {result.steps} steps; next: hope report {result.path}")


def _rehearse(arguments: argparse.Namespace) -> None:
    """Prints the layout and what its ranks hold."""
    if not arguments.dry_run:
        raise ConfigError(f"--world-size {arguments.world_size} goes with --dry-run; a real job gets its size from torchrun or srun")
    world_size = 1 if arguments.world_size is None else arguments.world_size
    if world_size < 1:
        raise ConfigError(f"--world-size {world_size}: expected 1 or more")
    settings = config.load(arguments.config, arguments.overrides)
    from rich.console import Console

    from hope_pt.cli.tables import size, table
    from hope_pt.launch.dry_run import dry_run
    from hope_pt.launch.memory import rank_bytes

    mesh, ranks = dry_run(settings, world_size=world_size)
    rows = []
    for one in ranks:
        peak = rank_bytes(settings, mesh, stage=one.stage).total
        rows.append((f"{one.rank} (stage {one.stage})", f"{one.blocks}", f"{one.parameters:,}", size(one.weight_bytes), size(peak)))
    columns = ("rank", "blocks", "parameters", "weights", "planned peak")
    Console().print(table(f"{settings.name} on {world_size} processes: {mesh.describe()}", *columns, rows=rows))
    print(f"micro-batches a step: {mesh.num_microbatches}; tokens of a sequence on a rank: {mesh.tokens_per_rank}; nothing was run")
    print(f"planned peak: rows of one document each; `hope estimate --gpus {world_size}` says whether it fits a GPU, packed documents too")
