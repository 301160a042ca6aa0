"""`hope memory audit` of really trained runs and of memory files: numbers against the weights, attribution against plain autograd."""

import json
import math
import shutil

import numpy as np
import pytest
import torch

from hope_pt import cli, data
from hope_pt.evals.audit_tokens import largest_updates
from hope_pt.evals.generation import load_memory
from hope_pt.evals.language import heldout
from hope_pt.evals.scoring import lm_losses
from hope_pt.nn import HopeLM
from hope_pt.report import metrics
from hope_pt.testing.configs import tiny_model, tiny_run
from hope_pt.train.trained import load_trained


def output(capsys, *arguments) -> str:
    capsys.readouterr()
    assert cli.main([str(argument) for argument in arguments]) == 0
    return capsys.readouterr().out


@pytest.fixture(scope="module")
def watched(settings, tmp_path_factory):
    """A run of 6 steps whose updates were all measured; period 2 for level 1."""
    out = tmp_path_factory.mktemp("watched")
    overrides = ["eval.levels_every=1", "eval.every=0", "eval.diagnostics_every=0", "checkpoint.keep=2"]
    assert cli.main(["train", str(settings), f"out={out}", *overrides]) == 0
    return out / "run"


@pytest.fixture(scope="module")
def audited(watched):
    """The audit of that run as JSON."""
    import contextlib
    import io

    text = io.StringIO()
    with contextlib.redirect_stdout(text):
        assert cli.main(["memory", "audit", str(watched), "--json", "--sequences", "5", "--top", "2"]) == 0
    return json.loads(text.getvalue())


def test_a_run_measures_its_updates(watched):
    records = metrics.read(watched / "metrics.jsonl")
    steps, norms = metrics.series(records, key="optim/level1/block0/update_norm")
    assert steps == [2, 4, 6] and min(norms) > 0
    assert metrics.series(records, key="optim/level1/since")[1] == [1, 0, 1, 0, 1, 0]
    assert metrics.series(records, key="optim/embedding/drift")[0] == [1, 2, 3, 4, 5, 6]


def test_a_run_that_was_stopped_measures_the_same(watched, settings, tmp_path):
    copy = shutil.copytree(watched, tmp_path / "runs" / "run")
    shutil.rmtree(copy / "checkpoints" / "step-00000006")
    overrides = ["eval.levels_every=1", "eval.every=0", "eval.diagnostics_every=0", "checkpoint.keep=2"]
    assert cli.main(["train", str(settings), f"out={copy.parent}", *overrides]) == 0
    lines = [[record for record in metrics.read(run / "metrics.jsonl") if "optim/matrix/drift" in record] for run in (watched, copy)]
    assert len(lines[0]) == len(lines[1]) == 6
    for ours, theirs in zip(*lines, strict=True):
        assert {key: (value, theirs[key]) for key, value in ours.items() if value != theirs[key]} == {}


def test_changes_are_those_of_the_weights(watched, audited):
    trained = load_trained(watched)
    start = dict(HopeLM(trained.config.model, seed=trained.config.train.seed).named_parameters())
    rows = {one["row"]: one for one in audited["changes"]}
    assert list(rows)[:4] == ["level0/block0", "level0/block1", "level1/block0", "level1/block1"]
    for row, prefix in (("level1/block1", "blocks.1.cms.levels.1."), ("embedding", "embedding.")):
        names = [name for name in start if name.startswith(prefix)]
        now, before = (torch.cat([lm[name].detach().flatten() for name in names]) for lm in (trained.lm.state_dict(), start))
        assert rows[row]["change"] == pytest.approx(float((now - before).norm() / before.norm()), rel=1e-5)
    # What was measured on the way from sketches agrees within their error.
    last = metrics.series(metrics.read(watched / "metrics.jsonl"), key="optim/level1/block1/drift")[1][-1]
    assert rows["level1/block1"]["change"] == pytest.approx(last, rel=5 * 0.022)


