"""Which code a run was made with: commit and uncommitted changes of this package's checkout, or its installed version."""

import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent.parent


def code_version() -> str:
    """One word, for example `4f1c2a90d3b7+changes`, `0.1.0` or `unknown`."""
    commit = _commit()
    if commit is None:
        try:
            return version("hope-pt")
        except PackageNotFoundError:
            return "unknown"
    return f"{commit[:12]}+changes" if _git("status", "--porcelain", "--untracked-files=no") else commit[:12]


def code_text() -> str:
    """The version, and of a checkout all that differs from its commit: the names of untracked files, then the whole diff."""
    if _commit() is None:
        return f"{code_version()}\n"
    # Whole untracked directories are one name: data lie there too.
    untracked = (_git("ls-files", "--others", "--exclude-standard", "--directory", "--full-name", ":/") or "").splitlines()
    return "".join(f"{line}\n" for line in (code_version(), *(f"untracked: {name}" for name in untracked))) + (_git("diff", "HEAD") or "")


def _commit() -> str | None:
    """The commit, if git knows this very file: an installed copy inside somebody's repository is not that repository's code."""
    if _git("ls-files", "--error-unmatch", "__init__.py") is None:
        return None
    return (_git("rev-parse", "HEAD") or "").strip() or None


def _git(*arguments: str) -> str | None:
    """Output of a git command in the package's directory, or None where it fails or there is no git."""
    try:
        done = subprocess.run(
            ("git", "-C", str(PACKAGE), *arguments), capture_output=True, text=True, errors="replace", timeout=30, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout
