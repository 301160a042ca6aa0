"""The GPU benchmarks, rehearsed on the CPU: every section runs, goals are judged, and without a GPU they say so in one line."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from hope_kernels.tuning import Tuning, table
from tools.bench import gpu_report, gpu_tune, step
from tools.bench.device import Bench

ROOT = Path(__file__).parents[2]


def run(module, *arguments):
    # As on a machine where nothing is installed but torch and its friends.
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, "-m", module, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_kernels_rehearsed(tmp_path):
    done = run("tools.bench.gpu", "--rehearse", "--out", str(tmp_path))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "REHEARSAL ON A CPU" in done.stdout
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert found["rehearsal"] and found["precompile"] == []
    assert all(not row["wrong"] for row in found["checks"])
    for section in ("scans", "newton_schulz", "head", "pointwise", "profile"):
        assert found[section] and not [row for row in found[section] if "failed" in row]
    assert {"bf16_tflops", "copy_tb_s", "launch_us"} == found["ceilings"].keys()
    assert found["goals"]


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("arguments", [(), ("--parity",)], ids=["speed", "parity"])
def test_steps_rehearsed(tmp_path, arguments):
    done = run("tools.bench.step", "--rehearse", "--out", str(tmp_path), *arguments)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "times mean nothing" in done.stdout
    if arguments:
        found = json.loads((tmp_path / "step_parity.json").read_text())
        assert all(goal["met"] for goal in found["goals"].values())
        return
    rows = json.loads((tmp_path / "step.json").read_text())["rows"]
    assert {(row["model"], row["backend"]) for row in rows} >= {("hope", "triton"), ("hope", "chunked"), ("transformer", "triton")}
    losses = {row["backend"]: row["losses"] for row in rows if row["model"] == "hope"}
    assert losses["triton"] == pytest.approx(losses["chunked"], abs=0.05)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("module", ["tools.bench.gpu", "tools.bench.step"])
def test_without_a_gpu_one_line_says_so(module):
    done = run(module)
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1].endswith("torch sees no CUDA device; --rehearse runs the program on the CPU")


def measured(ms):
    return {"ms": ms, "p10": ms, "p90": ms, "repetitions": 25}


def test_goals_are_judged_from_the_rows():
    shape = {"batch": 4, "tokens": 8192, "heads": 32, "width": 64}
    times = {"linear": 1.0, "mlp": 2.5, "linear chunked": 50.0, "fla": 1.25, "sdpa flash": 4.0, "sdpa cudnn": 2.0}
    rows = [{"op": name, **shape, "both": measured(ms)} for name, ms in times.items()]
    rows += [{"op": "momentum", **shape, "failed": "broken"}]
    results = {"scans": rows, "sanitizer": {"memcheck": "clean", "racecheck": "cannot run on this machine"}}
    found = gpu_report.goals(results)
    at = "4x8192, 32 heads of 64"
    assert found[f"linear memory over fla, {at}"] == {"value": 0.8, "at_most": 1.0, "met": True}
    assert found[f"linear over attention, {at}"] == {"value": 0.5, "at_most": 0.6, "met": True}
    assert found[f"mlp over attention, {at}"]["met"] is False
    assert found[f"linear: chunked over triton, {at}"]["value"] == 50.0
    assert found[f"self-modifying over attention, {at}"] == {"value": None, "at_most": 0.6, "met": None}
    assert found["compute-sanitizer clean"]["met"] is None
    assert ["broken" in line for line in gpu_report.failures(results)] == [True]


def test_step_goals():
    rows = [
        {"model": model, "length": 4096, "backend": backend, "parameters": size, "tokens_per_s": rate}
        for model, backend, size, rate in (
            ("hope", "triton", 100, 80.0),
            ("hope", "chunked", 100, 90.0),
            ("transformer", "triton", 103, 100.0),
        )
    ]
    found = step.goals(rows)
    assert found["HOPE over Transformer++ at 4096"]["met"] and not found["hope at 4096: kernels on over off"]["met"]
    assert found["equal parameters"] == {"value": 0.03, "at_most": 0.02, "met": False}


def test_tuning_takes_the_fastest_warps_of_every_kernel(monkeypatch):
    wanted = {"write_forward": 2, "read_forward": 8}

    def time(bench, key, entry, shape, timings):
        return sum(1.0 + (entry.warps[name] != warps) for name, warps in wanted.items()) + 16 / entry.tile

    stored = {(64, 64): Tuning(16, dict.fromkeys(wanted, 4)), (16, 16): Tuning(16, {})}
    monkeypatch.setattr(gpu_tune.tuning, "table", lambda: stored)
    monkeypatch.setattr(gpu_tune, "_time", time)
    best, _ = gpu_tune.tune(Bench(torch.device("cpu")), (1, 1, 32))
    assert best == {"64x64": {"tile": 64, "warps": wanted}, "16x16": {"tile": 16, "warps": {}}}


def test_the_table_of_tuning_is_written_as_it_is_stored():
    stored = {f"{key[0]}x{key[1]}": gpu_tune.as_stored(entry) for key, entry in table().items()}
    assert json.loads(gpu_tune.as_text(stored)) == json.loads((ROOT / "kernels" / "hope_kernels" / "tuning.json").read_text())
