"""The manifest of a checkpoint: step, and size and sha256 of every file; it carries its own sha256.

`verify` accepts a directory only if its name, the manifest and all bytes agree, so a flipped byte, a truncated, missing or exchanged
file, and a directory under another step's name are each an error that says which.
"""

import hashlib
import json
from pathlib import Path

from hope_pt.checkpoint.files import write_text
from hope_pt.errors import CheckpointError

MANIFEST = "manifest.json"
FORMAT = 1


def directory_name(step: int) -> str:
    """Name of the committed directory of a step."""
    return f"step-{step:08d}"


def step_of(path: Path) -> int | None:
    """Step of a committed directory, or None for any other path."""
    prefix, _, digits = path.name.partition("-")
    if prefix == "step" and digits.isdigit() and path.name == directory_name(int(digits)) and path.is_dir():
        return int(digits)
    return None


def list_steps(root: Path) -> list[int]:
    """Steps that have a committed directory in `root`, ascending, unverified."""
    steps = [step_of(path) for path in root.glob("step-*")]
    return sorted(step for step in steps if step is not None)


def write_manifest(directory: Path, *, step: int) -> None:
    """Hashes every file of `directory` and writes its manifest."""
    files = {path.name: {"bytes": path.stat().st_size, "sha256": _sha256(path)} for path in sorted(directory.iterdir())}
    write_text(directory / MANIFEST, text=_render({"format": FORMAT, "step": step, "files": files}))


def verify(directory: Path) -> None:
    """Reads every byte of a committed checkpoint; raises CheckpointError naming the first thing that is wrong."""
    try:
        payload = _read(directory)
        if payload["step"] != step_of(directory):
            raise CheckpointError(f"{directory}: {MANIFEST} is that of step {payload['step']}")
        for name, expected in payload["files"].items():
            path = directory / name
            if not path.is_file():
                raise CheckpointError(f"{directory}: {name} is missing")
            if path.stat().st_size != expected["bytes"]:
                raise CheckpointError(f"{directory}: {name} has {path.stat().st_size} bytes, the manifest says {expected['bytes']}")
            actual = _sha256(path)
            if actual != expected["sha256"]:
                raise CheckpointError(f"{directory}: {name} has sha256 {actual[:12]}, the manifest says {expected['sha256'][:12]}")
    except OSError as error:
        raise CheckpointError(f"{directory}: cannot be read: {error.strerror or error}") from error


def _read(directory: Path) -> dict:
    """The manifest's payload, after its own hash has been checked on the exact bytes."""
    path = directory / MANIFEST
    if not path.is_file():
        raise CheckpointError(f"{directory}: {MANIFEST} is missing")
    raw = path.read_bytes()
    try:
        payload = json.loads(raw)
        del payload["sha256"]
        intact = _render(payload).encode() == raw
    except (ValueError, KeyError, TypeError):
        intact = False
    if not intact:
        raise CheckpointError(f"{directory}: {MANIFEST} is damaged (its own sha256 does not match)")
    if payload["format"] != FORMAT:
        raise CheckpointError(f"{directory}: format {payload['format']}, this version reads format {FORMAT}")
    return payload


def _render(payload: dict) -> str:
    body = json.dumps(payload, sort_keys=True)
    return json.dumps({**payload, "sha256": hashlib.sha256(body.encode()).hexdigest()}, sort_keys=True, indent=1) + "\n"


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
