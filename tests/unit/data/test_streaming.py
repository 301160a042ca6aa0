"""mosaicml-streaming: it reads our shards, we read its, and our backend on it gives the local batches or an error in time."""

import json
import shutil
import sys
import time

import numpy as np
import pytest
import torch

from hope_data import mds
from hope_pt.config.schema import DataConfig
from hope_pt.data import Loader, open_source, streaming_backend
from hope_pt.data.streaming_backend import Fetcher, import_streaming, open_streaming
from hope_pt.errors import DataError

pytestmark = pytest.mark.timeout(110)
SEQ_LEN = 64


@pytest.fixture(scope="module")
def streaming():
    try:
        return import_streaming()
    except DataError as error:
        pytest.skip(str(error))


def config_of(remote, local):
    return DataConfig(path=str(local), remote=str(remote), backend="streaming", seq_len=SEQ_LEN)


def local_source(path, split="train"):
    return open_source(DataConfig(path=str(path), seq_len=SEQ_LEN), split=split)


def test_streaming_reads_our_shards(streaming, corpus, tmp_path):
    """Through its own index and reader classes, every sample of both splits, with hash validation of the download."""
    for split in ("train", "heldout"):
        source = local_source(corpus, split)
        rows = source.read_rows(np.arange(source.num_samples))
        settings = {"download_retry": 1, "download_timeout": 10, "validate_hash": "sha256", "keep_zip": False}
        stream = streaming.Stream(remote=str(corpus), local=str(tmp_path), split=split, **settings)
        shards = stream.get_shards(streaming.base.world.World.detect(), allow_unsafe_types=False)
        for shard in shards:
            stream.prepare_shard(shard)
        samples = [shard[i] for shard in shards for i in range(shard.samples)]
        assert len(samples) == source.num_samples
        assert all((s["tokens"] == ids).all() for s, ids in zip(samples, rows.ids, strict=True))
        starts = [s["doc_starts"] for s in samples]
        assert all(s[-1] == SEQ_LEN + 1 for s in starts)
        assert [s[s < SEQ_LEN].tolist() for s in starts] == [np.flatnonzero(r).tolist() for r in rows.doc_start]


def test_our_writer_is_mdswriter_byte_for_byte(streaming, tmp_path):
    generator = np.random.default_rng(0)
    samples = []
    for n in range(40):
        starts = np.sort(generator.choice(300, size=n * 7 % 290, replace=False)).astype(np.uint32)
        samples.append((generator.integers(0, 60_000, 301).astype(np.uint16), starts))
    columns = {"tokens": "ndarray:uint16", "doc_starts": "ndarray:uint32"}
    with streaming.MDSWriter(out=str(tmp_path), columns=columns, hashes=["sha256"], size_limit=mds.SIZE_LIMIT) as writer:
        for ids, starts in samples:
            writer.write({"tokens": ids, "doc_starts": np.append(starts, np.uint32(301)).astype(np.uint32)})
    data = mds.encode_shard([mds.encode_sample(ids, starts) for ids, starts in samples], dtype="uint16")
    assert (tmp_path / "shard.00000.mds").read_bytes() == data
    (entry,) = json.loads((tmp_path / "index.json").read_bytes())["shards"]
    assert entry == mds.index_entry("shard.00000.mds", data, 40, dtype="uint16")
    decoded = mds.decode_shard((tmp_path / "shard.00000.mds").read_bytes(), dtype="uint16")
    assert all((a == c).all() and (b == d).all() for (a, b), (c, d) in zip(samples, decoded, strict=True))


@pytest.mark.parametrize("workers", [0, 1])
def test_backend_gives_the_local_batches(streaming, corpus, tmp_path, workers):
    config = config_of(corpus, tmp_path / "cache")
    source = open_source(config, split="train")
    helped = config.model_copy(update={"num_workers": workers})
    with Loader(source, config=helped, global_batch_size=16) as loader:
        remote = [next(loader) for _ in range(6)]
    local = local_source(corpus)
    assert source.fingerprint == local.fingerprint
    loader = Loader(local, config=config, global_batch_size=16)
    assert all(torch.equal(next(loader).tokens_BT, b.tokens_BT) for b in remote)


def test_shards_come_when_needed(streaming, corpus, tmp_path):
    source = open_streaming(config_of(corpus, tmp_path), split="train")
    assert not list((tmp_path / "train").glob("*.mds"))
    source.read(np.array([0]))
    assert [p.name for p in (tmp_path / "train").glob("*.mds")] == ["shard.00000.mds"]


@pytest.mark.parametrize("damage, workers", [("missing", 0), ("missing", 1), ("flipped", 0), ("truncated", 0)])
def test_bad_remote_shard_is_an_error_in_time(streaming, damaged, tmp_path, damage, workers):
    """The case in which the upstream data set ends the epoch early without a word, or hangs with workers."""
    shard = damaged / "train" / "shard.00001.mds"
    data = shard.read_bytes()
    shard.unlink()
    if damage != "missing":
        shard.write_bytes(data[:-9] if damage == "truncated" else data[:5000] + bytes([data[5000] ^ 4]) + data[5001:])
    config = config_of(damaged, tmp_path / "cache").model_copy(update={"num_workers": workers})
    source = open_source(config, split="train")
    started = time.monotonic()
    with Loader(source, config=config, global_batch_size=source.num_samples) as loader:
        with pytest.raises(DataError, match=r"train/shard\.00001\.mds"):
            next(loader)
    assert time.monotonic() - started < 60
    assert not (tmp_path / "cache" / "train" / "shard.00001.mds").exists()
    shard.write_bytes(data)
    assert len(source.read(np.arange(source.num_samples))) == source.num_samples


def test_store_that_hangs_is_an_error_in_time(streaming, corpus, tmp_path, monkeypatch):
    source = open_streaming(config_of(corpus, tmp_path), split="train", timeout=0.5)
    monkeypatch.setattr(Fetcher, "_prepare", lambda self, entry: time.sleep(5))
    with pytest.raises(DataError, match="did not arrive within 0.5 s"):
        source.read(np.array([0]))


def test_cache_of_another_corpus_is_refused(streaming, corpus, tmp_path):
    cache = tmp_path / "cache"
    cache.mkdir()
    (cache / "manifest.json").write_text("{}")
    with pytest.raises(DataError, match="caches another corpus"):
        open_source(config_of(corpus, cache), split="train")


def test_missing_remote_is_named(streaming, tmp_path):
    with pytest.raises(DataError, match=r"cannot fetch .*nowhere/manifest.json"):
        open_source(config_of(tmp_path / "nowhere", tmp_path / "cache"), split="train")


def test_missing_package_names_the_recipe(monkeypatch, tmp_path):
    for name in [m for m in sys.modules if m.split(".")[0] == "streaming"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "streaming", None)
    with pytest.raises(DataError, match=r"needs the package mosaicml-streaming .*requirements/streaming-cpu.txt"):
        streaming_backend.import_streaming()


def test_local_corpus_through_the_backend(streaming, corpus, tmp_path):
    copy = shutil.copytree(corpus, tmp_path / "copy")
    source = open_source(DataConfig(path=str(copy), backend="streaming", seq_len=SEQ_LEN), split="heldout")
    assert torch.equal(source.read(np.arange(3)).tokens_BT, local_source(corpus, "heldout").read(np.arange(3)).tokens_BT)
