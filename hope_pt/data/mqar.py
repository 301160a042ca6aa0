"""Multi-query associative recall (Zoology): a task that only a working memory solves.

A sample: the pairs `k v k v ...`, then queries `k v` at random places of the rest of the sequence; the token after a queried key is its
value and the only target that counts. Id 0 fills the gaps; keys are drawn without repetition from the lower half of the other ids, values
with repetition from the upper half, and queried keys with repetition: were every key asked once, remembering which values are not yet
used would answer half of the queries without binding a value to its key, and training gets stuck there (docs/log.md). A model without
memory gets 1 / num_values right, one that only knows which values occurred 1 / num_pairs.
Sample i is a pure function of (seed, split, i, task settings): nothing is stored.
"""

import hashlib
import json
from pathlib import Path

import numpy as np

from hope_pt.config.schema import DataConfig
from hope_pt.data.batch import Batch, Rows
from hope_pt.errors import ConfigError

FILLER = 0


class MQARSource:
    """`Source` of generated sequences; `num_values` gives the chance level 1 / num_values."""

    bytes_per_token = 0.0
    tokenizer_path: Path | None = None

    def __init__(self, config: DataConfig, *, split: str, vocab_size: int):
        task = config.mqar
        self._num_pairs = task.num_pairs
        self._num_queries = task.num_queries or task.num_pairs
        self.seq_len = config.seq_len
        self.vocab_size = vocab_size
        self.num_samples = task.train_samples if split == "train" else task.heldout_samples
        self.num_keys = (vocab_size - 1) // 2
        self.num_values = vocab_size - 1 - self.num_keys
        needed = 2 * (self._num_pairs + self._num_queries)
        if needed > self.seq_len + 1:
            raise ConfigError(
                f"data.seq_len = {self.seq_len} is too short for {self._num_pairs} pairs and {self._num_queries} queries; "
                f"set data.seq_len to at least {needed - 1}"
            )
        if self.num_keys < self._num_pairs:
            raise ConfigError(
                f"model.vocab_size = {vocab_size} gives {self.num_keys} keys for {self._num_pairs} pairs; "
                f"raise it to {2 * self._num_pairs + 1}"
            )
        cause = ["hope-mqar/2", config.seed, split, self.seq_len, vocab_size, self._num_pairs, self._num_queries, self.num_samples]
        self.fingerprint = hashlib.sha256(json.dumps(cause).encode()).hexdigest()
        self._key = hashlib.sha256(f"hope-mqar/2|{config.seed}|{split}".encode()).hexdigest()

    def read(self, indices: np.ndarray) -> Batch:
        return self.read_rows(indices).to_batch()

    def read_rows(self, indices: np.ndarray) -> Rows:
        indices = np.asarray(indices, np.int64)
        if indices.size and (indices.min() < 0 or indices.max() >= self.num_samples):
            raise IndexError(f"sample index outside 0..{self.num_samples - 1}")
        ids = np.full((indices.size, self.seq_len + 1), FILLER, np.int64)
        mask = np.zeros((indices.size, self.seq_len), np.bool_)
        starts = np.zeros((indices.size, self.seq_len), np.bool_)
        starts[:, 0] = True
        for row, index in enumerate(indices.tolist()):
            self._generate(index, ids[row], mask[row])
        return Rows(ids, starts, mask)

    def _generate(self, index: int, ids: np.ndarray, mask: np.ndarray) -> None:
        """Fill ids [seq_len + 1] and mask [seq_len] of sample `index`."""
        digest = hashlib.sha256(f"{self._key}|{index}".encode()).digest()
        random = np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "little")))
        pairs, queries = self._num_pairs, self._num_queries
        keys = 1 + random.permutation(self.num_keys)[:pairs]
        values = 1 + self.num_keys + random.integers(self.num_values, size=pairs)
        ids[0 : 2 * pairs : 2], ids[1 : 2 * pairs : 2] = keys, values
        asked = random.integers(pairs, size=queries)
        free = ids.size - 2 * pairs - 2 * queries
        gaps = np.sort(random.integers(free + 1, size=queries))
        places = 2 * pairs + gaps + 2 * np.arange(queries)
        ids[places], ids[places + 1] = keys[asked], values[asked]
        mask[places] = True

    def close(self) -> None:
        """Nothing is held."""
