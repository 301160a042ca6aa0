"""SentencePiece BPE: training with the settings that convert without loss, and encoding that never yields a control id.

Identity normalisation, no dummy prefix, byte fallback, digits split, whitespace pieces allowed: decode(encode(text)) == text for any
text without NUL, but for U+2581 (the format's own sign for a space), which comes back as a space. Literal control strings such as
"</s>" in a text are encoded as the characters they are.
"""

import hashlib
import io
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import sentencepiece

from hope_data.errors import PrepError

PAD, BOS, EOS, UNK = 0, 1, 2, 3
SMALLEST_VOCAB = 4 + 256 + 1
_CHUNK_CHARS = 4000


class Tokenizer:
    """A loaded model. `sha256` is of the model file; `vocab_size`, `eos` as in the model."""

    def __init__(self, data: bytes, *, name: str):
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=data)
        except (RuntimeError, ValueError) as error:
            raise PrepError(f"{name} is not a SentencePiece model ({error}); make one with `hope-data train-tokenizer`") from None
        self.name = name
        self.data = data
        self.sha256 = hashlib.sha256(data).hexdigest()
        self.vocab_size: int = self._processor.vocab_size()
        self.eos: int = self._processor.eos_id()
        self._control = np.array([i for i in range(self.vocab_size) if self._processor.is_control(i) or self._processor.is_unknown(i)])
        if self.eos < 0:
            raise PrepError(f"{name} has no end-of-sentence id, which ends every document; make one with `hope-data train-tokenizer`")

    @classmethod
    def load(cls, path: Path) -> "Tokenizer":
        """Read a model file; PrepError if it is missing or not a model."""
        try:
            return cls(path.read_bytes(), name=str(path))
        except OSError as error:
            raise PrepError(f"cannot read tokenizer {path}: {error.strerror}") from None

    def encode(self, text: str) -> np.ndarray:
        """Ids [n] int64 of a text; PrepError if an id is a control id or `unk` (the model lacks byte fallback)."""
        ids = np.asarray(self._processor.encode(text), np.int64)
        if np.isin(ids, self._control).any():
            raise PrepError(f"tokenizer {self.name} cannot express some text without unknown or control ids; train it with byte fallback")
        return ids

    def decode(self, ids: np.ndarray) -> str:
        """Text of ids; control ids give nothing."""
        return self._processor.decode([int(i) for i in ids])

    def gives_back(self, text: str) -> bool:
        """Is decode(encode(text)) the text, but for U+2581?"""
        return self.decode(self.encode(text)) == text.replace("\u2581", " ")

    def control_ids(self) -> dict[str, int]:
        """Ids of pad, bos, eos, unk; -1 where the model has none."""
        p = self._processor
        return {"pad": p.pad_id(), "bos": p.bos_id(), "eos": p.eos_id(), "unk": p.unk_id()}


def _chunks(texts: Iterable[str]) -> Iterator[str]:
    """Pieces of some thousand characters, cut at line ends where there are any, so that line breaks become pieces of the vocabulary."""
    for text in texts:
        piece = ""
        for line in text.splitlines(keepends=True):
            while len(line) > _CHUNK_CHARS:
                yield line[:_CHUNK_CHARS]
                line = line[_CHUNK_CHARS:]
            if len(piece) + len(line) > _CHUNK_CHARS:
                yield piece
                piece = ""
            piece += line
        if piece:
            yield piece


def train(texts: Iterable[str], *, vocab_size: int) -> bytes:
    """Train a BPE model; the same texts give the same bytes. PrepError if the text cannot carry `vocab_size` pieces."""
    if vocab_size < SMALLEST_VOCAB:
        raise PrepError(f"--vocab-size {vocab_size} is below {SMALLEST_VOCAB} (4 control ids, 256 bytes and at least one piece)")
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_chunks(texts),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            byte_fallback=True,
            split_digits=True,
            allow_whitespace_only_pieces=True,
            character_coverage=0.9999,
            max_sentence_length=8 * _CHUNK_CHARS,
            pad_id=PAD,
            bos_id=BOS,
            eos_id=EOS,
            unk_id=UNK,
            num_threads=4,
            minloglevel=2,
        )
    except RuntimeError as error:
        reason = " ".join(str(error).split("] ")[-1].split()) or "no reason given"
        raise PrepError(f"no tokenizer of --vocab-size {vocab_size} from this text: {reason} Give another size or more text") from None
    data = model.getvalue()
    got = Tokenizer(data, name="the trained tokenizer").vocab_size
    if got != vocab_size:
        raise PrepError(f"the text carries only {got} pieces of --vocab-size {vocab_size}; lower it or give more text")
    return data
