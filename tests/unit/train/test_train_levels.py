"""The hook that writes measured updates: a line where there is something, null where a number is not finite, nothing elsewhere."""

import math

from hope_pt.train.hooks.base import StepRecord
from hope_pt.train.hooks.levels import LevelsHook


class Lines:
    def __init__(self):
        self.lines = []

    def write(self, *, step, values):
        self.lines.append((step, values))


def test_a_line_where_something_was_measured():
    sink, values = Lines(), [{}, {"optim/matrix/update_norm": 0.5, "optim/matrix/drift": math.nan}, {}]
    hook = LevelsHook(lambda: values.pop(0), sinks=[sink])
    for step in (4, 5, 6):
        hook.after_step(StepRecord(step, 1.0, 0.1, 1.0, False, 8, 1.0, 0.0, 1.0))
    assert sink.lines == [(5, {"optim/matrix/update_norm": 0.5, "optim/matrix/drift": None})]
