"""M_mem over a sequence, given q, k, v, eta and alpha: SPEC 2, scan 2.

    y, state = memory_scan(q, k, v, eta, log_alpha, state, rule=rule, chunk=64)

`reference` is the token recurrence with inner gradients by autograd, `chunked` the exact chunk form in plain torch, `triton` the same in
fused kernels.
"""

import torch

from hope_kernels.memory_scan import chunked, reference
from hope_kernels.rule import ChunkMasks, MemoryRule, MemoryState


def _triton(*arguments, **settings):
    from hope_kernels.memory_scan import triton_

    return triton_.memory_scan(*arguments, **settings)


BACKENDS = {"chunked": chunked.memory_scan, "reference": reference.memory_scan, "triton": _triton}


def memory_scan(
    q_BHTK: torch.Tensor,
    k_BHTK: torch.Tensor,
    v_BHTK: torch.Tensor,
    eta_BHT: torch.Tensor,
    log_alpha_BHT: torch.Tensor,
    state: MemoryState,
    *,
    rule: MemoryRule,
    chunk: int,
    log_mu_BHT: torch.Tensor | None = None,
    start: MemoryState | None = None,
    masks: ChunkMasks | None = None,
    read: str = "causal",
    save_every: int = 2048,
    keep_state: bool = True,
    backend: str = "chunked",
) -> tuple[torch.Tensor, MemoryState | None]:
    """Read and write the memory along a sequence.

    q, k, v: [B, H, T, K]; eta, log_alpha, log_mu: [B, H, T], log_mu exactly where rule.momentum. state: the anchor before the first
    token; start: the state to return to where masks.reset_BN (N = ceil(T / chunk)). read: "causal" (the state after the token) or
    "anchor" (the state at the start of its chunk). save_every: tokens of a piece; what is kept for backward of a sequence longer than
    that is less, and computed again. keep_state: whether the state after the last chunk is wanted.
    Returns y [B, H, T, K] and the state after the last chunk or None (a last partial chunk is written too, unless masks.commit_BN says no).
    Raises ValueError for an unknown backend or read.
    """
    if read not in ("causal", "anchor"):
        raise ValueError(f'read = "{read}" is neither "causal" nor "anchor"')
    if (log_mu_BHT is not None) != rule.momentum:
        raise ValueError(f"log_mu {'is missing' if rule.momentum else 'was given'} with rule.momentum = {rule.momentum}")
    return BACKENDS[backend](
        (q_BHTK, k_BHTK, v_BHTK),
        (eta_BHT, log_alpha_BHT) + (() if log_mu_BHT is None else (log_mu_BHT,)),
        state,
        rule=rule,
        chunk=chunk,
        start=start,
        masks=masks or ChunkMasks(),
        read=read,
        save_every=save_every,
        keep_state=keep_state,
    )
