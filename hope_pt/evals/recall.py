"""Multi-query associative recall: how often the value of a queried key is the model's first choice.

The samples come from a source whose loss mask is 1 on the query positions only (`source = "mqar"`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from hope_pt.errors import EvalError
from hope_pt.evals.scoring import batches, evaluating, target_losses

if TYPE_CHECKING:
    from hope_pt.data import Source
    from hope_pt.nn import HopeLM


def recall(lm: HopeLM, source: Source, *, chance: float, sequences: int = 512, batch_size: int = 64) -> dict[str, float]:
    """`eval/recall_accuracy`, `eval/recall_loss` (nats) over all queries, `eval/recall_chance` and `eval/recall_queries`.

    `chance` is the accuracy of a guess among all values.
    """
    right, loss, queries = 0, 0.0, 0
    for batch in batches(source, sequences=sequences, batch_size=batch_size):
        with evaluating(lm) as device:
            counted_BT = batch.loss_mask_BT.to(device) > 0
            logits_BTV, _ = lm(batch.tokens_BT.to(device), doc_start_BT=batch.doc_start_BT.to(device))
            targets_BT = batch.targets_BT.to(device)
            right += int((logits_BTV.argmax(-1) == targets_BT)[counted_BT].sum())
            loss += float(target_losses(logits_BTV, targets_BT)[counted_BT].double().sum())
            queries += int(counted_BT.sum())
    if queries == 0:
        raise EvalError("no query position is marked in the held-out samples; recall needs a source whose loss mask marks queries")
    return {
        "eval/recall_accuracy": right / queries,
        "eval/recall_loss": loss / queries,
        "eval/recall_chance": chance,
        "eval/recall_queries": float(queries),
    }
