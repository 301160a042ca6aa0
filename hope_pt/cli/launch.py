"""`hope launch plan | dry-run | submit | status | watch | cancel | wandb | sweep | eval | data | preflight`: from a login node."""

import argparse
import json
import os
import shlex
import sys
import time
from dataclasses import replace
from pathlib import Path

from hope_pt import config as configs
from hope_pt.config.schema import RunConfig
from hope_pt.errors import ConfigError, HopeError
from hope_pt.launch.cluster import ROOT, SCRIPTS, Cluster, read_cluster
from hope_pt.launch.render import Job, make_job


class BadNodesError(HopeError):
    """Preflight names nodes that a job should leave out; the exit code is neither a person's mistake nor a crash."""

    exit_code = 3


class BadNetworkError(HopeError):
    """Preflight did not come through the network's test and can name no node: an attempt that failed, as a crash does."""

    exit_code = 1


def run(arguments: argparse.Namespace) -> None:
    """Runs one action."""
    actions = {
        "plan": _plan,
        "dry-run": _dry_run,
        "submit": _submit,
        "status": _status,
        "watch": _watch,
        "cancel": _cancel,
        "wandb": _wandb,
        "preflight": _preflight,
        "sweep": _sweep,
        "eval": _tasks,
        "data": _tasks,
    }
    actions[arguments.action](arguments)


def _cluster(arguments: argparse.Namespace) -> Cluster:
    return read_cluster(arguments.cluster or os.environ.get("HOPE_CLUSTER", ""), os.environ)


def _job(arguments: argparse.Namespace) -> Job:
    return make_job(
        Path(arguments.script),
        config=arguments.config,
        options=_options(arguments),
        arguments=arguments.overrides,
        cluster=_cluster(arguments),
    )


def _options(arguments: argparse.Namespace) -> list[str]:
    """Options of sbatch from ours; a number of tasks is a number of GPUs."""
    given = [(f"--{name}", getattr(arguments, name)) for name in ("nodes", "time", "partition")]
    tasks = arguments.tasks_per_node
    given += [("--ntasks-per-node", tasks), ("--gres", tasks and arguments.action != "data" and f"gpu:{tasks}")]
    return [f"{name}={value}" for name, value in given if value] + [word for text in arguments.sbatch for word in shlex.split(text)]


def _checked(arguments: argparse.Namespace) -> tuple[Job, RunConfig]:
    """Prints the findings; raises ConfigError with all violations, one a line before it."""
    from hope_pt.launch.checks import check_job

    job = _job(arguments)
    settings, findings = check_job(job)
    if settings is not None:
        _show(job, settings)
    for warning in findings.warnings:
        print(f"warning: {warning}")
    print(f"scheduler: {findings.verdict}")
    for violation in findings.violations:
        print(f"violation: {' '.join(violation.split())}")
    if findings.violations or settings is None:
        raise ConfigError(f"{len(findings.violations)} violation(s), see above; nothing was submitted")
    return job, settings


def _show(job: Job, settings: RunConfig) -> None:
    from hope_pt.cli.tables import size
    from hope_pt.launch.needs import disk_need
    from hope_pt.launch.render import srun_line

    print(configs.to_toml(settings))
    print(f"config hash: {configs.config_hash(settings)}")
    tokens = settings.train.global_batch_size * settings.data.seq_len
    print(f"steps: {settings.train.steps:,} of {tokens:,} tokens, {settings.train.steps * tokens / 1e9:,.2f} billion in all")
    try:
        _show_layout(job, settings)
        need = disk_need(settings)
        print(f"disk: {size(need.checkpoint)} a checkpoint, {size(need.working)} at one time, {size(need.whole_run)} for the whole run")
        print(_submission(job, settings))
        place = [
            *(one for one in job.arguments if one.partition("=")[0] not in ("name", "out")),
            f"name={settings.name}",
            f"out={settings.out}",
        ]
        # The batch script mounts the folder of the run into a container.
        run = {"HOPE_RUN_DIR": str(ROOT / settings.out / settings.name)}
        print(srun_line(job, arguments=[job.config, *place], environment=os.environ | run))
    except HopeError:
        # Each of these has its own check, which tells the reason.
        pass


def _submission(job: Job, settings: RunConfig) -> str:
    """The line that submits the job, for a shell."""
    from hope_pt.launch.submit import submission

    command, environment = submission(job, run=settings.name, out=settings.out)
    return shlex.join([*(f"{key}={value}" for key, value in environment.items()), *command])


def _show_layout(job: Job, settings: RunConfig) -> None:
    from hope_pt.cli.tables import size
    from hope_pt.engine.mesh import check_mesh
    from hope_pt.launch.search import fullest_rank

    mesh = check_mesh(settings, world_size=job.world_size)
    print(f"world: {job.nodes} nodes * {job.tasks_per_node} tasks = {job.world_size} ranks: {mesh.describe()}")
    print(f"memory: {size(fullest_rank(settings, mesh).total)} on the fullest rank, by the planner")


