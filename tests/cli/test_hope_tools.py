"""`hope eval`, `generate`, `report`, `summary` and `config`, and where a process stands in its job."""

import json
import os
import re

import pytest
import torch

from hope_pt import cli
from hope_pt.cli.launcher import launch_from_environment
from hope_pt.engine.launch import Launch
from hope_pt.errors import HopeError
from hope_pt.evals.generation import load_memory
from hope_pt.report import metrics
from hope_pt.train.trained import load_trained


def output(capsys, *arguments) -> str:
    capsys.readouterr()
    assert cli.main([str(argument) for argument in arguments]) == 0
    return capsys.readouterr().out


def test_eval_repeats_what_training_measured(run_copy, capsys):
    said = output(capsys, "eval", run_copy)
    stored = json.loads((run_copy / "eval-step-6.json").read_text())["values"]
    records = metrics.read(run_copy / "metrics.jsonl")
    for key in ("eval/loss", "eval/bits_per_byte", "eval/trigram_bits_per_byte"):
        assert stored[key] == pytest.approx(metrics.series(records, key=key)[1][-1], rel=1e-6)
    assert "bits_per_byte" in said


def test_eval_on_other_data_needs_the_same_tokenizer(run_copy, other_corpus, foreign_corpus, fails, capsys):
    assert "no checkpoint" in fails("eval", run_copy.parent)
    assert "does not exist; steps that were kept: 2, 4, 6" in fails("eval", run_copy, "--step", 5)
    assert "expected 1 or more" in fails("eval", run_copy, "--sequences", 0)
    assert "bits_per_byte" in output(capsys, "eval", run_copy, "--data", other_corpus, "--sequences", 2)
    assert "another tokenizer" in fails("eval", run_copy, "--data", foreign_corpus)


def test_generate_streams_the_same_text_in_one_piece_and_through_a_memory_file(finished, tmp_path, capsys):
    memory = tmp_path / "memory.safetensors"
    common = ("generate", finished, "--temperature", 0)
    whole = output(capsys, *common, "--prompt", "The king", "--tokens", 30).rstrip("\n")
    first = output(capsys, *common, "--prompt", "The king", "--tokens", 18, "--save-memory", memory).rstrip("\n")
    second = output(capsys, *common, "--tokens", 12, "--load-memory", memory).rstrip("\n")
    assert whole.startswith("The king") and len(whole) > 20
    assert first + second == whole
    assert os.listdir(tmp_path) == ["memory.safetensors"]


def test_generate_depends_on_seed_and_temperature_only(finished, capsys):
    texts = [output(capsys, "generate", finished, "--tokens", 20, "--seed", seed, "--temperature", 1.0) for seed in (0, 0, 1)]
    assert texts[0] == texts[1] != texts[2]


def test_generate_mistakes(finished, tmp_path, fails):
    assert "expected 1 or more" in fails("generate", finished, "--tokens", 0)
    assert "temperature = -1.0" in fails("generate", finished, "--temperature", -1)
    assert "no checkpoint" in fails("generate", tmp_path)
    (tmp_path / "memory").write_bytes(b"not a memory")
    assert "cannot be read as a memory" in fails("generate", finished, "--load-memory", tmp_path / "memory")
    assert "cannot write the memory" in fails("generate", finished, "--tokens", 1, "--save-memory", tmp_path / "absent" / "memory")


def test_eval_reads_long_documents_with_and_without_a_token_clock(run_copy, fails, capsys):
    common = ("eval", run_copy, "--sequences", 1, "--documents", 2, "--document-tokens", 200)
    output(capsys, *common, "--token-clock", "32,64", "--token-lr", "1e-4")
    values = json.loads((run_copy / "eval-step-6.json").read_text())["values"]
    assert values["eval/document_tokens"] == values["eval/clock_tokens"]
    assert values["eval/clock_bits_per_byte"] != values["eval/document_bits_per_byte"]
    # the clock changes nothing before its first update
    for low, high in ((1, 1), (2, 2), (3, 4), (5, 8), (9, 16), (17, 32)):
        name = f"loss_at_context/{low:04d}-{high:04d}"
        assert values[f"eval/clock_{name}"] == pytest.approx(values[f"eval/document_{name}"], rel=1e-5)
    output(capsys, *common)
    assert "eval/clock_loss" not in json.loads((run_copy / "eval-step-6.json").read_text())["values"]
    assert "one learning rate for each" in fails(*common, "--token-clock", "32,64")
    assert "expected one number, or one for each of the 2" in fails(*common, "--token-clock", "1,2,3")
    assert "expected numbers with commas" in fails(*common, "--token-clock", "x")
    assert "does not divide" in fails(*common, "--token-clock", "32,48", "--token-lr", "1")
    assert "token_clock.periods.1 = -8: " in fails(*common, "--token-clock", "32,-8", "--token-lr", "1")
    assert "the longest has" in fails("eval", run_copy, "--documents", 1, "--document-tokens", 10**7)


