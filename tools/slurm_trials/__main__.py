"""Trials of the real trainer on a Slurm of virtual nodes that this program starts: figures and violations.

    python -m tools.slurm_trials [--name NAME] kills 100      kill -9 of random ranks at random moments
    python -m tools.slurm_trials disk-full 20                 saves on a full disk
    python -m tools.slurm_trials worlds                       4, then 2, then 8 ranks
    python -m tools.slurm_trials stops                        USR1, requeue, preemption, STOP file, a lost node, a new slurmctld
    python -m tools.slurm_trials hangs 8                      sleep, SIGSTOP, a missed collective, a stuck reader

Exit code 0 without, 1 with violations, 77 where the machine has no Slurm. The result is printed and, with --name NAME, written to
docs/results/slurm/NAME.json with machine, versions and commit.
"""

import argparse
import json
import shutil
import signal
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from tools.bench.common import environment, write_results
from tools.slurm_trials import disk, hangs, kills, stops, worlds
from tools.slurm_trials.cluster import CANNOT, ROOT, CannotStart, started
from tools.slurm_trials.training import Bench

RESULTS = ROOT / "docs" / "results" / "slurm"


def main() -> int:
    """Runs one kind of trial."""
    options = _parse()
    signal.signal(signal.SIGTERM, _end)
    about, began = environment(), time.monotonic()
    root = Path(tempfile.mkdtemp(prefix="hope-trials-"))
    try:
        with ExitStack() as stack:
            steps = options.steps
            if options.command == "disk-full":
                stack.enter_context(disk.small_disk(root, whole=options.whole))
                steps = disk.steps_for(options.count)
            cluster = stack.enter_context(started(nodes=options.nodes))
            result = options.trials(Bench(cluster, root, steps=steps), options)
    except CannotStart as reason:
        print(reason, file=sys.stderr)
        return CANNOT
    settings = {key: value for key, value in vars(options).items() if key not in ("trials", "name", "steps")}
    result = {"environment": about, "settings": settings, "seconds": round(time.monotonic() - began, 1), **result}
    print(json.dumps(result, indent=1))
    if options.name:
        print(write_results(options.name, result, folder=RESULTS))
    if result["violations"]:
        print(f"runs are kept in {root}", file=sys.stderr)
        return 1
    shutil.rmtree(root)
    return 0


def _end(number: int, frame: Any) -> None:
    """A series that is stopped takes its cluster with it, undisturbed by a second signal."""
    signal.signal(number, signal.SIG_IGN)
    sys.exit(128 + number)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tools.slurm_trials", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--name", help="write docs/results/slurm/NAME.json")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=60, help="of every run (default 60; disk-full: what its saves need)")
    commands = parser.add_subparsers(required=True, dest="command")
    kill = commands.add_parser("kills", help="kill -9 of random ranks at random moments")
    kill.add_argument("count", type=int, metavar="N")
    kill.add_argument("--layouts", default=",".join(kills.ORDER), help="in turn (default %(default)s)")
    kill.add_argument(
        "--parallel", type=int, default=1, metavar="N", help="runs at a time; recovery times are then those of a busy machine"
    )
    kill.set_defaults(trials=_kills, nodes=2)
    full = commands.add_parser("disk-full", help="saves on a full disk")
    full.add_argument("count", type=int, metavar="N")
    full.add_argument("--whole", action="store_true", help="the disk has the whole run directory, not only its checkpoints")
    full.set_defaults(trials=lambda bench, options: disk.trials(bench, count=options.count, seed=options.seed), nodes=2)
    world = commands.add_parser("worlds", help="4, then 2, then 8 ranks")
    world.set_defaults(trials=lambda bench, options: worlds.trials(bench, seed=options.seed), nodes=2)
    stop = commands.add_parser("stops", help="USR1, requeue, preemption, STOP file, a lost node, a new slurmctld")
    stop.add_argument("--ways", default=",".join(stops.WAYS), help="some of %(default)s")
    stop.set_defaults(trials=lambda bench, options: stops.trials(bench, ways=options.ways.split(","), seed=options.seed), nodes=3)
    hang = commands.add_parser("hangs", help="sleep, SIGSTOP, a missed collective, a stuck reader")
    hang.add_argument("count", type=int, metavar="N")
    hang.set_defaults(trials=lambda bench, options: hangs.trials(bench, count=options.count, seed=options.seed), nodes=2)
    return parser.parse_args()


def _kills(bench: Bench, options: argparse.Namespace) -> dict[str, Any]:
    trials = kills.KillTrials(bench, count=options.count, order=options.layouts.split(","), seed=options.seed)
    trials.run(parallel=options.parallel)
    return trials.figures()


if __name__ == "__main__":
    sys.exit(main())
