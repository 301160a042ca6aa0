"""What the straggler report says of given times: who is slow, what is written, what is warned of."""

import logging

import pytest

from hope_pt.engine import collectives
from hope_pt.train.hooks.base import StepRecord
from hope_pt.train.hooks.stragglers import StragglersHook, Times, slow_ranks


def times(*own: float) -> list[Times]:
    return [Times(own_s=seconds, data_s=0.0, host=f"n{rank}") for rank, seconds in enumerate(own)]


@pytest.mark.parametrize(
    ("own", "slow"),
    [
        ((1.0, 1.0, 1.0, 1.0), []),
        ((1.0, 1.29, 1.0, 1.0), []),
        ((1.0, 1.31, 1.0, 1.0), [1]),
        ((1.4, 1.0, 2.0, 1.0, 1.0), [2, 0]),
        ((1.0, 2.0), [1]),  # of two, the faster one is what is usual
        ((2.0, 1.0), [0]),
        ((0.0, 0.0), []),
    ],
)
def test_slow_is_above_1_3_times_the_median(own, slow):
    assert slow_ranks(times(*own)) == slow


class Sink:
    def __init__(self):
        self.lines = []

    def write(self, *, step, values):
        self.lines.append({"step": step, **values})


def record(step: int, *, data_s: float) -> StepRecord:
    return StepRecord(
        step=step, loss=1.0, lr=0.1, grad_norm=1.0, skipped=False, tokens=1, tokens_per_s=1.0, data_s=data_s, wall_s=1.0
    )  # fmt: skip


def report(monkeypatch, others: list[Times], own: list[float], *, every: int) -> list[dict]:
    """Lines of a first rank whose steps take `own` seconds, a tenth of a second each of them waiting for data."""
    monkeypatch.setattr(collectives, "gather", lambda value: [value, *others])
    monkeypatch.setattr("socket.gethostname", lambda: "n0")
    sink, passes = Sink(), iter(own)
    hook = StragglersHook(lambda: next(passes), sinks=[sink], every=every)
    for step in range(1, len(own) + 1):
        hook.after_step(record(step, data_s=0.1))
    return sink.lines


def test_medians_of_the_steps_since_the_last_report_are_compared(monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    # The first step, which compiles kernels, does not count for much.
    lines = report(monkeypatch, [Times(1.1, 0.7, "n1")], [60.0, 0.9, 0.9, 0.9, 3.9, 3.9], every=3)
    assert lines == [
        {
            "step": 3,
            "stragglers/slowest_rank": 1,
            "stragglers/own_s_median": pytest.approx(1.0),
            "stragglers/own_s_max": 1.1,
            "stragglers/data_s_max": 0.7,
        },
        {
            "step": 6,
            "stragglers/slowest_rank": 0,
            "stragglers/own_s_median": 1.1,
            "stragglers/own_s_max": pytest.approx(4.0),
            "stragglers/data_s_max": 0.7,
        },
    ]
    said = [(record.levelname, record.message) for record in caplog.records]
    assert said == [
        ("INFO", "step 3: no slow rank; the slowest is rank 1 on n1 (1.1 s, 1.10 times the median, 0.7 s of it waiting for data)"),
        (
            "WARNING",
            "step 6: the job waits for rank 0 on n0 (4 s, 3.64 times the median, 0.1 s of it waiting for data); "
            "the median of the ranks is 1.1 s a step",
        ),
    ]


def test_a_line_names_four_ranks_and_counts_the_others(monkeypatch, caplog):
    others = [Times(1.0, 0.0, "fast")] * 8 + [Times(2.0 + rank, 0.0, f"slow{rank}") for rank in range(6)]
    report(monkeypatch, others, [0.9], every=1)
    (message,) = (record.message for record in caplog.records if record.levelname == "WARNING")
    named = [f"rank {rank} on slow{rank - 9}" for rank in (14, 13, 12, 11)]
    assert all(name in message for name in named) and "rank 10 " not in message and "; and 2 more;" in message
