"""One rank killed, stopped or raising ends the job with that rank named: the short lane of tools/failure_trials.py, and Watch alone."""

import json
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from hope_pt.engine import peers
from hope_pt.engine.hangs import Report
from hope_pt.engine.hub import Hub, Limits, Link, Verdict
from hope_pt.engine.launch import Launch
from hope_pt.engine.peers import PeerError, Watch
from hope_pt.errors import ConfigError, DivergenceError, ParallelError
from hope_pt.testing import run_distributed

pytestmark = pytest.mark.distributed

ROOT = Path(__file__).parents[2]
LIMITS = Limits(beat_s=0.2, silent_s=2.0, unwind_s=1.0)
JOIN_S = 4.0


@pytest.fixture(scope="module")
def trials(tmp_path_factory):
    """Real jobs of `hope train`, 2 and 4 ranks: the outcomes by phase and action."""
    out = tmp_path_factory.mktemp("failures") / "result.json"
    command = [sys.executable, "-W", "ignore", "-m", "tools.failure_trials", "--trials", "short", "--parallel", "6", "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=110)
    assert out.exists(), done.stdout + done.stderr
    return {(found["trial"]["phase"], found["trial"]["action"]): found for found in json.loads(out.read_text())["trials"]}


@pytest.mark.timeout(130)
@pytest.mark.parametrize(
    ("phase", "action"),
    [
        ("before joining", "kill"),
        ("joining", "raise"),
        ("building the model", "kill"),
        ("reading data", "user"),
        ("forward", "stop"),
        ("collective", "kill"),
        ("optimizer", "raise"),
        ("saving", "kill"),
        ("evaluation", "raise"),
        ("shutdown", "kill"),
        ("any moment", "stop"),
    ],
)
def test_the_job_ends_within_30_s_and_every_other_rank_names_the_one_that_failed(trials, phase, action):
    found = trials.pop((phase, action))
    assert found["seconds"] is not None and found["seconds"] <= 30.0, found
    assert found["named"], found
    assert found["codes_right"], found
    assert found["orphans"] == 0, found


def tcp(launch: Launch) -> Launch:
    """The same place in a job that meets at a TCP port instead of a file, as real jobs do."""
    path = Path(launch.master_addr.removeprefix("file://") + ".port")
    if launch.rank == 0:
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
        path.with_suffix(".new").write_text(str(port))
        path.with_suffix(".new").rename(path)
    while not path.exists():
        time.sleep(0.01)
    port = int(path.read_text())
    return replace(launch, master_addr="127.0.0.1", master_port=port)


def watched(launch, work, meets):
    """`work(rank)` under a Watch; how it ended."""
    launch = replace(tcp(launch) if meets == "tcp" else launch, join_s=JOIN_S)
    try:
        with Watch(launch, limits=LIMITS):
            work(launch.rank)
    except Exception as error:
        return type(error).__name__, str(error), getattr(error, "exit_code", 1)
    return "done", "", 0


@pytest.mark.parametrize("meets", ["tcp", "file"])
def test_ranks_that_end_at_different_times_raise_no_alarm(meets):
    began = time.monotonic()
    results = run_distributed(watched, world_size=3, timeout_s=30, args=(lambda rank: time.sleep(3.0 * (rank == 1)), meets))
    assert results == [("done", "", 0)] * 3
    assert time.monotonic() - began > 3.0


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (ConfigError("optim.lr = -1; set it above 0"), 2, "optim.lr = -1; set it above 0"),
        (DivergenceError("step 7: loss = nan"), 93, "step 7: loss = nan"),
        (ValueError("two\nlines"), 1, "ValueError: two lines"),
    ],
)
def test_the_exit_code_and_the_message_of_the_failed_rank_are_those_of_all(error, code, text):
    def work(rank):
        if rank == 1:
            raise error
        # As a rank does whose collective breaks when another rank leaves it.
        time.sleep(0.3)
        raise RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed by peer")

    results = run_distributed(watched, world_size=3, timeout_s=30, args=(work, "tcp"))
    name = f"rank 1 of 3 ({socket.gethostname()}) failed: {text}"
    assert results[1] == (type(error).__name__, str(error), code)
    assert results[0] == results[2] == ("PeerError", name, code)


def test_a_collective_that_breaks_for_no_known_reason_becomes_the_failure_of_a_rank_that_saw_it():
    def work(rank):
        raise RuntimeError("gloo: Connection reset by peer")

    began = time.monotonic()
    results = run_distributed(watched, world_size=2, timeout_s=30, args=(work, "file"))
    # Not before every silent rank would have been named.
    assert LIMITS.silent_s < time.monotonic() - began < 10.0
    kinds = {kind for kind, _, _ in results}
    assert "RuntimeError" in kinds and kinds <= {"RuntimeError", "PeerError"}
    assert all("gloo: Connection reset by peer" in text for _, text, _ in results)


