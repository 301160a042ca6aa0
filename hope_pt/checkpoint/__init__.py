"""Checkpoints that are either whole or not there: hashed, committed by one rename, verified on load (DESIGN section 3).

Flow: `train` -> `save` -> `files` (fsync, rename), `tensors` (safetensors), `manifest` (sha256 of every file), `retention`;
`train`, `evals` and the command line -> `load_newest` -> `manifest.verify` -> `Checkpoint`.
"""

from hope_pt.checkpoint.read import Checkpoint, load, load_newest
from hope_pt.checkpoint.retention import set_aside_newer
from hope_pt.checkpoint.write import save

__all__ = ["Checkpoint", "load", "load_newest", "save", "set_aside_newer"]
