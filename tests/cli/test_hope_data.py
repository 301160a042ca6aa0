"""`hope-data` as a user meets it: the one-command corpus, and each mistake exits 2 with one line and no traceback."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from hope_data import cli

ROOT = Path(__file__).resolve().parents[2]
SMALL = ["--vocab-size", "300", "--seq-len", "16", "--heldout-every", "0", "--workers", "1"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """What `make train` builds."""
    out = tmp_path_factory.mktemp("tiny") / "tiny"
    assert cli.main(["tiny", "--out", str(out), "--workers", "1"]) == 0
    return out


@pytest.fixture
def damaged(tiny, tmp_path):
    return shutil.copytree(tiny, tmp_path / "copy")


def fails(capsys, *arguments):
    """The one line of a command that must exit 2."""
    capsys.readouterr()
    assert cli.main([str(a) for a in arguments]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    return line


def test_tiny_corpus_has_both_splits_from_every_source(tiny, capsys):
    manifest = json.loads((tiny / "manifest.json").read_bytes())
    assert manifest["vocab_size"] == 1024 and manifest["seq_len"] == 256 and manifest["dtype"] == "uint16"
    assert {s["licence"] for s in manifest["sources"]} == {"public domain"}
    held, train = (manifest["splits"][s] for s in ("heldout", "train"))
    assert held["documents"] == len(manifest["sources"]) == 13
    assert 0.03 < held["tokens"] / (held["tokens"] + train["tokens"]) < 0.1
    assert train["samples"] > 2000 and 2 < train["bytes"] / train["tokens"] < 3
    assert cli.main(["verify", str(tiny)]) == 0
    assert "sound" in capsys.readouterr().out


def test_tokenize_tiny_is_the_same(tiny, tmp_path):
    out = tmp_path / "other"
    assert cli.main(["tokenize", "--corpus", "tiny", "--vocab-size", "1024", "--seq-len", "256", "--out", str(out), "--workers", "1"]) == 0
    assert (out / "manifest.json").read_bytes() == (tiny / "manifest.json").read_bytes()


def test_inspect_shows_documents(tiny, capsys):
    assert cli.main(["inspect", str(tiny), "--split", "heldout", "--samples", "3"]) == 0
    out = capsys.readouterr().out
    assert "public domain" in out and out.count("---- heldout sample") == 3 and "2.4" in out
    assert cli.main(["inspect", str(tiny), "--samples", "1"]) == 0
    assert "==== document start ====\nAS YOU LIKE IT" in capsys.readouterr().out


def test_separate_tokenizer(tiny, tmp_path, capsys):
    model = tmp_path / "t.model"
    assert cli.main(["train-tokenizer", "--corpus", "tiny", "--vocab-size", "1024", "--out", str(model)]) == 0
    assert model.read_bytes() == (tiny / "tokenizer.model").read_bytes()
    out = tmp_path / "corpus"
    arguments = ["tokenize", "--corpus", "tiny", "--tokenizer", model, "--out", out, "--workers", "1", "--dtype", "uint32"]
    assert cli.main([str(a) for a in arguments]) == 0
    assert json.loads((out / "manifest.json").read_bytes())["dtype"] == "uint32"
    assert cli.main(["verify", str(out)]) == 0


@pytest.mark.parametrize(
    "content, reason",
    [
        (b'{"text": "\xff"}', "1 x invalid UTF-8; first a.jsonl:2"),
        (b"{broken", "1 x broken JSON; first a.jsonl:2"),
        (b'{"body": "x"}', "1 x no key 'text'; first a.jsonl:2"),
        (b'{"text": "a\\u0000"}', "1 x NUL character; first a.jsonl:2"),
    ],
)
def test_bad_documents_fail_above_the_rate_and_are_listed_below_it(tmp_path, capsys, content, reason):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "a good line of text"}\n' + content + b"\n" + b'{"text": "another good line"}\n' * 40)
    arguments = ["tokenize", tmp_path / "a.jsonl", "--out", tmp_path / "out", *SMALL]
    assert reason in (line := fails(capsys, *arguments)) and "--max-reject-rate 0.001" in line
    assert not (tmp_path / "out").exists()
    assert cli.main([str(a) for a in [*arguments, "--max-reject-rate", "0.05"]]) == 0
    (reject,) = [json.loads(line) for line in (tmp_path / "out" / "rejects.jsonl").read_text().splitlines()]
    assert (reject["file"], reject["line"]) == ("a.jsonl", 2)


def test_mistakes_in_the_command(tmp_path, capsys):
    text = tmp_path / "a.txt"
    text.write_text("some words in a row, again and again\n" * 50)
    out = tmp_path / "out"
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "file").write_text("x")
    for arguments, message in [
        (["tokenize", tmp_path / "none.txt", "--out", out, *SMALL], "does not exist"),
        (["tokenize", text, "--out", out], "give --tokenizer FILE, or --vocab-size"),
        (["tokenize", text, "--out", out, "--tokenizer", text, "--vocab-size", 300], "exclude each other"),
        (["tokenize", text, "--out", out, "--tokenizer", text], "not a SentencePiece model"),
        (["tokenize", text, "--out", out, *SMALL, "--seq-len", 0], "--seq-len 0"),
        (["tokenize", text, "--out", out, *SMALL, "--seq-len", 100_000], "train split has"),
        (["tokenize", text, "--out", out, *SMALL, "--heldout-every", 1], "--heldout-every 1"),
        (["tokenize", text, "--out", tmp_path / "used", *SMALL], "is not a corpus"),
        (["tokenize", text, "--corpus", "tiny", "--out", out], "takes no input files"),
        (["train-tokenizer", text, "--out", out], "--vocab-size is missing"),
        (["train-tokenizer", text, "--out", out, "--vocab-size", 9000], "Vocabulary size too high (9000)"),
        (["train-tokenizer", text, "--out", tmp_path / "no" / "dir", "--vocab-size", 300], "cannot write"),
        (["verify", tmp_path / "none"], "does not exist"),
        (["inspect", tmp_path / "none"], "does not exist"),
    ]:
        assert message in fails(capsys, *arguments), arguments
    assert not out.exists()


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda p: flip(p / "train" / "shard.00000.mds"), "shard.00000.mds is damaged: sha256"),
        (lambda p: flip(p / "tokenizer.model"), "tokenizer.model"),
        (lambda p: flip(p / "heldout" / "index.json"), "index.json is damaged"),
        (lambda p: (p / "train" / "shard.00000.mds").unlink(), "is missing"),
        (lambda p: (p / "manifest.json").write_text('{"format": "hope-data/1"}'), "not a hope-data manifest"),
        (lambda p: (p / "manifest.json").write_text("{"), "not valid JSON"),
    ],
)
def test_verify_finds_damage(damaged, capsys, change, message):
    change(damaged)
    assert message in fails(capsys, "verify", damaged)


def test_command_in_its_own_process(tmp_path):
    """Exit codes and streams of the real thing; usage errors are argparse's, exit 2 too."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "data_prep")}
    run = lambda *a: subprocess.run([sys.executable, "-m", "hope_data.cli", *a], env=environment, capture_output=True, text=True)  # noqa: E731
    assert run("--help").returncode == 0
    assert run("tokenise").returncode == 2
    done = run("verify", str(tmp_path))
    assert (done.returncode, done.stdout) == (2, "") and done.stderr.startswith("hope-data: ") and "Traceback" not in done.stderr


def test_our_own_bug_is_not_dressed_up(tmp_path, monkeypatch):
    monkeypatch.setattr(cli, "verify", lambda path: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        cli.main(["verify", str(tmp_path)])
