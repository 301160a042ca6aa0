"""`hope launch watch` about runs that are dead: steps are missing, and no job has the run or will have it."""

import json
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from hope_pt import cli
from hope_pt.cli import launch as command
from hope_pt.errors import HopeError
from hope_pt.launch.watch import jobs_of, run_status

DEAD = "missing and no job has the run"


@pytest.fixture
def queue(tmp_path, monkeypatch):
    """Sets what squeue knows: states of jobs by id or name; None: it does not answer, "": there is no squeue."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))

    def answer(known: dict[str, str] | None) -> None:
        cases = "".join(f'*"--jobs={job}"*) echo {state};;\n*"--name={job}"*) echo 9;;\n' for job, state in (known or {}).items())
        unknown = '*--jobs=*) echo "slurm_load_jobs error: Invalid job id specified" >&2; exit 1;;\n'
        body = f'case "$*" in\n{cases}{unknown}esac\n' if known is not None else 'echo "Unable to contact slurm controller" >&2; exit 1\n'
        (folder / "squeue").write_text(f"#!/bin/sh\n{body}")
        (folder / "squeue").chmod(0o755)

    return answer


def make_run(path: Path, *, state: str = "", reason: str = "", age: float = 0.0, end: str = "", owner: str = "7", job: str = "7") -> Path:
    """A run of 100 steps with a checkpoint at 32, whose last job started `age` seconds ago; without a `state` it wrote no status."""
    now = time.time() - age
    (path / "slurm").mkdir(parents=True)
    (path / "checkpoints" / "step-00000032").mkdir(parents=True)
    stamp = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(now))
    lines = [
        f"start 1 job={job}.0 step=32 time={stamp}",
        *([f"end 1 job={job}.0 step=32 from=32 rc=1 action={end} time={stamp}"] if end else []),
    ]
    (path / "slurm" / "attempts").write_text("".join(f"{line}\n" for line in lines))
    if owner:
        (path / "slurm" / "owner").write_text(f"{owner}\n")
    if state:
        said = {"state": state, "reason": reason, "step": 40, "num_steps": 100, "checkpoint": 32, "time": now}
        (path / "status.json").write_text(json.dumps(said))
    return path


@pytest.mark.parametrize(
    "ended",
    [
        {"state": "stopped", "reason": "usr1", "end": "requeue", "owner": ""},
        {"state": "stopped", "reason": "term", "end": "preempted", "owner": ""},
        {"end": "leave", "owner": ""},
        {"age": 600.0},
        {"state": "running"},
    ],
    ids=["a requeue was refused", "one after a preemption", "ended while it started", "its batch node was lost", "killed"],
)
def test_a_dead_run_is_a_problem(tmp_path, queue, ended, capsys):
    queue({})
    path = make_run(tmp_path / "run", **ended)
    found = run_status(path)
    assert DEAD in found.problem and (found.problem.startswith("68 steps") == bool(found.num_steps))
    assert cli.main(["launch", "watch", str(path), "--once"]) == 2
    assert DEAD in capsys.readouterr().err


@pytest.mark.parametrize("action", ["give-up", "never", "nodes", "user", "vanished"])
def test_a_decision_against_another_start_is_named(tmp_path, queue, action):
    queue({})
    assert f"ended with '{action}'" in run_status(make_run(tmp_path / "run", end=action, owner="")).problem


@pytest.mark.parametrize("known", [None, {"7": "RUNNING"}, {"7": "PENDING"}, {"hope-run": "PENDING"}], ids=str)
def test_a_run_that_a_job_may_have_is_not_called_dead(tmp_path, queue, known):
    queue(known)
    assert run_status(make_run(tmp_path / "run", state="stopped", reason="usr1", end="requeue")).problem == ""


def test_the_next_link_of_a_chain_has_the_run(tmp_path, queue):
    queue({"hope-chain-x": "PENDING"})
    assert run_status(make_run(tmp_path / "run", state="stopped", reason="usr1", owner="", end="requeue", job="hope-chain-x")).problem == ""


def test_without_slurm_nobody_knows(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "/bin-without-slurm")
    path = make_run(tmp_path / "run", state="stopped", reason="usr1", end="requeue")
    assert run_status(path).problem == ""
    with pytest.raises(HopeError, match="squeue is not installed"):
        jobs_of(path)


def test_a_folder_without_a_run_is_a_problem_unless_its_job_waits(tmp_path, queue):
    (tmp_path / "run").mkdir()
    for known, problem in (({}, "no run has begun here, and no job of that name waits"), ({"hope-run": "PENDING"}, ""), (None, "")):
        queue(known)
        assert run_status(tmp_path / "run").problem == problem


def test_a_scheduler_that_does_not_answer_is_no_empty_queue(tmp_path, queue):
    queue(None)
    with pytest.raises(HopeError, match="squeue refused: Unable to contact"):
        jobs_of(make_run(tmp_path / "run"))


@pytest.mark.parametrize(("job", "said"), [("RUNNING", "no sign of life"), ("PENDING", "")])
@pytest.mark.parametrize("state", ["", "running"])
def test_a_start_that_hangs_is_found_and_a_job_that_waits_is_not_one(tmp_path, queue, state, job, said):
    queue({"7": job})
    assert run_status(make_run(tmp_path / "run", state=state, age=4000)).problem.partition(" for ")[0] == said


@pytest.mark.parametrize(
    ("state", "reason", "end", "known", "over", "problem"),
    [
        ("done", "", "done", {}, True, ""),
        ("stopped", "stop", "stopped", {}, True, ""),
        ("stopped", "term", "leave", {}, True, ""),
        ("stopped", "term", "", {}, True, ""),
        ("stopped", "term", "preempted", {"7": "PENDING"}, False, ""),
        ("stopped", "term", "leave", {"7": "PENDING"}, False, ""),  # an administrator has requeued it
        ("stopped", "usr1", "requeue", {"7": "PENDING"}, False, ""),
        ("diverged", "", "", {"7": "RUNNING"}, True, "the run has diverged"),
        ("failed", "", "", {}, True, "the run has failed"),
        ("failed", "", "requeue", {"7": "PENDING"}, False, ""),
        ("failed", "", "requeue", {"hope-chain-x": "PENDING"}, False, ""),
        ("failed", "", "requeue", None, False, ""),
    ],
)
def test_watching_ends_with_the_run(tmp_path, queue, monkeypatch, capsys, state, reason, end, known, over, problem):
    queue(known)
    chain = {"job": "hope-chain-x", "owner": ""} if "hope-chain-x" in (known or {}) else {}
    path = make_run(tmp_path / "run", state=state, reason=reason, end=end, **chain)
    found = run_status(path)
    assert (found.over, found.problem) == (over, problem)
    if over:
        monkeypatch.setattr(command, "time", SimpleNamespace(sleep=lambda seconds: pytest.fail("looks again")))
        assert cli.main(["launch", "watch", str(path)]) == (2 if problem else 0)
