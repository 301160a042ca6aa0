"""What a cluster's file says reaches every job: where runs lie, what a container sees, the small jobs of submitit, the environment."""

import os
import stat
from pathlib import Path

import pytest

from hope_pt import cli
from hope_pt.launch import checks
from hope_pt.launch.cluster import KEYS, ROOT, Cluster, read_cluster
from hope_pt.launch.render import Job, make_job
from hope_pt.launch.submit import submission
from hope_pt.launch.sweep import Command, on_cluster

TINY = "configs/hope_tiny.toml"


@pytest.fixture(autouse=True)
def _clean(monkeypatch):
    for name in [name for name in os.environ if name.startswith("HOPE_")]:
        monkeypatch.delenv(name)


def job(*arguments: str, options: tuple[str, ...] = (), **values: str) -> Job:
    return make_job(Path("hope_1p3b"), config=TINY, options=options, arguments=arguments, cluster=Cluster("mine", values))


def test_runs_lie_where_the_cluster_says(tmp_path):
    file = tmp_path / "mine.env"
    file.write_text(f"HOPE_OUT={tmp_path}/scratch\n")
    made = make_job(Path("hope_1p3b"), config=TINY, options=(), arguments=("name=try2",), cluster=read_cluster(str(file), {}))
    config = checks.resolve(made)
    assert Path(config.out) / config.name == tmp_path / "scratch" / "try2"
    command, environment = submission(made, run=config.name, out=config.out)
    assert f"--output={tmp_path}/scratch/try2/logs/slurm-%j.log" in command and environment == {"HOPE_CLUSTER": str(file)}
    assert not [word for word in command if word.startswith("out=")], "the script takes HOPE_OUT from the same file"


@pytest.mark.parametrize(
    ("given", "values", "expected"),
    [
        ((), {}, str(ROOT / "runs")),
        ((), {"HOPE_OUT": "there"}, str(ROOT / "there")),
        (("out=/here",), {"HOPE_OUT": "/there"}, "/here"),
    ],
)
def test_an_argument_wins_over_the_cluster_and_the_cluster_over_the_configuration(given, values, expected):
    assert checks.resolve(job(*given, **values)).out == expected


@pytest.mark.parametrize(
    ("path", "mounts", "seen"),
    [
        ("data/tiny", "", True),
        ("/lustre/data", "", False),
        ("/lustre/data", "/lustre:/lustre", True),
        ("/lustre/data", "/a:/b,/vol/lustre:/lustre:ro", True),
        ("/lustre/data", "/lustre:/mnt", False),
        ("/lustre2/data", "/lustre:/lustre", False),
        ("/home/me/runs/big/data", "", True),
    ],
)
def test_a_container_must_have_the_data(path, mounts, seen):
    values = {"HOPE_IMAGE": "x.sqsh", "HOPE_MOUNTS": mounts}
    config = checks.resolve(job("out=/home/me/runs", f"data.path={path}", "data.source=shards", HOPE_CONTAINER="pyxis", **values))
    found = checks._mounts(config, job(HOPE_CONTAINER="pyxis", **values))
    assert bool(found) != seen and all("data.path" in one and "HOPE_MOUNTS" in one for one in found)
    assert checks._mounts(config, job(**values)) == []


def test_a_link_out_of_what_is_mounted_is_found(tmp_path):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "data").symlink_to(tmp_path)
    here = {"HOPE_CONTAINER": "apptainer", "HOPE_IMAGE": "x.sif"}
    config = checks.resolve(job(f"out={tmp_path}/runs", f"data.path={tmp_path}/runs/data"))
    assert len(checks._mounts(config, job(**here))) == 1
    assert checks._mounts(config, job(**here, HOPE_MOUNTS=f"{tmp_path}:{tmp_path}")) == []


def test_a_dry_run_says_what_the_container_has_not(capsys, tmp_path):
    file = tmp_path / "mine.env"
    file.write_text("HOPE_CONTAINER=pyxis\nHOPE_IMAGE=x.sqsh\n")
    arguments = ["--config", TINY, f"--cluster={file}", f"data.path={tmp_path}", f"out={tmp_path}/runs"]
    assert cli.main(["launch", "dry-run", "hope_1p3b", *arguments]) == 2
    assert f"violation: data.path = '{tmp_path}' is neither in the repository nor below a target of HOPE_MOUNTS" in capsys.readouterr().out


