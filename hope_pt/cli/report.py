"""`hope report RUN [RUN_OR_FILE ...]`."""

import argparse
from pathlib import Path

from hope_pt.report.page import write_report


def run(arguments: argparse.Namespace) -> None:
    """Writes the page and prints its path."""
    others = [Path(path) for path in (*arguments.others, *arguments.compare)]
    print(write_report(Path(arguments.run), compare=others, out=Path(arguments.out) if arguments.out else None))
