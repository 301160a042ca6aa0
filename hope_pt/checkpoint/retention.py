"""Which checkpoints stay: the newest `keep`, and every multiple of `keep_every`. Nothing goes before a newer one has been verified."""

from pathlib import Path

from hope_pt.checkpoint.manifest import directory_name, list_steps
from hope_pt.files import fsync, remove_tree, rename


def prune(root: Path, *, newest: int, keep: int, keep_every: int) -> None:
    """Removes the checkpoints before step `newest` that nothing keeps; the caller has read `newest` back from the disk and verified it."""
    older = [step for step in list_steps(root) if step < newest]
    for step in older[: max(0, len(older) - (keep - 1))]:
        if not (keep_every and step % keep_every == 0):
            remove_tree(root / directory_name(step))
    fsync(root)


def set_aside_newer(root: Path, *, step: int) -> None:
    """Renames checkpoints newer than `step` to `damaged-...`: the loader refused them, and they must not count among the kept."""
    for newer in list_steps(root):
        if newer > step:
            set_aside(root / directory_name(newer))


def set_aside(directory: Path) -> None:
    """Renames one refused checkpoint out of the way; it stays on the disk for whoever wants to look at it."""
    name = f"damaged-{directory.name}"
    candidates = [directory.with_name(name), *(directory.with_name(f"{name}.{copy}") for copy in range(1, 1000))]
    rename(directory, target=next(path for path in candidates if not path.exists()))
