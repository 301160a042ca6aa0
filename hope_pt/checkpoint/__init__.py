"""Checkpoints that are either whole or not there: hashed, committed by one rename, verified on load.

All ranks of a job write one checkpoint together, and any number of ranks in any layout reads it. Flow: `train` -> `save` or `Saving` ->
`engine.storage` (every rank its file), `manifest` (sha256 of every file), `hope_pt.files` (fsync, rename), `retention`; `train` ->
`load_newest` -> `manifest.verify` -> `Checkpoint.read`; evaluation, generation and reports -> `Checkpoint.tensors`, in one process.
"""

from hope_pt.checkpoint.read import Checkpoint, load, load_newest
from hope_pt.checkpoint.retention import set_aside_newer
from hope_pt.checkpoint.write import Saving, save

__all__ = ["Checkpoint", "Saving", "load", "load_newest", "save", "set_aside_newer"]
