"""A Slurm of virtual nodes on this machine (tools/onebox_slurm), and one training run on it; for the trials and for tests/slurm."""

import contextlib
import os
import random
import re
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
ONEBOX = ROOT / "tools" / "onebox_slurm"
CANNOT = 77


class CannotStart(Exception):
    """This machine cannot have such a cluster; the message says what is missing."""


class NotInTime(AssertionError):
    """What was awaited did not happen."""


@dataclass
class Cluster:
    """A running cluster; `environment` is that of everything submitted to it."""

    directory: Path
    environment: dict[str, str] = field(default_factory=dict)
    lost: dict[str, list[int]] = field(default_factory=dict)
    """Nodes that are gone, and what is left of their processes."""

    def run(self, *command: object, check: bool = True, **environment: str) -> subprocess.CompletedProcess:
        """A Slurm command, from a directory that is not the repository."""
        return subprocess.run(
            [str(word) for word in command],
            cwd=self.directory,
            env=self.environment | environment,
            capture_output=True,
            text=True,
            check=check,
            timeout=60,
        )

    def job(self, number: str) -> dict[str, str]:
        """What scontrol says of a job, by key."""
        said = self.run("scontrol", "show", "job", number).stdout
        return dict(word.split("=", 1) for word in said.split() if "=" in word)

    def queue(self) -> list[str]:
        """Jobs that are not finished: pending, running, completing."""
        return self.run("squeue", "--noheader", "--format=%i").stdout.split()

    def node_states(self) -> dict[str, str]:
        """State of every node."""
        return dict(line.split() for line in self.run("sinfo", "-h", "-p", "low", "-N", "-o", "%N %t").stdout.splitlines())

    def start_node(self, name: str) -> None:
        """A new slurmd in place of one that a test killed, in namespaces of its own."""
        mounts = 'mount --make-rprivate / && mount --bind "$1/etc/hosts" /etc/hosts'
        script = mounts + ' && hostname "$2" && exec slurmd -N "$2" -f "$1/etc/slurm.conf"'
        self.run("unshare", "-m", "-u", "bash", "-c", script, "onebox", self.directory, name)
        self.run("scontrol", "update", f"NodeName={name}", "State=RESUME", check=False)
        wait(lambda: self.node_states().get(name) == "idle", seconds=30, what=f"node {name} to be idle")

    def start_controller(self) -> None:
        """A new slurmctld in place of one that a test killed; it reads its state again."""
        self.run("slurmctld", "-f", self.directory / "etc" / "slurm.conf")

    def clear(self) -> None:
        """Ends all jobs, and brings back the nodes that are lost."""
        self.run("scancel", "--full", "--signal=KILL", "--state=RUNNING", "--user=root", check=False)
        self.run("scancel", "--user=root", check=False)
        wait(lambda: not self.queue(), seconds=60, what="the queue to be empty")
        for name in list(self.lost):
            for pid in self.lost.pop(name):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            self.start_node(name)

    def kill_daemon(self, name: str) -> None:
        """Kill -9 of slurmctld or slurmd.NODE."""
        os.kill(int((self.directory / "run" / f"{name}.pid").read_text()), signal.SIGKILL)


