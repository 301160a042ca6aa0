"""What a run is doing, read from its directory and the scheduler by somebody outside it: `hope launch status`, `watch`, `cancel`.

In: status.json, metrics.jsonl, slurm/attempts and slurm/owner (slurm/lib/attempts.sh) and the names of the checkpoints. Nothing is
written and torch is not needed, so it works on a login node and from cron.
"""

import json
import re
import statistics
import subprocess
import time
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from pathlib import Path

from hope_pt.errors import ConfigError, HopeError
from hope_pt.files import read_object

STALL_S = 1800.0
"""Seconds without a sign of life after which a run is taken for dead."""
RECENT = 50
"""Training lines that speed and time left are taken from."""
_TAIL_BYTES = 1 << 18
_FINAL = ("give-up", "never", "nodes", "user", "vanished")
"""Actions of slurm/lib/decide.sh after which only a person starts the run again."""


@dataclass(frozen=True)
class RunStatus:
    """state: of status.json, with "starting" and "unknown" where there is none. eta_s: seconds to the last step.

    reason: who asked a stopped run to stop (usr1, usr2, term, stop). attempt: how often a job has started the run, counting this time.
    skips: steps dropped since the run began. silent_s: seconds since the last sign of life. job: id and state in the queue. restarts:
    attempts after the first. mfu: share of the GPUs' bf16 rate, where the run's GPUs are known. hang: first line of the watchdog's report,
    where this attempt has one. problem: what a person should look at, empty if nothing. over: nothing will change by itself.
    """

    name: str
    state: str
    reason: str
    attempt: int
    step: int
    num_steps: int
    loss: float | None
    tokens_per_s: float | None
    mfu: float | None
    eta_s: float | None
    skips: int
    checkpoint: int
    restarts: int
    job: str
    silent_s: float | None
    message: str
    hang: str
    problem: str
    over: bool

    def as_dict(self) -> dict:
        """For programs."""
        return asdict(self)


def run_status(path: Path, *, stall_s: float = STALL_S, flops_rate: float | None = None, now: float | None = None) -> RunStatus:
    """The state of the run in `path`. Without a sign of life for `stall_s` seconds a running run is a problem.

    flops_rate: FLOPs of a token over FLOP/s of all GPUs, whose product with tokens/s is the MFU; None: unknown. Raises ConfigError where
    there is no run.
    """
    if not path.is_dir():
        raise ConfigError(f"{path}: no such run directory")
    now = time.time() if now is None else now
    said, lines = read_object(path / "status.json"), recent_lines(path / "metrics.jsonl")
    last = lines[-1] if lines else {}
    attempts = read_attempts(path)
    owner, sign = owner_state(path), max(said.get("time", 0.0), last.get("time", 0.0))
    # A start is a sign of life too: what hangs before its first step has written nothing else.
    alive = max(sign, start_time(attempts))
    starts = sum(one["what"] == "start" for one in attempts)
    step, num_steps = max(last.get("step", 0), said.get("step", 0)), said.get("num_steps", 0)
    speeds = [line["tokens_per_s"] for line in lines if line.get("tokens_per_s")]
    speed = statistics.median(speeds) if speeds else None
    seconds = _step_seconds(lines)
    silent = now - alive if alive else None
    state = said.get("state") or ("starting" if owner else "unknown")
    # A run that hangs while it closes has all that it was to have.
    hang = "" if state in ("done", "stopped") else hang_report(path, last_sign=alive)
    # A run whose checkpoints lie elsewhere says its last one in status.json only.
    saved = max(committed_step(path), said.get("checkpoint", 0))
    found = RunStatus(
        name=path.name,
        state=state,
        reason=said.get("reason", ""),
        attempt=max(said.get("attempt", 0), starts),
        step=step,
        num_steps=num_steps,
        loss=last.get("loss"),
        tokens_per_s=speed,
        mfu=speed * flops_rate if speed and flops_rate else None,
        eta_s=seconds * max(num_steps - step, 0) if seconds and num_steps else None,
        skips=last.get("skips", 0),
        checkpoint=saved,
        restarts=max(starts - 1, 0),
        job=owner,
        silent_s=silent,
        message=said.get("message", ""),
        hang=hang,
        problem="",
        over=False,
    )
    found = replace(found, over=_is_over(found, path=path, attempts=attempts))
    return replace(found, problem=_problem(found, path=path, attempts=attempts, stall_s=stall_s))


