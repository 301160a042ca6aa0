"""One small corpus, one tiny configuration and one finished run for all tests of the command line."""

import shutil

import pytest

from hope_data.corpus_build import BuildOptions, build
from hope_data.documents import ReadOptions
from hope_data.embedded import tiny_corpus
from hope_data.parts import HoldOut
from hope_pt import cli

SEQ_LEN = 48
CONFIG = """
name = "run"
[model]
vocab_size = 400
num_layers = 2
width = 16
num_heads = 2
[model.titans]
chunk_mem = 8
chunk_proj = 16
[model.cms]
hidden = 24
periods = [1, 2]
[optim]
lr = 1e-2
warmup_steps = 2
schedule = "wsd"
[engine]
micro_batch_size = 4
device = "cpu"
threads = 1
[checkpoint]
every = 2
[eval]
every = 3
sequences = 4
passkey = false
diagnostics_every = 2
[train]
global_batch_size = 4
steps = 6
"""


def build_corpus(out, *, works: int, tokenizer: str = ""):
    options = BuildOptions(
        seq_len=SEQ_LEN,
        read=ReadOptions(),
        holdout=HoldOut("per-file", 20),
        tokenizer=tokenizer,
        vocab_size=0 if tokenizer else 400,
        train_bytes=50_000,
        shard_bytes=256 << 10,
    )
    with tiny_corpus() as (inputs, sources):
        build(inputs[:works], sources=sources[:works], out=out, options=options, workers=1)
    return out


@pytest.fixture(scope="session")
def cli_corpus(tmp_path_factory):
    return build_corpus(tmp_path_factory.mktemp("cli") / "corpus", works=1)


@pytest.fixture(scope="session")
def other_corpus(cli_corpus, tmp_path_factory):
    """Other text with the same tokenizer."""
    return build_corpus(tmp_path_factory.mktemp("cli") / "other", works=2, tokenizer=str(cli_corpus / "tokenizer.model"))


@pytest.fixture(scope="session")
def foreign_corpus(tmp_path_factory):
    """Other text with a tokenizer of its own."""
    return build_corpus(tmp_path_factory.mktemp("cli") / "foreign", works=2)


@pytest.fixture(scope="session")
def settings(cli_corpus, tmp_path_factory):
    """The configuration file; runs go to a directory that each test names."""
    path = tmp_path_factory.mktemp("cli") / "tiny.toml"
    path.write_text(f'{CONFIG}[data]\npath = "{cli_corpus}"\nseq_len = {SEQ_LEN}\n')
    return path


@pytest.fixture(scope="session")
def finished(settings, tmp_path_factory):
    """A run of 6 steps; read only."""
    out = tmp_path_factory.mktemp("runs")
    assert cli.main(["train", str(settings), f"out={out}"]) == 0
    return out / "run"


@pytest.fixture
def run_copy(finished, tmp_path):
    """A copy of the run to continue or damage."""
    return shutil.copytree(finished, tmp_path / "runs" / "run")


@pytest.fixture
def fails(capsys):
    """Runs a command that must exit 2 (or the given code) with one line on standard error, and returns the line."""

    def run(*arguments, code: int = 2) -> str:
        capsys.readouterr()
        assert cli.main([str(argument) for argument in arguments]) == code
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("hope: ")]
        assert len(lines) == 1, lines
        return lines[0]

    return run
