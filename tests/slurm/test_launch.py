"""`hope launch` around a run, without a cluster: status from files, problems, sweeps as submitit's text."""

import json
import os
import time
from pathlib import Path

import pytest

from hope_pt import cli
from hope_pt.errors import ConfigError
from hope_pt.launch import sweep
from hope_pt.launch.watch import run_status

ROOT = Path(__file__).resolve().parents[2]


def make_run(path: Path, *, state: str = "running", attempts: tuple[str, ...] = (), age: float = 0.0) -> Path:
    """A run that is at step 40 of 100, one step in two seconds, its newest line `age` seconds old."""
    now = time.time() - age
    (path / "slurm").mkdir(parents=True)
    for step in (16, 32):
        (path / "checkpoints" / f"step-{step:08d}").mkdir(parents=True)
    lines = [{"step": s, "loss": 4.0 - s / 100, "tokens_per_s": 1000.0, "time": now - 2 * (40 - s)} for s in range(1, 41)]
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 41, "lo')
    (path / "status.json").write_text(json.dumps({"state": state, "step": 38, "num_steps": 100, "message": "", "time": now}))
    (path / "slurm" / "attempts").write_text("".join(f"{line}\n" for line in attempts))
    return path


def test_the_status_of_a_run(tmp_path, capsys):
    attempts = ("start 1 job=7.0 step=0", "end 1 job=7.0 step=16 from=0 rc=137 action=requeue", "start 2 job=7.1 step=16")
    path = make_run(tmp_path / "big", attempts=attempts)
    found = run_status(path, flops_rate=4e-4)
    assert (found.step, found.num_steps, found.checkpoint, found.restarts) == (40, 100, 32, 1)
    assert found.loss == pytest.approx(3.6) and found.tokens_per_s == 1000.0 and found.mfu == pytest.approx(0.4)
    assert found.eta_s == pytest.approx(120, abs=1)
    assert cli.main(["launch", "status", str(path)]) == 0
    text = capsys.readouterr().out
    for expected in (
        "big: running, step 40 of 100",
        "loss 3.6000, 1,000 tokens/s",
        "time left 0:02 h",
        "last checkpoint: step 32; attempt 2, restarts: 1; skipped steps: 0",
    ):
        assert expected in text
    assert cli.main(["launch", "status", str(path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["step"] == 40


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"age": 4000.0}, "no sign of life for 4000 s"),
        ({"state": "diverged"}, "the run has diverged"),
        ({"attempts": ("start 1 job=7.0 step=0", "end 1 job=7.0 step=0 from=0 rc=1 action=give-up")}, "'give-up'"),
        ({"state": "done"}, ""),
        ({"state": "done", "age": 4000.0}, ""),
    ],
)
def test_a_watcher_names_the_problem(tmp_path, change, said, capsys, monkeypatch):
    monkeypatch.setenv("PATH", "/bin-without-slurm")
    path = make_run(tmp_path / "run", **change)
    assert said in run_status(path).problem and bool(said) == bool(run_status(path).problem)
    assert cli.main(["launch", "watch", str(path), "--once"]) == (2 if said else 0)
    assert said in capsys.readouterr().err


def test_a_status_says_who_stopped_it_and_what_was_skipped(tmp_path, capsys):
    path = make_run(tmp_path / "run")
    said = {"state": "stopped", "reason": "usr1", "checkpoint": 38, "attempt": 3, "step": 41, "num_steps": 100, "time": time.time()}
    (path / "status.json").write_text(json.dumps(said))
    with (path / "metrics.jsonl").open("a") as file:
        file.write("\n" + json.dumps({"step": 41, "loss": 3.5, "time": time.time(), "skipped": True, "skips": 7}) + "\n")
    found = run_status(path)
    assert (found.reason, found.attempt, found.checkpoint, found.skips, found.problem) == ("usr1", 3, 38, 7, "")
    assert cli.main(["launch", "status", str(path)]) == 0
    text = capsys.readouterr().out
    assert "run: stopped (usr1), step 41 of 100" in text and "last checkpoint: step 38; attempt 3" in text and "skipped steps: 7" in text


@pytest.mark.parametrize(("age", "shown"), [(0.0, True), (3600.0, False)], ids=["this attempt", "an earlier one"])
@pytest.mark.parametrize("batch", [True, False])
def test_a_hang_is_shown_in_the_attempt_that_hung(tmp_path, monkeypatch, age, shown, batch):
    monkeypatch.setenv("PATH", "/bin-without-slurm")
    start = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time.time() - 600))
    path = make_run(tmp_path / "run", attempts=(f"start 1 job=7.0 step=0 time={start}",) if batch else (), age=60)
    (path / "logs").mkdir()
    hang = path / "logs" / "hang.txt"
    hang.write_text("2026-11-21 18:00:00  rank 3 on n2 hangs: step 41, asleep for 90 s\n\nrank 0: waits\n")
    os.utime(hang, (time.time() - age, time.time() - age))
    found = run_status(path)
    assert found.problem == found.hang == ("rank 3 on n2 hangs: step 41, asleep for 90 s" if shown else "")


