"""Giving jobs to Slurm and taking them back; runs on a login node."""

import os
import subprocess
from collections.abc import Mapping
from pathlib import Path

from hope_pt.errors import HopeError
from hope_pt.launch.render import Job
from hope_pt.launch.watch import job_name, jobs_of


def submission(job: Job, *, run: str, out: str) -> tuple[list[str], dict[str, str]]:
    """The sbatch command of a run in directory `out`/`run`, and what it adds to the environment.

    The job has the run's name, so that it can be found, and its log lies in the run directory.
    """
    log = (Path(out) / run / "logs" / "slurm-%j.log").absolute()
    names = [] if "name" in {one.partition("=")[0] for one in job.arguments} else [f"name={run}"]
    command = [*job.sbatch("--parsable", f"--job-name={job_name(run)}", f"--output={log}"), *names]
    return command, {"HOPE_CLUSTER": job.cluster.name} if job.cluster.name else {}


def submit(job: Job, *, run: str, out: str, environment: Mapping[str, str] = os.environ) -> str:
    """Submits and returns the job's id. Raises HopeError with what sbatch said."""
    command, more = submission(job, run=run, out=out)
    (Path(out) / run / "logs").mkdir(parents=True, exist_ok=True)
    return call(command, environment={**environment, **more}).partition(";")[0]


def cancel(path: Path) -> list[str]:
    """Cancels every job of the run in `path`, waiting ones first (they would begin when a running one ends), and returns their ids."""
    jobs = jobs_of(path)
    if jobs:
        call(["scancel", "--state=PENDING", *jobs], environment=os.environ)
        # Without a state: a job between two starts is neither pending nor running.
        call(["scancel", *jobs], environment=os.environ)
    return jobs


def call(command: list[str], *, environment: Mapping[str, str]) -> str:
    """What a command of Slurm prints. Raises HopeError with its own words, or where there is no Slurm."""
    try:
        done = subprocess.run(command, env=dict(environment), capture_output=True, text=True, timeout=60)
    except FileNotFoundError:
        raise HopeError(f"{command[0]} is not installed here; run this on a machine of the cluster") from None
    except subprocess.TimeoutExpired:
        raise HopeError(f"{command[0]} has not answered for 60 s; is the scheduler up?") from None
    if done.returncode:
        raise HopeError(f"{command[0]} refused: {' '.join((done.stderr or done.stdout).split())}")
    return done.stdout.strip()
