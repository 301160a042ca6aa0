"""MDS version 2 shards (the format of mosaicml-streaming) of token samples: bytes out, samples in.

A shard is `num_samples: uint32 | offsets: uint32[num_samples + 1] | config JSON | samples`; a sample is the sizes of its
variable-size columns (uint32 each, columns in name order) and then the columns. Ours are

* `doc_starts`, ndarray:uint32, ascending positions in the sample at which a document starts, closed by the sentinel seq_len + 1
  (the format cannot hold an empty array);
* `tokens`, ndarray:uint16 or ndarray:uint32, seq_len + 1 ids; consecutive samples overlap by one id.

An ndarray column of one dimension is `4 | code of the length's type: 1 byte | length | values`, all little-endian.
"""

import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from hope_data.errors import PrepError
from hope_data.files import canonical_json, sha256_bytes

COLUMNS = ("doc_starts", "tokens")
SIZE_LIMIT = 1 << 26
_LENGTH_TYPES = ("uint8", "uint16", "uint32", "uint64")


def shard_name(index: int) -> str:
    """File name of a shard, as mosaicml-streaming numbers them."""
    return f"shard.{index:05d}.mds"


def shard_config(dtype: str) -> dict[str, Any]:
    """The description that stands in every shard and in the index."""
    return {
        "version": 2,
        "format": "mds",
        "compression": None,
        "hashes": ["sha256"],
        "size_limit": SIZE_LIMIT,
        "column_names": list(COLUMNS),
        "column_encodings": ["ndarray:uint32", f"ndarray:{dtype}"],
        "column_sizes": [None, None],
    }


def encode_array(values: np.ndarray) -> bytes:
    """One non-empty one-dimensional array as an ndarray column of fixed dtype."""
    code = next(i for i, limit in enumerate((1 << 8, 1 << 16, 1 << 32, 1 << 64)) if values.size < limit)
    length = np.array([values.size], _LENGTH_TYPES[code]).tobytes()
    return bytes([(1 << 2) | code]) + length + values.tobytes()


def encode_sample(tokens: np.ndarray, doc_starts: np.ndarray) -> bytes:
    """One sample: `tokens` [seq_len + 1] of the shard's dtype, `doc_starts` positions below seq_len + 1 (may be empty)."""
    starts = encode_array(np.append(doc_starts, tokens.size).astype("<u4"))
    body = encode_array(tokens)
    return np.array([len(starts), len(body)], "<u4").tobytes() + starts + body


def encode_shard(samples: Sequence[bytes], *, dtype: str) -> bytes:
    """The file of a shard; byte for byte what MDSWriter writes for the same samples and settings."""
    config = json.dumps(shard_config(dtype), sort_keys=True).encode("utf-8")
    head = 4 + 4 * (len(samples) + 1) + len(config)
    offsets = np.zeros(len(samples) + 1, np.int64)
    np.cumsum([len(s) for s in samples], out=offsets[1:])
    offsets += head
    if offsets[-1] >= 1 << 32:
        raise PrepError(f"a shard of {offsets[-1]} bytes does not fit MDS (4 GiB); lower --shard-mib")
    return np.uint32(len(samples)).tobytes() + offsets.astype("<u4").tobytes() + config + b"".join(samples)


def index_entry(name: str, data: bytes, num_samples: int, *, dtype: str) -> dict[str, Any]:
    """The shard's entry in index.json."""
    raw = {"basename": name, "bytes": len(data), "hashes": {"sha256": sha256_bytes(data)}}
    return {"samples": num_samples, "raw_data": raw, "zip_data": None, **shard_config(dtype)}


def index_json(entries: Sequence[dict[str, Any]]) -> bytes:
    """The file index.json of a split."""
    return canonical_json({"version": 2, "shards": list(entries)}) + b"\n"


def decode_array(data: bytes, dtype: str) -> np.ndarray:
    """Inverse of `encode_array`; ValueError if the bytes are not a one-dimensional array of that dtype."""
    code = data[0] & 3
    if data[0] >> 2 != 1:
        raise ValueError("not a one-dimensional array")
    start = 1 + (1 << code)
    (size,) = np.frombuffer(data[1:start], _LENGTH_TYPES[code])
    values = np.frombuffer(data[start:], dtype)
    if values.size != size:
        raise ValueError(f"array says {size} values and holds {values.size}")
    return values


def decode_shard(data: bytes, *, dtype: str) -> list[tuple[np.ndarray, np.ndarray]]:
    """All samples of a shard file as (tokens, doc_starts without the sentinel); ValueError if the structure is broken."""
    (count,) = np.frombuffer(data[:4], "<u4")
    offsets = np.frombuffer(data[4 : 8 + 4 * int(count)], "<u4").astype(np.int64)
    samples = []
    for begin, end in zip(offsets[:-1], offsets[1:], strict=True):
        sizes = np.frombuffer(data[begin : begin + 8], "<u4").astype(np.int64)
        middle = begin + 8 + sizes[0]
        starts = decode_array(data[begin + 8 : middle], "<u4")
        tokens = decode_array(data[middle:end], np.dtype(dtype).newbyteorder("<").str)
        samples.append((tokens, starts[starts < tokens.size]))
    return samples