def has_ended(path: Path, *, now: float | None = None) -> bool:
    """Whether this session of the run will write no more lines: status.json says how it ended, or there is no sign of life."""
    said, lines = read_object(path / "status.json"), recent_lines(path / "metrics.jsonl")
    if said.get("state", "running") != "running":
        return True
    sign = max(one.get("time", 0.0) for one in (said, *lines[-1:]))
    return (time.time() if now is None else now) - sign > STALL_S


def _is_over(found: RunStatus, *, path: Path, attempts: list[dict[str, str]]) -> bool:
    """All steps taken, stopped by a person, diverged, or failed with no job to start it again."""
    if found.state == "failed":
        return not attempts or (not found.job and _queue_is_without(path))
    if found.state == "stopped" and found.reason in ("term", "stop"):
        # SIGTERM may be Slurm's too: of a preemption, or of the time limit.
        action = attempts[-1].get("action", "") if attempts else "stopped"
        return action == "stopped" or (action in ("", "leave") and not found.job)
    return found.state in ("done", "diverged", "interrupted")


def _has_job(found: RunStatus) -> bool:
    return bool(found.job) and not found.job.endswith("(unknown)")


def _problem(found: RunStatus, *, path: Path, attempts: list[dict[str, str]], stall_s: float) -> str:
    """The first that is true, the most telling first."""
    if found.hang:
        return found.hang
    ends = [one for one in attempts if one["what"] == "end"]
    if ends and ends[-1].get("action") in _FINAL and attempts[-1] is ends[-1]:
        return f"the last attempt ended with {ends[-1]['action']!r}: it will not start again by itself"
    if found.state == "unknown" and not attempts and not found.step and _queue_is_without(path):
        return "no run has begun here, and no job of that name waits"
    if found.over:
        return f"the run has {found.state}" if found.state in ("failed", "diverged") else ""
    if attempts and not found.job and _queue_is_without(path):
        left = found.num_steps - found.checkpoint
        missing = f"{left} steps are" if left > 0 else "the end of the run is"
        return f"{missing} missing and no job has the run: it will not start again by itself"
    waits = found.job.endswith(("(PENDING)", "(CONFIGURING)"))
    if (found.state == "running" or _has_job(found)) and not waits and found.silent_s is not None and found.silent_s > stall_s:
        return f"no sign of life for {found.silent_s:.0f} s"
    recent = [one for one in ends[-3:] if one.get("action") == "requeue"]
    if len(recent) == 3 and len({one.get("step") for one in recent}) == 1:
        return "three restarts at the same committed step"
    return ""


def _queue_is_without(path: Path) -> bool:
    """Whether Slurm says that no job of the run runs or waits; where it cannot be asked nobody knows."""
    try:
        return not jobs_of(path)
    except HopeError:
        return False


def recent_lines(file: Path) -> list[dict]:
    """The last training lines of a metrics.jsonl, however long it is."""
    try:
        with file.open("rb") as opened:
            opened.seek(max(file.stat().st_size - _TAIL_BYTES, 0))
            raw = opened.read().decode(errors="replace").splitlines(keepends=True)
    except OSError:
        return []
    found = []
    for line in raw:
        try:
            one = json.loads(line)
        except ValueError:
            # The first line of the tail may be cut, the last one unfinished.
            continue
        if isinstance(one, dict) and "loss" in one and "step" in one:
            found.append(one)
    return found[-RECENT:]


