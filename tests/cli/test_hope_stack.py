"""`hope stack`: a really trained model, its levels stacked, trained on through `train.start_from`; each mistake exits 2 with one line."""

import json
import shutil

import pytest
import torch

from hope_pt import cli
from hope_pt.checkpoint import Checkpoint
from hope_pt.config import load
from hope_pt.nn import HopeLM
from hope_pt.report import metrics
from hope_pt.testing.models import random_tokens
from hope_pt.train.start import find_start
from hope_pt.train.trained import load_trained

ONE_LEVEL = ("model.mixer=attention", "model.cms.periods=[1]")


@pytest.fixture(scope="module")
def old(settings, tmp_path_factory):
    """A transformer of 3 blocks, trained for 24 steps; read only."""
    out = tmp_path_factory.mktemp("old")
    longer = ("train.steps=24", "eval.every=24", "checkpoint.every=12", "model.num_layers=3")
    assert cli.main(["train", str(settings), f"out={out}", *ONE_LEVEL, *longer]) == 0
    return out / "run"


def stack(old, out, how="clone_k", periods="1,4"):
    assert cli.main(["stack", str(old), "--how", how, "--periods", periods, "--out", str(out)]) == 0
    return out


def lm_of(start):
    config = load(start / "start.toml")
    lm = HopeLM(config.model)
    lm.load_state_dict({name.removeprefix("model."): tensor for name, tensor in find_start(start).tensors().items()})
    return lm


def values(run, key):
    steps, found = metrics.series(metrics.read(run / "metrics.jsonl"), key=key)
    return dict(zip(steps, found, strict=True))


@pytest.mark.parametrize("how", ["assign_by_depth", "clone_k"])
def test_the_logits_are_those_of_the_trained_model(how, old, tmp_path, capsys):
    start = stack(old, tmp_path / "start", how)
    out = capsys.readouterr().out
    assert "step 24" in out and f"hope train {start / 'start.toml'}" in out
    tokens = random_tokens(3, 40, vocab=400)
    with torch.no_grad():
        before, after = (lm(tokens)[0] for lm in (load_trained(old).lm, lm_of(start)))
    assert (before - after).abs().max() <= 1e-6


@pytest.mark.parametrize(("how", "periods"), [("assign_by_depth", "1,2,4"), ("clone_k", "1,4")])
def test_training_goes_on_from_the_trained_loss(how, periods, old, tmp_path):
    start = stack(old, tmp_path / "start", how, periods)
    options = ("train.steps=24", "eval.every=24", "optim.warmup_steps=4")
    assert cli.main(["train", str(start / "start.toml"), f"out={tmp_path}", "name=new", *options]) == 0
    trained, untrained = (values(old, "eval/loss")[step] for step in (24, 0))
    now = values(tmp_path / "new", "eval/loss")
    assert now[0] == pytest.approx(trained, abs=1e-6)
    assert trained < untrained - 0.5, "the old run has learned something"
    assert now[24] < trained - 0.1


def test_a_stopped_run_continues_from_its_own_checkpoint(old, tmp_path):
    """Not from the start again, and not differently than without the stop; the start may be gone by then, and the directory is shared."""
    start = stack(old, tmp_path / "start")
    command = ["train", str(start / "start.toml"), "train.steps=4", "eval.every=4", "checkpoint.every=2"]
    for name in ("whole", "start"):
        assert cli.main([*command, f"out={tmp_path}", f"name={name}"]) == 0
    shutil.rmtree(start / "checkpoints" / "step-00000004")
    shutil.move(start / "step-00000000", tmp_path / "away")
    assert cli.main([*command, f"out={tmp_path}"]) == 0
    whole, again = (load_trained(tmp_path / name).lm.state_dict() for name in ("whole", "start"))
    assert all(torch.equal(whole[name], again[name]) for name in whole)


def test_a_run_can_start_from_a_run_and_from_one_of_its_checkpoints(old, settings, tmp_path, capsys):
    command, first = ["train", str(settings), f"out={tmp_path}", *ONE_LEVEL, "model.num_layers=3", "train.steps=2"], {}
    for name, source, step in (("run", old, 24), ("early", old / "checkpoints" / "step-00000012", 12)):
        assert cli.main([*command, f"name={name}", f"train.start_from={source}"]) == 0
        assert f"beginning with the weights of {old / 'checkpoints' / f'step-{step:08d}'}" in capsys.readouterr().err
        first[name] = values(tmp_path / name, "eval/loss")[0]
    assert first["run"] == pytest.approx(values(old, "eval/loss")[24], abs=1e-6)
    assert first["run"] < first["early"] < values(old, "eval/loss")[0] - 0.1


