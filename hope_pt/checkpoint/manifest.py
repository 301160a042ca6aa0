"""The manifest of a checkpoint: step, who wrote it, and size and sha256 of every file; it carries its own sha256.

`verify` accepts a directory only if its name, the manifest and all bytes agree, so a flipped byte, a truncated, missing, exchanged or
foreign file, and a directory under another step's name are each an error that says which.
"""

import hashlib
import json
from pathlib import Path

from hope_pt.engine import collectives
from hope_pt.errors import CheckpointError
from hope_pt.files import write_text

MANIFEST = "manifest.json"
FORMAT = 2


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


def entry(size: int, digest: str) -> dict:
    """What a manifest says of a file of `size` bytes with the sha256 `digest`."""
    return {"bytes": size, "sha256": digest}


def describe(path: Path) -> dict:
    """The entry of a file as it is read back."""
    return entry(path.stat().st_size, _sha256(path))


def write_manifest(directory: Path, *, step: int, layout: str, files: dict[str, dict]) -> None:
    """Writes the manifest of a directory that has exactly `files`, by name as `entry` gives them; `layout` is a note for people."""
    write_text(directory / MANIFEST, text=_render({"format": FORMAT, "step": step, "layout": layout, "files": files}))


def verify(directory: Path, *, part: int = 0, parts: int = 1) -> None:
    """Checks a committed checkpoint and reads every byte of its share of the files; CheckpointError names the first thing that is wrong.

    Of `parts` ranks that divide the reading this is number `part`. Names and sizes are checked by each.
    """
    try:
        payload = _read(directory)
        if payload["step"] != step_of(directory):
            raise CheckpointError(f"{directory}: {MANIFEST} is that of step {payload['step']}")
        foreign = sorted({path.name for path in directory.iterdir()} - payload["files"].keys() - {MANIFEST})
        if foreign:
            raise CheckpointError(f"{directory}: {foreign[0]} is not in the manifest")
        for index, (name, expected) in enumerate(payload["files"].items()):
            _verify_file(directory, name=name, expected=expected, content=index % parts == part)
    except OSError as error:
        raise CheckpointError(f"{directory}: cannot be read: {error.strerror or error}") from error


def verify_together(directory: Path) -> None:
    """Collective: `verify`, the reading divided over the ranks; CheckpointError on all of them if any finds something wrong."""
    with collectives.together():
        verify(directory, part=collectives.rank(), parts=collectives.size())


def _verify_file(directory: Path, *, name: str, expected: dict, content: bool) -> None:
    path = directory / name
    if not path.is_file():
        raise CheckpointError(f"{directory}: {name} is missing")
    if path.stat().st_size != expected["bytes"]:
        raise CheckpointError(f"{directory}: {name} has {path.stat().st_size} bytes, the manifest says {expected['bytes']}")
    actual = _sha256(path) if content else expected["sha256"]
    if actual != expected["sha256"]:
        raise CheckpointError(f"{directory}: {name} has sha256 {actual[:12]}, the manifest says {expected['sha256'][:12]}")


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