def test_a_rank_whose_main_thread_is_stuck_is_ended_with_the_line_on_its_standard_error(tmp_path):
    def rank_of(rank):
        child = os.fork()
        if child:
            return child
        os.dup2(os.open(tmp_path / f"rank-{rank}.log", os.O_CREAT | os.O_WRONLY), 2)
        launch = Launch(rank=rank, world_size=2, master_addr=f"file://{tmp_path / 'store'}", join_s=JOIN_S)
        try:
            with Watch(launch, limits=LIMITS):
                (tmp_path / f"{rank}-is-in").touch()
                while rank == 0 and not (tmp_path / "1-is-in").exists():
                    time.sleep(0.01)
                if rank == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                threading.Event().wait(60)
        finally:
            os._exit(70)

    children = [rank_of(rank) for rank in range(2)]
    began = time.monotonic()
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    assert codes == [-signal.SIGKILL, 1]
    assert time.monotonic() - began < 10.0
    line = (tmp_path / "rank-1.log").read_text().splitlines()[-1]
    assert line == f"hope: rank 0 of 2 ({socket.gethostname()}) was killed or crashed: its process is gone"


def test_a_rank_that_is_started_twice_is_named():
    def work(rank):
        time.sleep(0.5)
        raise RuntimeError("gloo: Connection reset by peer")

    def start(launch):
        return watched(replace(launch, rank=min(launch.rank, 1)), work, "file")

    results = run_distributed(start, world_size=3, timeout_s=30)
    host = socket.gethostname()
    assert results[0] == ("PeerError", f"rank 1 of 3 ({host}) was started twice: on {host} and on {host}", 1)


def test_a_rank_that_never_comes_is_named_by_all_others_after_the_join_limit_of_the_launch():
    def work(rank):
        # As a rank does whose process group never comes about.
        time.sleep(3.0)
        raise RuntimeError("gloo: timed out")

    def start(launch):
        return watched(replace(launch, world_size=3), work, "file")

    began = time.monotonic()
    results = run_distributed(start, world_size=2, timeout_s=30)
    assert JOIN_S < time.monotonic() - began < 15.0
    text = "rank 2 of 3 has not joined within 4 s (HOPE_JOIN_S): killed before it was heard, or never started"
    assert results == [("PeerError", text, 1)] * 2


def test_a_first_rank_that_never_comes_is_named_in_time():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    began = time.monotonic()
    with pytest.raises(ParallelError, match=rf"^rank 0 of 2 cannot be reached at 127.0.0.1:{port} within 4 s .*MASTER_ADDR"):
        Watch(Launch(rank=1, world_size=2, master_port=port, join_s=JOIN_S), limits=LIMITS).__enter__()
    assert 4.0 <= time.monotonic() - began < 8.0


@pytest.mark.parametrize(
    ("home_of_the_stopped_rank", "home_of_the_survivor", "killed"), [("a", "a", True), ("a", "b", False), ("", "a", False), ("", "", False)]
)
def test_a_stopped_process_is_killed_only_from_where_its_number_is_known_to_be_its_own(
    monkeypatch, home_of_the_stopped_rank, home_of_the_survivor, killed
):
    monkeypatch.setattr(peers, "home", lambda: home_of_the_survivor)
    monkeypatch.setattr(os, "_exit", sys.exit)
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        survivor = Watch(Launch(rank=1, world_size=2), limits=Limits(beat_s=0.01, unwind_s=0.01))
        with pytest.raises(SystemExit):
            survivor._end(Verdict(0, "rank 0 has been silent", home=home_of_the_stopped_rank, pid=process.pid))
        if not killed:
            assert process.poll() is None
            process.communicate(b"\n")
    assert process.returncode == (-signal.SIGKILL if killed else 0)


def test_the_hub_of_a_thousand_ranks_hears_all_of_them_and_names_the_one_that_is_gone():
    size = 1100
    if resource.getrlimit(resource.RLIMIT_NOFILE)[0] < 2 * size + 200:
        pytest.skip("this process may not open enough files")
    hub = Hub(size, limits=Limits(), join_s=30.0)
    thread = threading.Thread(target=hub.run, daemon=True)
    thread.start()
    links = [Link(socket.create_connection(("127.0.0.1", hub.port))) for _ in range(size)]
    for rank, link in enumerate(links):
        link.send(hello=rank, token=hub.token, host="", home="", pid=0)
    assert all("welcome" in link.receive(timeout_s=10.0)[0] for link in links)
    for link in links:
        link.send(report=asdict(report("engine.step")))
    links[700].send(report=asdict(report("nn.titans")))
    links[700].close()
    texts = [wait_for_verdict(link) for link in links[:700] + links[701:]]
    assert set(texts) == {"rank 700 of 1100 was killed or crashed: its process is gone; last seen in nn.titans"}
    for link in links:
        link.send(done=True)
        link.close()


def wait_for_verdict(link):
    while True:
        for message in link.receive(timeout_s=10.0):
            if "verdict" in message:
                return message["verdict"]["text"]


def report(place):
    return Report(phase="step", step=3, seconds=0, place=place, place_s=0, collective=False, expired=False)


def test_one_process_has_a_thread_as_long_as_it_is_watched_and_its_errors_pass_unchanged():
    before = threading.active_count()
    with Watch(Launch(), limits=LIMITS) as watch:
        assert threading.active_count() == before + 1
    time.sleep(2 * LIMITS.beat_s)
    assert threading.active_count() == before
    with pytest.raises(RuntimeError, match="^gloo broke$"), watch, watch.reporting():
        raise RuntimeError("gloo broke")


def test_a_verdict_is_one_error_with_the_exit_code_of_the_cause():
    error = PeerError(Verdict(3, "rank 3 of 8 (node7) failed: no", code=2))
    assert isinstance(error, ParallelError) and str(error) == "rank 3 of 8 (node7) failed: no" and error.exit_code == 2
    assert PeerError(Verdict(3, "gone")).exit_code == 1
