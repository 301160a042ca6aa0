"""Many small jobs through submitit: sweeps, evaluations, data preparation. Pretraining has the batch scripts of slurm/ instead.

submitit writes the batch file, submits an array and keeps results and logs in one folder. It asks rank 0 alone when a job is interrupted,
which cannot save a model of several ranks; here nothing needs to be asked, because every command continues by itself when it is run again:
`checkpoint` hands the same command back, and submitit requeues it.
"""

import itertools
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hope_pt.errors import ConfigError
from hope_pt.launch.cluster import ROOT, Cluster
from hope_pt.launch.render import minutes, parse_options

MAX_JOBS = 1000
"""Most jobs of one sweep: more is a slip in a list of values, and above the limit of many clusters."""
TIMEOUTS = 20
"""Times that an interrupted job may continue."""
_OWN = {"job-name": "job_name", "nodes": "nodes", "ntasks-per-node": "ntasks_per_node", "cpus-per-task": "cpus_per_task", "gres": "gres"}


@dataclass(frozen=True)
class Command:
    """`hope ARGUMENTS` (or `hope-data`) as something that submitit can pickle, run in every task of a job, and start again.

    variables: of the cluster's file, HOPE_COMMAND among them; what the job's environment already has wins.
    """

    arguments: tuple[str, ...]
    program: str = "hope"
    variables: tuple[tuple[str, str], ...] = ()

    def __call__(self) -> int:
        """Runs it in the repository with the address of rank 0 set; raises RuntimeError where it fails, so that submitit reports it."""
        environment = {**dict(self.variables), **os.environ, **_address()}
        own = Path(sys.executable).with_name(self.program)
        program = environment.get("HOPE_COMMAND") or own if self.program == "hope" else own
        done = subprocess.run([program, *self.arguments], env=environment, cwd=ROOT)
        if done.returncode:
            raise RuntimeError(f"{shlex.join(self.arguments)} ended with code {done.returncode}")
        return 0

    def checkpoint(self) -> Any:
        """What submitit runs after an interruption: the same."""
        import submitit

        return submitit.helpers.DelayedSubmission(self)


def grid(settings: Sequence[str]) -> list[tuple[str, ...]]:
    """`key=a,b` for every key -> all combinations, the last key fastest. Commas within brackets or quotes belong to a value.

    Raises ConfigError for an empty value or more than MAX_JOBS combinations.
    """
    axes = []
    for setting in settings:
        key, equals, text = setting.partition("=")
        values = re.findall(r"""(?:\[[^\]]*\]|"[^"]*"|'[^']*'|[^,])+""", text)
        if not equals or not values or ",," in text or text.endswith(","):
            raise ConfigError(f"{setting!r}: expected key=value or key=value,value,...")
        axes.append([f"{key}={value}" for value in values])
    found = list(itertools.islice(itertools.product(*axes), MAX_JOBS + 1))
    if len(found) > MAX_JOBS:
        raise ConfigError(f"more than {MAX_JOBS} combinations; leave out values")
    return found


def sweep_commands(config: str, *, settings: Sequence[str], name: str, out: str) -> list[Command]:
    """One training command for each combination, with runs NAME-0, NAME-1, ... in `out`."""
    where = (f"out={out}",) if out else ()
    return [Command(("train", config, *one, f"name={name}-{index}", *where)) for index, one in enumerate(grid(settings))]


def on_cluster(commands: Sequence[Command], *, cluster: Cluster) -> list[Command]:
    """The commands with the variables of the cluster's file. ConfigError for values that are wrong, and for a container."""
    if problems := cluster.problems():
        raise ConfigError("; ".join(problems))
    if cluster.container != "none":
        raise ConfigError(
            f"cluster {cluster.name!r}: HOPE_CONTAINER = {cluster.container!r}, and submitit's jobs start no container; "
            "submit slurm/sweep.sh or slurm/eval.sh with sbatch, which do, and prepare data outside of it"
        )
    return [replace(command, variables=tuple(sorted(cluster.values.items()))) for command in commands]


def parameters(options: Sequence[str], *, name: str, cluster: Cluster) -> dict[str, Any]:
    """Options of sbatch, and the cluster's of srun, as submitit's parameters."""
    given = {"job-name": name, "export": "ALL", **parse_options(options)}
    found: dict[str, Any] = {}
    extra: dict[str, Any] = {}
    for key, value in given.items():
        if key in _OWN:
            found[_OWN[key]] = int(value) if value.isdigit() else value
        elif key == "time":
            found["time"] = max(int(minutes(value)), 1)
        elif key not in ("open-mode", "output", "error", "signal", "requeue"):
            extra[key.replace("-", "_")] = value or True
    # As hope_defaults of slurm/lib/env.sh: since Slurm 22.05 srun does not take the cores of a task from its job.
    found["setup"] = ["export SRUN_CPUS_PER_TASK=${SRUN_CPUS_PER_TASK:-${SLURM_CPUS_PER_TASK:-1}}"]
    return {**found, "srun_args": shlex.split(cluster.values.get("HOPE_SRUN_OPTIONS", "")), "additional_parameters": extra}


def batch_text(commands: Sequence[Command], *, folder: Path, settings: dict[str, Any], parallel: int) -> str:
    """The batch file that submitit would write; needs no Slurm."""
    slurm = _submitit().slurm.slurm
    count = {"map_count": len(commands)} if len(commands) > 1 else {}
    runner = f"{shlex.quote(sys.executable)} -u -m submitit.core._submit {shlex.quote(str(folder))}"
    return slurm._make_sbatch_string(command=runner, folder=folder, array_parallelism=parallel, **count, **settings)


def submit_all(commands: Sequence[Command], *, folder: Path, settings: dict[str, Any], parallel: int) -> list[str]:
    """Submits the commands as one array and returns their ids."""
    submitit = _submitit()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        executor = submitit.SlurmExecutor(folder=folder, max_num_timeout=TIMEOUTS)
        executor.update_parameters(array_parallelism=parallel, **settings)
        with executor.batch():
            jobs = [executor.submit(command) for command in commands]
        return [job.job_id for job in jobs]
    except (RuntimeError, submitit.core.utils.FailedJobError) as error:
        raise ConfigError(f"the jobs were not submitted: {' '.join(str(error).split())}") from error


def _submitit() -> Any:
    try:
        import submitit
        import submitit.slurm.slurm
    except ImportError:
        raise ConfigError("submitit is not installed; pip install 'hope-pt[slurm]'") from None
    return submitit


def _address() -> dict[str, str]:
    """Where rank 0 is, for jobs of several tasks."""
    if int(os.environ.get("SLURM_NTASKS", "1")) == 1:
        return {}
    hosts = subprocess.run(
        ["scontrol", "show", "hostnames", os.environ["SLURM_JOB_NODELIST"]], capture_output=True, text=True, check=True
    ).stdout.split()
    return {"MASTER_ADDR": hosts[0], "MASTER_PORT": str(16384 + int(os.environ["SLURM_JOB_ID"]) * 16 % 16384)}
