"""A rank made slow on purpose is named, by its own time and not by that of the ranks that wait for it."""

import logging
import time

import pytest

from hope_pt.config.schema import RunConfig
from hope_pt.engine import Launch
from hope_pt.testing import run_distributed, tiny_model, tiny_run
from hope_pt.testing.layouts import part_at, running, with_engine
from hope_pt.train.hooks.base import StepRecord
from hope_pt.train.hooks.stragglers import StragglersHook

SLOW_RANK, SLEEP_S, STEPS = 1, 0.5, 3
CONFIG = tiny_run(model=tiny_model(periods=(1,)), global_batch_size=3)
OVERLAPPING = with_engine(CONFIG, distributed_optimizer=True, overlap_grad_reduce=True, overlap_param_gather=True)


class Lines(logging.Handler):
    def __init__(self):
        super().__init__()
        self.warnings, self.written = [], []

    def emit(self, record):
        if record.levelno >= logging.WARNING:
            self.warnings.append(record.getMessage())

    def write(self, *, step, values):
        self.written.append({"step": step, **values})


def train(launch: Launch, config: RunConfig, sleeping: str):
    """(own times, whole times, lines written, warnings) of a rank. sleeping: what holds the slow one up, its forward pass or its data."""
    lines = Lines()
    logging.getLogger("hope_pt.train.hooks.stragglers").addHandler(lines)
    with running(config, launch=launch) as trainer:
        slow_s = SLEEP_S if launch.rank == SLOW_RANK else 0.0
        if sleeping == "forward":
            trainer.models[0].register_forward_pre_hook(lambda *_: time.sleep(slow_s))
        hook = StragglersHook(lambda: trainer.own_s, sinks=[lines] if launch.rank == 0 else [], every=STEPS)
        own, whole = [], []
        for index in range(STEPS):
            began = time.perf_counter()
            if sleeping == "data":
                time.sleep(slow_s)
            data_s = time.perf_counter() - began
            trainer.step(part_at(trainer, index))
            whole.append(time.perf_counter() - began)
            own.append(trainer.own_s)
            hook.after_step(StepRecord(index + 1, 1.0, 0.1, 1.0, False, 1, 1.0, data_s, 1.0))
    return own, whole, lines.written, lines.warnings


@pytest.mark.distributed
@pytest.mark.parametrize("sleeping", ["forward", "data"])
@pytest.mark.parametrize("config", [CONFIG, OVERLAPPING], ids=["plain", "overlapping"])
def test_a_slow_rank_is_named(config, sleeping):
    ranks = run_distributed(train, world_size=3, timeout_s=90, args=(config, sleeping))
    _, _, [line], [warning] = ranks[0]
    assert line["step"] == STEPS and line["stragglers/slowest_rank"] == SLOW_RANK
    assert line["stragglers/own_s_max"] > SLEEP_S
    assert (line["stragglers/data_s_max"] > SLEEP_S) == (sleeping == "data")
    assert warning.startswith(f"step 3: the job waits for rank {SLOW_RANK} on ")
    for rank, (own, whole, written, warnings) in enumerate(ranks):
        if rank:
            assert not written and not warnings, "only the first rank reports"
        assert min(whole) > SLEEP_S / 2, "all ranks are held up"
        assert (min(own) > SLEEP_S) == (rank == SLOW_RANK and sleeping == "forward"), rank
