"""Everything that is wrong with a job before it is submitted, all of it at once, without a GPU and without Slurm where there is none.

Each check is independent of the others as far as it can be: a wrong key in the configuration does not hide an unknown partition.
"""

import importlib.util
import os
import shutil
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from hope_pt import config as configs
from hope_pt.config.schema import RunConfig
from hope_pt.errors import HopeError
from hope_pt.launch.cluster import ROOT
from hope_pt.launch.render import Job, minutes

SBATCH_S = 8.0
"""Seconds that the scheduler has for its verdict."""
GIB = 2**30
CHECKED = Callable[[], str | list[str] | None]


@dataclass
class Findings:
    """violations: reasons not to submit. warnings: what a person should know. verdict: what sbatch --test-only said."""

    violations: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    verdict: str = ""

    def check(self, what: CHECKED) -> None:
        """Runs one check; what it returns, or the HopeError that it raises, is a violation."""
        try:
            found = what()
        except HopeError as error:
            found = str(error)
        # One mistake may stop several checks.
        self.violations += [one for one in ([found] if isinstance(found, str) else found or []) if one not in self.violations]


def resolve(job: Job) -> RunConfig:
    """The configuration as the batch script passes it on, with relative paths taken from the repository. Raises ConfigError."""
    given = any(one.startswith("out=") for one in job.arguments)
    out = job.cluster.values.get("HOPE_OUT")
    config = configs.load(ROOT / job.config, [*job.arguments, *([f"out={out}"] if out and not given else [])])
    return config.model_copy(update={"out": str(ROOT / config.out)})


def check_job(job: Job, *, environment: Mapping[str, str] = os.environ) -> tuple[RunConfig | None, Findings]:
    """The resolved configuration, if there is one, and all findings."""
    findings = Findings()
    config = None
    try:
        config = resolve(job)
    except HopeError as error:
        findings.violations.append(str(error))
        findings.warnings.append("the configuration cannot be read, so layout, data, disk, container and packages were not looked at")
    for problem in job.cluster.problems():
        findings.violations.append(problem)
    findings.check(lambda: _shape(job))
    findings.check(lambda: _time(job, findings.warnings))
    if config is not None:
        found = config
        findings.check(lambda: _layout(found, job, findings.warnings))
        findings.check(lambda: _samples(found))
        findings.check(lambda: _mounts(found, job))
        findings.check(lambda: _disk(found, findings.warnings))
        findings.check(lambda: _existing(found))
        findings.check(lambda: _packages(found))
    findings.verdict = ask_scheduler(job, findings, environment=environment)
    return config, findings


def _shape(job: Job) -> list[str]:
    """Nodes, tasks and GPUs go together: one task for each GPU."""
    settings, tasks, problems = job.settings, job.tasks_per_node, []
    if job.nodes and "ntasks" in settings and settings["ntasks"] != str(job.world_size):
        problems.append(f"--ntasks={settings['ntasks']} is not {job.nodes} nodes * {tasks} tasks; leave --ntasks out")
    gpus = settings.get("gres", "").rpartition(":")[2] if settings.get("gres", "").startswith("gpu") else ""
    gpus = gpus or settings.get("gpus-per-node", "").rpartition(":")[2]
    if gpus.isdigit() and int(gpus) != tasks:
        problems.append(f"--gres=gpu:{gpus} for --ntasks-per-node={tasks}: every task drives one GPU; make them equal")
    if job.cluster.gpus_per_node and tasks > job.cluster.gpus_per_node:
        problems.append(f"--ntasks-per-node={tasks} on nodes of {job.cluster.gpus_per_node} GPUs (HOPE_GPUS_PER_NODE); use more nodes")
    output = settings.get("output", "")
    if output.startswith("/") and not Path(output).parent.is_dir():
        problems.append(
            f"--output={output}: {Path(output).parent} does not exist, and Slurm makes no directories: the job would end silently"
        )
    return problems


def _time(job: Job, warnings: list[str]) -> list[str]:
    """The signal before the limit reaches the batch shell, early enough."""
    settings, problems = job.settings, []
    limit = minutes(settings["time"]) if "time" in settings else None
    target, _, lead = settings.get("signal", "").partition("@")
    if target != "B:USR1" or not (lead or "60").isdigit():
        problems.append(f"--signal={settings.get('signal', '')}: the batch shell must be told before the limit; use --signal=B:USR1@300")
    elif limit and float(lead or 60) >= limit * 60:
        problems.append(f"--time={settings['time']} is not longer than the {lead or 60} s of --signal: the job would stop at once")
    elif limit and float(lead or 60) * 4 > limit * 60:
        warnings.append(f"more than a quarter of --time={settings['time']} lies after the signal to stop ({lead or 60} s before the end)")
    if settings.get("open-mode") != "append":
        warnings.append("without --open-mode=append a requeue empties the job's log")
    if "no-requeue" in settings:
        warnings.append("--no-requeue: the run will not continue by itself; slurm/chain.sh is for such clusters")
    return problems


