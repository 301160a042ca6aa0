"""FLOPs of a token over the FLOP/s of all GPUs of a run: times its tokens/s that is the MFU. Known only for runs on known GPUs."""

from pathlib import Path

from hope_pt.config import loads
from hope_pt.errors import HopeError
from hope_pt.launch.gpus import GPUS
from hope_pt.launch.watch import read_attempts


def flops_rate(path: Path) -> float | None:
    """For the run in `path`; None on a CPU, where no job recorded its GPUs, or where the stored configuration cannot be read."""
    starts = [one for one in read_attempts(path) if one["what"] == "start"]
    gpu, ranks = (starts[-1].get("gpu", ""), starts[-1].get("ranks", "")) if starts else ("", "")
    if gpu not in GPUS or not ranks.isdigit():
        return None
    try:
        config = loads((path / "config.toml").read_text(encoding="utf-8"), source=str(path))
    except (OSError, HopeError):
        return None
    if config.engine.device == "cpu":
        return None
    from hope_pt.nn import flops_per_token

    flops = flops_per_token(config.model, seq_len=config.data.seq_len)
    return (flops["forward"] + flops["backward"]) / (GPUS[gpu].bf16 * int(ranks))
