"""The corpus that lies in the package: public-domain English for tests, demonstrations and `hope-data tiny`; needs no network."""

import importlib.resources
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hope_data.corpus_build import Source
from hope_data.documents import Input
from hope_data.errors import PrepError
from hope_data.files import sha256_file


@contextmanager
def tiny_corpus() -> Iterator[tuple[list[Input], list[Source]]]:
    """Its files and their sources, checked against the hashes of corpus/sources.json; PrepError if a file was changed."""
    with importlib.resources.as_file(importlib.resources.files("hope_data") / "corpus") as directory:
        records = json.loads((Path(directory) / "sources.json").read_text("ascii"))
        for record in records:
            if sha256_file(Path(directory) / record["file"]) != record["sha256"]:
                raise PrepError(f"the embedded text {record['file']} differs from its hash in sources.json; install hope-pt again")
        inputs = [Input(str(Path(directory) / r["file"]), r["file"]) for r in records]
        yield inputs, [Source(name=r["name"], licence=r["licence"], origin=r["origin"]) for r in records]