def _dry_run(arguments: argparse.Namespace) -> None:
    _checked(arguments)
    print("no violation; `hope launch submit` with the same arguments submits it")


def _submit(arguments: argparse.Namespace) -> None:
    from hope_pt.launch.submit import submit

    job, settings = _checked(arguments)
    number = submit(job, run=settings.name, out=settings.out)
    print(f"job {number}; next: hope launch watch {Path(settings.out) / settings.name}")


def _plan(arguments: argparse.Namespace) -> None:
    from rich.console import Console

    from hope_pt.cli.tables import size, table
    from hope_pt.launch.checks import resolve
    from hope_pt.launch.gpus import gpu_of
    from hope_pt.launch.search import search

    job = _job(arguments)
    settings, gpu = resolve(job), gpu_of(job.cluster.gpu)
    found = search(settings, world_size=job.world_size, gpu=gpu)
    if not found:
        raise ConfigError(f"no layout of {settings.name} fits {job.world_size} x {gpu.name}; give more GPUs, or larger ones")
    rows = []
    for one in found[:5]:
        days = one.time.total * settings.train.steps / 86400
        rows.append((one.mesh.describe(), f"{one.engine.micro_batch_size}", one.engine.recompute, size(one.fullest.total), f"{days:.1f}"))
    title = f"{settings.name} on {job.nodes} nodes of {job.tasks_per_node} x {gpu.name}; days by a model that no GPU has confirmed"
    Console().print(table(title, "layout", "rows", "recompute", "fullest rank", "days", rows=rows))
    best = settings.model_copy(update={"engine": found[0].engine})
    changes = [line.partition(": ") for line in configs.diff(settings, best)]
    words = [f"{key}={change.rpartition(' -> ')[2].strip(chr(34))}" for key, _, change in changes]
    print(f"the fastest: {_submission(replace(job, arguments=(*job.arguments, *words)), settings)}")


def _status(arguments: argparse.Namespace) -> None:
    found = _read_status(arguments)
    print(json.dumps(found.as_dict(), indent=1) if arguments.json else _lines(found))


def _watch(arguments: argparse.Namespace) -> None:
    while True:
        found = _read_status(arguments)
        print(json.dumps(found.as_dict()) if arguments.json else _lines(found), flush=True)
        if arguments.once or found.over:
            break
        time.sleep(arguments.every)
    if found.problem:
        raise HopeError(f"{found.name}: {found.problem}")


def _read_status(arguments: argparse.Namespace):
    from hope_pt.launch.rate import flops_rate
    from hope_pt.launch.watch import run_status

    path = Path(arguments.run)
    return run_status(path, stall_s=arguments.stall, flops_rate=flops_rate(path))


def _lines(found) -> str:
    def shown(value: float | None, form: str) -> str:
        return "unknown" if value is None else format(value, form)

    left = "unknown" if found.eta_s is None else f"{int(found.eta_s // 3600)}:{int(found.eta_s % 3600 // 60):02d} h"
    lines = [
        f"{found.name}: {found.state}{f' ({found.reason})' if found.reason else ''}, "
        f"step {found.step} of {found.num_steps or 'unknown'}, {found.job or 'no job'}",
        f"  loss {shown(found.loss, '.4f')}, {shown(found.tokens_per_s, ',.0f')} tokens/s, MFU {shown(found.mfu, '.1%')}, time left {left}",
        f"  last checkpoint: step {found.checkpoint}; attempt {found.attempt}, restarts: {found.restarts}; "
        f"skipped steps: {found.skips}; last sign of life {shown(found.silent_s, '.0f')} s ago",
    ]
    return "\n".join(
        [*lines, *([f"  message: {found.message}"] if found.message else []), *([f"  PROBLEM: {found.problem}"] if found.problem else [])]
    )


def _cancel(arguments: argparse.Namespace) -> None:
    from hope_pt.launch.submit import cancel

    path = Path(arguments.run)
    if not path.is_dir():
        raise ConfigError(f"{path}: no such run directory")
    jobs = cancel(path)
    print(f"cancelled: {' '.join(jobs)}" if jobs else f"no job of {path} is in the queue")


