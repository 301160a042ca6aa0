"""A small corpus with several shards and both splits, built once; tests that damage it take a copy."""

import shutil

import pytest

from hope_data.corpus_build import BuildOptions, build
from hope_data.documents import ReadOptions
from hope_data.embedded import tiny_corpus
from hope_data.parts import HoldOut

SEQ_LEN = 64


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """Corpus directory: 5 works, vocabulary 512, sequence length 64, shards of 32 KiB."""
    out = tmp_path_factory.mktemp("corpus") / "corpus"
    options = BuildOptions(
        seq_len=SEQ_LEN, read=ReadOptions(), holdout=HoldOut("per-file", 20), vocab_size=512, train_bytes=200_000, shard_bytes=32 << 10
    )
    with tiny_corpus() as (inputs, sources):
        build(inputs[:2], sources=sources[:2], out=out, options=options, workers=1)
    return out


@pytest.fixture
def damaged(corpus, tmp_path):
    """A copy of the corpus to break."""
    return shutil.copytree(corpus, tmp_path / "copy")
