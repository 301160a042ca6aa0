"""`hope launch` against a real scheduler: its verdict on a job, a person's way from submit to cancel, a sweep."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SMALL = (
    *("name=tiny", "data.source=mqar", "data.seq_len=32", "engine.device=cpu", "engine.micro_batch_size=1", "train.global_batch_size=4"),
    *("--nodes=2", "--tasks-per-node=2", "--cluster=onebox", "--sbatch=--cpus-per-task=1"),
)


@pytest.mark.parametrize(
    ("option", "said"), [("--partition=fast", "invalid partition"), pytest.param("--nodes=9", "not available", marks=pytest.mark.slow)]
)
def test_the_scheduler_refuses(cluster, tmp_path, option, said):
    command = [
        sys.executable,
        "-m",
        "hope_pt",
        "launch",
        "dry-run",
        "hope_1p3b",
        f"--config={ROOT}/configs/hope_tiny.toml",
        *SMALL,
        f"out={tmp_path}/runs",
    ]
    began = time.monotonic()
    good = subprocess.run(command, env=cluster.environment, capture_output=True, text=True)
    seconds = time.monotonic() - began
    assert good.returncode == 0 and "to start at" in good.stdout, good.stdout + good.stderr
    bad = subprocess.run([*command, "train.global_batch_size=36", option], env=cluster.environment, capture_output=True, text=True)
    assert bad.returncode == 2 and "sbatch --test-only refuses the job" in bad.stdout and said in bad.stdout, bad.stdout + bad.stderr
    print(f"dry run: {seconds:.1f} s")


def test_submit_status_and_cancel_on_a_cluster(cluster, run):
    """The whole way of a person: submit, look, cancel; then nothing of the run is left in the queue."""
    hope = [sys.executable, "-m", "hope_pt", "launch"]
    settings = {"HOPE_COMMAND": run.command, "HOPE_PREFLIGHT": "0", "FAKE_STEPS": "500", "HOPE_CLUSTER": "onebox"}
    config = run.path.parent / "tiny.toml"
    config.write_text((ROOT / "configs" / "hope_tiny.toml").read_text())
    place = [f"--config={config}", f"name={run.path.name}", f"out={run.path.parent}", "data.source=mqar", "engine.device=cpu"]
    shape = ["--nodes=2", "--tasks-per-node=2", "--sbatch=--cpus-per-task=1", "engine.micro_batch_size=2", "data.mqar.gap=8"]
    done = cluster.run(*hope, "submit", "hope_760m", *place, *shape, check=False, **settings)
    assert done.returncode == 0, done.stdout + done.stderr
    job = done.stdout.rsplit("job ", 1)[1].split(";")[0]
    run.wait_for_step(3)
    status = json.loads(cluster.run(*hope, "status", run.path, "--json").stdout)
    assert status["state"] == "running" and status["job"] == f"job {job} (RUNNING)" and status["step"] >= 3
    refused = cluster.run(*hope, "submit", "hope_760m", *place, *shape, check=False, **settings)
    assert refused.returncode == 2 and f"belongs to job {job} (RUNNING)" in refused.stdout
    assert cluster.run(*hope, "cancel", run.path).stdout.strip() == f"cancelled: {job}"
    run.wait_for_queue()
    assert cluster.job(job)["JobState"] == "CANCELLED"


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_sweep_through_submitit_runs(cluster, run):
    """Two tiny evaluations' worth of work: `hope config show` stands for a command that ends by itself."""
    pytest.importorskip("submitit", reason="submitit is not installed: pip install 'hope-pt[slurm]'")
    program = (
        "import sys; from pathlib import Path; from hope_pt.launch.sweep import *;"
        "commands = [Command(('config', 'show', sys.argv[2], f'train.steps={n}')) for n in (3, 4)];"
        "options = ['--nodes=1', '--ntasks-per-node=1', '--time=5', '--cpus-per-task=1', '--mem=100M'];"
        "print(submit_all(commands, folder=Path(sys.argv[1]), settings=parameters(options, name='x', cluster=Cluster('', {})), parallel=2))"
    )
    folder = run.path.parent / "jobs"
    done = cluster.run(sys.executable, "-c", program, folder, ROOT / "configs" / "hope_tiny.toml", check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    run.wait_for_queue(seconds=120)
    logs = "".join(path.read_text() for path in sorted(folder.glob("*.out")))
    assert "steps = 3" in logs and "steps = 4" in logs


def hope_with_a_fault(run) -> Path:
    """A command for HOPE_COMMAND: the real preflight with a fault, and the stand-in for the trainer."""
    path = run.path.parent / "hope"
    faults = Path(__file__).with_name("preflight_faults.py")
    path.write_text(f'#!/bin/sh\n[ "$1" = launch ] || exec {run.command} "$@"\nexec {sys.executable} {faults} "$@"\n')
    path.chmod(0o755)
    return path


FAULTS = {
    "slow product": ("n2", "a matrix product takes 1"),
    "missing GPU": ("n3", "nvidia-smi lists 1 of the 2 GPUs"),
    "unreachable": ("n3", "does not reach rank 0"),
    "clock": ("n1", "its clock is -300.0 s from the median of 3 nodes"),
    "link": ("n2", "exchanges of 16 MiB with other nodes take"),
}


def preflight(run, *, fault: str, node: str, tasks: int = 1) -> str:
    """The log of slurm/preflight.sh on all three nodes."""
    place = run.path / "runs"
    settings = {"HOPE_COMMAND": str(hope_with_a_fault(run)), "HOPE_CLUSTER": "onebox", "FAULT": fault, "FAULT_NODE": node}
    options = run.options(nodes=3, tasks=tasks)
    job = run.cluster.run("sbatch", "--parsable", *options, ROOT / "slurm" / "preflight.sh", place, **settings).stdout.strip()
    run.wait(job, seconds=150)
    return run.log


@pytest.mark.timeout(200)
@pytest.mark.parametrize("fault", [pytest.param(one, marks=[] if one == "clock" else pytest.mark.slow) for one in FAULTS])
def test_preflight_names_the_bad_node(run, fault):
    node, said = FAULTS[fault]
    log = preflight(run, fault=fault, node=node, tasks=2 if fault == "missing GPU" else 1)
    named = [line for line in log.splitlines() if "is bad:" in line]
    assert named and all(f"node {node} is bad:" in line for line in named), log
    assert any(said in line for line in named), log
    assert f"preflight found bad nodes: {node}" in log


@pytest.mark.slow
@pytest.mark.timeout(200)
@pytest.mark.parametrize(
    ("options", "said"), [("size=512k", "0 MiB free"), ("size=8m,nr_inodes=40", "inodes free")], ids=["full", "inodes"]
)
def test_preflight_names_the_node_with_a_bad_disk(run, options, said):
    """A small file system is mounted over the directory on one virtual node, as a local disk or a broken mount would be."""
    place, node = run.path / "runs", "n2"
    place.mkdir(parents=True)
    daemon = (run.cluster.directory / "run" / f"slurmd.{node}.pid").read_text().strip()
    inside = ["nsenter", f"--target={daemon}", "--mount"]
    subprocess.run([*inside, "mount", "-t", "tmpfs", "-o", options, "tmpfs", place], check=True)
    try:
        log = preflight(run, fault="", node="")
    finally:
        subprocess.run([*inside, "umount", place], check=True)
    assert [line.partition("preflight: ")[2] for line in log.splitlines() if "is bad:" in line and said in line], log
    assert f"preflight found bad nodes: {node}" in log


@pytest.mark.timeout(300)
def test_a_node_that_preflight_names_is_left_out_and_the_run_ends_on_others(run):
    settings = {"HOPE_COMMAND": str(hope_with_a_fault(run)), "HOPE_PREFLIGHT": "1", "FAULT": "slow product", "FAULT_NODE": "n2"}
    job = run.submit(shape={"nodes": 2, "tasks": 2}, **settings)
    assert run.wait(job, seconds=250) == "COMPLETED", run.log
    assert run.actions == ["exclude", "done"], run.log
    assert "node n2 is bad" in run.log and "node n1 is bad" not in run.log


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_killed_trainer_leaves_nothing_in_shared_memory(run):
    """kill -9 of every process of a step with reader processes, by its node's own /dev/shm, which started empty."""
    from hope_pt import config

    file = run.path.parent / "tiny.toml"
    file.write_text((ROOT / "configs" / "hope_tiny.toml").read_text())
    small = ["data.source=mqar", "data.mqar.gap=8", "data.num_workers=2", "data.seq_len=32", "engine.device=cpu", "engine.threads=1"]
    more = ["train.steps=400", "train.global_batch_size=4", "engine.micro_batch_size=1", "eval.every=0", "eval.at_start=false"]
    settings = [*small, *more]
    config.load(file, settings)
    run.command = str(Path(sys.executable).with_name("hope"))
    job = run.submit("--config", str(file), *settings)
    run.wait_for_step(3, seconds=200)
    killed = run.processes()
    assert len(killed) == 4
    for process in killed:
        os.kill(process, 9)
    run.cluster.run("scancel", job)
    run.wait(job, seconds=100)
    for node in ("n1", "n2"):
        daemon = (run.cluster.directory / "run" / f"slurmd.{node}.pid").read_text().strip()
        assert list(Path(f"/proc/{daemon}/root/dev/shm").iterdir()) == []
