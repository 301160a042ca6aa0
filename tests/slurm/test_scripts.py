"""The shell half without a cluster: the decision as a table, the record of attempts, containers as rendered lines, shellcheck."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from hope_pt.errors import ConfigError
from hope_pt.launch.cluster import Cluster, read_cluster
from hope_pt.launch.render import make_job, srun_line

ROOT = Path(__file__).resolve().parents[2]
LIB = ROOT / "slurm" / "lib"
SCRIPTS = sorted([*(ROOT / "slurm").glob("*.sh"), *LIB.glob("*.sh"), *(ROOT / "tools" / "onebox_slurm").glob("*.sh")])


def bash(text: str, *arguments: str, **environment: str) -> str:
    done = subprocess.run(["bash", "-c", text, "test", *arguments], env=os.environ | environment, capture_output=True, text=True)
    return done.stdout.strip() + done.stderr.strip()


# rc, verdict, state, reason, job state, fruitless attempts -> action, exit code of the job
TABLE = [
    ((0, "", "done", "", "RUNNING", 0), "done", 0),
    ((0, "", "", "", "RUNNING", 1), "requeue", 1),  # nothing was written where this script reads: that proves no end
    ((0, "", "done", "", "COMPLETING", 0), "done", 0),
    ((0, "", "done", "", "PREEMPTED", 0), "done", 0),
    ((0, "", "stopped", "usr1", "RUNNING", 0), "requeue", 1),
    ((143, "", "stopped", "usr1", "RUNNING", 0), "requeue", 1),
    ((0, "", "stopped", "usr1", "RUNNING", 3), "give-up", 93),  # every attempt is over before its first step
    ((0, "", "stopped", "term", "RUNNING", 0), "stopped", 0),
    ((0, "", "stopped", "stop", "RUNNING", 0), "stopped", 0),
    ((143, "", "stopped", "term", "RUNNING", 0), "requeue", 1),  # srun sends SIGTERM when one rank has failed
    ((0, "", "stopped", "term", "PREEMPTED", 0), "preempted", 1),
    ((143, "", "running", "", "PREEMPTED", 3), "preempted", 1),  # preemption is not the run's fault
    ((143, "", "running", "", "COMPLETING", 0), "leave", 1),
    ((143, "", "stopped", "term", "CANCELLED", 0), "leave", 1),
    ((143, "2", "failed", "", "CANCELLED", 0), "leave", 1),
    ((0, "", "stopped", "usr1", "TIMEOUT", 0), "requeue", 1),
    ((0, "", "stopped", "term", "TIMEOUT", 0), "requeue", 1),  # Slurm's own SIGTERM, nobody's wish
    ((143, "", "running", "", "TIMEOUT", 3), "give-up", 93),
    ((1, "", "running", "", "", 0), "leave", 1),  # the scheduler does not answer: no proof that the job was not cancelled
    ((143, "2", "", "", "RUNNING", 0), "user", 2),
    ((2, "", "", "", "RUNNING", 1), "user", 2),  # a rank that does not see the run's directory
    ((2, "", "running", "", "RUNNING", 1), "requeue", 1),
    ((143, "93", "diverged", "", "RUNNING", 0), "never", 93),
    ((143, "", "diverged", "", "RUNNING", 0), "never", 93),
    ((137, "", "running", "", "RUNNING", 2), "requeue", 1),
    ((137, "", "running", "", "RUNNING", 3), "give-up", 93),
    ((1, "", "failed", "", "RUNNING", 1), "requeue", 1),
]


@pytest.mark.parametrize(
    ("facts", "action", "code"), TABLE, ids=lambda value: "-".join(map(str, value)) if isinstance(value, tuple) else None
)
def test_the_decision(facts, action, code):
    text = f'. {LIB}/decide.sh; hope_decide "$@"'
    assert bash(text, *map(str, facts)) == action
    assert bash(f". {LIB}/decide.sh; hope_exit_code {action}") == str(code)
    assert bash(f". {LIB}/decide.sh; hope_say {action} X")


def record(path: Path, lines: list[str], *, committed: int, start: int, lineage: str = "7") -> str:
    (path / "slurm").mkdir()
    (path / "slurm" / "attempts").write_text("".join(line + "\n" for line in lines))
    (path / "checkpoints" / f"step-{committed:08d}").mkdir(parents=True)
    (path / "checkpoints" / ".tmp-step-00000999").mkdir()
    settings = {"HOPE_RUN_DIR": str(path), "HOPE_LINEAGE": lineage, "HOPE_FROM": str(start), "HOPE_ATTEMPT": "9"}
    return bash(f". {LIB}/attempts.sh; hope_fruitless; hope_committed; hope_next_attempt", **settings)


@pytest.mark.parametrize(
    ("ends", "committed", "start", "fruitless"),
    [
        ([], 0, 0, 1),
        ([], 8, 4, 0),
        (["8 from=8", "8 from=8"], 8, 8, 3),
        (["4 from=4", "8 from=4"], 8, 8, 1),  # the attempt before this one has advanced
        (["8 from=8", "8 from=8"], 16, 8, 0),
        (["8 from=8 rc=0 action=leave", "8 from=8"], 8, 8, 2),  # a cancellation or requeue by others counts for nothing
        (["8 from=8 rc=3 action=exclude bad=n2", "8 from=8 rc=143 action=preempted", "8 from=8"], 8, 8, 2),
    ],
)
def test_attempts_without_progress_are_counted(tmp_path, ends, committed, start, fruitless):
    lines = [f"end {n} job=7.{n} step={end}{'' if 'action' in end else ' rc=1 action=requeue'} time=x" for n, end in enumerate(ends)]
    other = ["end 1 job=6.0 step=8 from=8 rc=1 action=requeue time=x", "end 1 job=77.0 step=8 from=8 rc=1 action=requeue time=x"]
    assert record(tmp_path, [*other, *lines], committed=committed, start=start).split() == [str(fruitless), str(committed), "1"]


@pytest.mark.parametrize(
    ("lines", "vanished"),
    [
        (["start 1 job=7.0 step=8"], 0),
        (["start 1 job=7.0 step=8", "start 2 job=7.1 step=8", "start 3 job=7.2 step=8"], 2),
        (["start 1 job=7.0 step=0", "start 2 job=7.1 step=8", "start 3 job=7.2 step=8"], 1),
        (["start 1 job=7.0 step=8", "end 1 job=7.0 step=8 from=8", "start 2 job=7.1 step=8", "start 3 job=7.2 step=8"], 1),
        (["start 1 job=6.0 step=8", "start 2 job=77.0 step=8", "start 3 job=7.0 step=8"], 0),
    ],
)
def test_attempts_that_left_no_end_are_counted(tmp_path, lines, vanished):
    (tmp_path / "slurm").mkdir()
    (tmp_path / "slurm" / "attempts").write_text("".join(f"{line} nodes=n1 time=x\n" for line in lines))
    settings = {"HOPE_RUN_DIR": str(tmp_path), "HOPE_LINEAGE": "7", "HOPE_FROM": "8"}
    assert bash(f". {LIB}/attempts.sh; hope_vanished", **settings) == str(vanished)


def take(path: Path, job: str, *, slow: float = 0.0) -> subprocess.Popen:
    """A shell that takes the run as `job`; jobs below 20 still exist, and squeue needs `slow` seconds to say so."""
    text = f". {LIB}/attempts.sh; hope_job_exists() {{ sleep {slow}; [ $1 -lt 20 ]; }}; hope_own && echo has it"
    environment = os.environ | {"HOPE_RUN_DIR": str(path), "HOPE_RUN": "x", "HOPE_JOB": job}
    return subprocess.Popen(["bash", "-c", text], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize("slow", [(0.0, 0.3), (0.3, 0.0), (0.1, 0.1)])
def test_of_two_jobs_that_find_a_dead_owner_one_gets_the_run(tmp_path, slow):
    folder = tmp_path / "slurm"
    folder.mkdir()
    (folder / "owner").write_text("99\n")
    shells = [take(tmp_path, str(11 + number), slow=seconds) for number, seconds in enumerate(slow)]
    said = [shell.communicate() for shell in shells]
    winners = [number for number, (out, _) in enumerate(said) if "has it" in out]
    assert len(winners) == 1 and (folder / "owner").read_text() == f"{11 + winners[0]}\n", said
    assert f"belongs to job {11 + winners[0]}" in said[1 - winners[0]][1]
    assert sorted(path.name for path in folder.iterdir()) == ["owner"]


def test_a_run_whose_next_owner_died_while_it_took_over_can_be_taken(tmp_path):
    folder = tmp_path / "slurm"
    folder.mkdir()
    (folder / "owner").write_text("98\n")
    (folder / "owner.after-98").write_text("99\n")
    assert "has it" in take(tmp_path, "11").communicate()[0] and (folder / "owner").read_text() == "11\n"
    assert sorted(path.name for path in folder.iterdir()) == ["owner"]
    (folder / "owner.after-11").write_text("12\n")
    assert "belongs to job 12" in take(tmp_path, "13").communicate()[1], "a job that takes over has the run already"


@pytest.mark.parametrize(
    "left",
    [
        {"owner": ""},
        {"owner": "98\n", "owner.after-98": "11\n"},
        {"owner": "98\n", "owner.after-98": ""},
        {"owner": "97\n", "owner.after-11": "96\n"},
        {"owner": "11\n", "owner.after-11": "96\n"},
    ],
    ids=["an empty owner", "it died while it took over", "another did, without power", "it had been followed once", "it was requeued"],
)
def test_what_jobs_that_died_have_left_is_no_obstacle(tmp_path, left):
    folder = tmp_path / "slurm"
    folder.mkdir()
    for name, text in left.items():
        (folder / name).write_text(text)
    out, said = take(tmp_path, "11").communicate()
    assert "has it" in out and (folder / "owner").read_text() == "11\n", said
    assert sorted(path.name for path in folder.iterdir()) == ["owner"]


def test_a_full_disk_is_named_before_anything_is_started(tmp_path):
    (tmp_path / "slurm").write_text("no directory")
    assert "make room, or set out= to another place" in take(tmp_path, "11").communicate()[1]


def fake_scontrol(folder: Path, text: str) -> dict[str, str]:
    """A scontrol in the PATH of the test that does as `text`; `n` counts its calls."""
    script = folder / "scontrol"
    script.write_text(f"#!/bin/bash\nn=$(($(cat {folder}/n 2> /dev/null) + 1)); echo $n > {folder}/n\n{text}\n")
    script.chmod(0o755)
    return {"PATH": f"{folder}:{os.environ['PATH']}", "HOPE_JOB": "7"}


@pytest.mark.parametrize(
    ("text", "state"),
    [
        ("echo '   JobState=RUNNING Reason=None'; echo '   PreemptEligibleTime=x PreemptTime=None'", "RUNNING"),
        ("echo '   JobState=RUNNING Reason=None'; echo '   PreemptEligibleTime=x PreemptTime=2026-11-21T23:06:27'", "PREEMPTED"),
        ("echo '   JobState=COMPLETING Reason=TimeLimit Dependency=(null)'", "TIMEOUT"),
        ("echo '   JobState=COMPLETING Reason=None Dependency=(null)'", "COMPLETING"),
        (
            '[ $n -gt 2 ] && echo "   JobState=RUNNING Reason=None" || { echo "error: Unable to contact slurm controller" >&2; exit 1; }',
            "RUNNING",
        ),
        ('[ $n -gt 1 ] && echo "   JobState=RUNNING Reason=None" || kill -TERM $$', "RUNNING"),
    ],
)
def test_the_state_of_a_job_is_asked_until_slurm_answers(tmp_path, text, state):
    assert bash(f". {LIB}/run.sh; hope_job_state", **fake_scontrol(tmp_path, text)) == state


@pytest.mark.parametrize(
    ("state", "requeue"), [("RUNNING Reason=None", "requeue incomplete 7"), ("COMPLETING Reason=TimeLimit Dependency", "requeue 7")]
)
def test_only_a_job_that_met_its_limit_is_requeued_whatever_its_state(tmp_path, state, requeue):
    settings = fake_scontrol(tmp_path, f'echo "$*" >> {tmp_path}/said; echo "   JobState={state} "')
    bash(f". {LIB}/run.sh; sleep() {{ :; }}; hope_requeue", **settings)
    assert (tmp_path / "said").read_text().splitlines()[-1] == requeue


@pytest.mark.parametrize(("state", "done"), [("PENDING", True), ("RUNNING", False), ("CANCELLED", False)])
def test_a_refusal_after_slurm_has_requeued_the_job_is_none(tmp_path, state, done):
    text = f'[ $1 = show ] && echo "   JobState={state} Reason=None" || {{ echo "Requested operation is presently disabled"; exit 1; }}'
    said = bash(f". {LIB}/run.sh; sleep() {{ :; }}; hope_requeue || echo refused", **fake_scontrol(tmp_path, text))
    assert ("refused" in said) != done and "presently disabled" in said


@pytest.mark.parametrize(
    ("gpus", "seen", "tasks", "said"),
    [("2", "0,1", "3", "ask for one GPU a task"), ("", "", "2(x2)", "GPU none of ''"), ("2", "0,1", "2(x2)", "GPU 1 of '0,1'")],
)
def test_the_binding_is_asserted_where_slurm_gave_gpus(tmp_path, gpus, seen, tasks, said):
    (tmp_path / "slurm").mkdir()
    settings = {"SLURM_PROCID": "1", "SLURM_NTASKS": "3", "SLURM_LOCALID": "1", "SLURM_TASKS_PER_NODE": tasks}
    settings |= {"CUDA_VISIBLE_DEVICES": seen, "SLURM_GPUS_ON_NODE": gpus, "HOPE_RUN_DIR": str(tmp_path)}
    assert said in bash(f"{LIB}/task.sh true", **settings)
    assert (tmp_path / "slurm" / "verdict").is_symlink() == said.startswith("ask")
    assert "does not see" in bash(f"{LIB}/task.sh true", **settings | {"HOPE_RUN_DIR": str(tmp_path / "other")})


def test_the_cores_of_a_task_reach_its_step():
    text = f". {LIB}/env.sh; hope_defaults; echo ${{SRUN_CPUS_PER_TASK:-none}}"
    assert bash(text, SLURM_CPUS_PER_TASK="8") == "8" and bash(text) == "none"


def test_a_controller_that_stays_away_is_said(tmp_path):
    settings = fake_scontrol(tmp_path, 'echo "error: Unable to contact slurm controller" >&2; exit 1')
    said = bash(f". {LIB}/run.sh; hope_job_state", **settings, HOPE_CONTROLLER_S="1")
    assert said == "hope: scontrol show job 7: error: Unable to contact slurm controller"


def arguments(*words: str, **environment: str) -> list[str]:
    text = f'. {LIB}/run.sh; hope_arguments "$@" && printf "%s\n" "$HOPE_RUN_DIR" "${{HOPE_MAX_FRUITLESS:-3}}"'
    return bash(text, "configs/hope_1p3b.toml", *words, **environment).splitlines()


def test_a_cluster_file_says_where_runs_lie_and_how_often_they_are_tried(tmp_path):
    file = tmp_path / "site.env"
    file.write_text("HOPE_OUT=/scratch/me\nHOPE_MAX_FRUITLESS=7\n")
    assert arguments(HOPE_CLUSTER=str(file)) == ["/scratch/me/hope_1p3b", "7"]
    assert arguments("out=/other", "name=x", HOPE_CLUSTER=str(file)) == ["/other/x", "7"]
    assert arguments() == [f"{ROOT}/runs/hope_1p3b", "3"]


def test_checkpoints_on_another_disk_count(tmp_path):
    (tmp_path / "disk" / "step-00000007").mkdir(parents=True)
    (tmp_path / "checkpoints").symlink_to(tmp_path / "disk")
    assert bash(f". {LIB}/attempts.sh; hope_committed", HOPE_RUN_DIR=str(tmp_path)) == "7"


def job(**values: str):
    return make_job(Path("hope_1p3b"), config="", options=[], arguments=[], cluster=Cluster("test", values))


def test_the_srun_line_without_a_container():
    line = srun_line(
        job(HOPE_COMMAND="hope"), arguments=["configs/hope_1p3b.toml", "data.path=a b"], environment={"PATH": os.environ["PATH"]}
    )
    assert line == (f"srun --kill-on-bad-exit=1 --label --unbuffered {LIB}/task.sh hope train configs/hope_1p3b.toml data.path=a\\ b")


def test_the_srun_line_with_pyxis():
    values = {"HOPE_CONTAINER": "pyxis", "HOPE_IMAGE": "nvcr.io#nvidia/pytorch:25.09-py3", "HOPE_MOUNTS": "/scratch:/scratch"}
    words = srun_line(job(**values, HOPE_SRUN_OPTIONS="--mpi=none"), arguments=["c.toml"]).split()
    assert words == [
        *("srun", "--kill-on-bad-exit=1", "--label", "--unbuffered", "--mpi=none"),
        "--container-image=nvcr.io#nvidia/pytorch:25.09-py3",
        f"--container-mounts=/scratch:/scratch\\,{ROOT}:{ROOT}",
        f"--container-workdir={ROOT}",
        "--no-container-entrypoint",
        *(f"{LIB}/task.sh", "hope", "train", "c.toml"),
    ]


def test_a_container_sees_the_folder_of_the_run():
    values = {"HOPE_CONTAINER": "apptainer", "HOPE_IMAGE": "/hope.sif", "HOPE_MOUNTS": "/scratch:/scratch:ro"}
    both = f"/scratch:/scratch:ro,{ROOT}:{ROOT}"
    for run, mounts in (("/scratch/me/x", f"{both},/scratch/me:/scratch/me"), (f"{ROOT}/runs/x", both)):
        line = srun_line(job(**values), arguments=["c.toml"], environment=os.environ | {"HOPE_RUN_DIR": run})
        assert f" --bind {mounts} ".replace(",", "\\,") in line


def test_the_job_finds_its_library_whatever_its_arguments_are():
    line = "   Command=/my place/slurm/hope_1p3b.sh data.path=/data/tiny.shakespeare a.sh b=/slurm/x.sh"
    text = next(part for part in (ROOT / "slurm" / "hope_1p3b.sh").read_text().split("'") if "Command=" in part)
    for said in (line, line.partition(" data")[0]):
        done = subprocess.run(["sed", "-n", text], input=f"JobId=7\n{said}\n   WorkDir=/\n", capture_output=True, text=True, check=True)
        assert done.stdout == "/my place/slurm/hope_1p3b.sh\n"


@pytest.mark.parametrize("gpus", ["8", "0"])
def test_the_srun_line_with_apptainer(gpus):
    values = {"HOPE_CONTAINER": "apptainer", "HOPE_IMAGE": "/images/hope.sif", "HOPE_GPUS_PER_NODE": gpus}
    words = srun_line(job(**values), arguments=["c.toml"]).split()
    assert words == [
        *("srun", "--kill-on-bad-exit=1", "--label", "--unbuffered"),
        *("apptainer", "exec", "--bind", f"{ROOT}:{ROOT}", "--pwd", str(ROOT)),
        *(["--nv"] if gpus == "8" else []),
        *("/images/hope.sif", f"{LIB}/task.sh", "hope", "train", "c.toml"),
    ]


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"HOPE_CONTAINER": "docker", "HOPE_IMAGE": "x"}, "expected none, pyxis or apptainer"),
        ({"HOPE_CONTAINER": "pyxis"}, "without HOPE_IMAGE"),
    ],
)
def test_a_wrong_container_is_refused_by_both_readers(values, said):
    with pytest.raises(ConfigError, match=said):
        srun_line(job(**values), arguments=["c.toml"])
    assert said in " ".join(Cluster("test", values).problems())


def test_both_readers_of_a_cluster_file_agree(tmp_path):
    file = tmp_path / "site.env"
    file.write_text("# a comment\n\nHOPE_SRUN_OPTIONS=--mpi=none --cpu-bind=none\nNCCL_IB_HCA=mlx5_0:1,mlx5_1:1\nHOPE_GPUS_PER_NODE=4\n")
    keys = ("HOPE_SRUN_OPTIONS", "NCCL_IB_HCA", "HOPE_GPUS_PER_NODE")
    text = f". {LIB}/env.sh; hope_cluster {file}; printf '%s\\n' " + " ".join(f'"${key}"' for key in keys)
    seen = bash(text, HOPE_ROOT=str(ROOT), HOPE_GPUS_PER_NODE="2").splitlines()
    assert seen == ["--mpi=none --cpu-bind=none", "mlx5_0:1,mlx5_1:1", "2"], "what the environment has wins"
    values = read_cluster(str(file), {"HOPE_GPUS_PER_NODE": "2"}).values
    assert [values[key] for key in keys] == seen
    file.write_text("export NCCL_IB_HCA=1\n")
    assert "expected KEY=value" in bash(text, HOPE_ROOT=str(ROOT))
    with pytest.raises(ConfigError, match="expected KEY=value"):
        read_cluster(str(file), {})


@pytest.mark.parametrize("name", ["example", "onebox"])
def test_shipped_cluster_files_are_right(name):
    assert read_cluster(name, {}).problems() == []


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_shellcheck(script):
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed: apt-get install shellcheck")
    done = subprocess.run(["shellcheck", "-x", str(script)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_the_virtual_cluster_says_what_is_missing(tmp_path):
    start = ROOT / "tools" / "onebox_slurm" / "start.sh"
    done = subprocess.run(
        ["/bin/bash", str(start), "--dir", str(tmp_path / "c")], env={"PATH": str(tmp_path)}, capture_output=True, text=True
    )
    assert done.returncode == 77 and "apt-get install" in done.stderr and "slurmctld" in done.stderr
    assert not (tmp_path / "c").exists()


def test_a_job_script_outside_slurm_says_so(tmp_path):
    done = subprocess.run([str(ROOT / "slurm" / "hope_1p3b.sh"), "wrong"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and "expected key=value" in done.stderr
    for word, said in (("--nodes=8", "options of sbatch stand before the script"), ("--config", "needs a FILE")):
        done = subprocess.run([str(ROOT / "slurm" / "hope_1p3b.sh"), word], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 2 and said in done.stderr
    environment = {key: value for key, value in os.environ.items() if not key.startswith("SLURM_")}
    done = subprocess.run([str(ROOT / "slurm" / "hope_1p3b.sh"), f"out={tmp_path}"], env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and "submit it with sbatch" in done.stderr and list(tmp_path.iterdir()) == []


def test_a_batch_script_checks_itself_on_a_login_node(tmp_path):
    """`bash slurm/hope_760m.sh --dry-run key=value` is the dry run of that script with those arguments."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM_", "HOPE_"))}
    words = ["--dry-run", "--config", "configs/hope_tiny.toml", "data.source=mqar", "optim.lrr=1", f"out={tmp_path}"]
    done = subprocess.run(["bash", "slurm/hope_760m.sh", *words], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and "did you mean optim.lr" in done.stdout, done.stdout + done.stderr
    assert list(tmp_path.iterdir()) == []
