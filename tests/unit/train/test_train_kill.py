"""The short lane of tools/kill_trials.py: two kills of a real trainer, one run with reader processes; nothing may show."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]


def test_a_killed_trainer_computes_the_same_in_the_end(tmp_path):
    paths = os.pathsep.join(str(ROOT / part) for part in (".", "kernels", "data_prep"))
    command = [sys.executable, "tools/kill_trials.py", "--kills", "2", "--steps", "12", "--out", str(tmp_path / "result.json")]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=110, env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["kills"] == 2 and result["violations"] == []
