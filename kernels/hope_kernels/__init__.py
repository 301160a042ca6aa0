"""Scans of HOPE's memories: one package per operation, each with a token-by-token reference and a chunked implementation.

`rule.py` names what a memory is and how it writes, `memory.py` is the memory and its error signals, `chunk.py` the exact closed form of
one chunk of writes (SPEC 2.1), `fused.py` the same for the default rule with its backward by hand. `memory_scan` runs M_mem given
(q, k, v, eta, alpha); `projection_scan` runs the memories that generate those. Depends on torch only.
"""
