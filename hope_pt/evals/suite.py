"""The evaluations that fit a run's configuration, in one call: what the training hook and `hope eval` run."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hope_pt.data.mqar import MQARSource
from hope_pt.evals.language import heldout
from hope_pt.evals.passkey import passkey
from hope_pt.evals.recall import recall
from hope_pt.evals.scoring import lm_losses

if TYPE_CHECKING:
    from hope_pt.config import RunConfig
    from hope_pt.data import Source
    from hope_pt.nn import HopeLM


def evaluate(lm: HopeLM, source: Source, *, config: RunConfig) -> dict[str, float]:
    """Held-out loss; for text the passkey probe too (if `eval.passkey`), for associative recall the accuracy. `source` is held out."""
    batch_size = config.engine.micro_batch_size
    sequences = config.eval.sequences
    losses = lm_losses(lm, document_reset=config.data.document_reset)
    result = heldout(losses, source, sequences=sequences, batch_size=batch_size)
    if isinstance(source, MQARSource):
        result |= recall(lm, source, chance=1 / source.num_values, sequences=sequences, batch_size=batch_size)
    elif config.eval.passkey:
        result |= passkey(lm, source, batch_size=batch_size)
    return result
