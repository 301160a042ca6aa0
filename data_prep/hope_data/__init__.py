"""Data preparation: text in, hashed MDS shards of tokens out (`hope-data`). Needs numpy and sentencepiece only; not `hope_pt`."""

__version__ = "0.1.0"
