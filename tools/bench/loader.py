"""Samples per second of the local shard reader and loader at 2,048 tokens, in one process. Writes tools/bench/results/loader.json.

The shards are the embedded corpus, repeated, tokenised and cut by `hope_data`. Timed after the shards are mapped and hashed:
`Source.read_rows` (ids as stored), `Source.read` and `Loader` (int64 tensors, in shuffled order), batches of 8 and 64. Each figure is
the best of five rounds, per second and per CPU-second (the first falls where other programs use the cores).
Goal: Loader >= 50,000 samples/s.

    python -m tools.bench.loader [--workers N]
"""

import argparse
import itertools
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from hope_data.corpus_build import BuildOptions, build
from hope_data.documents import Input, ReadOptions
from hope_data.embedded import tiny_corpus
from hope_data.parts import HoldOut
from hope_pt.config.schema import DataConfig
from hope_pt.data import Loader, Source, open_source
from tools.bench.common import environment, write_results

SEQ_LEN = 2048
REPEATS = 24
GOAL = 50_000
ROUNDS = 5


def build_corpus(directory: Path) -> Path:
    """Some 8,000 samples of real text, repeated; the path of the corpus."""
    with tiny_corpus() as (inputs, sources):
        text = [p for i in inputs for p in Path(i.path).read_text("ascii").split("\n\f\n")]
        path = directory / "text.jsonl"
        path.write_text("".join(json.dumps({"text": t, "id": f"{r}-{n}"}) + "\n" for r in range(REPEATS) for n, t in enumerate(text)))
        options = BuildOptions(seq_len=SEQ_LEN, read=ReadOptions(), holdout=HoldOut("hash", 0), vocab_size=1024, train_bytes=1 << 20)
        build([Input(str(path), path.name)], sources=sources[:1], out=directory / "corpus", options=options, workers=1)
    return directory / "corpus"


def rate(batches: Callable[[], Any], *, samples: int) -> dict[str, int]:
    """Samples per second and per CPU-second of this process, best of ROUNDS, of the iterable that `batches` gives (`samples` samples)."""
    wall, cpu = [], []
    for _ in range(ROUNDS):
        iterable = batches()
        start, used = time.perf_counter(), time.process_time()
        for _batch in iterable:
            pass
        wall.append(samples / (time.perf_counter() - start))
        cpu.append(samples / (time.process_time() - used))
    return {"per_second": round(max(wall)), "per_cpu_second": round(max(cpu))}


def measure(source: Source, config: DataConfig, *, batch: int) -> dict[str, dict[str, int]]:
    """Figures of one batch size."""
    steps = source.num_samples // batch
    order = np.random.default_rng(0).permutation(source.num_samples)[: steps * batch].reshape(steps, batch)
    loader = Loader(source, config=config, global_batch_size=batch)
    result = {
        "read_rows": rate(lambda: map(source.read_rows, order), samples=steps * batch),
        "read": rate(lambda: map(source.read, order), samples=steps * batch),
        "loader": rate(lambda: itertools.islice(loader, steps), samples=steps * batch),
    }
    loader.close()
    return result


def main() -> None:
    """Build, measure, write."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--workers", type=int, default=0)
    args = parser.parse_args()
    results: dict[str, Any] = {"environment": environment(), "seq_len": SEQ_LEN, "workers": args.workers, "goal": GOAL}
    with tempfile.TemporaryDirectory() as temporary:
        path = build_corpus(Path(temporary))
        config = DataConfig(path=str(path), seq_len=SEQ_LEN, num_workers=args.workers)
        start = time.perf_counter()
        source = open_source(config, split="train")
        results["open_and_hash_seconds"] = round(time.perf_counter() - start, 3)
        results["corpus_bytes"] = sum(p.stat().st_size for p in path.rglob("*.mds"))
        results["samples"] = source.num_samples
        for batch in (8, 64):
            results[f"batch_{batch}"] = measure(source, config, batch=batch)
        source.close()
    print(json.dumps(results, indent=1))
    print(write_results("loader", results))


if __name__ == "__main__":
    main()