def _wandb(arguments: argparse.Namespace) -> None:
    from importlib.metadata import PackageNotFoundError, version

    from hope_pt.launch.watch import has_ended
    from hope_pt.report import tracking

    path = Path(arguments.run)
    stored = path / "config.toml"
    if not stored.is_file():
        raise ConfigError(f"{path}: no run directory with a config.toml")
    if arguments.upload:
        settings = configs.loads(stored.read_text(encoding="utf-8"), source=str(stored))
        sent = tracking.upload(settings, directory=path, finished=has_ended(path))
        print(f"sent {len(sent)} steps: {sent[0]} to {sent[-1]}" if sent else "wandb has every step already")
        return
    found = tracking.segments(path)
    if not found:
        print(f"{path} has no offline segments of wandb; --upload sends its metrics.jsonl")
        return
    try:
        installed = version("wandb")
    except PackageNotFoundError:
        installed = ""
    for number, one in enumerate(found, start=1):
        print(f"{number}. {one}")
    print("as one run, with what wandb itself has recorded of the machine; steps taken again after a crash are in two segments:")
    print("\n".join(f"  {shlex.join(words)}" for words in tracking.sync_commands(found, version=installed)))
    print(f"every step once, from metrics.jsonl:\n  hope launch wandb {path} --upload")


def _preflight(arguments: argparse.Namespace) -> None:
    from hope_pt.cli.launcher import launch_from_environment
    from hope_pt.launch.preflight import preflight

    launch, directory = launch_from_environment(), Path(arguments.run)
    verdict = preflight(launch, directory=directory, environment=os.environ)
    named = directory / "slurm" / "bad-node"
    # Rank 0 knows best; the others speak only where it is gone, and one is enough.
    if verdict is None or (launch.rank and named.exists()):
        return
    print("\n".join(verdict.lines), flush=True)
    error: HopeError | None = None
    if verdict.bad:
        if named.parent.is_dir():
            named.write_text("".join(f"{node}\n" for node in sorted(verdict.bad)), encoding="utf-8")
        error = BadNodesError(f"preflight found bad nodes: {', '.join(sorted(verdict.bad))}")
    elif verdict.shared:
        error = HopeError(f"preflight: no node can write the run: {'; '.join(verdict.shared)}; make room or set out elsewhere")
    elif verdict.stuck:
        error = BadNetworkError("preflight did not come through the network's test, see above")
    if error is not None and verdict.stuck:
        print(f"error: {error}", file=sys.stderr, flush=True)
        # A thread of this process may be inside a collective that never ends.
        os._exit(error.exit_code)
    if error is not None:
        raise error


def _sweep(arguments: argparse.Namespace) -> None:
    from hope_pt.launch.sweep import sweep_commands

    values = dict(one.partition("=")[::2] for one in arguments.overrides)
    config, name = ROOT / arguments.config, values.get("name", Path(arguments.config).stem)
    out = values.get("out") or _cluster(arguments).values.get("HOPE_OUT", "")
    settings = [one for one in arguments.overrides if one.partition("=")[0] not in ("name", "out")]
    commands = sweep_commands(str(config), settings=settings, name=name, out=out and str(ROOT / out))
    for command in commands:
        # A wrong key in the last job of an array should not be found tomorrow.
        configs.load(config, list(command.arguments[2:]))
    _send(arguments, commands, name=f"hope-sweep-{name}")


def _tasks(arguments: argparse.Namespace) -> None:
    from hope_pt.launch.sweep import Command

    if arguments.action == "eval":
        runs = [ROOT / word for word in arguments.words]
        missing = [run for run in runs if not (run / "checkpoints").is_dir()]
        if missing:
            raise ConfigError(f"{missing[0]}: no run with checkpoints")
        commands = [Command(("eval", str(run))) for run in runs]
    else:
        commands = [Command(tuple(arguments.words), program="hope-data")]
    _send(arguments, commands, name=f"hope-{arguments.action}")


def _send(arguments: argparse.Namespace, commands, *, name: str) -> None:
    from hope_pt.launch.render import script_options
    from hope_pt.launch.sweep import batch_text, on_cluster, parameters, submit_all

    cluster = _cluster(arguments)
    commands = on_cluster(commands, cluster=cluster)
    script = script_options(SCRIPTS / "sweep.sh")
    if arguments.action == "data":
        # Tokenizing and packing are a CPU's work.
        script = [word for word in script if not word.startswith("--gres=")]
    options = [*script, f"--job-name={name}", *cluster.sbatch_options, *_options(arguments)]
    settings, folder = parameters(options, name=name, cluster=cluster), ROOT / arguments.folder
    if arguments.print:
        print(batch_text(commands, folder=folder, settings=settings, parallel=arguments.parallel))
        print(f"# in {ROOT} with {shlex.join(f'{key}={value}' for key, value in commands[0].variables) or 'no variables'}")
        for index, command in enumerate(commands):
            print(f"# {index}: {command.program} {shlex.join(command.arguments)}")
        return
    # A site's default would win over --export in the file that submitit writes.
    os.environ.pop("SBATCH_EXPORT", None)
    jobs = submit_all(commands, folder=folder, settings=settings, parallel=arguments.parallel)
    print(f"{len(jobs)} jobs: {jobs[0]} to {jobs[-1]}; logs in {folder}")
