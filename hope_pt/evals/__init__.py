"""Evaluations: held-out loss and bits per byte, long documents, n-gram baselines, passkey probe, associative recall.

Every function returns a flat dict of `eval/...` metrics, leaves the model's mode, the random number generators and all memory states
as they were, and gives the same numbers when it is called again.
"""

from hope_pt.evals.documents import documents, read_documents
from hope_pt.evals.language import bits_per_byte, heldout
from hope_pt.evals.ngram import Trigram, Unigram, baselines
from hope_pt.evals.passkey import passkey
from hope_pt.evals.recall import recall
from hope_pt.evals.scoring import TokenLosses, lm_losses
from hope_pt.evals.suite import evaluate, has_probe, probe

__all__ = [
    "TokenLosses",
    "Trigram",
    "Unigram",
    "baselines",
    "bits_per_byte",
    "documents",
    "evaluate",
    "has_probe",
    "heldout",
    "lm_losses",
    "passkey",
    "probe",
    "read_documents",
    "recall",
]
