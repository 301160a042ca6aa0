"""`hope estimate` and `hope train --dry-run`."""

import json
import os

import pytest

from hope_pt import cli


def output(capsys, *arguments) -> str:
    capsys.readouterr()
    assert cli.main([str(argument) for argument in arguments]) == 0
    return capsys.readouterr().out


def test_estimate_as_tables_and_as_json(settings, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "140")
    said = output(capsys, "estimate", settings, "engine.tensor_parallel=2", "--gpus", 2)
    assert all(word in said for word in ("FLOPs per token", "bytes per rank: tensor 2", "bytes sent", "no GPU has confirmed"))
    found = json.loads(output(capsys, "estimate", settings, "engine.pipeline_parallel=2", "--gpus", 2, "--gpu", "a100", "--json"))
    assert found["mesh"]["pipeline"] == 2 and found["gpu"]["name"] == "a100" and "layouts" not in found
    assert found["parameters"]["total"] > 0 and len(found["ranks"]) == 2 and found["assumed"]["links"] > 0
    searched = json.loads(output(capsys, "estimate", settings, "engine.micro_batch_size=2", "--gpus", 2, "--search", "--json"))
    assert searched["layouts"][0]["time"]["total"] <= searched["layouts"][-1]["time"]["total"]
    assert searched["time"] == searched["layouts"][0]["time"], "the estimate is of the fastest layout"
    assert "layouts fit" in output(capsys, "estimate", settings, "engine.micro_batch_size=2", "--gpus", 2, "--search")


def test_more_documents_need_more_memory(settings, capsys):
    def peak(documents: int) -> int:
        return json.loads(output(capsys, "estimate", settings, "--gpus", 1, "--documents", documents, "--json"))["ranks"][0]["total"]

    assert peak(3) > peak(1)


def test_an_estimate_says_what_scans_it_is_for(settings, capsys, monkeypatch):
    assert "the scans are planned in plain torch" in output(capsys, "estimate", settings, "engine.device=cpu", "--gpus", 1)
    assert "the scans are planned with the fused Triton kernels" in output(capsys, "estimate", settings, "engine.device=cuda", "--gpus", 1)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    said = output(capsys, "estimate", settings, "engine.device=cuda", "--gpus", 1)
    assert "memory and time are those of plain torch" in said and "triton is not installed on this machine" in said


def test_estimate_mistakes(settings, fails):
    assert "--gpu v100: unknown" in fails("estimate", settings, "--gpu", "v100")
    assert "--gpus 0" in fails("estimate", settings, "--gpus", 0)
    assert "engine.tensor_parallel = 3" in fails("estimate", settings, "engine.tensor_parallel=3", "--gpus", 3)


def test_a_dry_run_prints_the_layout_and_touches_nothing(settings, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "140")
    # The data do not exist, and nothing is written.
    layout = ("engine.tensor_parallel=2", "engine.pipeline_parallel=2", "engine.micro_batch_size=1", "train.global_batch_size=64")
    said = output(
        capsys, "train", settings, *layout, "data.path=absent", f"out={tmp_path / 'runs'}", "--dry-run", "--world-size", 256
    )  # fmt: skip
    assert "256 processes: tensor 2, context 1, data 64, pipeline 2 x 1" in said
    assert "0 (stage 0)" in said and "128 (stage 1)" in said and "micro-batches a step: 1" in said
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("engine.tensor_parallel=3", "--dry-run", "--world-size", "3"), "engine.tensor_parallel = 3"),
        (("--dry-run", "--world-size", "3"), "train.global_batch_size = 4 is not a multiple of 12"),
        (("--dry-run", "--world-size", "0"), "--world-size 0"),
        (("--world-size", "2"), "goes with --dry-run"),
    ],
)
def test_impossible_dry_runs_are_one_line(settings, fails, arguments, words):
    assert words in fails("train", settings, *arguments)
