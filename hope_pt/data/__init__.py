"""Samples for training and evaluation: sources of token sequences, their order, and the loader that hands out batches.

Flow: `open_source(config, split=...)` gives a `Source` (shards on disk, shards in an object store, or a generated task);
`sample_order` maps global sample positions to dataset indices, a pure function; `Loader` reads one rank's rows of consecutive global
batches. The state of the whole pipeline is one integer: the number of samples consumed.
"""

from hope_pt.data.batch import Batch
from hope_pt.data.loader import Loader
from hope_pt.data.order import sample_order
from hope_pt.data.source import Source, open_source

__all__ = ["Batch", "Loader", "Source", "open_source", "sample_order"]