def test_generate_with_a_token_clock_keeps_what_it_learnt_in_the_file(finished, tmp_path, fails, capsys):
    memory = tmp_path / "memory.safetensors"
    common = ("generate", finished, "--temperature", 0)
    clock = ("--token-clock", "8,16", "--token-lr", "0.02")
    whole = output(capsys, *common, *clock, "--prompt", "The king", "--tokens", 40).rstrip("\n")
    first = output(capsys, *common, *clock, "--prompt", "The king", "--tokens", 25, "--save-memory", memory).rstrip("\n")
    second = output(capsys, *common, "--tokens", 15, "--load-memory", memory).rstrip("\n")
    assert first + second == whole
    assert output(capsys, *common, "--tokens", 15, "--load-memory", memory, "--freeze").strip("\n")
    frozen = tmp_path / "frozen.safetensors"
    once = output(capsys, *common, "--tokens", 20, "--load-memory", memory, "--freeze", "--save-memory", frozen)
    lm = load_trained(finished).lm
    start, still = (load_memory(path, lm=lm).learnt.state.levels for path in (memory, frozen))
    assert still.frozen and not start.frozen and all(torch.equal(still.moved[name], value) for name, value in start.moved.items())
    # --freeze is this call's: the file that it wrote learns again without it
    again = tmp_path / "again.safetensors"
    output(capsys, *common, "--tokens", 40, "--load-memory", frozen, "--save-memory", again)
    learns = load_memory(again, lm=lm).learnt.state.levels
    assert once and not learns.frozen and any(not torch.equal(learns.moved[name], value) for name, value in start.moved.items())
    assert "was written with --token-clock 8,16" in fails(*common, "--load-memory", memory, "--token-clock", "4,8", "--token-lr", 1)
    assert "--freeze needs --load-memory" in fails(*common, "--freeze")


def test_report_is_one_file_that_needs_nothing_else(run_copy, tmp_path, capsys):
    stored = tmp_path / "control.json"
    output(capsys, "report", run_copy, "--store-curve", stored)
    csv = tmp_path / "csv.csv"
    csv.write_text("step,loss,eval/bits_per_byte\n1,5.5,\n2,5.25,3.5\n")
    path = output(capsys, "report", run_copy, stored, "--compare", csv).strip()
    text = (run_copy / "report.html").read_text()
    assert path == str(run_copy / "report.html")
    assert not re.search(r'<script|<link|<img|(src|href)="(?!#|data:)|@import|url\((?!#)', text)
    for title in ("Loss", "Loss by position in the document", "Comparison", "Memory", "Samples", "Configuration"):
        assert f"<h2>{title}</h2>" in text, title
    assert "trigram" in text and "csv" in text and text.count("<svg") >= 8


def test_report_mistakes(finished, tmp_path, fails):
    assert "metrics.jsonl" in fails("report", tmp_path)
    (tmp_path / "broken.json").write_text("{")
    assert "broken.json cannot be read as a curve" in fails("report", finished, tmp_path / "broken.json", "--out", tmp_path / "r.html")
    assert "is not a run directory, .json, .csv or .jsonl" in fails("report", finished, tmp_path / "x.txt")


def test_summary_counts_what_the_model_has(settings, finished, capsys):
    said = output(capsys, "summary", settings)
    from hope_pt.train.trained import load_trained

    total = sum(parameter.numel() for parameter in load_trained(finished).lm.parameters())
    assert f"{total:,}" in said and "FLOPs per token" in said and "state of one sequence, bytes" in said and "cms-norm" in said


