"""wandb against a stand-in for the package: explicit steps, a stable id, offline by default, one-line errors, each step sent once."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hope_pt import cli
from hope_pt.config import to_toml
from hope_pt.config.schema import TrackConfig
from hope_pt.errors import ConfigError, HopeError
from hope_pt.report.tracking import open_wandb, run_id, segments, sync_commands, upload
from hope_pt.testing.configs import tiny_run


class FakeWandb:
    """Remembers what it is told; `refuse` makes `init` fail as wandb does without a key; `history` has what the server holds.

    The server drops steps that are not newer than its newest, as wandb's does.
    """

    def __init__(self, *, refuse: bool = False, dies_at: int | None = None):
        self.calls: list[tuple] = []
        self.history: dict[int, dict] = {}
        self._refuse, self._dies_at = refuse, dies_at

    @property
    def starting_step(self):
        return max(self.history, default=-1) + 1

    def init(self, **options):
        if self._refuse:
            raise RuntimeError("api_key not configured\n(no-tty)")
        self.calls.append(("init", options))
        return self

    def log(self, values, *, step):
        if step == self._dies_at:
            raise ConnectionResetError("Connection lost")
        self.calls.append(("log", step, values))
        if step >= max(self.history, default=0):
            self.history.setdefault(step, {}).update(values)

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
    with pytest.raises(ConfigError, match="wandb in mode .offline. refused .api_key not configured .no-tty.*track.wandb = false") as caught:
        open_wandb(tiny_run(), directory=tmp_path, module=FakeWandb(refuse=True))
    assert "\n" not in str(caught.value)


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match="wandb is not installed"):
        open_wandb(tiny_run(), directory=tmp_path)


def test_a_tracker_that_dies_costs_a_warning_and_nothing_else(tmp_path, caplog):
    """A signal to all processes of a job ends wandb's own, and the run has lines to write after it."""
    fake = FakeWandb(dies_at=3)
    sink = open_wandb(tiny_run(), directory=tmp_path, module=fake)
    for step in range(1, 7):
        sink.write(step=step, values={"loss": 1.0})
    sink.close()
    assert [call[1] for call in fake.calls if call[0] == "log"] == [1, 2]
    assert [
        record.getMessage() for record in caplog.records if "wandb is gone (ConnectionResetError: Connection lost)" in record.getMessage()
    ]
    assert len(caplog.records) == 1


def test_what_wandb_starts_does_not_see_the_signals_that_stop_a_run(tmp_path):
    class Starts(FakeWandb):
        def init(self, **options):
            self.process = subprocess.Popen([sys.executable, "-c", "import time; print('up', flush=True); time.sleep(30)"], stdout=-1)
            self.process.stdout.readline()
            return super().init(**options)

    fake = Starts()
    open_wandb(tiny_run(), directory=tmp_path, module=fake)
    for number in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM):
        fake.process.send_signal(number)
    with pytest.raises(subprocess.TimeoutExpired):
        fake.process.wait(timeout=0.5)
    fake.process.kill()
    fake.process.wait()
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, []) & {signal.SIGUSR1, signal.SIGTERM}


