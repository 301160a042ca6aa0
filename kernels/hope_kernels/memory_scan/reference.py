"""The memory scan as the token recurrence of SPEC 2, one token after the other: the specification of every faster path.

Inner gradients come from autograd of the inner loss, not from the hand-derived formulas; no chunk algebra. Slow, any dtype, meant for
float64 and T <= 128.
"""

import torch

from hope_kernels.memory import generated_target, inner_loss, l2norm, read_memory
from hope_kernels.rule import ChunkMasks, MemoryRule, MemoryState


def bounded(error: torch.Tensor, rule: MemoryRule) -> torch.Tensor:
    """`hope_kernels.memory.bounded` in torch's own operations, which can be differentiated any number of times."""
    if rule.objective != "huber":
        return error
    return error * torch.rsqrt(1 + error.square().sum(-1, keepdim=True) / rule.huber_delta**2)


def token_signals(anchor: tuple[torch.Tensor, ...], k: torch.Tensor, v: torch.Tensor, rule: MemoryRule) -> list[tuple]:
    """(layer input, error signal) of every weight for one token k, v [L, 1, K], by autograd of the inner loss at the anchor."""
    target = generated_target(anchor, v, rule)
    with torch.enable_grad():
        pre = k @ anchor[0].mT
        pre = pre if pre.requires_grad else pre.requires_grad_()
        hidden = torch.nn.functional.silu(pre) if rule.memory == "mlp" else None
        out = k + hidden @ anchor[1].mT if rule.memory == "mlp" else pre
        loss = inner_loss(out, target, rule).sum()
        (grad_out,) = torch.autograd.grad(loss, out, create_graph=True)
        if rule.memory == "linear":
            return [(k, grad_out)]
        (grad_pre,) = torch.autograd.grad(out, pre, grad_out, create_graph=True)
    x1 = l2norm(hidden) if rule.erases(1) else hidden
    return [(k, bounded(grad_pre, rule)), (x1, grad_out)]


def write_token(state: MemoryState, signals: list[tuple], gates: tuple[torch.Tensor, ...], rule: MemoryRule) -> MemoryState:
    """One step of the recurrence: gates eta, alpha (and mu) are [L, 1, 1]."""
    eta, alpha = gates[0], gates[1]
    weights, momenta = [], []
    for layer, (x, delta) in enumerate(signals):
        weight = state.weights[layer]
        write = -eta * delta.mT @ x
        if rule.momentum:
            write = gates[2] * state.momentum[layer] + write
            momenta.append(write)
        kept = alpha * weight
        if rule.erases(layer):
            kept = kept - eta * (weight @ x.mT) @ x
        weights.append(kept + write)
    return MemoryState(tuple(weights), tuple(momenta))


def memory_scan(
    qkv: tuple[torch.Tensor, ...],
    gates: tuple[torch.Tensor, ...],
    state: MemoryState,
    *,
    rule: MemoryRule,
    chunk: int,
    start: MemoryState | None,
    masks: ChunkMasks,
    read: str,
    save_every: int,
    keep_state: bool,
) -> tuple[torch.Tensor, MemoryState | None]:
    """See `hope_kernels.memory_scan.memory_scan`."""
    outputs = []
    anchor = state
    for token in range(qkv[0].shape[2]):
        index = token // chunk
        if token % chunk == 0:
            if index and masks.commit_BN is not None:
                state = anchor.where(masks.commit_BN[:, index - 1], state)
            if masks.reset_BN is not None:
                state = state.where(masks.reset_BN[:, index], start)
            anchor = state
        q, k, v = (t[:, :, token : token + 1] for t in qkv)
        eta, log_alpha, *log_mu = (t[:, :, token, None, None] for t in gates)
        signals = token_signals(anchor.weights, k, v, rule)
        state = write_token(state, signals, (eta, log_alpha.exp(), *(m.exp() for m in log_mu)), rule)
        outputs.append(read_memory((state if read == "causal" else anchor).weights, q))
    if masks.commit_BN is not None:
        state = anchor.where(masks.commit_BN[:, -1], state)
    return torch.cat(outputs, 2), state if keep_state else None