def test_config_show_gives_a_configuration_that_is_the_same(settings, tmp_path, capsys):
    shown = tmp_path / "shown.toml"
    shown.write_text(output(capsys, "config", "show", settings, "optim.lr=0.5"))
    assert output(capsys, "config", "show", shown) == shown.read_text()
    assert output(capsys, "config", "diff", settings, shown) == "optim.lr: 0.01 -> 0.5\n"
    assert output(capsys, "config", "diff", shown, shown) == "no difference\n"


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, Launch()),
        ({"SLURM_JOB_ID": "3", "SLURM_NTASKS": "8"}, Launch()),
        ({"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}, Launch()),
        (
            {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "n1", "MASTER_PORT": "29501"},
            Launch(rank=3, world_size=4, local_rank=1, master_addr="n1", master_port=29501, join_s=300.0),
        ),
        (
            {
                "SLURM_STEP_ID": "0",
                "SLURM_PROCID": "1",
                "SLURM_STEP_NUM_TASKS": "2",
                "SLURM_LOCALID": "1",
                "MASTER_ADDR": "n1",
                "MASTER_PORT": "1",
            },
            Launch(rank=1, world_size=2, local_rank=1, master_addr="n1", master_port=1, join_s=300.0),
        ),
    ],
)
def test_launch_variables(environment, expected):
    assert launch_from_environment(environment) == expected


TORCHRUN = {"RANK": "8", "WORLD_SIZE": "20", "LOCAL_RANK": "0", "MASTER_ADDR": "n1", "MASTER_PORT": "1"}
SRUN = {
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "8",
    "SLURM_STEP_NUM_TASKS": "20",
    "SLURM_LOCALID": "0",
    "MASTER_ADDR": "n1",
    "MASTER_PORT": "1",
}


@pytest.mark.parametrize(
    ("environment", "join_s"),
    [
        (TORCHRUN | {"LOCAL_WORLD_SIZE": "20"}, 18.0),
        (TORCHRUN | {"LOCAL_WORLD_SIZE": "8"}, 300.0),
        (TORCHRUN, 300.0),
        # torchrun inside a Slurm step of one task on each of many machines, and the other way round: torchrun's word counts.
        (TORCHRUN | {"LOCAL_WORLD_SIZE": "8", "SLURM_STEP_NUM_NODES": "1"}, 300.0),
        (TORCHRUN | {"LOCAL_WORLD_SIZE": "20", "SLURM_NNODES": "3"}, 18.0),
        (SRUN | {"SLURM_STEP_NUM_NODES": "1", "SLURM_NNODES": "3"}, 18.0),
        (SRUN | {"SLURM_STEP_NUM_NODES": "3"}, 300.0),
        (SRUN | {"SLURM_NNODES": "1"}, 18.0),
        (SRUN, 300.0),
        (TORCHRUN | {"LOCAL_WORLD_SIZE": "20", "HOPE_JOIN_S": "45"}, 45.0),
        (SRUN | {"SLURM_STEP_NUM_NODES": "3", "HOPE_JOIN_S": "900"}, 900.0),
    ],
)
def test_a_job_on_several_machines_has_longer_to_join(environment, join_s):
    assert launch_from_environment(environment).join_s == join_s


@pytest.mark.parametrize(
    ("environment", "name"),
    [
        ({"RANK": "0"}, "WORLD_SIZE = ''"),
        ({"RANK": "x", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, "RANK = 'x'"),
        ({"RANK": "2", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, "RANK = 2 is not below WORLD_SIZE = 2"),
        ({"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, "MASTER_ADDR is not set"),
        ({"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "n1"}, "MASTER_PORT = ''"),
        *((TORCHRUN | {"HOPE_JOIN_S": text}, f"HOPE_JOIN_S = {text!r}") for text in ("", "0", "-5", "5m", "1e9", "inf", "86401")),
    ],
)
def test_launch_variables_that_are_missing_or_wrong(environment, name):
    with pytest.raises(HopeError, match=re.escape(name)):
        launch_from_environment(environment)
