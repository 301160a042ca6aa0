"""Multi-query associative recall (Zoology): a task that only a working memory solves.

A sample: the pairs `k v k v ...`, a gap, then queried keys at random places of the rest. The target at a queried key is its value, which
is never shown again, and no other target counts. Id 0 fills the gaps. Keys are drawn without repetition from the lower half of the other
ids, values with repetition from the upper half, queried keys with repetition from the pairs. The gap is longer than the reach of the
convolutions, so a model without memory gets 1 / num_values right, one that only knows which values occurred about 1 / num_pairs.
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
        self._gap = task.gap
        needed = 2 * self._num_pairs + self._num_queries + self._gap
        if needed > self.seq_len:
            raise ConfigError(
                f"data.seq_len = {self.seq_len} is too short for {self._num_pairs} pairs, {self._num_queries} queries "
                f"and a gap of {self._gap}; "
                f"set data.seq_len to at least {needed}"
            )
        if self.num_keys < self._num_pairs:
            raise ConfigError(
                f"model.vocab_size = {vocab_size} gives {self.num_keys} keys for {self._num_pairs} pairs; "
                f"raise it to {2 * self._num_pairs + 1}"
            )
        shape = [self.seq_len, vocab_size, self._num_pairs, self._num_queries, self._gap, self.num_samples]
        cause = ["hope-mqar/4", config.seed, split, *shape]
        self.fingerprint = hashlib.sha256(json.dumps(cause).encode()).hexdigest()
        self._key = hashlib.sha256(f"hope-mqar/4|{config.seed}|{split}".encode()).hexdigest()

    def read(self, indices: np.ndarray) -> Batch:
        return self.read_rows(indices).to_batch()

    def read_rows(self, indices: np.ndarray) -> Rows:
        indices = np.asarray(indices, np.int64)
        if indices.size and (indices.min() < 0 or indices.max() >= self.num_samples):
            raise IndexError(f"sample index outside 0..{self.num_samples - 1}")
        ids = np.full((indices.size, self.seq_len + 1), FILLER, np.int64)
        answers = np.full((indices.size, self.seq_len), FILLER, np.int64)
        starts = np.zeros((indices.size, self.seq_len), np.bool_)
        starts[:, 0] = True
        for row, index in enumerate(indices.tolist()):
            self._generate(index, ids[row], answers[row])
        return Rows(ids, starts, answers != FILLER, answers)

    def _generate(self, index: int, ids: np.ndarray, answers: np.ndarray) -> None:
        """Fill ids [seq_len + 1] and answers [seq_len] of sample `index`."""
        digest = hashlib.sha256(f"{self._key}|{index}".encode()).digest()
        random = np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "little")))
        pairs, queries = self._num_pairs, self._num_queries
        keys = 1 + random.permutation(self.num_keys)[:pairs]
        values = 1 + self.num_keys + random.integers(self.num_values, size=pairs)
        ids[0 : 2 * pairs : 2], ids[1 : 2 * pairs : 2] = keys, values
        asked = random.integers(pairs, size=queries)
        first = 2 * pairs + self._gap
        places = first + random.permutation(self.seq_len - first)[:queries]
        ids[places], answers[places] = keys[asked], values[asked]

    def close(self) -> None:
        """Nothing is held."""
