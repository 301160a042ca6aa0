"""`hope train CONFIG [key=value ...]`."""

import argparse

from hope_pt import config
from hope_pt.cli.launcher import launch_from_environment
from hope_pt.engine.peers import Watch


def run(arguments: argparse.Namespace) -> None:
    """Trains to the last step, or continues to it, and says where the results lie."""
    launch = launch_from_environment()
    with Watch(launch) as watch:
        settings = config.load(arguments.config, arguments.overrides)
        # After the configuration has been read: torch and megatron take seconds to import, an error in a key should not.
        from hope_pt import train

        result = train.run(settings, launch=launch, watch=watch)
    if launch.rank == 0:
        print(f"{result.path}: {result.steps} steps; next: hope report {result.path}")
