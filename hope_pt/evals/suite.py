"""The evaluations that fit a run's configuration: the held-out loss, and a probe that reads the model."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hope_pt.data.mqar import MQARSource
from hope_pt.evals.language import heldout
from hope_pt.evals.passkey import passkey
from hope_pt.evals.recall import recall
from hope_pt.evals.scoring import lm_losses
from hope_pt.nn.token_clock import ClockedLM

if TYPE_CHECKING:
    from hope_pt.config import RunConfig
    from hope_pt.data import Source
    from hope_pt.nn import HopeLM


def evaluate(lm: HopeLM, source: Source, *, config: RunConfig) -> dict[str, float]:
    """Held-out loss and probe of a model in one process: what `hope eval` runs. `source` is held out.

    The loss of a meta-trained run is that of a reader with its token clock on, as while training; probes read without it.
    """
    reader = ClockedLM(lm, config.token_clock) if config.token_clock.meta_train else lm
    losses = lm_losses(reader, document_reset=config.data.document_reset)
    result = heldout(losses, source, sequences=config.eval.sequences, batch_size=config.engine.micro_batch_size)
    return result | (probe(lm, source, config=config) if has_probe(source, config=config) else {})


def has_probe(source: Source, *, config: RunConfig) -> bool:
    """Whether `probe` has something to ask: associative recall, or text with `eval.passkey`."""
    return isinstance(source, MQARSource) or config.eval.passkey


def probe(lm: HopeLM, source: Source, *, config: RunConfig) -> dict[str, float]:
    """The accuracy of associative recall, or for text the passkey probe."""
    batch_size = config.engine.micro_batch_size
    if isinstance(source, MQARSource):
        return recall(lm, source, chance=1 / source.num_values, sequences=config.eval.sequences, batch_size=batch_size)
    return passkey(lm, source, batch_size=batch_size)
