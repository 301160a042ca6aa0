"""`hope`, but on one virtual node something is bad: behind HOPE_COMMAND of the tests. FAULT is what, FAULT_NODE where.

Virtual nodes share a CPU, a clock and a loopback, so what cannot be broken for real is broken in the process of the node's ranks.
"""

import os
import sys
import time
from types import SimpleNamespace

import torch
import torch.distributed as dist

from hope_pt import cli
from hope_pt.launch import health, preflight

# Limits between good and bad that turns of one loaded CPU do not reach.
os.environ["HOPE_JOIN_S"] = "25"
preflight.JOIN_S, preflight.NETWORK_S, preflight.SLOWER, preflight.SLOWER_LINK = 25.0, 20.0, {"cpu": 100.0}, {"cpu": 10.0}
health.LEAST_FREE_BYTES, health.LEAST_FREE_FILES = 1 << 20, 100


def later(real, seconds):
    return lambda *arguments, **options: (time.sleep(seconds), real(*arguments, **options))[1]


fault = os.environ["FAULT"] if os.environ["SLURMD_NODENAME"] == os.environ.get("FAULT_NODE") else ""
if fault == "slow product":
    took = health.product_s
    health.product_s = lambda device: took(device) + 1.0
elif fault == "unreachable":
    os.environ["MASTER_PORT"] = "1"
elif fault == "clock":
    real = time.time
    time.time = lambda: real() - 300.0
elif fault == "link":
    dist.batch_isend_irecv = later(dist.batch_isend_irecv, 1.0)
elif fault == "missing GPU":
    smi, run = "0, 0\n", health.subprocess.run
    health.subprocess = SimpleNamespace(
        **{name: getattr(health.subprocess, name) for name in ("SubprocessError", "TimeoutExpired")},
        run=lambda command, **options: SimpleNamespace(stdout=smi) if command[0] == "nvidia-smi" else run(command, **options),
    )
torch.set_num_threads(1)
sys.exit(cli.main(sys.argv[1:]))