def test_undoing_a_level_is_what_it_says(watched, audited):
    trained = load_trained(watched)
    lm, start = trained.lm, HopeLM(trained.config.model, seed=trained.config.train.seed).state_dict()
    weights = {name: start[name] if ".cms.levels.1." in name else value for name, value in lm.state_dict().items()}
    source = data.open_source(trained.config.data, split="heldout", vocab_size=trained.config.model.vocab_size)
    batch = source.read(np.arange(5) * source.num_samples // 5)
    losses = []
    for state in (lm.state_dict(), weights):
        model = HopeLM(trained.config.model)
        model.load_state_dict(state)
        with torch.no_grad():
            losses.append(model.token_losses(batch.tokens_BT, batch.targets_BT, doc_start_BT=batch.doc_start_BT).mean().item())
    assert audited["heldout_loss"] == pytest.approx(losses[0], rel=1e-6)
    undone = {one["what"]: one for one in audited["undone"]}
    assert list(undone) == ["level 0", "level 1", "all levels"]
    assert undone["level 1"]["loss"] == pytest.approx(losses[1], rel=1e-6)
    assert undone["level 1"]["difference"] == pytest.approx(losses[1] - losses[0], abs=1e-6)


def test_the_sequences_of_the_largest_updates_are_found_and_ranked(watched, audited):
    trained = load_trained(watched)
    records = metrics.read(watched / "metrics.jsonl")
    source = data.open_source(trained.config.data, split="train", vocab_size=trained.config.model.vocab_size)
    updates = audited["updates"]
    assert [one["update"]["level"] for one in updates] == [0, 0, 1, 1]
    ratios = {}
    for record in records:
        pairs = [(record.get(f"optim/level1/block{b}/update_norm"), record.get(f"optim/level1/block{b}/update_ratio")) for b in (0, 1)]
        if all(norm for norm, _ in pairs):
            ratios[record["step"]] = math.hypot(*(norm for norm, _ in pairs)) / math.hypot(*(norm / ratio for norm, ratio in pairs))
    largest = max(ratios, key=lambda step: ratios[step])
    one = updates[2]
    assert one["update"]["step"] == largest and one["update"]["first"] == largest - 1
    assert one["update"]["ratio"] == pytest.approx(ratios[largest], rel=1e-9)
    assert (one["examined"], one["candidates"]) == (5, 8), "two steps of four sequences"
    kept = [0, 4, 6]
    assert one["weights_step"] == min(kept, key=lambda step: abs(step - (largest - 2)))
    drivers = one["drivers"]
    assert [driver["gradient"] for driver in drivers] == sorted((driver["gradient"] for driver in drivers), reverse=True)
    best = drivers[0]
    config = trained.config.data
    positions = np.arange((best["step"] - 1) * 4, best["step"] * 4)
    order = data.sample_order(
        positions, num_samples=source.num_samples, seed=config.seed, fingerprint=source.fingerprint, shuffle_block=config.shuffle_block
    )
    assert best["sample"] in order.tolist() and largest - 1 <= best["step"] <= largest
    lm = load_trained(watched, step=one["weights_step"]).lm if one["weights_step"] else HopeLM(trained.config.model, seed=0)
    batch = source.read(np.array([best["sample"]]))
    loss = lm.token_losses(batch.tokens_BT, batch.targets_BT, doc_start_BT=batch.doc_start_BT)
    (loss.mean() / 4).backward()
    parameters = [value for name, value in lm.named_parameters() if ".cms.levels.1." in name]
    assert best["loss"] == pytest.approx(loss.mean().item(), rel=1e-6)
    assert best["gradient"] == pytest.approx(math.sqrt(sum(float(value.grad.square().sum()) for value in parameters)), rel=1e-5)
    assert best["token_loss"] == pytest.approx(float(loss.max()), rel=1e-6) and best["text"]


def test_since_a_checkpoint(watched, audited, capsys):
    found = json.loads(output(capsys, "memory", "audit", watched, "--json", "--since", 4, "--sequences", 2, "--top", 1))
    assert found["since"] == 4 and len(found["updates"]) == 2
    since, start = ({one["row"]: one["change"] for one in audit["changes"]} for audit in (found, audited))
    assert all(0 < since[row] < start[row] for row in start)
    assert all(one["update"]["step"] > 4 for one in found["updates"]), "what was before it is not asked for"
    assert {one["update"]["step"] for one in audited["updates"]} - {5, 6}


def test_an_earlier_step_knows_nothing_of_later_updates(watched, capsys):
    found = json.loads(output(capsys, "memory", "audit", watched, "--json", "--step", 4, "--sequences", 2, "--top", 6))
    assert [(one["update"]["level"], one["update"]["step"]) for one in found["updates"] if one["update"]["level"] == 1] in (
        [(1, 2), (1, 4)],
        [(1, 4), (1, 2)],
    )
    assert max(one["update"]["step"] for one in found["updates"]) == 4


def test_a_restart_sums_the_gradients_of_its_whole_interval():
    """Three nested levels of periods 1, 2, 4: level 1 restarts every 4 steps, where the update is that of its initial state."""
    model = tiny_model(periods=(1, 2, 4))
    model = model.model_copy(update={"cms": model.cms.model_copy(update={"variant": "nested"})})
    names = [f"optim/level{level}/block{block}/" for level in range(3) for block in range(model.num_layers)]
    record = {key: value for name in names for key, value in ((f"{name}update_norm", 1.0), (f"{name}update_ratio", 0.1))}

    def first(level, step, config):
        (update,) = largest_updates([record | {"step": step}], level=level, config=config, top=1)
        return update.first

    nested, chain = tiny_run(model=model), tiny_run(model=tiny_model(periods=(1, 2, 4)))
    assert [first(1, step, nested) for step in (2, 4, 6, 8)] == [1, 1, 5, 5]
    assert [first(1, step, chain) for step in (2, 4, 6, 8)] == [1, 3, 5, 7]
    assert [first(0, step, nested) for step in (1, 2, 3)] == [1, 1, 3] and first(2, 8, nested) == 5


def test_a_run_that_began_with_other_weights(finished, settings, tmp_path, capsys, fails):
    source = shutil.copytree(finished, tmp_path / "source")
    overrides = [f"out={tmp_path}", "name=next", f'train.start_from="{source}"', "train.steps=2", "eval.levels_every=1", "eval.every=0"]
    assert cli.main(["train", str(settings), *overrides]) == 0
    found = json.loads(output(capsys, "memory", "audit", tmp_path / "next", "--json", "--sequences", 2, "--top", 1))
    now, start = (load_trained(run).lm.state_dict()["embedding.weight"] for run in (tmp_path / "next", finished))
    change = next(one["change"] for one in found["changes"] if one["row"] == "embedding")
    assert change == pytest.approx(float((now - start).norm() / start.norm()), rel=1e-5)
    assert found["updates"][0]["weights_step"] == 0 and found["start_checked"]
    assert "not checked" not in output(capsys, "memory", "audit", tmp_path / "next", "--sequences", 2, "--top", 1)
    blind = ["name=blind", *overrides[:1], *overrides[2:], "eval.levels_every=0"]
    assert cli.main(["train", str(settings), *blind]) == 0
    shutil.rmtree(source / "checkpoints" / "step-00000006")
    assert "has other weights now than this run began with; name a step with --since" in fails("memory", "audit", tmp_path / "next")
    text = output(capsys, "memory", "audit", tmp_path / "blind", "--sequences", 2)
    assert f'not checked: whether "{source}" still has the weights that this run began with' in text


def test_a_meta_trained_run_is_evaluated_with_its_clock_and_not_audited(settings, tmp_path, capsys, fails):
    clock = ("token_clock.periods=[8,16]", "token_clock.lr=[0.5,0.5]", "token_clock.meta_train=true", "model.mixer=attention")
    command = ["train", str(settings), f"out={tmp_path}", *clock, "train.steps=2", "eval.every=2", "eval.levels_every=0"]
    assert cli.main([*command, "engine.overlap_grad_reduce=false", "engine.overlap_param_gather=false"]) == 0
    run = tmp_path / "run"
    output(capsys, "eval", run)
    found = json.loads((run / "eval-step-2.json").read_text())["values"]["eval/loss"]
    assert found == pytest.approx(metrics.series(metrics.read(run / "metrics.jsonl"), key="eval/loss")[1][-1], rel=1e-5)
    trained = load_trained(run)
    source = data.open_source(trained.config.data, split="heldout", vocab_size=trained.config.model.vocab_size)
    plain = heldout(lm_losses(trained.lm), source, sequences=4)["eval/loss"]
    assert abs(found - plain) > 1e-3 * plain
    assert "token_clock.meta_train = true" in fails("memory", "audit", run)


def test_the_tables_say_the_same(watched, audited, capsys):
    text = output(capsys, "memory", "audit", watched, "--sequences", 5, "--top", 2)
    assert f"{audited['undone'][1]['loss']:.4f}" in text and f"{audited['changes'][3]['change']:.2%}" in text
    assert "who pushed hard, not what was learned" in text and "5 of 8 sequences, at the weights of step" in text


def test_a_run_without_measured_updates_still_has_changes(finished, capsys):
    text = output(capsys, "memory", "audit", finished, "--sequences", 2)
    assert "no measured updates of these steps in metrics.jsonl" in text and "all levels" in text


@pytest.fixture(scope="module")
def memory_file(finished, tmp_path_factory):
    path = tmp_path_factory.mktemp("memory") / "memory.safetensors"
    assert (
        cli.main(["generate", str(finished), "--prompt", "The king said to the queen", "--tokens", "30", "--save-memory", str(path)]) == 0
    )
    return path


def test_a_memory_file(finished, memory_file, capsys):
    text = " and then he went away"
    found = json.loads(output(capsys, "memory", "audit", memory_file, "--against", finished, "--text", text, "--json"))
    trained = load_trained(finished)
    memory = load_memory(memory_file, lm=trained.lm)
    assert found["tokens"] == int(memory.state.seen_B[0]) > 16, "a chunk of 16 tokens has been committed"
    places = [(one["layer"], one["memory"]) for one in found["changes"]]
    core = trained.lm.blocks[0].mixer.core
    assert places == [(layer, name) for layer in (0, 1) for name in ("mem", *core.stack)]
    start = torch.cat([weight.flatten() for weight in core.mem_weights]).detach()
    now = torch.cat([memory.state.layers[0][f"mem.{index}"].flatten() for index in (0, 1)])
    assert found["changes"][0]["change"] == pytest.approx(float((now - start).norm() / start.norm()), rel=1e-5)
    member = list(core.stack).index("v")
    start = torch.cat([weight[:, member].flatten() for weight in core.proj_weights]).detach()
    now = torch.cat([memory.state.layers[0][f"proj.{index}"][0, :, member].flatten() for index in (0, 1)])
    v = next(one for one in found["changes"] if (one["layer"], one["memory"]) == (0, "v"))
    assert v["change"] == pytest.approx(float((now - start).norm() / start.norm()), rel=1e-5)
    assert all(one["difference"] == pytest.approx(one["loss"] - found["loss"], abs=1e-9) for one in found["changes"])
    assert len({one["loss"] for one in found["changes"]}) > 5 and found["fresh"] != found["loss"]


def test_undoing_every_memory_leaves_what_is_no_memory(finished, memory_file):
    """By hand: all anchors of one layer back, one memory after the other, gives the state with that layer's learned start."""
    from hope_pt.evals.audit_state import _memories, _start, _without

    trained = load_trained(finished)
    state = load_memory(memory_file, lm=trained.lm).state
    core = trained.lm.blocks[1].mixer.core
    start = _start(core)
    for places in _memories(core).values():
        state = _without(state, 1, start, places)
    fresh = core.init_state(1, dtype=torch.float32, device=torch.device("cpu"))
    for name in start:
        assert torch.equal(state.layers[1][name], fresh[name]), name
    assert not torch.equal(state.layers[1]["tail"], fresh["tail"])


def test_without_text_only_the_changes(finished, memory_file, capsys):
    found = json.loads(output(capsys, "memory", "audit", memory_file, "--against", finished, "--json"))
    assert found["loss"] is None and all(one["loss"] is None for one in found["changes"])
    assert "|W - W_start|" in output(capsys, "memory", "audit", memory_file, "--against", finished)


def test_what_a_token_clock_has_learnt(finished, tmp_path, capsys):
    path, text = tmp_path / "learnt.safetensors", " and then he went away"
    clock = ("--token-clock", "4,8", "--token-lr", "0.2,0.1")
    output(capsys, "generate", finished, "--prompt", "The king said", "--tokens", 30, "--save-memory", path, *clock)
    found = json.loads(output(capsys, "memory", "audit", path, "--against", finished, "--text", text, "--json"))
    trained = load_trained(finished)
    memory = load_memory(path, lm=trained.lm)
    moved = memory.learnt.state.levels.moved
    assert [(one["level"], one["block"]) for one in found["levels"]] == [(level, block) for level in (0, 1) for block in (None, 0, 1)]
    names = [name for name in moved if name.startswith("blocks.1.cms.levels.1.")]
    weights = trained.lm.state_dict()
    lengths = [math.sqrt(sum(float(values[name].square().sum()) for name in names)) for values in (
        {name: moved[name] for name in names}, {name: weights[f"{name}.weight"] for name in names}
    )]  # fmt: skip
    assert len(names) == 3 and found["levels"][5]["change"] == pytest.approx(lengths[0] / lengths[1], rel=1e-5)
    # By hand: the trained weights with the other level's change added, and the memory as it is.
    for name, value in moved.items():
        if ".levels.0." in name:
            weights[f"{name}.weight"] = weights[f"{name}.weight"] + value[0]
    other = HopeLM(trained.config.model)
    other.load_state_dict(weights)
    from hope_pt.evals.passkey import sentencepiece_encode

    ids = sentencepiece_encode(trained.tokenizer)(text)
    with torch.no_grad():
        logits, _ = other(torch.tensor([[memory.last, *ids[:-1]]]), state=memory.state)
    loss = torch.nn.functional.cross_entropy(logits[0], torch.tensor(ids)).item()
    assert found["levels"][3]["loss"] == pytest.approx(loss, rel=1e-5) and found["levels"][3]["loss"] != found["loss"]
    assert "what the token clock has changed" in output(capsys, "memory", "audit", path, "--against", finished)


def test_mistakes(finished, memory_file, tmp_path, fails):
    assert "does not exist; name a run directory" in fails("memory", "audit", tmp_path / "absent")
    assert "no checkpoint" in fails("memory", "audit", tmp_path)
    assert "name the run whose model wrote it with --against RUN" in fails("memory", "audit", memory_file)
    assert "--since 2: a memory file has no steps" in fails("memory", "audit", memory_file, "--against", finished, "--since", 2)
    assert "--text x: a run is audited on its own held-out data" in fails("memory", "audit", finished, "--text", "x")
    assert "--text is empty" in fails("memory", "audit", memory_file, "--against", finished, "--text", "")
    assert "--top 0: expected 1 or more" in fails("memory", "audit", finished, "--top", 0)
    assert "the checkpoint that is audited is of step 6" in fails("memory", "audit", finished, "--since", 6)
    assert "steps that were kept: 2, 4, 6" in fails("memory", "audit", finished, "--since", 5)
    (tmp_path / "bad").write_bytes(b"not a memory")
    assert "cannot be read as a memory" in fails("memory", "audit", tmp_path / "bad", "--against", finished)
