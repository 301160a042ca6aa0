"""`hope config show CONFIG [key=value ...]` and `hope config diff A B`."""

import argparse

from hope_pt import config


def run(arguments: argparse.Namespace) -> None:
    """Prints the resolved configuration, or the keys in which two resolved configurations differ."""
    if arguments.action == "show":
        print(config.to_toml(config.load(arguments.config, arguments.overrides)), end="")
        return
    lines = config.diff(config.load(arguments.config), config.load(arguments.other))
    print("\n".join(lines) if lines else "no difference")