def read_attempts(path: Path) -> list[dict[str, str]]:
    """Lines of slurm/attempts: `what` (start or end), `attempt`, and their keys."""
    try:
        lines = (path / "slurm" / "attempts").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        words = line.split()
        if len(words) > 2 and words[0] in ("start", "end"):
            found.append({"what": words[0], "attempt": words[1], **dict(word.split("=", 1) for word in words[2:] if "=" in word)})
    return found


def start_time(attempts: list[dict[str, str]]) -> float:
    """When a batch job last started the run, in seconds since the epoch; 0 where none did."""
    starts = [one["time"] for one in attempts if one["what"] == "start" and "time" in one]
    try:
        return datetime.fromisoformat(starts[-1]).timestamp() if starts else 0.0
    except ValueError:
        # A line torn by a full disk.
        return 0.0


def hang_report(path: Path, *, last_sign: float) -> str:
    """What the watchdog says of a hang of this attempt, without its time; empty if there is none, or only one of an earlier attempt.

    last_sign: time of the newest start, step or status, which after the hang is a new session's.
    """
    file = path / "logs" / "hang.txt"
    try:
        if file.stat().st_mtime < last_sign:
            return ""
        return file.read_text(encoding="utf-8").partition("\n")[0].partition("  ")[2]
    except OSError:
        return ""


def committed_step(path: Path) -> int:
    """Step of the newest checkpoint directory, 0 before the first; nothing is verified."""
    steps = [int(found[1]) for one in path.glob("checkpoints/step-*") if (found := re.fullmatch(r"step-(\d+)", one.name))]
    return max(steps, default=0)


def owner_state(path: Path) -> str:
    """Id and state of the job that owns the run, for example job 12 (RUNNING); empty if none that still exists does."""
    try:
        owner = (path / "slurm" / "owner").read_text(encoding="utf-8").strip()
    except OSError:
        return ""
    state = job_state(owner)
    return f"job {owner} ({state})" if state else ""


def job_state(job: str) -> str:
    """State of a job in the queue, empty for one that has left it, "unknown" where the scheduler does not answer."""
    try:
        done = subprocess.run(["squeue", "--noheader", "--format=%T", f"--jobs={job}"], capture_output=True, text=True, timeout=15)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    if done.returncode:
        return "" if "Invalid job id" in done.stderr else "unknown"
    return done.stdout.strip()


def jobs_of(path: Path) -> list[str]:
    """Jobs in the queue that belong to a run: its owner, and what waits under the name `hope launch submit` gives.

    Raises HopeError where Slurm does not answer.
    """
    found = []
    owner = path / "slurm" / "owner"
    if owner.exists() and job_state(job := owner.read_text(encoding="utf-8").strip()):
        found.append(job)
    chains = {one["job"].rpartition(".")[0] for one in read_attempts(path) if one.get("job", "").startswith("hope-chain-")}
    for name in (job_name(path.name), *sorted(chains)):
        found += [job for job in _queued(name) if job not in found]
    return found


def _queued(name: str) -> list[str]:
    """The user's jobs of that name."""
    command = ["squeue", "--noheader", "--me", "--format=%i", f"--name={name}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=15)
    except FileNotFoundError:
        raise HopeError("squeue is not installed here; run this on a machine of the cluster") from None
    except subprocess.TimeoutExpired:
        raise HopeError("squeue has not answered for 15 s; is the scheduler up?") from None
    if done.returncode:
        raise HopeError(f"squeue refused: {' '.join(done.stderr.split())}")
    return done.stdout.split()


def job_name(run: str) -> str:
    """Name of the jobs of a run."""
    return f"hope-{run}"


def _step_seconds(lines: list[dict]) -> float | None:
    """Median seconds between consecutive steps of one session."""
    pairs = zip(lines, lines[1:], strict=False)
    found = [b["time"] - a["time"] for a, b in pairs if "time" in a and "time" in b and b["step"] == a["step"] + 1]
    return statistics.median(found) if found else None
