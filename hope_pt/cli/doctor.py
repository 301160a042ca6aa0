"""`hope doctor [--json] [--out DIR]`."""

import argparse
import json
from pathlib import Path

from hope_pt.errors import ConfigError
from hope_pt.launch.doctor import examine


def run(arguments: argparse.Namespace) -> None:
    """Prints what this machine can do; ConfigError (exit code 2) where it cannot train."""
    report = examine(Path(arguments.out))
    print(json.dumps(report.as_json(), indent=1) if arguments.json else report.as_text())
    if not report.can_train:
        raise ConfigError("training is not possible on this machine; the lines that begin with no say what is missing")
