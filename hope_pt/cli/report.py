"""`hope report RUN [RUN_OR_FILE ...]`."""

import argparse
import logging
from pathlib import Path

from hope_pt.errors import CheckpointError
from hope_pt.report.curves import load_curve, store_curve
from hope_pt.report.page import write_report
from hope_pt.report.samples import Sample, draw_samples

LOG = logging.getLogger(__name__)


def run(arguments: argparse.Namespace) -> None:
    """Writes the page, or stores the run's curve, and prints the path."""
    directory = Path(arguments.run)
    curves = [load_curve(path) for path in (directory, *arguments.others, *arguments.compare)]
    if arguments.store_curve:
        store_curve(curves[0], arguments.store_curve)
        print(arguments.store_curve)
        return
    out = Path(arguments.out) if arguments.out else None
    print(write_report(directory, curves=curves, samples=_samples(directory), out=out))


def _samples(directory: Path) -> list[Sample]:
    """A run without a usable checkpoint still has curves to show, and is told what is missing."""
    try:
        return draw_samples(directory)
    except CheckpointError as error:
        LOG.warning("the report has no samples: %s", error)
        return []
