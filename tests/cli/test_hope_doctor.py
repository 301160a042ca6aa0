"""`hope doctor`: facts, verdicts, exit codes; on this machine and on simulated ones."""

import json
import os
import resource
import subprocess
import sys

import pytest
import torch

from hope_pt import cli
from hope_pt.engine import compat
from hope_pt.launch import doctor


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """The command as a person runs it, in a process of its own."""
    began = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    command = [sys.executable, "-m", "hope_pt", "doctor", "--json", "--out", str(tmp_path_factory.mktemp("doctor") / "new/runs")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    return {**json.loads(done.stdout), "seconds": resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - began}


def test_it_says_what_is_here(report):
    assert report["can_train"] is True
    assert report["machine"]["cpus"] == os.cpu_count()
    assert report["torch"]["version"] == torch.__version__
    assert report["engine"]["megatron-core"] == str(compat.check_megatron())
    assert report["engine"]["tested megatron-core"] == ">=0.16.1,<0.20"
    assert "gloo" in report["engine"]["back ends"]
    assert report["packages"]["submitit"] == doctor._version("submitit")
    assert report["storage"]["free GiB"] > 0 and report["storage"]["writable"] is True


def test_every_verdict_says_with_what_or_what_to_do(report):
    verdicts = report["verdicts"]
    assert {"train on CPU", "train on GPU", 'provider "te"', 'provider "apex"', "export to transformers", "write runs"} <= verdicts.keys()
    assert all(verdict["text"] for verdict in verdicts.values())
    missing = [verdict["text"] for task, verdict in verdicts.items() if not verdict["works"] and task in doctor._NEEDS]
    assert all("pip install" in text for text in missing)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_without_a_gpu_the_shim_is_announced_and_a_cuda_build_asked_for(report):
    assert "CPU shim" in report["verdicts"]["train on CPU"]["text"]
    assert report["verdicts"]["train on GPU"] == {"works": False, "text": doctor._CPU_BUILD.format(version=torch.__version__)}


def test_people_get_lines(capsys):
    assert cli.main(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("machine: python 3.")
    assert any(line.startswith("yes  train on CPU") for line in lines)


def test_where_megatron_is_missing_nothing_trains_and_the_exit_code_says_so(monkeypatch, fails, capsys):
    monkeypatch.setattr(doctor, "_engine", lambda: {"megatron-core": None, "problem": "megatron-core is not installed; install it with X"})
    report = doctor.examine(doctor.Path("runs"))
    assert not report.can_train
    assert {v.text for v in report.verdicts if v.task.startswith("train")} == {"megatron-core is not installed; install it with X"}
    assert fails("doctor").startswith("hope: training is not possible on this machine")


def test_the_web_framework_called_apex_is_a_finding_and_no_crash(tmp_path):
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex/__init__.py").write_text("raise AttributeError('must not be imported')")
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    done = subprocess.run(
        [sys.executable, "-m", "hope_pt", "doctor", "--json"], capture_output=True, text=True, timeout=60, env=environment
    )
    assert done.returncode == 0, done.stderr
    verdict = json.loads(done.stdout)["verdicts"]['provider "apex"']
    assert verdict["works"] is False and "is not NVIDIA's" in verdict["text"] and "pip uninstall apex" in verdict["text"]


def verdicts(*, gpus=1, cuda="13.0", nccl=True, apex="usable", free=100.0, shared=8.0):
    gpu = {"name": "NVIDIA H200", "memory GiB": 139.7, "capability": "9.0"}
    facts = {"version": "2.13.0", "cuda": cuda, "nccl": "2.28.3" if gpus else None}
    engine = {"back ends": ["gloo", "nccl"] if nccl else ["gloo"], "transformer-engine": "not installed", "apex": apex}
    storage = {"runs": "/data", "free GiB": free, "writable": True, "shared memory GiB": shared}
    found = doctor._verdicts(facts, gpus=[gpu] * gpus, engine=engine, storage=storage)
    return {verdict.task: verdict for verdict in found}


def test_a_machine_with_gpus():
    found = verdicts(gpus=8)
    assert found["train on GPU"].works and found["train on GPU"].text == "8 x NVIDIA H200, NCCL 2.28.3"
    assert found["train on CPU"].text == "gloo"
    assert found['provider "apex"'].works and not found['provider "te"'].works
    assert "docs/providers.md" in found['provider "te"'].text


@pytest.mark.parametrize(
    ("machine", "task", "text"),
    [
        ({"gpus": 0}, "train on GPU", "CUDA 13.0 and sees no GPU"),
        ({"gpus": 0, "cuda": None}, "train on GPU", "is a CPU build"),
        ({"nccl": False}, "train on GPU", "has no NCCL"),
        ({"gpus": 0}, 'provider "apex"', "sees no GPU"),
        ({"free": 3.0}, "write runs", "3.0 GiB are free at /data"),
        ({"shared": 0.1}, "write runs", "--shm-size"),
    ],
)
def test_what_is_wrong_is_said(machine, task, text):
    verdict = verdicts(**machine)[task]
    assert not verdict.works and text in verdict.text


def test_it_takes_few_seconds_of_a_core(report):
    # Of a core, because other tests run beside it: 1.3 here.
    assert report["seconds"] < 8.0