def write_metrics(path: Path, steps: range) -> None:
    lines = [{"step": step, "loss": 5.0 - step / 100} for step in steps]
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_every_step_is_sent_once_in_order(tmp_path):
    """Sent while the run goes on, then after a crash took it back from 9 to 5 and it ran to 12."""
    fake = FakeWandb()
    write_metrics(tmp_path, range(1, 10))
    assert upload(tiny_run(), directory=tmp_path, finished=False, module=fake) == list(range(1, 9))
    write_metrics(tmp_path, range(1, 13))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 12, "eval/loss": 4.0}\n{"step": 13, "lo')
    assert upload(tiny_run(), directory=tmp_path, finished=True, module=fake) == [9, 10, 11, 12]
    assert upload(tiny_run(), directory=tmp_path, finished=True, module=fake) == []
    assert [call[1] for call in fake.calls if call[0] == "log"] == list(range(1, 13))
    assert fake.history[12] == {"loss": 4.88, "eval/loss": 4.0}
    (_, options) = fake.calls[0]
    assert options["mode"] == "online" and options["resume"] == "allow" and options["id"] == run_id(tiny_run(), directory=tmp_path)
    assert not (tmp_path / "wandb").exists()


def test_a_network_that_goes_half_way_is_one_line_and_the_rest_goes_next_time(tmp_path):
    write_metrics(tmp_path, range(1, 6))
    fake = FakeWandb(dies_at=4)
    with pytest.raises(HopeError, match="wandb failed .ConnectionResetError: Connection lost.; run the same command again"):
        upload(tiny_run(), directory=tmp_path, finished=True, module=fake)
    fake._dies_at = None
    assert upload(tiny_run(), directory=tmp_path, finished=True, module=fake) == [4, 5]


@pytest.mark.parametrize(
    ("state", "age", "sent"),
    [
        ("running", 0.0, "1 steps: 1 to 1"),
        ("running", 4000.0, "2 steps: 1 to 2"),
        ("failed", 0.0, "2 steps: 1 to 2"),
        ("diverged", 0.0, "2 steps: 1 to 2"),
        ("interrupted", 0.0, "2 steps: 1 to 2"),
        ("stopped", 0.0, "2 steps: 1 to 2"),
    ],
)
def test_only_a_run_that_goes_on_keeps_its_newest_step(tmp_path, monkeypatch, capsys, state, age, sent):
    """What a run that diverged did last is what one wants to see."""
    write_metrics(tmp_path, range(1, 3))
    (tmp_path / "config.toml").write_text(to_toml(tiny_run()))
    (tmp_path / "status.json").write_text(json.dumps({"state": state, "time": time.time() - age}))
    monkeypatch.setitem(sys.modules, "wandb", FakeWandb())
    assert cli.main(["launch", "wandb", str(tmp_path), "--upload"]) == 0
    assert capsys.readouterr().out == f"sent {sent}\n"


SESSIONS = ("offline-run-20261121_185642-0ca9", "offline-run-20261120_235959-0ca9", "offline-run-20261121_185632-0ca9")


def test_segments_are_in_order_and_the_command_follows_wandbs_version(tmp_path, capsys, monkeypatch):
    for name in (*SESSIONS, "latest-run"):
        (tmp_path / "wandb" / name).mkdir(parents=True)
    found = segments(tmp_path)
    assert [path.name for path in found] == sorted(SESSIONS)
    assert sync_commands(found, version="0.31.0") == [["wandb", "sync", "--id=0ca9", *map(str, found)]]
    old = sync_commands(found, version="0.21.4")
    assert [words[2:4] for words in old] == [["--id=0ca9", str(found[0])], ["--append", "--id=0ca9"], ["--append", "--id=0ca9"]]
    assert sync_commands([], version="") == []
    fake = FakeWandb()
    write_metrics(tmp_path, range(1, 3))
    upload(tiny_run(), directory=tmp_path, finished=True, module=fake)
    assert fake.calls[0][1]["id"] == "0ca9"

    assert cli.main(["launch", "wandb", str(tmp_path)]) == 2
    (tmp_path / "config.toml").write_text(to_toml(tiny_run()))
    assert cli.main(["launch", "wandb", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert [line for line in text.splitlines() if line[:2] in ("1.", "2.", "3.")] == [f"{n}. {path}" for n, path in enumerate(found, 1)]
    assert f"hope launch wandb {tmp_path} --upload" in text
    monkeypatch.setitem(sys.modules, "wandb", fake)
    fake.history.clear()
    assert cli.main(["launch", "wandb", str(tmp_path), "--upload"]) == 0
    assert capsys.readouterr().out == "sent 2 steps: 1 to 2\n"