@dataclass
class Run:
    """One training run on the cluster; `command` is its trainer."""

    cluster: Cluster
    path: Path
    command: str
    root: Path = ROOT
    jobs: list[str] = field(default_factory=list)

    @property
    def log(self) -> str:
        """What all jobs of this run printed."""
        return "".join(path.read_text(errors="replace") for path in sorted(self.path.parent.glob("job-*.log")))

    @property
    def attempts(self) -> list[str]:
        """The run's record of attempts."""
        record = self.path / "slurm" / "attempts"
        return record.read_text().splitlines() if record.exists() else []

    @property
    def actions(self) -> list[str]:
        """How the attempts ended."""
        return [action for line in self.attempts if line.startswith("end") for action in re.findall(r"action=([\w-]+)", line)]

    def options(self, *, nodes: int = 2, tasks: int = 2) -> list[str]:
        """Options of sbatch for a small job."""
        shape = [f"--nodes={nodes}", f"--ntasks-per-node={tasks}", f"--gres=gpu:{tasks}", "--cpus-per-task=1", "--mem=0"]
        return [*shape, f"--output={self.path.parent}/job-%j.log"]

    def submit(
        self,
        *arguments: str,
        options: tuple[str, ...] = (),
        shape: dict[str, int] | None = None,
        script: str = "hope_1p3b.sh",
        **environment: str,
    ) -> str:
        """Submits and returns the job's number."""
        place = [f"name={self.path.name}", f"out={self.path.parent}"]
        settings: dict[str, Any] = {"HOPE_COMMAND": self.command, "HOPE_PREFLIGHT": "0", "HOPE_CLUSTER": "onebox"} | environment
        words = ["sbatch", "--parsable", *self.options(**(shape or {})), *options, ROOT / "slurm" / script, *arguments, *place]
        number = self.cluster.run(*words, **settings).stdout.strip()
        self.jobs.append(number)
        return number

    def wait(self, number: str, *, seconds: float = 60) -> str:
        """Waits until the job has left the queue for good, and returns its last state."""
        wait(lambda: number not in self.cluster.queue(), seconds=seconds, what=f"job {number} to end", shown=lambda: self.log)
        return self.cluster.job(number)["JobState"]

    def wait_for_queue(self, *, seconds: float = 60) -> None:
        """Waits until the queue is empty."""
        wait(lambda: not self.cluster.queue(), seconds=seconds, what="the queue to be empty", shown=lambda: self.log)

    def wait_for_log(self, text: str, *, times: int = 1, seconds: float = 60) -> None:
        """Waits until the jobs have printed `text`."""
        wait(lambda: self.log.count(text) >= times, seconds=seconds, what=f"{text!r} x {times} in the log", shown=lambda: self.log)

    def wait_for_step(self, step: int, *, seconds: float = 60) -> None:
        """Waits until the metrics have this step."""
        file = self.path / "metrics.jsonl"
        wait(
            lambda: file.exists() and f'"step": {step},' in file.read_text(),
            seconds=seconds,
            what=f"step {step}",
            shown=lambda: self.log,
        )

    def processes(self) -> list[int]:
        """Process ids of the trainers that run now."""
        found = []
        for status in Path("/proc").glob("[0-9]*/environ"):
            try:
                environment = status.read_bytes()
                command = (status.parent / "cmdline").read_bytes()
            except OSError:
                continue
            ours = f"HOPE_RUN_DIR={self.path}\0".encode() in environment and b"SLURM_PROCID=" in environment
            if ours and b"\0train\0" in command and b"task.sh" not in command and b"srun" not in command:
                found.append(int(status.parent.name))
        return sorted(found)

    def lose_node(self, name: str) -> None:
        """As its machine does, without a word: kill -9 of its slurmd, and SIGSTOP for this run's ranks there and what started them."""
        self.cluster.kill_daemon(f"slurmd.{name}")
        stopped = self.cluster.lost[name] = []
        for pid in self.processes():
            if f"SLURMD_NODENAME={name}\0".encode() in Path(f"/proc/{pid}/environ").read_bytes():
                stopped += [int(Path(f"/proc/{pid}/stat").read_text().split()[3]), pid]
        for pid in stopped:
            os.kill(pid, signal.SIGSTOP)


def wait(condition: Callable[[], bool], *, seconds: float, what: str, shown: Callable[[], str] = lambda: "") -> None:
    """Polls; raises NotInTime with what was awaited."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise NotInTime(f"waited {seconds} s for {what}\n{shown()}")
        time.sleep(0.1)


@contextlib.contextmanager
def started(*, nodes: int) -> Iterator[Cluster]:
    """A cluster of its own for the block. CannotStart where the machine has no Slurm."""
    directory = Path(tempfile.mkdtemp(prefix="hope-slurm-"))
    options = ["--nodes", nodes, "--port", _free_port(nodes + 1)]
    command = [ONEBOX / "start.sh", "--dir", directory, *options]
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    if done.returncode == CANNOT:
        directory.rmdir()
        raise CannotStart(done.stderr.strip())
    assert done.returncode == 0, done.stderr
    # Nothing of a surrounding job or run may reach the jobs.
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM_", "SBATCH_", "HOPE_", "FAKE_", "TRIAL_"))}
    try:
        yield Cluster(directory, kept | {"SLURM_CONF": str(directory / "etc" / "slurm.conf")})
    finally:
        subprocess.run([ONEBOX / "stop.sh", "--dir", directory, "--remove"], timeout=90)


def _free_port(count: int) -> int:
    """First of some free ports in a row, below those that outgoing connections take."""
    while True:
        port = random.randrange(7000, 16000)
        if all(_is_free(port + offset) for offset in range(count)):
            return port


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) != 0
