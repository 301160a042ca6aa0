"""The memories that generate k, v, eta, alpha (and q) for every token, and their own writes: SPEC 2, scan 1.

    generated, state = projection_scan(inputs, readout, state, rule=rule, stack=("k", "eta", "alpha", "v"), chunk=256)

All stacked memories share k, eta and alpha, so a chunk has one Gram matrix and one triangular solve for all of them; they are read at
their anchor, so no state inside a chunk is ever needed. Which streams have a memory is `stack`; a stream without one is static and is
read from its projection directly (the ablation rows of NL Table 6).
"""

from hope_kernels.projection_scan import chunked, reference
from hope_kernels.projection_scan.generate import Generated, Inputs, Readout
from hope_kernels.rule import ChunkMasks, MemoryRule, MemoryState


def _triton(*arguments, **settings):
    from hope_kernels.projection_scan import triton_

    return triton_.projection_scan(*arguments, **settings)


BACKENDS = {"chunked": chunked.projection_scan, "reference": reference.projection_scan, "triton": _triton}

__all__ = ["BACKENDS", "Generated", "Inputs", "Readout", "projection_scan"]


def projection_scan(
    inputs: Inputs,
    readout: Readout,
    state: MemoryState | None,
    *,
    rule: MemoryRule,
    stack: tuple[str, ...],
    chunk: int,
    start: MemoryState | None = None,
    masks: ChunkMasks | None = None,
    save_every: int = 2048,
    keep_state: bool = True,
    backend: str = "chunked",
) -> tuple[Generated, MemoryState | None]:
    """Generate k, v, q, eta and log alpha along a sequence.

    inputs: the static streams [B, H, T, K]; readout: parameters of eta and alpha; state: stacked anchors [B, H, S, ...] in the order of
    `stack` (names among k, v, q, eta, alpha), None where the stack is empty. masks.commit_BN and reset_BN have N = ceil(T / chunk).
    save_every as in `memory_scan`. keep_state: whether the state after the last chunk is wanted. Returns the generated streams and that
    state or None.
    """
    return BACKENDS[backend](
        inputs,
        readout,
        state,
        rule=rule,
        stack=stack,
        chunk=chunk,
        start=start,
        masks=masks or ChunkMasks(),
        save_every=save_every,
        keep_state=keep_state,
    )
