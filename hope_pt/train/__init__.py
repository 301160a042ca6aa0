"""Training: `run` takes a configuration to a finished run directory, and continues one that was stopped.

Read in this order: `loop` (one screen), `session` (what is opened and closed around it), `state` (what a checkpoint holds), `hooks`.
"""

from hope_pt.train.session import RunResult, run

__all__ = ["RunResult", "run"]
