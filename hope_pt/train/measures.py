"""What the measuring hooks call: evaluations and memory diagnostics of the weights that the engine holds now.

Each builds the single-process model from the engine's full weights, so a number means the same under every parallel layout. All ranks
measure, because gathering the weights is a collective; the first one writes.
"""

from collections.abc import Callable

import numpy as np

from hope_pt import evals, nn
from hope_pt.config.schema import RunConfig
from hope_pt.data import Source
from hope_pt.engine import Plan, TrainEngine

BASELINE_TOKENS = 50_000_000
"""The n-gram baselines are fitted on at most this many training tokens, the first ones."""
DIAGNOSTIC_SEQUENCES = 2

Measure = Callable[[], dict[str, float]]


def evaluation(config: RunConfig, *, trainer: TrainEngine, plan: Plan, heldout: Source) -> Measure:
    """The evaluations that fit the run (`evals.evaluate`), as `eval/...` values."""

    def measure() -> dict[str, float]:
        return evals.evaluate(trainer.to_lm().to(plan.device), heldout, config=config)

    return measure


def baselines(config: RunConfig, *, train: Source, heldout: Source) -> Measure:
    """The n-gram baselines on the same held-out sequences; they need no model."""

    def measure() -> dict[str, float]:
        samples = max(1, BASELINE_TOKENS // train.seq_len)
        return evals.baselines(train, heldout, sequences=config.eval.sequences, max_samples=samples)

    return measure


def diagnostics(*, trainer: TrainEngine, plan: Plan, heldout: Source) -> Measure:
    """Per layer eta, alpha, surprise, memory norm and drift on the first held-out sequences, as `memory/...` values."""
    tokens_BT = heldout.read(np.arange(min(DIAGNOSTIC_SEQUENCES, heldout.num_samples))).tokens_BT

    def measure() -> dict[str, float]:
        return nn.diagnostics(trainer.to_lm().to(plan.device), tokens_BT.to(plan.device))

    return measure