def test_a_job_takes_the_environment_along_unless_somebody_says_otherwise():
    assert job().sbatch("--parsable")[:3] == ["sbatch", "--parsable", "--export=ALL"]
    assert "--export=ALL" not in job(options=("--export=NIL",)).sbatch()
    assert "--export=ALL" not in job(HOPE_SBATCH_OPTIONS="--export NONE").sbatch()


@pytest.mark.parametrize("key", ["HOPE_REQUEUE", "HOPE_CONTROLLER_S", "HOPE_MAX_FRUITLESS"])
def test_what_the_batch_scripts_ask_of_a_site_is_a_known_key(key):
    assert key in KEYS and Cluster("mine", {key: "0"}).problems() == []


def printed(capsys, *arguments: str) -> str:
    pytest.importorskip("submitit", reason="submitit is not installed: pip install 'hope-pt[slurm]'")
    assert cli.main(["launch", *arguments]) == 0
    return capsys.readouterr().out


def test_a_sweep_is_what_the_cluster_says(capsys, tmp_path, monkeypatch):
    file = tmp_path / "mine.env"
    file.write_text("HOPE_SBATCH_OPTIONS=--partition=gpu --time=60\nHOPE_OUT=/scratch/runs\nNCCL_IB_HCA=mlx5\n")
    monkeypatch.chdir(tmp_path)
    text = printed(capsys, "sweep", TINY, "optim.lr=1e-3,3e-3", "name=lr", f"--cluster={file}", "--print", "--time=30")
    assert f"# 1: hope train {ROOT}/{TINY} optim.lr=3e-3 name=lr-1 out=/scratch/runs" in text
    assert f"# in {ROOT} with HOPE_OUT=/scratch/runs" in text and "NCCL_IB_HCA=mlx5" in text
    for line in ("--export=ALL", "--partition=gpu", "--gres=gpu:1", "--time=30"):
        assert f"#SBATCH {line}\n" in text, text
    assert f"#SBATCH --output={ROOT}/runs/.submitit/" in text
    assert "out=/here" in printed(capsys, "sweep", TINY, "out=/here", f"--cluster={file}", "--print")


def test_a_sites_default_does_not_take_the_environment_from_small_jobs(tmp_path, capsys, monkeypatch):
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("sbatch", "srun"):
        (folder / name).write_text(f'#!/bin/sh\necho "$SBATCH_EXPORT." > {tmp_path}/export\necho "Submitted batch job 12"\n')
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.setenv("SBATCH_EXPORT", "NONE")
    assert "1 jobs: 12 to 12" in printed(capsys, "data", f"--folder={tmp_path}/jobs", "--", "tokenize")
    assert (tmp_path / "export").read_text() == ".\n"


def test_data_need_no_gpu(capsys):
    text = printed(capsys, "data", "--print", "--tasks-per-node=2", "--", "tokenize")
    assert "gpu" not in text and "#SBATCH --ntasks-per-node=2" in text
    assert "#SBATCH --gres=gpu:1" in printed(capsys, "data", "--print", "--sbatch=--gres=gpu:1", "--", "tokenize")


@pytest.mark.parametrize("action", [("sweep", TINY, "train.seed=0,1"), ("data", "tokenize")])
def test_a_container_is_refused_where_none_would_start(action, capsys, monkeypatch):
    monkeypatch.setenv("HOPE_CONTAINER", "pyxis")
    monkeypatch.setenv("HOPE_IMAGE", "x.sqsh")
    assert cli.main(["launch", *action, "--print"]) == 2
    said = capsys.readouterr().err
    assert "HOPE_CONTAINER = 'pyxis'" in said and "slurm/sweep.sh or slurm/eval.sh" in said


def test_a_small_job_runs_the_clusters_command_with_its_variables_in_the_repository(tmp_path, monkeypatch):
    program = tmp_path / "hope"
    program.write_text(f'#!/bin/sh\necho "$PWD $1 $NCCL_IB_HCA $NCCL_SOCKET_IFNAME" > {tmp_path}/said\n')
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NCCL_IB_HCA", "of the job")
    values = {"HOPE_COMMAND": str(program), "NCCL_IB_HCA": "mlx5", "NCCL_SOCKET_IFNAME": "ib0"}
    (command,) = on_cluster([Command(("train",))], cluster=Cluster("mine", values))
    command()
    assert (tmp_path / "said").read_text() == f"{ROOT} train of the job ib0\n"
