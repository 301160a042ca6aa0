"""The skip rule alone: what it drops, what it remembers, when it gives up, and that its memory survives a checkpoint bit for bit."""

import itertools
import json
import math
import random

import pytest

from hope_pt.config.schema import SkipConfig
from hope_pt.optim.spikes import SkipRule


def rule(**settings) -> SkipRule:
    return SkipRule(SkipConfig(**{"sigmas": 6.0, "window": 8, **settings}))


def feed(skips: SkipRule, losses, *, norm: float = 1.0) -> list[bool]:
    return [skips.judge(loss=loss, norm=norm).dropped for loss in losses]


LEVEL = [3.0, 3.1, 2.9, 3.0, 3.2, 2.8, 3.0, 3.0]
"""Mean 3, standard deviation sqrt(0.1 / 8) = 0.1118."""


def test_a_spike_is_so_many_deviations_above_the_mean_of_the_window():
    for loss, dropped in ((3.0 + 5.9 * 0.1118, False), (3.0 + 6.1 * 0.1118, True), (-50.0, False)):
        skips = rule()
        feed(skips, LEVEL)
        verdict = skips.judge(loss=loss, norm=1.0)
        assert (verdict.dropped, verdict.spike) == (dropped, dropped)
        assert not verdict.diverged


def test_the_gradient_norm_is_judged_like_the_loss():
    skips = rule()
    for norm in LEVEL:
        assert not skips.judge(loss=2.0, norm=norm).dropped
    verdict = skips.judge(loss=2.0, norm=4.0)
    assert verdict.spike and verdict.reason == (
        "gradient norm 4 is more than train.skip.sigmas = 6 standard deviations (0.112) above the mean 3 of the last 8 steps taken"
    )


def test_before_the_window_is_full_nothing_is_a_spike():
    for seen in range(9):
        skips = rule()
        feed(skips, LEVEL[:seen])
        assert skips.judge(loss=1e6, norm=1.0).dropped == (seen == 8)


def test_steps_whose_value_is_not_finite_do_not_fill_the_window():
    skips = rule(in_a_row=100, in_window=100)
    assert feed(skips, [*LEVEL[:7], math.nan, 1e6]) == [False] * 7 + [True, False]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_dropped_under_every_setting(bad):
    for settings in ({"sigmas": 0.0}, {}):
        for values in ({"loss": bad, "norm": 1.0}, {"loss": 1.0, "norm": bad}):
            skips = rule(**settings)
            verdict = skips.judge(**values)
            assert verdict.dropped and not verdict.spike and f" is {bad}" in verdict.reason
            assert skips.skips == 1


def test_by_default_no_finite_step_is_dropped():
    skips = SkipRule(SkipConfig())
    assert not any(feed(skips, [3.0 + step % 2 / 10 for step in range(200)] + [1e30]))
    assert not skips.judge(loss=3.0, norm=1e18).dropped


def test_a_dropped_step_leaves_no_trace_in_what_later_ones_are_compared_with():
    spiked, plain = rule(in_a_row=100, in_window=100), rule()
    feed(plain, LEVEL)
    feed(spiked, LEVEL)
    # Were it part of the history, the second spike would be within its standard deviation.
    assert feed(spiked, [100.0, math.nan, 100.0]) == [True] * 3
    kept = ("losses", "norms")
    assert [spiked.state_dict()[key] for key in kept] == [plain.state_dict()[key] for key in kept]


def test_old_steps_leave_the_window():
    skips = rule()
    feed(skips, LEVEL)
    # A slow climb is no spike, and moves the mean along.
    assert not any(feed(skips, [3.0 + step / 10 for step in range(30)]))
    assert feed(skips, [5.9]) == [False] and feed(skips, [9.0]) == [True]
    assert len(skips.state_dict()["losses"]) == 8


def test_so_many_in_a_row_have_diverged_and_a_good_step_begins_anew():
    skips = rule(in_a_row=3, in_window=100)
    bad, good = {"loss": math.nan, "norm": 1.0}, {"loss": 1.0, "norm": 1.0}
    found = [skips.judge(**values).diverged for values in (bad, bad, good, bad, bad, bad)]
    assert found == [""] * 5 + ["3 steps in a row were dropped (train.skip.in_a_row = 3)"]


def test_so_many_of_the_window_have_diverged_and_older_ones_are_forgotten():
    def judged(pattern: str) -> list[bool]:
        skips = rule(in_a_row=100, in_window=3)
        return [bool(skips.judge(loss=math.nan if mark == "x" else 1.0, norm=1.0).diverged) for mark in pattern]

    assert judged("x.x....x") == [False] * 7 + [True]
    # The same three, one step farther apart than the window of 8 is long.
    assert not any(judged("x.x.....x"))
    skips = rule(in_a_row=100, in_window=2)
    feed(skips, [math.nan, 1.0])
    assert skips.judge(loss=1.0, norm=math.inf).diverged == "2 of the last 8 steps were dropped (train.skip.in_window = 2)"


def test_a_rule_from_a_stored_state_decides_the_same():
    generator = random.Random(0)
    values = [(generator.gauss(3, 0.1), generator.lognormvariate(0, 0.2)) for _ in range(80)]
    values = [(math.nan if index % 17 == 0 else loss, norm * (20 if index % 13 == 0 else 1)) for index, (loss, norm) in enumerate(values)]
    settings = {"sigmas": 3.0, "in_a_row": 4, "in_window": 4}
    whole = rule(**settings)
    expected = [whole.judge(loss=loss, norm=norm) for loss, norm in values]
    assert {(verdict.dropped, verdict.spike) for verdict in expected} == {(False, False), (True, False), (True, True)}
    for cut in (0, 5, 18, 40):
        first, second = rule(**settings), rule(**settings)
        found = [first.judge(loss=loss, norm=norm) for loss, norm in values[:cut]]
        second.load_state_dict(json.loads(json.dumps(first.state_dict())))
        found += [second.judge(loss=loss, norm=norm) for loss, norm in values[cut:]]
        assert found == expected
        assert second.state_dict() == whole.state_dict() and second.skips == whole.skips > 0


def test_the_window_may_change_between_sessions():
    skips = rule(window=16)
    feed(skips, [float(step) for step in range(20)])
    shorter = rule(window=8)
    shorter.load_state_dict(skips.state_dict())
    assert shorter.state_dict()["losses"] == [float(step) for step in range(12, 20)]
    longer = rule(window=18)
    longer.load_state_dict(skips.state_dict())
    assert feed(longer, itertools.repeat(1e6, 2)) == [False, False], "the history of 16 fills up to 18 first"
    assert feed(longer, [1e9]) == [True]
