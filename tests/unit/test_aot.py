import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed")
pytestmark = pytest.mark.timeout(300)

ROOT = Path(__file__).parents[2]
KERNELS = """
    import torch
    import triton
    import triton.language as tl

    from tools.aot.case import Case


    @triton.jit
    def scale(x, y, n, BLOCK: tl.constexpr):
        columns = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        tl.store(y + columns, 2 * tl.load(x + columns, mask=columns < n), mask=columns < n)


    @triton.jit
    def product(x, y, n, M: tl.constexpr, TIMES: tl.constexpr):
        square = tl.arange(0, M)[:, None] * M + tl.arange(0, M)[None, :]
        a = tl.load(x + square)
        b = tl.load(x + M * M + square)
        c = tl.zeros([M, M], tl.float32)
        for i in tl.range(n, num_stages=1):
            c = tl.dot(tl.dot(a, b, c).to(x.dtype.element_ty), b) + c
        for i in tl.static_range(TIMES - 1):
            c = tl.dot(a, b, c * i)
        tl.store(y + square, c)


    def case(name, kernel, num_warps=4, **arguments):
        limits = {key: arguments.pop(key) for key in list(arguments) if key.startswith(("min_", "max_", "hmma"))}
        return Case(name, kernel, arguments, num_warps, **limits)


    def scaled(name, **limits):
        return case(name, scale, x=torch.float32, y=torch.float32, n=4096, BLOCK=1024, **limits)


    def multiplied(name, dtype=torch.bfloat16, M=64, TIMES=1, **limits):
        return case(name, product, x=dtype, y=torch.float32, n=4096, M=M, TIMES=TIMES, **limits)
"""


@pytest.fixture
def gate(tmp_path):
    """Writes a file of cases and runs the gate on it."""
    folder = tmp_path / "cases"
    folder.mkdir()
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}

    def run(cases, *arguments, arch="sm_90a", **extra):
        (folder / "tiny.py").write_text(textwrap.dedent(KERNELS) + f"\n\ndef cases():\n    return [{cases}]\n")
        command = [sys.executable, "-m", "tools.aot", "--cases", folder, "--arch", arch, "--jobs", "1", *arguments]
        return subprocess.run(command, cwd=ROOT, env={**environment, **extra}, capture_output=True, text=True)

    run.baseline = tmp_path / "baseline.json"
    return run


def failures(done):
    return [line.removeprefix("FAIL ") for line in done.stderr.splitlines() if line.startswith("FAIL ")]


def test_good_kernels_pass_and_are_stored(gate):
    done = gate("scaled('scale', min_mma=0), multiplied('product')", "--update")
    assert done.returncode == 0, done.stderr
    stored = json.loads(gate.baseline.read_text())
    (family,) = stored
    found = stored[family]["sm_90a"]
    assert set(found) == {"tiny/scale", "tiny/product"}
    assert found["tiny/scale"]["mma"] == 0 and found["tiny/scale"]["stores"] > 0
    assert found["tiny/product"]["mma"] >= 2 and found["tiny/product"]["stack"] == 0
    assert gate("scaled('scale', min_mma=0), multiplied('product')").returncode == 0


def test_limits(gate):
    done = gate(
        "multiplied('spills', M=128, TIMES=1), scaled('no_products'), multiplied('registers', max_registers=24), "
        "multiplied('shared', max_shared=1024), multiplied('small', M=16), multiplied('small_allowed', M=16, hmma_reason='16 rows'), "
        "case('typing', scale, x=torch.float32, n=1)"
    )
    assert done.returncode == 1
    found = failures(done)
    assert len(found) == 6, found
    assert all(line.startswith("sm_90a tiny/") for line in found)
    spills, products, registers, shared, small = (
        next(line for line in found if f"tiny/{name}:" in line) for name in ("spills", "no_products", "registers", "shared", "small")
    )
    assert "spills: " in spills
    assert "0 matrix instructions (HGMMA or UTCHMMA), at least 1 wanted" in products
    assert "registers, at most 24 allowed" in registers
    assert "of shared memory, at most 1024 allowed" in shared
    assert "0 matrix instructions" in small
    assert any("tiny/typing: does not compile: ValueError" in line and "BLOCK, y" in line for line in found)


def test_differences_from_the_baseline(gate):
    assert gate("multiplied('a'), multiplied('gone')", "--update").returncode == 0
    done = gate("multiplied('a', TIMES=3), multiplied('new')")
    assert done.returncode == 1
    found = failures(done)
    assert any("tiny/a: mma " in line and "->" in line for line in found)
    assert any("tiny/new: not in the baseline" in line for line in found)
    assert any("tiny/gone: in the baseline, not a case" in line for line in found)
    # A part of the cases is updated and judged alone.
    assert gate("multiplied('a', TIMES=3), multiplied('new')", "--only", "tiny/new", "--update").returncode == 0
    assert not any("tiny/new" in line for line in failures(gate("multiplied('a', TIMES=3), multiplied('new')")))
    assert gate("multiplied('a', TIMES=3), multiplied('new')", "--only", "tiny/new").returncode == 0


def test_blackwell(gate):
    done = gate("multiplied('product', M=128)", "--update", arch="sm_100a")
    assert done.returncode == 0, done.stderr
    (family,) = (stored := json.loads(gate.baseline.read_text()))
    assert stored[family]["sm_100a"]["tiny/product"]["mma"] >= 2
    assert 0 < stored[family]["sm_100a"]["tiny/product"]["tensor_memory"] <= 512


def test_a_file_that_cannot_be_read_is_a_finding(gate):
    done = gate("1 / 0")
    assert done.returncode == 1
    assert failures(done) == ["sm_90a tiny: ZeroDivisionError: division by zero"]


def test_refuses_the_interpreter(gate):
    done = gate("", TRITON_INTERPRET="1")
    assert done.returncode == 2
    assert "TRITON_INTERPRET is set" in done.stderr
