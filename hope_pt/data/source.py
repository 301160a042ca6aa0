"""`Source`, what the loader reads from, and `open_source`, which picks the kind that the configuration names."""

from pathlib import Path
from typing import Literal, Protocol

import numpy as np

from hope_pt.config.schema import DataConfig
from hope_pt.data.batch import Batch, Rows
from hope_pt.errors import ConfigError

Split = Literal["train", "heldout"]


class Source(Protocol):
    """A fixed, indexed set of samples of one length. All sources can be sent to worker processes."""

    fingerprint: str
    """Identity of the content: equal fingerprints mean equal samples. Stored in checkpoints and compared on resume."""
    num_samples: int
    seq_len: int
    vocab_size: int
    bytes_per_token: float
    """UTF-8 bytes of text for each token of this split; 0.0 where samples are not text. Bits per byte is loss / ln 2 / this."""
    tokenizer_path: Path | None

    def read(self, indices: np.ndarray) -> Batch:
        """Samples `indices` [B] as a batch; DataError if a shard is damaged or missing, IndexError outside 0..num_samples-1."""
        ...

    def read_rows(self, indices: np.ndarray) -> Rows:
        """The same as plain arrays."""
        ...

    def close(self) -> None:
        """Give back files and memory maps."""
        ...


def open_source(config: DataConfig, *, split: Split, vocab_size: int | None = None) -> Source:
    """Open one split of the configured data.

    `vocab_size` is the model's: the generated task takes its vocabulary from it (required there), shards must not exceed it.
    Raises DataError for missing, damaged or mismatched data, ConfigError for a missing or too small vocabulary.
    """
    if config.source == "mqar":
        from hope_pt.data.mqar import MQARSource

        if vocab_size is None:
            raise ConfigError('data.source = "mqar" needs the vocabulary size of the model: open_source(..., vocab_size=...)')
        return MQARSource(config, split=split, vocab_size=vocab_size)
    if config.backend == "streaming":
        from hope_pt.data.streaming_backend import open_streaming

        source: Source = open_streaming(config, split=split)
    else:
        from hope_pt.data.shards import ShardSource

        source = ShardSource(Path(config.path), split=split, seq_len=config.seq_len)
    if vocab_size is not None and source.vocab_size > vocab_size:
        source.close()
        raise ConfigError(f"model.vocab_size = {vocab_size} does not cover the {source.vocab_size} ids of {config.path}; raise it to that")
    return source
