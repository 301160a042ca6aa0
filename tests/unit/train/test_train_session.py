"""What a session leaves beside its steps: the status of a finished run that is started again, and the code it ran."""

import json
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest

from hope_pt.checkpoint import Checkpoint
from hope_pt.engine import Launch
from hope_pt.testing.configs import tiny_run
from hope_pt.train import code, session


@pytest.mark.parametrize("before", [None, "", "[]", '{"state": "running"}'])
def test_a_finished_run_that_is_started_again_says_done(tmp_path, monkeypatch, before):
    """A batch script removes the status before every attempt, and takes a run without one for unfinished; a kill leaves any."""
    config = tiny_run().model_copy(update={"out": str(tmp_path)})
    newest = Checkpoint(step=config.train.steps, meta={}, path=tmp_path)
    monkeypatch.setattr(session.data, "open_source", lambda *_, **__: SimpleNamespace(fingerprint="", close=lambda: None))
    for name, returned in (("check", None), ("start", SimpleNamespace(dp_size=1)), ("stop", None)):
        monkeypatch.setattr(session.engine, name, lambda *_, returned=returned, **__: returned)
    monkeypatch.setattr(session, "_find", lambda *_, **__: newest)
    (tmp_path / config.name).mkdir()
    if before is not None:
        (tmp_path / config.name / "status.json").write_text(before)
    assert session.run(config, launch=Launch(attempt=3)).steps == config.train.steps
    said = json.loads((tmp_path / config.name / "status.json").read_text())
    expected = {"state": "done", "step": newest.step, "num_steps": newest.step, "checkpoint": newest.step, "attempt": 3}
    assert {key: said[key] for key in expected} == expected


def test_the_names_of_untracked_files_belong_to_the_code(tmp_path, monkeypatch):
    package = tmp_path / "hope_pt"
    package.mkdir()
    (package / "__init__.py").write_text("")

    def git(*arguments: str) -> None:
        subprocess.run(
            ["git", "-C", str(tmp_path), "-c", "user.name=x", "-c", "user.email=x@x", *arguments], check=True, capture_output=True
        )

    git("init")
    git("add", ".")
    git("commit", "-m", "x")
    monkeypatch.setattr(code, "PACKAGE", package)
    version = code.code_version()
    assert code.code_text() == f"{version}\n"
    (package / "new.py").write_text("x = 1\n")
    (tmp_path / "shards").mkdir()
    for number in range(3):
        Path(tmp_path / "shards" / f"{number}.bin").write_text("")
    (package / "__init__.py").write_text("y = 2\n")
    text = code.code_text()
    assert text.startswith(f"{version}+changes\nuntracked: hope_pt/new.py\nuntracked: shards/\ndiff --git"), text
