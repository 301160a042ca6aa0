"""`hope eval RUN`: the evaluations that fit a run, on its held-out data or on another directory of shards."""

import argparse
import json
from contextlib import closing
from pathlib import Path

from rich.console import Console
from rich.table import Table

from hope_pt import data, evals
from hope_pt.cli.clock import token_clock
from hope_pt.config.schema import TokenClockConfig
from hope_pt.data import Source
from hope_pt.errors import DataError, EvalError, HopeError
from hope_pt.files import replace_text
from hope_pt.nn import HopeLM
from hope_pt.nn.token_clock import ClockedLM
from hope_pt.train.trained import load_trained, require_tokenizer

DOCUMENTS = 8
"""Documents that are read where a token clock is given and no number of them."""


def run(arguments: argparse.Namespace) -> None:
    """Prints the values and writes them to RUN/eval-step-N.json."""
    trained = load_trained(arguments.run, step=arguments.step)
    config = trained.config
    if arguments.data:
        if config.data.source != "shards":
            raise DataError(f'--data {arguments.data}: a run with data.source = "{config.data.source}" reads no shards; drop --data')
        elsewhere = {"path": arguments.data, "backend": "mds", "remote": ""}
        config = config.model_copy(update={"data": config.data.model_copy(update=elsewhere)})
    if arguments.sequences is not None:
        if arguments.sequences < 1:
            raise EvalError(f"--sequences {arguments.sequences}: expected 1 or more")
        config = config.model_copy(update={"eval": config.eval.model_copy(update={"sequences": arguments.sequences})})
    clock = token_clock(arguments, config)
    vocab_size = config.model.vocab_size
    with (
        closing(data.open_source(config.data, split="train", vocab_size=vocab_size)) as train,
        closing(data.open_source(config.data, split="heldout", vocab_size=vocab_size)) as heldout,
    ):
        if not arguments.data and train.fingerprint != trained.fingerprint:
            raise DataError(
                f"{config.data.path} has fingerprint {train.fingerprint}, the run was trained on {trained.fingerprint}; "
                "name the directory to evaluate on with --data"
            )
        given = train.tokenizer_path
        if arguments.data and given and given.read_bytes() != require_tokenizer(trained).read_bytes():
            raise DataError(f"--data {arguments.data} has another tokenizer than the run was trained with; tokenize it with --tokenizer")
        values = evals.evaluate(trained.lm, heldout, config=config)
        if config.data.source == "shards":
            values |= evals.baselines(train, heldout, sequences=config.eval.sequences)
        if arguments.documents or clock.active:
            values |= _long_documents(trained.lm, heldout, arguments=arguments, clock=clock)
    _show(values, title=f"{config.name}, step {trained.step}")
    path = Path(arguments.run) / f"eval-step-{trained.step}.json"
    try:
        replace_text(path, text=json.dumps({"step": trained.step, "data": train.fingerprint, "values": values}, indent=1) + "\n")
    except OSError as error:
        raise HopeError(f"cannot write {path}: {error.strerror}") from error


def _long_documents(lm: HopeLM, source: Source, *, arguments: argparse.Namespace, clock: TokenClockConfig) -> dict[str, float]:
    """Long documents read by the model as it was trained, and with the clock if there is one."""
    least, most = arguments.document_tokens // 2, arguments.document_tokens
    if arguments.documents < 0 or least < 1:
        raise EvalError(f"--documents {arguments.documents} of --document-tokens {most}: expected 1 or more, of 2 tokens or more")
    texts = evals.documents(source, count=arguments.documents or DOCUMENTS, least=least, most=most)
    values = evals.read_documents(lm, texts, bytes_per_token=source.bytes_per_token)
    if clock.active:
        values |= evals.read_documents(ClockedLM(lm, clock), texts, bytes_per_token=source.bytes_per_token, name="clock_")
    return values


def _show(values: dict[str, float], *, title: str) -> None:
    table = Table(title=title, title_justify="left", show_edge=False, pad_edge=False)
    table.add_column("measure")
    table.add_column("value", justify="right")
    for name, value in values.items():
        table.add_row(name.removeprefix("eval/"), f"{value:.4f}".rstrip("0").rstrip("."))
    Console().print(table)
