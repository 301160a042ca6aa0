"""The lines of a job as text: options of its script, what sbatch is called with, and the srun line that the script will run.

The srun line comes from the very shell functions that the batch script uses (slurm/lib), so it cannot differ from them.
"""

import os
import re
import shlex
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from hope_pt.errors import ConfigError
from hope_pt.launch.cluster import ROOT, SCRIPTS, Cluster

_SHORT = {
    "-A": "account",
    "-J": "job-name",
    "-N": "nodes",
    "-a": "array",
    "-c": "cpus-per-task",
    "-n": "ntasks",
    "-o": "output",
    "-p": "partition",
    "-q": "qos",
    "-t": "time",
    "-w": "nodelist",
    "-x": "exclude",
}
_FLAGS = ("requeue", "no-requeue", "exclusive", "test-only", "parsable", "hold")
_SRUN = """
. "$HOPE_ROOT/slurm/lib/env.sh"
step=()
hope_step "$HOPE_ROOT/slurm/lib/task.sh" "$(hope_program)" train "$@" || exit 2
printf '%q ' "${step[@]}"
"""


@dataclass(frozen=True)
class Job:
    """script: the batch script. config: what it trains. options: of sbatch, later ones win. arguments: key=value for the trainer."""

    script: Path
    config: str
    options: tuple[str, ...]
    arguments: tuple[str, ...]
    cluster: Cluster

    @property
    def settings(self) -> dict[str, str]:
        """Options of sbatch by long name: those of the script under those of the cluster and of the caller."""
        return parse_options([*script_options(self.script), *self.cluster.sbatch_options, *self.options])

    @property
    def nodes(self) -> int:
        """Nodes of the job."""
        return _number(self.settings, "nodes", default=1)

    @property
    def tasks_per_node(self) -> int:
        """Processes on a node: one for each GPU."""
        return _number(self.settings, "ntasks-per-node", default=1)

    @property
    def world_size(self) -> int:
        """Processes of the job."""
        return self.nodes * self.tasks_per_node

    def sbatch(self, *more: str) -> list[str]:
        """The command that submits the job. At sites with SBATCH_EXPORT=NONE only --export=ALL takes HOPE_CLUSTER along."""
        export = [] if "export" in self.settings else ["--export=ALL"]
        options = [*self.cluster.sbatch_options, *self.options, *more, *export]
        return ["sbatch", *options, str(self.script), *self.config_arguments, *self.arguments]

    @property
    def config_arguments(self) -> list[str]:
        """Names the configuration where it is not the script's own."""
        return [] if self.config == script_config(self.script) else ["--config", self.config]


def make_job(script: Path, *, config: str, options: Sequence[str], arguments: Sequence[str], cluster: Cluster) -> Job:
    """A job of `script`, found below slurm/ too; `config` empty: the script's own. Raises ConfigError where there is no such script."""
    path = next((path for path in (script, ROOT / script, SCRIPTS / script, SCRIPTS / f"{script}.sh") if path.is_file()), None)
    if path is None:
        known = ", ".join(sorted(found.name for found in SCRIPTS.glob("hope_*.sh")))
        raise ConfigError(f"{script}: no such batch script; slurm/ has {known}")
    path = path.resolve()
    return Job(path, config or script_config(path), tuple(options), tuple(arguments), cluster)


def script_options(script: Path) -> list[str]:
    """Words of the `#SBATCH` lines."""
    lines = script.read_text(encoding="utf-8").splitlines()
    return [word for line in lines if line.startswith("#SBATCH ") for word in shlex.split(line.removeprefix("#SBATCH"), comments=True)]


def script_config(script: Path) -> str:
    """The configuration that a script trains; ConfigError for a script that trains none."""
    found = re.search(r"^hope_job (\S+\.toml)", script.read_text(encoding="utf-8"), re.MULTILINE)
    if not found:
        raise ConfigError(f"{script}: this script names no configuration; give one with --config FILE")
    return found[1]


def parse_options(words: Sequence[str]) -> dict[str, str]:
    """Options of sbatch by long name, the last of each; flags have the value "". Raises ConfigError for what is no option."""
    found: dict[str, str] = {}
    rest = list(words)
    while rest:
        word = rest.pop(0)
        name, equals, value = word.partition("=")
        if name.startswith("--"):
            name = name[2:]
        elif word[:2] in _SHORT:
            name, equals, value = _SHORT[word[:2]], word[2:], word[2:]
        else:
            raise ConfigError(f"sbatch option {word!r}: expected --name=value")
        if not equals and name not in _FLAGS:
            if not rest:
                raise ConfigError(f"sbatch option --{name} has no value")
            value = rest.pop(0)
        found[name] = value
    return found


def srun_line(job: Job, *, arguments: Sequence[str], environment: Mapping[str, str] = os.environ) -> str:
    """The line that starts the ranks with `hope train ARGUMENTS`. Raises ConfigError with what the shell functions said."""
    values = {**environment, **job.cluster.values, "HOPE_ROOT": str(ROOT)}
    done = subprocess.run(["bash", "-c", _SRUN, "render", *arguments], env=values, capture_output=True, text=True, timeout=30)
    if done.returncode:
        raise ConfigError(done.stderr.strip().removeprefix("hope: ") or "the srun line cannot be rendered")
    return done.stdout.strip()


def minutes(text: str) -> float:
    """Minutes of Slurm's `minutes`, `minutes:seconds`, `hours:minutes:seconds`, `days-hours[:minutes[:seconds]]`; ConfigError else."""
    found = re.fullmatch(r"(?:(\d+)-(\d+)(?::(\d+))?(?::(\d+))?|(\d+)(?::(\d+))?(?::(\d+))?)", text)
    if not found:
        raise ConfigError(f"--time={text}: expected minutes, hours:minutes:seconds or days-hours")
    days, hours, after, seconds, first, second, third = (int(part) if part else 0 for part in found.groups())
    if found[1] is not None:
        return days * 1440 + hours * 60 + after + seconds / 60
    return first * 60 + second + third / 60 if found[7] is not None else first + second / 60


def _number(settings: Mapping[str, str], name: str, *, default: int) -> int:
    text = settings.get(name, str(default))
    if not text.isdigit() or int(text) < 1:
        raise ConfigError(f"--{name}={text}: expected a whole number")
    return int(text)
