"""The mosaicml-streaming backend: the same corpus directory in an object store, its shards brought to `data.path` as they are needed.

mosaicml-streaming downloads (every store it knows, with retries) and decompresses; indices, order, hashes and decoding are ours
(`ShardSource`), so the batches equal those of the local reader. Its dataset class is not used: that one ends the epoch early without
an error when a shard cannot be fetched, and hangs with workers. Here each shard is fetched under a lock (one process of a node does
it), within WATCHDOG_SECONDS, and checked against the manifest; anything else is a DataError. The cache is not evicted.
"""

import fcntl
import importlib
import json
import os
import sys
import threading
import types
from pathlib import Path
from typing import Any

from hope_pt.config.schema import DataConfig
from hope_pt.data.shards import ShardSource
from hope_pt.errors import DataError

DOWNLOAD_SECONDS = 60.0
WATCHDOG_SECONDS = 300.0
_RETRIES = 2
_INSTALL = "pip install --no-deps -r requirements/streaming-cpu.txt (or the extra hope-pt[streaming] beside a CUDA build of torch)"


def import_streaming() -> Any:
    """The package `streaming`; DataError with the recipe where it is missing.

    Where torchvision cannot be imported (no build fits a CPU-only torch), the image data sets of `streaming` are replaced by an empty
    module first: nothing else in it needs torchvision.
    """
    try:
        importlib.import_module("torchvision")
    except (ImportError, RuntimeError):
        empty = types.ModuleType("streaming.vision", "Not available: torchvision cannot be imported here.")
        sys.modules.setdefault("streaming.vision", empty)
    try:
        return importlib.import_module("streaming")
    except ImportError as error:
        raise DataError(f'data.backend = "streaming" needs the package mosaicml-streaming ({error}): {_INSTALL}') from None


class Fetcher:
    """Brings files of `remote` to the same place under `directory`; picklable, so that reader processes fetch too."""

    def __init__(self, remote: str, directory: Path, *, split: str, timeout: float = WATCHDOG_SECONDS):
        self._remote, self._directory, self._split, self._timeout = remote, directory, split, timeout
        self._entries: dict[str, dict[str, Any]] | None = None

    def manifest(self) -> None:
        """Fetch manifest.json and tokenizer.model; DataError if the cache holds another corpus."""
        fresh = self._directory / f"manifest.json.{os.getpid()}"
        local = self._directory / "manifest.json"
        fresh.unlink(missing_ok=True)
        try:
            self._watched("manifest.json", lambda: self._download("manifest.json", fresh))
            if local.exists() and local.read_bytes() != fresh.read_bytes():
                raise DataError(f"{self._directory} caches another corpus than {self._remote}; empty it or set another data.path")
            os.replace(fresh, local)
        finally:
            fresh.unlink(missing_ok=True)
        self._locked("tokenizer.model", self._directory / "tokenizer.model")
        self._locked(f"{self._split}/index.json", self._directory / self._split / "index.json")

    def __call__(self, path: Path) -> None:
        """Fetch the shard that belongs at `path` unless it is there."""
        if path.exists():
            return
        if self._entries is None:
            try:
                index = json.loads((self._directory / self._split / "index.json").read_bytes())
                self._entries = {e["raw_data"]["basename"]: e for e in index["shards"]}
            except (OSError, ValueError, KeyError) as error:
                raise DataError(f"cannot read {self._directory / self._split}/index.json: {error}; restore it from the corpus") from None
        name = f"{self._split}/{path.name}"
        if path.name not in self._entries:
            raise DataError(f"shard {name} is in the manifest but not in index.json of {self._remote}; upload the corpus again")
        self._locked(name, path, entry=self._entries[path.name])

    def _locked(self, name: str, path: Path, *, entry: dict[str, Any] | None = None) -> None:
        def job() -> None:
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(path.with_name(path.name + ".lock"), "w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                if path.exists():
                    return
                try:
                    self._download(name, path) if entry is None else self._prepare(entry)
                except BaseException:
                    path.unlink(missing_ok=True)
                    raise

        self._watched(name, job)
        if not path.exists():
            raise DataError(f"{self._remote}/{name} was not fetched although the download reported success; check the store")

    def _watched(self, name: str, job: Any) -> None:
        """Run a download in a thread; DataError if it fails or does not end in time."""
        failure: list[Exception] = []

        def body() -> None:
            try:
                job()
            except Exception as error:  # the stores' clients raise errors of a dozen libraries: all mean that the file did not come
                failure.append(error)

        thread = threading.Thread(target=body, daemon=True, name=f"fetch {name}")
        thread.start()
        thread.join(self._timeout)
        if thread.is_alive():
            raise DataError(f"{self._remote}/{name} did not arrive within {self._timeout:g} s; check the network and the store")
        if failure:
            reason = (str(failure[0]).splitlines() or [""])[0]
            raise DataError(f"cannot fetch {self._remote}/{name}: {type(failure[0]).__name__}: {reason}; check data.remote") from failure[0]

    def _download(self, name: str, path: Path) -> None:
        import_streaming()
        storage = importlib.import_module("streaming.base.storage")
        storage.CloudDownloader.direct_download(f"{self._remote}/{name}", str(path), DOWNLOAD_SECONDS)

    def _prepare(self, entry: dict[str, Any]) -> None:
        """Let mosaicml-streaming download, check and decompress one shard."""
        streaming = import_streaming()
        formats = importlib.import_module("streaming.base.format")
        stream = streaming.Stream(
            remote=self._remote,
            local=str(self._directory),
            split=self._split,
            download_retry=_RETRIES,
            download_timeout=DOWNLOAD_SECONDS,
            validate_hash="sha256" if "sha256" in entry["hashes"] else None,
            keep_zip=False,
        )
        stream.prepare_shard(formats.reader_from_json(str(self._directory), self._split, entry))


def open_streaming(config: DataConfig, *, split: str, timeout: float = WATCHDOG_SECONDS) -> ShardSource:
    """`Source` over `config.remote` with the cache `config.path`; without a remote, over local (possibly compressed) shards there."""
    import_streaming()
    directory = Path(config.path)
    fetcher = Fetcher(config.remote or str(directory), directory, split=split, timeout=timeout)
    if config.remote:
        directory.mkdir(parents=True, exist_ok=True)
        fetcher.manifest()
    return ShardSource(directory, split=split, seq_len=config.seq_len, fetch=fetcher)
