"""`hope-data fetch`: corpora that can be downloaded, as JSONL with id, text, sha256, package version and licence for each document.

`debian-docs`: documentation packages of the Debian archive this machine is set up for (`apt-get download`, no root needed).
`fineweb-edu`: parquet files of HuggingFaceFW/fineweb-edu, through huggingface_hub where it is installed and the network is there.
"""

import gzip
import hashlib
import html.parser
import json
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from hope_data.errors import PrepError
from hope_data.files import commit_bytes, pretty_json, writing

DEBIAN_PACKAGES = {
    "linux-doc-6.12": "GPL-2.0-only",
    "perl-doc": "Artistic-1.0-Perl OR GPL-1.0-or-later",
    "python3.11-doc": "PSF-2.0",
    "anarchism": "GPL-2.0-or-later",
    "manpages-dev": "mixed free licences, see the package's copyright file",
    "manpages": "mixed free licences, see the package's copyright file",
}
FINEWEB = "HuggingFaceFW/fineweb-edu"
_SHORTEST = 200  # bytes; shorter files are stubs and includes
_SKIPPED_TAGS = {"script", "style", "head", "nav"}
_BLOCK_TAGS = {"p", "div", "li", "tr", "br", "pre", "h1", "h2", "h3", "h4", "h5", "h6", "dt", "dd", "table", "ul", "ol", "section"}


def fetch(recipe: str, out: Path, *, packages: list[str], subset: str, max_files: int) -> list[Path]:
    """Run a recipe; the files written. PrepError when a tool, a package or the network is missing."""
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
    if recipe == "debian-docs":
        return [_debian_package(name, out) for name in packages or list(DEBIAN_PACKAGES)]
    return _fineweb(out, subset=subset, max_files=max_files)


RECIPES: tuple[str, ...] = ("debian-docs", "fineweb-edu")


def source_record(path: str) -> dict[str, Any] | None:
    """The record (name, licence, version, origin) that a recipe left beside the file `path`; None if there is none."""
    record = Path(path + ".source.json")
    return json.loads(record.read_text("utf-8")) if record.exists() else None


def _run(command: list[str], directory: Path, *, mend: str) -> str:
    try:
        return subprocess.run(command, cwd=directory, check=True, capture_output=True, text=True).stdout
    except FileNotFoundError:
        raise PrepError(f"{command[0]} is not on this machine; {mend}") from None
    except subprocess.CalledProcessError as error:
        reason = (error.stderr.strip().splitlines() or ["no message"])[-1]
        raise PrepError(f"`{' '.join(command[:3])}` failed: {reason}; {mend}") from None


def _debian_package(name: str, out: Path) -> Path:
    mend = "this recipe needs a Debian machine with package lists (`apt-get update`) that offer the package"
    path = out / f"{name}.jsonl"
    with tempfile.TemporaryDirectory(prefix="hope-data-") as temporary:
        scratch = Path(temporary)
        _run(["apt-get", "download", name], scratch, mend=mend)
        archive = next(iter(scratch.glob("*.deb")), None)
        if archive is None:
            raise PrepError(f"apt-get downloaded nothing for {name}; {mend}")
        version = _run(["dpkg-deb", "-f", archive.name, "Version"], scratch, mend=mend).strip()
        digest = hashlib.sha256(archive.read_bytes()).hexdigest()
        _run(["dpkg-deb", "-x", archive.name, "tree"], scratch, mend=mend)
        licence = DEBIAN_PACKAGES.get(name, "see the package's copyright file")
        lines = []
        for relative, text in _texts(scratch / "tree", scratch):
            sha = hashlib.sha256(text.encode("utf-8")).hexdigest()
            record = {"id": f"{name}/{relative}", "text": text, "sha256": sha, "package": name, "version": version, "licence": licence}
            lines.append(json.dumps(record, ensure_ascii=False, sort_keys=True) + "\n")
        if not lines:
            raise PrepError(f"package {name} {version} holds no .rst .txt .md .pod .html .yaml files or manual pages; choose another")
    commit_bytes(path, "".join(lines).encode("utf-8"))
    origin = f"Debian package, sha256 {digest}, manual pages {_manual_tool()}"
    source = {"name": name, "licence": licence, "version": version, "origin": origin}
    commit_bytes(Path(f"{path}.source.json"), pretty_json(source))
    return path


