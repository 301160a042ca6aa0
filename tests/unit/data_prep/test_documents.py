"""Reading input files: good documents come out as they are, bad ones as rejects with their line."""

import gzip
import json

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from hope_data.documents import Document, Input, ReadOptions, Reject, find_inputs, read_documents
from hope_data.errors import PrepError

GOOD = b'{"text": "fine \\u00e9"}\n'
BAD_LINES = {
    b'{"text": "\xff"}\n': "invalid UTF-8",
    b'{"text": \n': "broken JSON",
    b"[" * 100_000 + b"\n": "broken JSON",
    b'{"txt": "a"}\n': "no key 'text'",
    b'["text"]\n': "no key 'text'",
    b'{"text": 3}\n': "text is not a string",
    b'{"text": null}\n': "text is not a string",
    b'{"text": "  \\n"}\n': "empty text",
    b'{"text": "a\\u0000b"}\n': "NUL character",
    b'{"text": "a\\ud800b"}\n': "lone surrogate",
    b'{"text": "a", "id": "\\ud800"}\n': "lone surrogate",
    b'{"text": "' + b"x" * 200_000 + b'"}\n': "line longer than 150000 bytes",
}


def read(path, **options):
    return list(read_documents(Input(str(path), path.name), ReadOptions(**options)))


@pytest.mark.parametrize("line, reason", BAD_LINES.items(), ids=[f"{i}-{r}" for i, r in enumerate(BAD_LINES.values())])
def test_bad_line_is_rejected_with_its_number(tmp_path, line, reason):
    path = tmp_path / "a.jsonl"
    path.write_bytes(GOOD + line + b"\n" + GOOD)
    first, bad, last = read(path, max_bytes=150_000)
    assert (first.text, last.text, last.line) == ("fine é", "fine é", 4)
    assert bad == Reject(2, reason)


def test_last_line_needs_no_newline(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(GOOD + GOOD.rstrip())
    assert len(read(path)) == 2


@pytest.mark.parametrize("ending", ["jsonl", "jsonl.gz", "jsonl.zst", "parquet"])
def test_all_containers_give_the_same_documents(tmp_path, ending):
    records = [{"text": f"text {i}\n\n é", "id": f"d{i}"} for i in range(700)]
    path = tmp_path / f"a.{ending}"
    data = "".join(json.dumps(r) + "\n" for r in records).encode()
    if ending == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), path)
    else:
        path.write_bytes({"gz": gzip.compress, "zst": zstandard.compress}.get(ending.split(".")[-1], bytes)(data))
    documents = read(path)
    assert [d.text for d in documents] == [r["text"] for r in records]
    assert [d.line for d in documents] == list(range(1, 701))
    assert len({d.key for d in documents}) == 700


@pytest.mark.parametrize("ending, pack", [("gz", gzip.compress), ("zst", zstandard.compress)])
def test_truncated_archive_is_an_error(tmp_path, ending, pack):
    path = tmp_path / f"a.jsonl.{ending}"
    path.write_bytes(pack(GOOD * 50_000)[:-20])
    with pytest.raises(PrepError, match="a.jsonl"):
        read(path)


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst", "a.parquet"])
def test_wrong_content_is_an_error_in_one_line(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(GOOD * 3)
    with pytest.raises(PrepError, match=name) as error:
        read(path)
    assert "\n" not in str(error.value)


def test_parquet_without_the_column_names_the_columns(tmp_path):
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"body": "x"}]), path)
    with pytest.raises(PrepError, match="columns body, none named 'text'; set --text-key"):
        read(path)
    assert [d.text for d in read(path, text_key="body")] == ["x"]


def test_text_file_is_cut_at_form_feed_lines(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"one\n\ftwo\n\n\f\nx\ny\n\f\n \n\f\nbad \xff\n\f\nend\n")
    assert [(d.line, d.text if isinstance(d, Document) else d.reason) for d in read(path)] == [
        (1, "one\n\x0ctwo\n"),
        (5, "x\ny"),
        (8, "empty text"),
        (10, "invalid UTF-8"),
        (12, "end"),
    ]


def test_key_is_of_the_id_where_there_is_one(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a", "id": "1"}\n{"text": "b", "id": "1"}\n{"text": "b"}\n{"text": "b"}\n')
    a, b, c, d = (document.key for document in read(path))
    assert a == b != c == d


def test_inputs_are_found_and_named_without_their_place(tmp_path):
    (tmp_path / "in" / "sub").mkdir(parents=True)
    for name in ("in/b.txt", "in/a.jsonl", "in/sub/a.jsonl", "in/readme.md"):
        (tmp_path / name).write_text("x")
    assert [i.name for i in find_inputs([str(tmp_path / "in")])] == ["a.jsonl", "b.txt", "sub/a.jsonl"]
    for arguments, message in [
        ([str(tmp_path / "none")], "does not exist"),
        ([str(tmp_path / "in/readme.md")], "none of the endings"),
        ([str(tmp_path / "in/a.jsonl"), str(tmp_path / "in/sub/a.jsonl")], "two inputs have the name a.jsonl"),
        ([], "no input files"),
    ]:
        with pytest.raises(PrepError, match=message):
            find_inputs(arguments)