def test_a_start_is_read_by_blocks_and_without_the_optimizer(old, settings, tmp_path, monkeypatch):
    """Never the whole model at once: several of them, one for every process of a node, do not fit its memory."""
    asked, read = [], Checkpoint.tensors
    monkeypatch.setattr(Checkpoint, "tensors", lambda self, *, prefix="": asked.append(prefix) or read(self, prefix=prefix))
    command = ["train", str(settings), f"out={tmp_path}", *ONE_LEVEL, "model.num_layers=3", "train.steps=1", "eval.every=0"]
    assert cli.main([*command, f"train.start_from={old}"]) == 0
    blocks = [f"model.blocks.{block}." for block in range(3)]
    assert sorted(asked) == [*blocks, "model.embedding.weight", "model.final_norm.weight"]


def test_what_was_written_says_where_it_is_from(old, tmp_path):
    start = stack(old, tmp_path / "start", "assign_by_depth", "1,8")
    config = load(start / "start.toml")
    assert (config.name, config.train.start_from, config.model.cms.depth_periods) == ("start", str(start), (1, 1, 8))
    meta = json.loads((start / "step-00000000" / "meta.json").read_text())
    assert (meta["trained_as"], meta["trained_steps"]) == ("run", 24)
    assert set(find_start(start).tensors()) == {f"model.{name}" for name in load_trained(old).lm.state_dict()}


def test_settings_of_single_levels_are_not_those_of_the_new_levels(settings, tmp_path, capsys):
    clock = ("token_clock.periods=[8]", "token_clock.lr=[0.1]")
    levels = ('optim.levels=["muon"]', "optim.freeze_levels=[0]", "optim.matrix_lr=0.01", *clock)
    short = ("train.steps=2", "eval.every=0", "eval.at_start=false")
    assert cli.main(["train", str(settings), f"out={tmp_path}", *ONE_LEVEL, *levels, *short]) == 0
    capsys.readouterr()
    config = load(stack(tmp_path / "run", tmp_path / "cloned") / "start.toml")
    assert (config.optim.levels, config.optim.freeze_levels, config.token_clock.periods) == ((), (), ())
    keys = ("optim.levels", "optim.matrix_lr", "optim.freeze_levels", "token_clock.periods", "token_clock.lr")
    assert f"back at their defaults, because they are about single levels: {', '.join(keys)}" in capsys.readouterr().out
    kept = load(stack(tmp_path / "run", tmp_path / "deep", "assign_by_depth") / "start.toml")
    assert (kept.optim.levels, kept.optim.freeze_levels, kept.token_clock.periods) == (("muon",), (0,), (8,))
    assert "defaults" not in capsys.readouterr().out


def test_mistakes(old, finished, settings, tmp_path, fails):
    def stack_fails(run, *, how="clone_k", periods="1,4", out="new"):
        line = fails("stack", run, "--how", how, "--periods", periods, "--out", tmp_path / out)
        assert not (tmp_path / "new").exists()
        return line

    assert "has no checkpoint" in stack_fails(tmp_path / "nothing")
    assert "model.cms.periods = [1, 2]" in stack_fails(finished)
    assert "--periods 1,x" in stack_fails(old, periods="1,x")
    assert "--periods 4,1" in stack_fails(old, periods="4,1")
    assert "two periods" in stack_fails(old, periods="4")
    assert "4 frequencies for 3 blocks" in stack_fails(old, how="assign_by_depth", periods="1,2,4,8")
    assert "name" in stack_fails(old, out="a name")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").touch()
    assert "exists already" in stack_fails(old, out="taken")


def test_starts_that_cannot_be_are_refused_before_anything_is_written(old, settings, tmp_path, fails):
    def train_fails(source, *options):
        line = fails("train", settings, f"out={tmp_path}", "name=new", f"train.start_from={source}", *ONE_LEVEL, *options)
        assert not (tmp_path / "new" / "config.toml").exists()
        return line

    assert "has no checkpoint" in train_fails(tmp_path / "nothing", "model.num_layers=3")
    line = train_fails(old)
    assert "tensors of" in line and "blocks.2." in line and "absent here" in line
    assert "(16, 24) there, (16, 32) here" in train_fails(old, "model.num_layers=3", "model.cms.hidden=32")
    damaged = shutil.copytree(old, tmp_path / "damaged")
    for path in (damaged / "checkpoints").glob("step-*/*.safetensors"):
        path.write_bytes(path.read_bytes()[:-1])
    assert "bytes, the manifest says" in train_fails(damaged, "model.num_layers=3")
