"""The tokenizer gives every text back, never yields a control id, and is a function of its training text."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hope_data.embedded import tiny_corpus
from hope_data.errors import PrepError
from hope_data.parts import checked_ids
from hope_data.tokenizer import BOS, EOS, PAD, UNK, Tokenizer, train


@pytest.fixture(scope="module")
def model():
    with tiny_corpus() as (inputs, _):
        return train([open(inputs[0].path).read()], vocab_size=512)


@pytest.fixture(scope="module")
def tokenizer(model):
    return Tokenizer(model, name="test")


@settings(max_examples=200, deadline=None)
@given(text=st.text(st.characters(exclude_characters="\0\u2581", exclude_categories=["Cs"]), max_size=60))
def test_any_text_comes_back(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert not np.isin(ids, [PAD, BOS, EOS, UNK]).any()


@pytest.mark.parametrize("text", ["<s>a</s>", "<pad><unk>", "<0x41>", " lead", "trail \n\n", "a\r\n\tb", "12345", "日本 é 👩‍🚀", "ﬁ"])
def test_awkward_text_comes_back(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert len(tokenizer.encode(text)) > 0 and tokenizer.encode(text).min() > UNK


def test_the_sign_for_a_space_is_the_one_exception(tokenizer):
    assert tokenizer.decode(tokenizer.encode("a\u2581b")) == "a b" and tokenizer.gives_back("a\u2581b")


def test_digits_are_split(tokenizer):
    assert len(tokenizer.encode("123456")) >= 6


def test_training_is_deterministic(model):
    with tiny_corpus() as (inputs, _):
        assert train([open(inputs[0].path).read()], vocab_size=512) == model


def test_size_and_control_ids(tokenizer):
    assert tokenizer.vocab_size == 512
    assert tokenizer.control_ids() == {"pad": PAD, "bos": BOS, "eos": EOS, "unk": UNK} and tokenizer.eos == EOS


@pytest.mark.parametrize("size, message", [(100, "below 261"), (5000, "Vocabulary size too high .5000.* more text")])
def test_impossible_vocabulary_is_an_error_in_one_line(size, message):
    with pytest.raises(PrepError, match=message) as error:
        train(["some text\n" * 20], vocab_size=size)
    assert "\n" not in str(error.value)


def test_other_files_are_refused(tmp_path):
    (tmp_path / "m").write_bytes(b"not a model")
    with pytest.raises(PrepError, match="not a SentencePiece model"):
        Tokenizer.load(tmp_path / "m")
    with pytest.raises(PrepError, match="cannot read tokenizer"):
        Tokenizer.load(tmp_path / "none")


@settings(max_examples=100, deadline=None)
@given(
    ids=st.lists(st.integers(0, 1 << 34), min_size=1, max_size=20),
    dtype=st.sampled_from(["uint16", "uint32"]),
    vocab=st.integers(1, 1 << 33),
)
def test_ids_never_wrap(ids, dtype, vocab):
    limit = min(vocab, np.iinfo(dtype).max + 1)
    if max(ids) < limit:
        assert checked_ids(np.array(ids), dtype=dtype, vocab_size=vocab, where="x").tolist() == ids
    else:
        with pytest.raises(PrepError, match=f"x: token id {max(ids)} is outside"):
            checked_ids(np.array(ids), dtype=dtype, vocab_size=vocab, where="x")
