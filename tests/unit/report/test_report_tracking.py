"""The wandb sink against a stand-in for the package: explicit steps, a stable id, offline by default, one-line errors."""

import sys
from pathlib import Path

import pytest

from hope_pt.config.schema import TrackConfig
from hope_pt.errors import ConfigError
from hope_pt.report.tracking import open_wandb, run_id
from hope_pt.testing.configs import tiny_run


class FakeWandb:
    """Remembers what it is told; `refuse` makes `init` fail as wandb does without a key."""

    def __init__(self, *, refuse: bool = False):
        self.calls: list[tuple] = []
        self._refuse = refuse

    def init(self, **options):
        if self._refuse:
            raise RuntimeError("api_key not configured\n(no-tty)")
        self.calls.append(("init", options))
        return self

    def log(self, values, *, step):
        self.calls.append(("log", step, values))

    def finish(self):
        self.calls.append(("finish",))


def test_lines_carry_their_own_steps_and_the_run_is_offline(tmp_path):
    fake = FakeWandb()
    sink = open_wandb(tiny_run(), directory=tmp_path, module=fake)
    sink.write(step=7, values={"loss": 1.5})
    sink.write(step=7, values={"eval/loss": 2.5})
    sink.sync()
    sink.close()
    (_, options), *rest = fake.calls
    assert options["mode"] == "offline" and options["resume"] == "allow" and options["dir"] == str(tmp_path)
    assert options["id"] == run_id(tiny_run(), directory=tmp_path) and options["config"]["optim"]["lr"] == 0.01
    assert rest == [("log", 7, {"loss": 1.5}), ("log", 7, {"eval/loss": 2.5}), ("finish",)]


def test_the_id_is_the_runs_and_survives_a_harmless_change(tmp_path):
    config = tiny_run()
    changed = config.model_copy(update={"track": TrackConfig(wandb=True, wandb_mode="online")})
    assert run_id(config, directory=tmp_path) == run_id(changed, directory=tmp_path)
    assert run_id(config, directory=tmp_path) != run_id(config, directory=Path("elsewhere"))


def test_a_refusal_is_one_line_that_says_what_to_do(tmp_path):
    with pytest.raises(ConfigError, match="wandb refused .api_key not configured .no-tty.*track.wandb = false") as caught:
        open_wandb(tiny_run(), directory=tmp_path, module=FakeWandb(refuse=True))
    assert "\n" not in str(caught.value)


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match="wandb is not installed"):
        open_wandb(tiny_run(), directory=tmp_path)
