"""`hope launch dry-run`: seeded mistakes, each found, together where there are several, in seconds and without a GPU."""

import json
import os
import time
from pathlib import Path

import pytest

from hope_pt import cli
from hope_pt.launch import checks
from hope_pt.launch.render import minutes, parse_options

TINY = """
name = "tiny"
[model]
vocab_size = 64
num_layers = 2
width = 16
num_heads = 2
[model.titans]
chunk_mem = 4
chunk_proj = 8
[model.cms]
hidden = 24
periods = [1, 2]
[data]
source = "mqar"
seq_len = 32
[engine]
micro_batch_size = 1
device = "cpu"
threads = 1
[train]
global_batch_size = 4
steps = 6
"""
GOOD = ("--nodes=2", "--tasks-per-node=2", "engine.tensor_parallel=2")


@pytest.fixture
def tiny(tmp_path) -> Path:
    path = tmp_path / "tiny.toml"
    path.write_text(TINY)
    return path


@pytest.fixture
def dry_run(tiny, tmp_path, capsys, monkeypatch):
    """Runs the command in this process and returns (exit code, violations, everything printed); without a scheduler."""
    monkeypatch.setenv("PATH", "/usr/bin:/bin" if "SLURM_CONF" in os.environ else str(tmp_path))
    for name in [name for name in os.environ if name.startswith("HOPE_")]:
        monkeypatch.delenv(name)

    def run(*arguments: str, config: Path | None = tiny) -> tuple[int, list[str], str]:
        capsys.readouterr()
        place = [f"out={tmp_path}/runs"] if not any(one.startswith("out=") for one in arguments) else []
        chosen = [f"--config={config}"] if config else []
        (tmp_path / "bash").exists() or (tmp_path / "bash").symlink_to("/bin/bash")
        code = cli.main(["launch", "dry-run", "hope_1p3b", *chosen, *arguments, *place])
        printed = capsys.readouterr()
        text = printed.out + printed.err
        return code, [line.removeprefix("violation: ") for line in text.splitlines() if line.startswith("violation: ")], text

    return run


def test_a_good_job_has_no_violation(dry_run):
    code, violations, text = dry_run(*GOOD)
    assert (code, violations) == (0, []), text
    for expected in ("config hash: ", "2 nodes * 2 tasks = 4 ranks: tensor 2, context 1, data 2", "memory: ", "disk: ", "task.sh"):
        assert expected in text
    assert "sbatch --nodes=2 --ntasks-per-node=2 --gres=gpu:2 --parsable --job-name=hope-tiny" in text
    assert "the scheduler was not asked" in text or "onebox" in text


MISTAKES = [
    ("a misspelt key", ["optim.lrr=1e-3"], "did you mean optim.lr"),
    ("a value of the wrong type", ["train.steps=many"], "expected an integer"),
    ("heads that tensor parallelism does not divide", ["engine.tensor_parallel=4"], "num_heads = 2 is not a multiple"),
    (
        "a world that the degrees do not divide",
        ["engine.pipeline_parallel=2", "--nodes=1", "--tasks-per-node=1"],
        "1 process cannot be divided",
    ),
    ("a batch that the ranks do not divide", ["train.global_batch_size=6", "engine.tensor_parallel=1"], "not a multiple of 4"),
    (
        "blocks that the stages do not divide",
        ["model.num_layers=3", "data.mqar.gap=12", "engine.pipeline_parallel=2"],
        "cannot be divided over 2",
    ),
    ("data that are not there", ["data.source=shards", "data.path=/nowhere"], "/nowhere"),
    ("a directory that cannot be made", ["out=/dev/null/runs"], "/dev/null cannot be written"),
    ("a name that is no name", ["name=a/b"], "name"),
    ("weights to start from that are not there", ["train.start_from=/nowhere/run"], "no such run or checkpoint"),
    ("one GPU for two tasks", ["--sbatch=--gres=gpu:1"], "every task drives one GPU"),
    ("a number of tasks beside nodes and tasks a node", ["--sbatch=--ntasks=3"], "leave --ntasks out"),
    ("no signal before the time limit", ["--sbatch=--signal=TERM@30"], "use --signal=B:USR1@300"),
    ("a time limit shorter than the signal's lead", ["--time=4"], "would stop at once"),
    ("a time limit that is none", ["--time=soon"], "expected minutes"),
    ("a log in a directory that is not there", ["--sbatch=--output=/nowhere/%j.log"], "the job would end silently"),
    ("a cluster that is not there", ["--cluster=onbox"], "known: example, onebox"),
    ("an option that is none", ["--sbatch=nodes=3"], "expected --name=value"),
    ("a package that is not installed", ["track.wandb=true"], "wandb is not installed"),
]


