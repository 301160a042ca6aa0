"""The local reader gives exactly the token stream that was written, and refuses anything that is not."""

import json

import numpy as np
import pytest
import sentencepiece
import torch

from hope_data import mds
from hope_data.embedded import tiny_corpus
from hope_pt.config.schema import DataConfig
from hope_pt.data import open_source
from hope_pt.data import shards as shards_module
from hope_pt.errors import ConfigError, DataError

SEQ_LEN = 64


def source_of(path, split="train", **settings):
    return open_source(DataConfig(path=str(path), seq_len=SEQ_LEN, **settings), split=split)


def test_batches_have_the_contracts_types(corpus):
    batch = source_of(corpus).read(np.array([0, 3, 5]))
    assert {k: (tuple(v.shape), v.dtype) for k, v in vars(batch).items()} == {
        "tokens_BT": ((3, SEQ_LEN), torch.int64),
        "targets_BT": ((3, SEQ_LEN), torch.int64),
        "loss_mask_BT": ((3, SEQ_LEN), torch.float32),
        "doc_start_BT": ((3, SEQ_LEN), torch.bool),
    }
    part = batch.slice(slice(1, 3))
    assert len(part) == 2 and torch.equal(part.targets_BT, batch.targets_BT[1:])


def test_samples_are_the_documents_in_order(corpus):
    """Decoded and cut at the document starts, the train split is the embedded text without its held-out documents."""
    source, held = source_of(corpus), source_of(corpus, "heldout")
    processor = sentencepiece.SentencePieceProcessor(model_file=str(source.tokenizer_path))
    texts = []
    for part in (source, held):
        batch = part.read(np.arange(part.num_samples))
        ids, starts = batch.tokens_BT.flatten(), batch.doc_start_BT.flatten()
        edges = [*torch.nonzero(starts).flatten().tolist(), len(ids)]
        texts.append([processor.decode(ids[a:b].tolist()) for a, b in zip(edges, edges[1:], strict=False)])
        assert torch.equal(batch.tokens_BT.flatten()[1:], batch.targets_BT.flatten()[:-1])
    with tiny_corpus() as (inputs, _):
        documents = [d.removesuffix("\n") for i in inputs[:2] for d in open(i.path).read().split("\n\f\n")]
    found = [t for part in texts for t in part[:-1]]
    assert set(found) <= set(documents) and len(found) == len(documents) - 2
    assert [d for d in documents if d in set(texts[0][:-1])] == texts[0][:-1]
    assert not set(texts[0]) & set(texts[1])


def test_bytes_per_token_is_of_the_split(corpus):
    counts = json.loads((corpus / "manifest.json").read_bytes())["splits"]
    for split in ("train", "heldout"):
        assert source_of(corpus, split).bytes_per_token == counts[split]["bytes"] / counts[split]["tokens"]


def test_reader_agrees_with_the_writers_decoder(corpus):
    source = source_of(corpus)
    rows = source.read_rows(np.arange(source.num_samples))
    files = sorted((corpus / "train").glob("*.mds"))
    samples = [s for f in files for s in mds.decode_shard(f.read_bytes(), dtype="uint16")]
    assert len(files) > 5
    assert (rows.ids == np.stack([ids for ids, _ in samples])).all()
    assert [np.flatnonzero(r).tolist() for r in rows.doc_start] == [s[s < SEQ_LEN].tolist() for _, s in samples]


@pytest.mark.parametrize("index", [-1, 10**9])
def test_indices_outside_are_refused(corpus, index):
    with pytest.raises(IndexError, match="outside 0"):
        source_of(corpus).read(np.array([index]))


def break_flip(path, where):
    shard = path / "train" / "shard.00002.mds"
    data = bytearray(shard.read_bytes())
    data[int(where * (len(data) - 1))] ^= 0x10
    shard.write_bytes(data)


BREAKS = {
    "flip in head": lambda p: break_flip(p, 0.0),
    "flip in offsets": lambda p: break_flip(p, 0.005),
    "flip in body": lambda p: break_flip(p, 0.5),
    "flip at end": lambda p: break_flip(p, 1.0),
    "truncated": lambda p: (p / "train" / "shard.00002.mds").write_bytes((p / "train" / "shard.00002.mds").read_bytes()[:-1]),
    "missing": lambda p: (p / "train" / "shard.00002.mds").unlink(),
}


@pytest.mark.parametrize("limit", [shards_module.CHECK_AT_OPEN_BYTES, 0], ids=["at open", "at first touch"])
@pytest.mark.parametrize("name", BREAKS)
def test_damaged_shard_is_named_before_its_samples_are_used(damaged, monkeypatch, name, limit):
    monkeypatch.setattr(shards_module, "CHECK_AT_OPEN_BYTES", limit)
    BREAKS[name](damaged)
    with pytest.raises(DataError, match=r"shard .*shard\.00002\.mds .*(damaged|bytes|missing)") as error:
        source = source_of(damaged)
        assert limit == 0
        source.read(np.arange(source.num_samples))
    assert "\n" not in str(error.value)


def test_whole_shards_are_readable_beside_a_damaged_one_in_a_large_corpus(damaged, monkeypatch):
    monkeypatch.setattr(shards_module, "CHECK_AT_OPEN_BYTES", 0)
    break_flip(damaged, 0.5)
    assert len(source_of(damaged).read(np.array([0, 1]))) == 2


def change_manifest(path, change):
    manifest = json.loads((path / "manifest.json").read_bytes())
    change(manifest)
    (path / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda p: (p / "manifest.json").unlink(), "cannot read .*manifest.json"),
        (lambda p: (p / "manifest.json").write_text("{"), "not valid JSON"),
        (lambda p: (p / "manifest.json").write_text("[]"), "not a hope-data/1 manifest"),
        (lambda p: change_manifest(p, lambda m: m["splits"]["train"].update(samples=1)), "was altered"),
        (lambda p: change_manifest(p, lambda m: m.update(fingerprint="0" * 64)), "was altered"),
        (lambda p: change_manifest(p, lambda m: m.pop("dtype")), "was altered"),
        (lambda p: (p / "tokenizer.model").unlink(), "cannot read .*tokenizer.model"),
        (lambda p: (p / "tokenizer.model").write_bytes(b"x"), "tokenizer.model is damaged"),
    ],
)
def test_broken_directory_is_refused_in_one_line(damaged, change, message):
    change(damaged)
    with pytest.raises(DataError, match=message) as error:
        source_of(damaged)
    assert "\n" not in str(error.value)


def test_other_sequence_length_names_both(corpus):
    with pytest.raises(DataError, match=r"data.seq_len = 128 .* 64"):
        open_source(DataConfig(path=str(corpus), seq_len=128), split="train")


def test_model_vocabulary_must_cover_the_ids(corpus):
    with pytest.raises(ConfigError, match=r"vocab_size = 511 .* 512"):
        open_source(DataConfig(path=str(corpus), seq_len=SEQ_LEN), split="train", vocab_size=511)
    assert open_source(DataConfig(path=str(corpus), seq_len=SEQ_LEN), split="train", vocab_size=600).vocab_size == 512


def test_closed_source_opens_again(corpus):
    source = source_of(corpus)
    before = source.read(np.arange(4)).tokens_BT
    source.close()
    assert torch.equal(source.read(np.arange(4)).tokens_BT, before)
