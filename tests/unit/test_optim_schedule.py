"""Learning-rate schedules: end points, shape, continuity."""

import math

import pytest

from hope_pt.config.optim import OptimConfig
from hope_pt.optim import learning_rate

STEPS = 101


def _rates(**fields) -> list[float]:
    optim = OptimConfig(lr=2.0, min_lr_ratio=0.1, **fields)
    return [learning_rate(step, optim=optim, num_steps=STEPS) for step in range(STEPS)]


def test_cosine_by_hand():
    rates = _rates(schedule="cosine", warmup_steps=20)
    assert rates[0] == 2.0 / 20
    assert rates[19] == 2.0
    assert rates[20] == 2.0
    assert rates[60] == pytest.approx(0.2 + 1.8 * 0.5)
    assert rates[40] == pytest.approx(0.2 + 1.8 * 0.5 * (1 + math.cos(math.pi / 4)))
    assert rates[100] == pytest.approx(0.2)


def test_wsd_by_hand():
    rates = _rates(schedule="wsd", warmup_steps=10, decay_steps=40)
    assert rates[10:61] == [2.0] * 51
    assert rates[80] == pytest.approx(0.2 + 1.8 * 0.5)
    assert rates[100] == pytest.approx(0.2)


def test_wsd_decays_over_a_tenth_of_the_run_by_default():
    rates = _rates(schedule="wsd", warmup_steps=0)
    assert rates[90] == 2.0
    assert rates[91] < 2.0


@pytest.mark.parametrize("schedule", ["cosine", "wsd"])
@pytest.mark.parametrize("warmup", [0, 1, 30, 95])
def test_neighbouring_steps_differ_little(schedule, warmup):
    rates = _rates(schedule=schedule, warmup_steps=warmup, decay_steps=20)
    largest = max(abs(b - a) for a, b in zip(rates, rates[1:], strict=False))
    # The steepest part is the linear decay (1.8 in 20 steps) or the warm-up; the late warm-up meets a steep cosine at 95.
    assert largest <= max(1.8 / 20, 2.0 / max(warmup, 1) if warmup else 0.0, 1.8 / max(1, STEPS - 1 - warmup)) * math.pi / 2 + 1e-12


def test_run_shorter_than_the_warm_up_only_warms_up():
    optim = OptimConfig(lr=1.0, warmup_steps=10)
    assert [learning_rate(step, optim=optim, num_steps=3) for step in range(3)] == pytest.approx([0.1, 0.2, 0.3])


def test_steps_after_the_end_keep_the_final_rate():
    assert learning_rate(500, optim=OptimConfig(lr=1.0, warmup_steps=2), num_steps=10) == pytest.approx(0.1)
