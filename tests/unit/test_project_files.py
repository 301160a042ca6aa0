"""Project files keep their promises: named paths and make targets exist, the gates catch what they should, extras and pins agree."""

import re
import subprocess
import sys
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = ["README.md", "CONTRIBUTING.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]
TARGETS = set(re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
PINS = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


@pytest.mark.parametrize("document", DOCUMENTS)
def test_documents_name_existing_paths_and_targets(document):
    text = (ROOT / document).read_text()
    named = re.findall(r"`((?:hope_pt|kernels|data_prep|configs|tests|tools|docs)/[\w./-]+)`", text)
    assert [path for path in named if not (ROOT / path).exists()] == []
    linked = re.findall(r"\]\(([\w./-]+)\)", text)
    assert [path for path in linked if not ((ROOT / document).parent / path).exists()] == []
    assert set(re.findall(r"`?make ([a-z][a-z0-9-]+)", "\n".join(re.findall(r"`[^`]*`|```.*?```", text, re.DOTALL)))) <= TARGETS


def test_the_readme_names_six_files_to_read_first():
    section = (ROOT / "README.md").read_text().partition("## Six files to read first")[2]
    assert len(re.findall(r"^\d\. `[\w./]+`", section, re.MULTILINE)) == 6


def test_make_lists_every_public_target_and_ci_uses_existing_ones():
    phony = set(re.findall(r"^\.PHONY: ([a-z0-9-]+)$", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert phony == TARGETS - {""}
    asked = {"train", "test", "lint", "types", "bench", "test-mcore019", "kill-trials", "stability", "mqar", "controls", "clean", "help"}
    assert asked <= phony
    helped = subprocess.run(["make", "-s", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert {line.split()[0] for line in helped.splitlines()} == phony
    assert set(re.findall(r"make ([a-z]+)", (ROOT / ".ci" / "run").read_text())) <= phony


def test_tests_that_start_processes_share_one_worker(tmp_path):
    """The scheduler of tests/conftest.py: everything below `distributed` in one worker, of the rest each file in one."""
    (tmp_path / "conftest.py").write_text((ROOT / "tests" / "conftest.py").read_text())
    recorded = tmp_path / "workers"
    for file in ("distributed/test_a.py", "distributed/test_b.py", "unit/test_c.py", "unit/test_d.py"):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_text(
            "import os, pytest\n"
            "@pytest.mark.parametrize('number', range(6))\n"
            "def test_one(number):\n"
            f"    print('{file}', os.environ['PYTEST_XDIST_WORKER'], file=open('{recorded}', 'a'))\n"
        )
    command = [sys.executable, "-m", "pytest", "-n", "2", "-q", "-p", "no:cacheprovider", f"--rootdir={tmp_path}", str(tmp_path)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [line.split() for line in recorded.read_text().splitlines()]
    assert len(lines) == 24
    workers = {
        group: {worker for file, worker in lines if file.startswith(group)} for group in ("distributed", "unit/test_c", "unit/test_d")
    }
    assert all(len(of) == 1 for of in workers.values()), workers
    assert set.union(*workers.values()) == {"gw0", "gw1"}


def test_direct_dependencies_are_pinned_within_their_ranges():
    project = PYPROJECT["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["dev"], *project["optional-dependencies"]["test"]]
    for requirement in map(Requirement, wanted):
        assert requirement.name in PINS, f"{requirement.name} is not pinned in constraints.txt"
        assert requirement.specifier.contains(PINS[requirement.name]), f"{requirement} excludes its pin {PINS[requirement.name]}"


def test_installed_packages_are_the_pinned_ones():
    """A later install must not have replaced them; torch is the machine's own where the environment was made that way."""
    own_torch = "include-system-site-packages = true" in (Path(sys.prefix) / "pyvenv.cfg").read_text()
    names = ["megatron-core", "pydantic", "safetensors", "sentencepiece", *([] if own_torch else ["torch", "numpy"])]
    assert {name: version(name).split("+")[0] for name in names} == {name: PINS[name] for name in names}


def test_both_commands_are_installed():
    for command in PYPROJECT["project"]["scripts"]:
        assert (Path(sys.executable).parent / command).exists(), f"{command} is missing; run `make env`"


def size_gate(root: Path) -> tuple[int, str]:
    done = subprocess.run([sys.executable, str(ROOT / "tools" / "size_gate.py"), str(root)], capture_output=True, text=True)
    return done.returncode, done.stdout


@pytest.fixture
def repository(tmp_path) -> Path:
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    return tmp_path


def function_of(lines: int) -> str:
    return "def f():\n" + "    x = 1\n" * (lines - 1)


@pytest.mark.parametrize(
    ("name", "text", "code", "said"),
    [
        ("a.py", function_of(50), 0, "0 errors, 0 warnings"),
        ("a.py", function_of(51), 0, "warning: a.py:1: f is 51 lines"),
        ("a.py", function_of(81), 1, "error: a.py:1: f is 81 lines"),
        ("a.py", "x = 1\n" * 401, 0, "warning: a.py: 401 lines"),
        ("a.py", "x = 1\n" * 601, 1, "error: a.py: 601 lines"),
        ("tests/test_a.py", function_of(81), 0, "0 errors"),
        ("kernels/hope_kernels/a.py", "x = 1\n" * 601, 0, "0 errors"),
        ("kernels/__init__.py", "", 1, "must not exist"),
        ("tests/unit/__init__.py", "", 1, "must not exist"),
        ("a.py", "def f(:\n", 1, "does not parse"),
    ],
)
def test_the_size_gate(repository, name, text, code, said):
    path = repository / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    returned, output = size_gate(repository)
    assert (returned, said in output) == (code, True), output
