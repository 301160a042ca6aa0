"""Fetching: what becomes a document, and what the user reads when a tool or the network is missing. No test uses the network."""

import gzip
import json
import shutil
import subprocess
import sys

import pytest

from hope_data import cli, fetch

HEAD = "<html><head><title>no</title></head><body><h1>Title</h1><p>Some &amp; more</p><script>no()</script>"
PAGE = HEAD + "<p>word</p>" * 60 + "</body></html>"
MANUAL = '.TH X 3\n.SH NAME\nx \\- does \\fBy\\fP\n.\\" comment\n' + "A line of text that is long enough to count as a document.\n" * 5


def make_package(directory, name="docs"):
    """A Debian package with every kind of file."""
    doc = directory / "tree" / "usr/share/doc/docs"
    man = directory / "tree" / "usr/share/man/man3"
    for path in (doc, man, directory / "tree" / "DEBIAN"):
        path.mkdir(parents=True)
    control = f"Package: {name}\nVersion: 1.2-3\nArchitecture: all\nMaintainer: x <x@x.org>\nDescription: x\n"
    (directory / "tree/DEBIAN/control").write_text(control)
    (doc / "a.rst.gz").write_bytes(gzip.compress(b"a text\n" * 60))
    (doc / "page.html").write_text(PAGE)
    (doc / "twin.html").write_text(PAGE)
    (doc / "twin.md").write_text("# twin\n" * 60)
    (doc / "latin.txt").write_bytes(b"\xe9" * 300)
    (doc / "tiny.txt").write_text("x")
    (doc / "copyright").write_text("c" * 300)
    (doc / "link.txt").symlink_to("a.rst.gz")
    (man / "x.3.gz").write_bytes(gzip.compress(MANUAL.encode()))
    subprocess.run(["dpkg-deb", "--build", "-Znone", "tree", f"{name}_1.2-3_all.deb"], cwd=directory, check=True, capture_output=True)
    return directory / f"{name}_1.2-3_all.deb"


@pytest.mark.skipif(not shutil.which("dpkg-deb"), reason="dpkg-deb is not on this machine")
def test_debian_package_becomes_documents_with_version_and_hash(tmp_path, monkeypatch):
    archive = make_package(tmp_path)
    real = subprocess.run

    def run(command, **options):
        if command[0] == "apt-get":
            shutil.copy(archive, options["cwd"])
            command = ["true"]
        return real(command, **options)

    monkeypatch.setattr(fetch.subprocess, "run", run)
    out = tmp_path / "out"
    assert cli.main(["fetch", "debian-docs", "--package", "docs", "--out", str(out)]) == 0
    records = [json.loads(line) for line in (out / "docs.jsonl").read_text().splitlines()]
    names = ("doc/docs/a.rst.gz", "doc/docs/page.html", "doc/docs/twin.md", "man/man3/x.3.gz")
    assert [r["id"] for r in records] == [f"docs/usr/share/{n}" for n in names]
    assert {r["version"] for r in records} == {"1.2-3"} and all(len(r["sha256"]) == 64 for r in records)
    assert records[1]["text"].startswith("Title\n\nSome & more\n") and "no" not in records[1]["text"]
    assert "does y" in records[3]["text"] and "comment" not in records[3]["text"]
    corpus = tmp_path / "corpus"
    arguments = ["--vocab-size", "310", "--seq-len", "8", "--heldout-every", "0", "--workers", "1"]
    assert cli.main(["tokenize", str(out), "--out", str(corpus), *arguments]) == 0
    (source,) = json.loads((corpus / "manifest.json").read_bytes())["sources"]
    assert (source["name"], source["version"]) == ("docs", "1.2-3")


def test_missing_tool_says_what_is_needed(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert cli.main(["fetch", "debian-docs", "--package", "docs", "--out", str(tmp_path / "out")]) == 2
    assert "apt-get is not on this machine; this recipe needs a Debian machine" in capsys.readouterr().err


def test_missing_huggingface_hub_says_what_to_do(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert cli.main(["fetch", "fineweb-edu", "--out", str(tmp_path / "out")]) == 2
    assert "pip install huggingface_hub; or download parquet files" in capsys.readouterr().err


def test_no_network_says_what_to_do(tmp_path, monkeypatch, capsys):
    hub = pytest.importorskip("huggingface_hub")

    def fail(self, *arguments):
        raise OSError("Name or service not known\nand more")

    monkeypatch.setattr(hub.HfApi, "dataset_info", fail)
    assert cli.main(["fetch", "fineweb-edu", "--out", str(tmp_path / "out")]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "cannot download HuggingFaceFW/fineweb-edu: Name or service not known; check the network" in line