def _layout(config: RunConfig, job: Job, warnings: list[str]) -> str | None:
    """The world can be divided as configured, and a rank's memory fits its GPU."""
    from hope_pt.engine.mesh import check_mesh
    from hope_pt.launch.gpus import budget, gpu_of
    from hope_pt.launch.search import fullest_rank

    mesh = check_mesh(config, world_size=job.world_size)
    if mesh.tensor > job.tasks_per_node:
        warnings.append(
            f"engine.tensor_parallel = {mesh.tensor} reaches over nodes of {job.tasks_per_node} GPUs: every layer waits for the network"
        )
    if config.engine.device == "cpu":
        return None
    gpu = gpu_of(job.cluster.gpu)
    peak = fullest_rank(config, mesh).total
    if peak > budget(gpu):
        return (
            f"{mesh.describe()} needs {peak / GIB:.1f} GiB on its fullest rank, {gpu.name} has {budget(gpu) / GIB:.1f} GiB to give; "
            f"hope launch plan lists layouts of {job.world_size} GPUs that fit"
        )
    return None


def _samples(config: RunConfig) -> None:
    """The data exist, have the configured length and fit the vocabulary."""
    from hope_pt import data

    settings = config.data.model_copy(update={"path": str(ROOT / config.data.path)}) if config.data.path else config.data
    for split in ("train", "heldout"):
        data.open_source(settings, split=split, vocab_size=config.model.vocab_size).close()


def _mounts(config: RunConfig, job: Job) -> list[str]:
    """What the run reads can be seen in the container, which has the repository, the run's own place and HOPE_MOUNTS."""
    if job.cluster.container == "none":
        return []
    roots = [ROOT, Path(config.out), *job.cluster.mounts]
    read = {"data.path": config.data.path, "train.start_from": config.train.start_from}
    return [
        f"{key} = {value!r} is neither in the repository nor below a target of HOPE_MOUNTS, so the container does not have it; mount it"
        for key, value in read.items()
        if value and not _is_below(ROOT / value, roots)
    ]


def _is_below(path: Path, roots: list[Path]) -> bool:
    """Whether a path lies below one of the roots, and what its links lead to as well."""
    return any(path.is_relative_to(root) for root in roots) and any(path.resolve().is_relative_to(root.resolve()) for root in roots)


def _disk(config: RunConfig, warnings: list[str]) -> str | None:
    """The run directory can be written, and has room for the checkpoints that are there at one time."""
    from hope_pt.launch.needs import disk_need, free_bytes

    place = Path(config.out).absolute()
    while not place.exists():
        place = place.parent
    if not place.is_dir() or not os.access(place, os.W_OK):
        return f"out = {config.out!r}: {place} cannot be written"
    free, need = free_bytes(place), disk_need(config)
    if free < need.working:
        return (
            f"out = {config.out!r} has {free / GIB:.1f} GiB free, {config.checkpoint.keep} checkpoints and one being written need "
            f"{need.working / GIB:.1f} GiB; set out elsewhere or lower checkpoint.keep"
        )
    if free < need.whole_run:
        warnings.append(
            f"the whole run keeps {need.whole_run / GIB:.0f} GiB of checkpoints (checkpoint.keep_every), {free / GIB:.0f} GiB are free"
        )
    return None


def _existing(config: RunConfig) -> list[str]:
    """A run of that name may be continued by this configuration, and nobody else is writing it."""
    from hope_pt.launch.watch import owner_state
    from hope_pt.train.resume import check_config

    path, problems = Path(config.out) / config.name, []
    owner = owner_state(path)
    if owner:
        problems.append(f"run {config.name!r} belongs to {owner}; wait for it, cancel it, or give this run another name")
    stored = path / "config.toml"
    if stored.exists() and (path / "metrics.jsonl").exists():
        try:
            from hope_pt.launch.watch import committed_step

            check_config(config, stored=configs.loads(stored.read_text(encoding="utf-8"), source=str(stored)), step=committed_step(path))
        except HopeError as error:
            problems.append(str(error))
    if config.train.start_from and not (ROOT / config.train.start_from).exists():
        problems.append(f"train.start_from = {config.train.start_from!r}: no such run or checkpoint")
    return problems


def _packages(config: RunConfig) -> list[str]:
    """Optional packages that the configuration asks for. Those of the GPU cannot be looked for on a login node."""
    wanted = {"wandb": config.track.wandb, "streaming": config.data.backend == "streaming"}
    extras = {"wandb": "pip install 'hope-pt[track]', or set track.wandb = false", "streaming": "see docs/data.md"}
    return [
        f"{name} is not installed: {extras[name]}" for name, asked in wanted.items() if asked and importlib.util.find_spec(name) is None
    ]


def ask_scheduler(job: Job, findings: Findings, *, environment: Mapping[str, str]) -> str:
    """The verdict of `sbatch --test-only`; a refusal is a violation, a scheduler that cannot be asked is none."""
    if shutil.which("sbatch", path=environment.get("PATH")) is None:
        return "sbatch is not installed here: the scheduler was not asked"
    try:
        done = subprocess.run(
            job.sbatch()[:1] + ["--test-only"] + job.sbatch()[1:], env=dict(environment), capture_output=True, text=True, timeout=SBATCH_S
        )
    except (subprocess.TimeoutExpired, HopeError) as error:
        return f"the scheduler was not asked: {error}"
    said = " ".join(line.removeprefix("sbatch: ") for line in (done.stdout + done.stderr).splitlines()).strip()
    if done.returncode:
        if any(text in said for text in ("Unable to contact slurm controller", "configuration source", "Connection refused")):
            return f"the scheduler does not answer: {said}"
        findings.violations.append(f"sbatch --test-only refuses the job: {said}")
    return said