@pytest.mark.parametrize(("arguments", "said"), [one[1:] for one in MISTAKES], ids=[one[0] for one in MISTAKES])
def test_a_seeded_mistake_is_found(dry_run, arguments, said):
    began = time.process_time()
    code, _, text = dry_run(*GOOD, *arguments)
    assert code == 2 and said in text, text
    assert time.process_time() - began < 10


def test_a_model_too_large_for_its_gpus_is_found(dry_run):
    code, violations, text = dry_run(
        "--nodes=1", "data.source=mqar", "data.mqar.gap=64", "engine.micro_batch_size=16", "engine.recompute=none", config=None
    )
    assert code == 2 and any("on its fullest rank, h100 has" in line for line in violations), text


def test_a_full_disk_is_found(dry_run, monkeypatch):
    monkeypatch.setattr("hope_pt.launch.needs.free_bytes", lambda place: 1000)
    code, violations, _ = dry_run(*GOOD)
    assert code == 2 and "checkpoints and one being written need" in violations[0]


def test_another_configuration_of_a_run_that_exists_is_found(dry_run, tmp_path):
    """Stopped by a kill: the stored configuration says what the run began with."""
    from hope_pt import config

    (tmp_path / "runs" / "tiny").mkdir(parents=True)
    stored = config.load(tmp_path / "tiny.toml", ["optim.lr=5e-3"])
    (tmp_path / "runs" / "tiny" / "config.toml").write_text(config.to_toml(stored))
    (tmp_path / "runs" / "tiny" / "metrics.jsonl").write_text(json.dumps({"step": 1, "loss": 4.0}) + "\n")
    code, violations, _ = dry_run(*GOOD)
    assert code == 2 and "optim.lr" in violations[0]


def test_all_mistakes_are_told_at_once(dry_run, tmp_path):
    file = tmp_path / "site.env"
    file.write_text("HOPE_GPUS_PER_NODES=4\nHOPE_CONTAINER=pyxis\n")
    code, violations, text = dry_run(
        "--nodes=2", "--tasks-per-node=2", "engine.tensor_parallel=4", "--time=4", f"--cluster={file}", "out=/dev/null/x"
    )
    assert code == 2 and len(violations) == 5, text
    assert f"{len(violations)} violation(s)" in text


def test_a_scheduler_that_does_not_answer_is_no_violation(monkeypatch, tiny, tmp_path):
    (tmp_path / "sbatch").write_text("#!/bin/sh\necho 'sbatch: error: Unable to contact slurm controller (connect failure)' >&2; exit 1\n")
    (tmp_path / "sbatch").chmod(0o755)
    from hope_pt.launch.cluster import Cluster
    from hope_pt.launch.render import make_job

    job = make_job(Path("hope_1p3b"), config=str(tiny), options=[], arguments=[], cluster=Cluster("", {}))
    findings = checks.Findings()
    assert "does not answer" in checks.ask_scheduler(job, findings, environment={"PATH": f"{tmp_path}:/usr/bin:/bin"})
    assert findings.violations == []


@pytest.mark.parametrize(
    ("text", "expected"), [("90", 90), ("90:30", 90.5), ("24:00:00", 1440), ("2-0", 2880), ("1-12:30", 2190), ("0-0:01:30", 1.5)]
)
def test_time_limits_are_read_as_slurm_reads_them(text, expected):
    assert minutes(text) == expected


def test_options_are_read_as_sbatch_reads_them():
    words = ["-N", "2", "-p", "low", "--time", "5", "--gres=gpu:1", "-J", "x", "--requeue", "--time=7", "-n4"]
    expected = {"nodes": "2", "partition": "low", "time": "7", "gres": "gpu:1", "job-name": "x", "requeue": "", "ntasks": "4"}
    assert parse_options(words) == expected