@pytest.mark.parametrize(
    ("state", "status_at", "shown"), [("done", -90, ""), ("stopped", -90, ""), ("running", -90, "x"), ("running", 5, "")]
)
def test_a_hang_is_no_problem_of_a_finished_run_nor_of_the_next_session(tmp_path, monkeypatch, state, status_at, shown):
    """A run may hang while it closes; one that is started again says so in its status before its first step."""
    monkeypatch.setenv("PATH", "/bin-without-slurm")
    path, hung = make_run(tmp_path / "run", age=100), time.time() - 60
    (path / "status.json").write_text(json.dumps({"state": state, "step": 40, "num_steps": 100, "time": hung + status_at}))
    (path / "logs").mkdir()
    (path / "logs" / "hang.txt").write_text("2026-11-21 18:00:00  x\n")
    os.utime(path / "logs" / "hang.txt", (hung, hung))
    found = run_status(path)
    assert found.problem == found.hang == shown


def test_a_missing_run_is_a_mistake(tmp_path):
    assert cli.main(["launch", "status", str(tmp_path / "nothing")]) == 2
    assert cli.main(["launch", "cancel", str(tmp_path / "nothing")]) == 2


def test_a_grid_has_every_combination():
    found = sweep.grid(["optim.lr=1e-3,3e-3", "model.cms.periods=[1, 2],[1, 4]", "train.seed=0"])
    assert found == [
        (f"optim.lr={lr}", f"model.cms.periods={periods}", "train.seed=0") for lr in ("1e-3", "3e-3") for periods in ("[1, 2]", "[1, 4]")
    ]
    for wrong in ("optim.lr", "optim.lr=", "optim.lr=1,", "optim.lr=1,,2"):
        with pytest.raises(ConfigError, match="key=value,value"):
            sweep.grid([wrong])
    with pytest.raises(ConfigError, match="more than 1000"):
        sweep.grid([f"{key}={','.join(map(str, range(11)))}" for key in ("a", "b", "c")])


def test_a_sweep_is_rendered_without_slurm(capsys, tmp_path, monkeypatch):
    pytest.importorskip("submitit", reason="submitit is not installed: pip install 'hope-pt[slurm]'")
    monkeypatch.setenv("HOPE_CLUSTER", "example")
    arguments = ["optim.lr=1e-3,3e-3", "train.seed=0,1", "name=lr", f"out={tmp_path}"]
    options = ["--time=2:00:00", "--parallel=2", f"--folder={tmp_path}/jobs", "--print"]
    assert cli.main(["launch", "sweep", str(ROOT / "configs/hope_tiny.toml"), *arguments, *options]) == 0
    text = capsys.readouterr().out
    for line in (
        "--array=0-3%2",
        "--partition=gpu",
        "--account=my-project",
        "--time=120",
        "--gres=gpu:1",
        "--nodes=1",
        "--job-name=hope-sweep-lr",
    ):
        assert f"#SBATCH {line}\n" in text, text
    assert "\nexport SRUN_CPUS_PER_TASK=${SRUN_CPUS_PER_TASK:-" in text and "\nsrun --unbuffered" in text and " --cpu-bind=none " in text
    assert f"# 3: hope train {ROOT}/configs/hope_tiny.toml optim.lr=3e-3 train.seed=1 name=lr-3 out={tmp_path}" in text
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_key_of_a_sweep_is_found_before_it_is_submitted(capsys):
    assert cli.main(["launch", "sweep", str(ROOT / "configs/hope_tiny.toml"), "optim.lrr=1,2", "--print"]) == 2
    assert "did you mean optim.lr" in capsys.readouterr().err


def test_data_preparation_is_a_job_too(capsys):
    pytest.importorskip("submitit", reason="submitit is not installed: pip install 'hope-pt[slurm]'")
    assert cli.main(["launch", "data", "--print", "--", "tokenize", "--out", "x"]) == 0
    assert "# 0: hope-data tokenize --out x" in capsys.readouterr().out


def test_the_plans_line_submits_the_job_with_its_clusters_file(capsys, tmp_path):
    words = ["hope_760m", "--cluster", "example", f"out={tmp_path}", "name=x"]
    assert cli.main(["launch", "plan", *words]) == 0
    line = capsys.readouterr().out.splitlines()[-1]
    assert (
        line.startswith("the fastest: HOPE_CLUSTER=example sbatch ")
        and "--job-name=hope-x" in line
        and f"--output={tmp_path}/x/logs" in line
    )
    assert "engine." in line.partition("hope_760m.sh")[2] and list(tmp_path.iterdir()) == []
