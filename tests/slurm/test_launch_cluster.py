"""`hope launch` against a real scheduler: its verdict on a job, a person's way from submit to cancel, a sweep."""

import json
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
        "print(submit_all(commands, folder=Path(sys.argv[1]), settings=parameters(options, name='x'), parallel=2))"
    )
    folder = run.path.parent / "jobs"
    done = cluster.run(sys.executable, "-c", program, folder, ROOT / "configs" / "hope_tiny.toml", check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    run.wait_for_queue(seconds=120)
    logs = "".join(path.read_text() for path in sorted(folder.glob("*.out")))
    assert "steps = 3" in logs and "steps = 4" in logs
