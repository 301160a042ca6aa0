"""Fails when a file or a function is too long, or when an `__init__.py` lies where it would shadow an installed package.

Part of `make lint`. Limits: files 400 lines (warning) and 600 (error), functions 50 and 80. Kernels are exempt; test functions are
exempt from the function limits. Usage: `python tools/size_gate.py [ROOT]`; exit 1 when an error was found.
"""

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

FILE_WARN, FILE_MAX = 400, 600
FUNCTION_WARN, FUNCTION_MAX = 50, 80
FORBIDDEN_INITS = ("kernels/__init__.py", "data_prep/__init__.py", "tools/__init__.py")


@dataclass(frozen=True)
class Finding:
    """One line of the gate's output."""

    where: str
    what: str
    fatal: bool


def python_files(root: Path) -> list[Path]:
    """Python files under `root` that git tracks or would track, relative to it."""
    command = ["git", "ls-files", "-co", "--exclude-standard", "*.py"]
    listed = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout.splitlines()
    return sorted({Path(name) for name in listed if (root / name).exists()})


def check_file(root: Path, file: Path) -> Iterator[Finding]:
    """Findings of one file; a file that does not parse is an error."""
    if file.name == "__init__.py" and (str(file) in FORBIDDEN_INITS or file.parts[0] == "tests"):
        yield Finding(str(file), "must not exist: a package of this name would shadow an installed one", True)
    if "hope_kernels" in file.parts:
        return
    text = (root / file).read_text()
    lines = text.count("\n")
    if lines > FILE_WARN:
        yield Finding(str(file), f"{lines} lines (limit {FILE_MAX}, aim for {FILE_WARN})", lines > FILE_MAX)
    if file.parts[0] == "tests":
        return
    try:
        tree = ast.parse(text)
    except SyntaxError as error:
        yield Finding(str(file), f"does not parse: {error}", True)
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            size = (node.end_lineno or node.lineno) - node.lineno + 1
            if size > FUNCTION_WARN:
                what = f"{node.name} is {size} lines (limit {FUNCTION_MAX}, aim for {FUNCTION_WARN})"
                yield Finding(f"{file}:{node.lineno}", what, size > FUNCTION_MAX)


def main(argv: list[str]) -> int:
    """Print all findings; 1 when one of them is fatal."""
    root = Path(argv[1]) if len(argv) > 1 else Path(__file__).resolve().parent.parent
    files = python_files(root)
    findings = [finding for file in files for finding in check_file(root, file)]
    for finding in findings:
        print(f"{'error' if finding.fatal else 'warning'}: {finding.where}: {finding.what}")
    fatal = sum(finding.fatal for finding in findings)
    print(f"size gate: {len(files)} files, {fatal} errors, {len(findings) - fatal} warnings")
    return 1 if fatal else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv))