def _texts(tree: Path, scratch: Path) -> Iterator[tuple[str, str]]:
    """(path, text) of every document, in path order; left out: links, what is not UTF-8 or tiny, HTML copies of Markdown files."""
    files = [p for p in sorted(tree.rglob("*")) if p.is_file() and not p.is_symlink()]
    markdown = {_stem(p) for p in files if p.name.removesuffix(".gz").endswith((".md", ".markdown"))}
    for path in files:
        if _stem(path) in markdown and path.name.removesuffix(".gz").endswith((".html", ".htm")):
            continue
        convert = _converter(path, scratch)
        if convert is None:
            continue
        data = gzip.decompress(path.read_bytes()) if path.name.endswith(".gz") else path.read_bytes()
        try:
            text = convert(data.decode("utf-8"))
        except UnicodeDecodeError:
            continue
        if len(text.encode("utf-8")) >= _SHORTEST and "\0" not in text:
            yield path.relative_to(tree).as_posix(), text


def _stem(path: Path) -> str:
    return path.name.removesuffix(".gz").rsplit(".", 1)[0]


def _converter(path: Path, scratch: Path) -> Callable[[str], str] | None:
    name = path.name.removesuffix(".gz")
    if name.startswith(("changelog", "copyright", "NEWS.Debian")):
        return None
    if "/man/" in path.as_posix() and re.search(r"\.[1-9][a-z]*$", name):
        return lambda text: _manual_page(text, scratch)
    if name.endswith((".html", ".htm")):
        return _html_text
    return (lambda text: text) if name.endswith((".rst", ".txt", ".md", ".markdown", ".pod", ".yaml")) else None


def _manual_tool() -> str:
    return "by groff" if shutil.which("groff") else "without groff"


def _manual_page(text: str, scratch: Path) -> str:
    """Formatted text where groff is installed, else the source without its requests; the source record says which."""
    if _manual_tool() == "by groff":
        command = ["groff", "-man", "-Tutf8", "-P-cbou"]
        done = subprocess.run(command, input=text, cwd=scratch, capture_output=True, text=True, check=False)
        if done.returncode == 0:
            return done.stdout
    lines = [re.sub(r'^\.[A-Za-z]+ ?"?', "", line).replace('"', "") for line in text.splitlines() if not line.startswith(('.\\"', "'\\\""))]
    return re.sub(r"\\f[BIRP]|\\&|\\\(..|\\-", lambda m: "-" if m.group() == "\\-" else "", "\n".join(lines)) + "\n"


class _Text(html.parser.HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.pieces: list[str] = []
        self._skip = 0

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        if tag in _SKIPPED_TAGS:
            self._skip += 1
        elif tag in _BLOCK_TAGS:
            self.pieces.append("\n")

    def handle_endtag(self, tag: str) -> None:
        if tag in _SKIPPED_TAGS:
            self._skip = max(0, self._skip - 1)
        elif tag in _BLOCK_TAGS:
            self.pieces.append("\n")

    def handle_data(self, data: str) -> None:
        if not self._skip:
            self.pieces.append(data)


def _html_text(text: str) -> str:
    parser = _Text()
    parser.feed(text)
    lines = [line.rstrip() for line in "".join(parser.pieces).split("\n")]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip("\n") + "\n"


def _fineweb(out: Path, *, subset: str, max_files: int) -> list[Path]:
    by_hand = f"or download parquet files of {FINEWEB} elsewhere, copy them here and give them to `hope-data tokenize`"
    try:
        import huggingface_hub
    except ImportError:
        raise PrepError(f"fineweb-edu needs huggingface_hub: pip install huggingface_hub; {by_hand}") from None
    folder = "sample/" + subset.removeprefix("sample-") if subset.startswith("sample-") else f"data/{subset}"
    try:
        api = huggingface_hub.HfApi()
        revision = api.dataset_info(FINEWEB).sha
        names = sorted(n for n in api.list_repo_files(FINEWEB, repo_type="dataset", revision=revision) if n.startswith(folder + "/"))
        if not names:
            raise PrepError(f"{FINEWEB} has no files in {folder}; choose another --subset, for example sample-10BT or CC-MAIN-2024-10")
        files = []
        for name in names[:max_files]:
            files.append(Path(huggingface_hub.hf_hub_download(FINEWEB, name, repo_type="dataset", revision=revision, local_dir=out)))
            source = {"name": f"{FINEWEB} {name}", "licence": "ODC-By 1.0", "version": str(revision), "origin": "Hugging Face Hub"}
            commit_bytes(Path(f"{files[-1]}.source.json"), pretty_json(source))
        return files
    except PrepError:
        raise
    except Exception as error:  # the hub raises errors of several HTTP libraries: all mean that it cannot be reached or read
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise PrepError(f"cannot download {FINEWEB}: {reason}; check the network, {by_hand}") from None
