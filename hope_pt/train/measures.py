"""What the measuring hooks call: evaluations and memory diagnostics of the weights that the engine holds now.

The held-out loss is the engine's, under its layout and in its precision; data-parallel ranks divide the sequences. The probes that read the
model token by token (passkey, associative recall, diagnostics) run on the single-process model, which the first rank builds from all
weights: a model that does not fit one device has to switch them off (`eval.passkey`, `eval.diagnostics_every`).
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
    """The evaluations that fit the run, as `eval/...` values; the probes' on the first rank only."""
    rows = config.engine.micro_batch_size * plan.dp_size

    def measure() -> dict[str, float]:
        values = evals.heldout(trainer.token_losses, heldout, sequences=config.eval.sequences, batch_size=rows)
        if evals.has_probe(heldout, config=config):
            lm = trainer.to_lm()
            values |= evals.probe(lm.to(plan.device), heldout, config=config) if lm else {}
        return values

    return measure


def baselines(config: RunConfig, *, train: Source, heldout: Source) -> Measure:
    """The n-gram baselines on the same held-out sequences; they need no model."""

    def measure() -> dict[str, float]:
        samples = max(1, BASELINE_TOKENS // train.seq_len)
        return evals.baselines(train, heldout, sequences=config.eval.sequences, max_samples=samples)

    return measure


def diagnostics(*, trainer: TrainEngine, plan: Plan, heldout: Source) -> Measure:
    """Per layer eta, alpha, surprise, memory norm and drift on the first held-out sequences, as `memory/...` values, on the first rank."""
    batch = heldout.read(np.arange(min(DIAGNOSTIC_SEQUENCES, heldout.num_samples)))
    targets_BT = batch.targets_BT.masked_fill(batch.loss_mask_BT == 0, -100)

    def measure() -> dict[str, float]:
        lm = trainer.to_lm()
        return nn.diagnostics(lm.to(plan.device), batch.tokens_BT.to(plan.device), targets_BT=targets_BT.to(plan.device)) if lm else {}

    return measure
