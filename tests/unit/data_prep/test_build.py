"""Building a corpus: the same bytes for any workers, kills and places; nothing half-done is taken for done."""

import hashlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hope_data import cli, mds
from hope_data.documents import ReadOptions, find_inputs
from hope_data.errors import PrepError
from hope_data.files import locked
from hope_data.parts import HoldOut

ROOT = Path(__file__).resolve().parents[3]
SETTINGS = ["--vocab-size", "300", "--seq-len", "32", "--heldout-every", "10", "--workers", "1", "--sample-mib", "1"]


def tree(directory):
    """sha256 of every file below a directory, by relative name."""
    return {p.relative_to(directory).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in directory.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """Six input files of 40 documents each."""
    directory = tmp_path_factory.mktemp("texts")
    words = "the cat sat on a mat while rain fell over old roofs and nobody said why it was so".split()
    generator = random.Random(0)
    for n in range(6):
        lines = [json.dumps({"text": " ".join(generator.choices(words, k=generator.randint(5, 200))), "id": f"{n}/{i}"}) for i in range(40)]
        (directory / f"{n}.jsonl").write_text("\n".join(lines) + "\n")
    return directory


@pytest.fixture(scope="module")
def reference(texts, tmp_path_factory):
    """The corpus built once in peace."""
    out = tmp_path_factory.mktemp("reference") / "corpus"
    assert cli.main(["tokenize", str(texts), "--out", str(out), *SETTINGS]) == 0
    return out


def command(texts, out, *extra):
    return [sys.executable, "-m", "hope_data.cli", "tokenize", str(texts), "--out", str(out), *SETTINGS, *extra]


def test_workers_and_places_do_not_change_a_byte(texts, reference, tmp_path):
    elsewhere = shutil.copytree(texts, tmp_path / "elsewhere")
    out = tmp_path / "other name"
    subprocess.run(command(elsewhere, out, "--workers", "2"), check=True, cwd=ROOT, env=environment())
    assert tree(out) == tree(reference)


def environment():
    return {**os.environ, "PYTHONPATH": str(ROOT / "data_prep"), "OMP_NUM_THREADS": "1"}


def test_kill_at_random_moments_changes_nothing(texts, reference, tmp_path):
    """SIGKILL to the writer and its workers three times within the time of a whole run, each later; the fourth run finishes."""
    out = tmp_path / "corpus"
    began = time.monotonic()
    subprocess.run(command(texts, tmp_path / "timed"), check=True, cwd=ROOT, env=environment())
    whole = time.monotonic() - began
    generator = random.Random(int.from_bytes(os.urandom(4), "little"))
    killed = 0
    for attempt in range(3):
        moment = whole * (0.1 + attempt * 0.25 + generator.random() * 0.25)
        process = subprocess.Popen(command(texts, out), cwd=ROOT, env=environment(), start_new_session=True, stdout=subprocess.DEVNULL)
        time.sleep(moment)
        os.killpg(process.pid, signal.SIGKILL)
        killed += process.wait() == -signal.SIGKILL
        assert not out.exists() or tree(out) == tree(reference)
    assert killed >= 1
    subprocess.run(command(texts, out), check=True, cwd=ROOT, env=environment())
    assert tree(out) == tree(reference)
    assert not Path(f"{out}.work").exists()


@pytest.mark.parametrize("fail_after", [1, 2, 3, 5, 8])
def test_interruption_between_files_is_continued(texts, reference, tmp_path, monkeypatch, fail_after):
    """A crash at the n-th rename leaves only whole pieces, and the next run completes them."""
    out, real, count = tmp_path / "corpus", os.replace, []

    def crash(source, target):
        count.append(target)
        if len(count) == fail_after:
            raise KeyboardInterrupt
        real(source, target)

    monkeypatch.setattr(os, "replace", crash)
    with pytest.raises(KeyboardInterrupt):
        cli.main(["tokenize", str(texts), "--out", str(out), *SETTINGS])
    assert not out.exists()
    monkeypatch.setattr(os, "replace", real)
    assert cli.main(["tokenize", str(texts), "--out", str(out), *SETTINGS]) == 0
    assert tree(out) == tree(reference)


def test_finished_parts_are_not_done_again(texts, tmp_path, monkeypatch):
    out = tmp_path / "corpus"
    arguments = ["tokenize", str(texts), "--out", str(out), *SETTINGS]
    monkeypatch.setattr("hope_data.corpus_build.build_shard", lambda *a: (_ for _ in ()).throw(PrepError("stop")))
    assert cli.main(arguments) == 2
    before = {p: p.stat().st_mtime_ns for p in Path(f"{out}.work").glob("part-*/done.json")}
    assert len(before) == 6
    monkeypatch.undo()
    monkeypatch.setattr("hope_data.parts._fill", lambda *a: pytest.fail("a finished part was built again"))
    assert cli.main(arguments) == 0


def test_run_on_a_finished_corpus_does_nothing_and_another_is_refused(texts, reference, capsys):
    before = tree(reference)
    assert cli.main(["tokenize", str(texts), "--out", str(reference), *SETTINGS]) == 0
    assert cli.main(["tokenize", str(texts), "--out", str(reference), *SETTINGS, "--seq-len", "33"]) == 2
    assert "holds another corpus" in capsys.readouterr().err
    assert tree(reference) == before


def test_second_writer_is_refused(texts, tmp_path, capsys):
    with locked(tmp_path / "corpus.work" / "lock"):
        assert cli.main(["tokenize", str(texts), "--out", str(tmp_path / "corpus"), *SETTINGS]) == 2
    assert "another hope-data is writing here" in capsys.readouterr().err


def test_full_disk_is_one_line_and_marks_nothing_done(texts, tmp_path):
    """A file-size limit stands in for the full disk: the write fails in the middle of a part with an OSError."""
    (tmp_path / "big").mkdir()
    (tmp_path / "big" / "a.jsonl").write_text("".join((texts / f"{n}.jsonl").read_text() for n in range(6)) * 5)
    out = tmp_path / "corpus"
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))  # noqa: E731
    done = subprocess.run(command(tmp_path / "big", out), cwd=ROOT, env=environment(), preexec_fn=limit, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("hope-data: cannot write") and "File too large" in line
    assert not out.exists() and not list(Path(f"{out}.work").glob("part-*"))
    subprocess.run(command(tmp_path / "big", out), check=True, cwd=ROOT, env=environment())


def test_heldout_rules(texts):
    (source, *_), read = find_inputs([str(texts)]), ReadOptions()
    from hope_data.documents import read_documents

    documents = list(read_documents(source, read))
    for rule in ("hash", "per-file"):
        chosen = HoldOut(rule, 10).chosen(source, read)
        held = [d for d in documents if chosen.contains(d)]
        assert len(held) == 4 if rule == "per-file" else 0 <= len(held) < 15
    assert not any(HoldOut("hash", 0).chosen(source, read).contains(d) for d in documents)


def test_manifest_counts_are_true(reference, texts):
    manifest = json.loads((reference / "manifest.json").read_bytes())
    documents = sum(s["documents"] for s in manifest["splits"].values())
    text = [json.loads(line)["text"] for p in sorted(texts.iterdir()) for line in p.read_text().splitlines()]
    assert documents == len(text) == 240
    assert sum(s["bytes"] for s in manifest["splits"].values()) == sum(len(t.encode()) for t in text)
    for split, counts in manifest["splits"].items():
        assert counts["tokens"] == counts["samples"] * 32 + 1 + counts["unused_tokens"] and 0 <= counts["unused_tokens"] < 32
        samples = [s for r in counts["shards"] for s in mds.decode_shard((reference / split / r["file"]).read_bytes(), dtype="uint16")]
        assert sum((starts < 32).sum() for _, starts in samples) in (counts["documents"], counts["documents"] - 1)
    assert str(texts) not in (reference / "manifest.json").read_text()


def test_fingerprint_is_of_the_content_only(reference, texts, tmp_path):
    base = json.loads((reference / "manifest.json").read_bytes())
    prints = {}
    for name, extra in {"licence": ["--licence", "CC0"], "length": ["--seq-len", "33"], "rule": ["--heldout-every", "11"]}.items():
        assert cli.main(["tokenize", str(texts), "--out", str(tmp_path / name), *SETTINGS, *extra]) == 0
        prints[name] = json.loads((tmp_path / name / "manifest.json").read_bytes())["fingerprint"]
    assert prints["licence"] == base["fingerprint"]
    assert len({base["fingerprint"], prints["length"], prints["rule"]}) == 3
