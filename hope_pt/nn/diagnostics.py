"""What the memories do on a given text: learning rate, retention, surprise, norm and drift, per layer (no gradient, no state kept).

Surprise of a token is the norm of a memory's error at it, and for the whole model its loss; of both the mean and the value that one token
in twenty exceeds.
"""

import math

import torch

from hope_kernels.memory import surprise
from hope_pt.nn.lm import HopeLM
from hope_pt.nn.titans import TitansCore


@torch.no_grad()
def diagnostics(model: HopeLM, tokens_BT: torch.Tensor, *, targets_BT: torch.Tensor | None = None) -> dict[str, float]:
    """Metrics of M_mem for tokens and targets [B, T], read as fresh documents; {} for a model without memories.

    memory/layer{i}/eta_mean, alpha_mean: the gates. surprise, surprise_p95: norm of the error at the anchors. norm_ratio: |W_T| / |W_0|
    at the end, norm_ratio_max the largest at any chunk end. drift: |W_T - W_0| / |W_0|. memory/token_loss, token_loss_p95: nats of the
    targets, where they are given; those that are no token, such as -100, do not count.
    """
    metrics: dict[str, float] = {}
    x = model.embedding(tokens_BT)
    for index, block in enumerate(model.blocks):
        if isinstance(block.mixer.core, TitansCore):
            found = _core_diagnostics(block.mixer.core, block.mixer.project(block.norm(x)))
            metrics |= {f"memory/layer{index}/{name}": value for name, value in found.items()}
        x, _ = block(x)
    if targets_BT is None or not metrics:
        return metrics
    losses = model.token_losses(tokens_BT, targets_BT)[targets_BT >= 0]
    return metrics | {"memory/token_loss": losses.mean().item(), "memory/token_loss_p95": _p95(losses)}


def _p95(values: torch.Tensor) -> float:
    """The least value that at most one in twenty exceeds."""
    return values.flatten().kthvalue(math.ceil(0.95 * values.numel())).values.item()


def _norm(weights: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """Norm of one memory per row and head: [B, H]."""
    return torch.stack([w.square().sum((-2, -1)) for w in weights]).sum(0).sqrt()


def _core_diagnostics(core: TitansCore, projected_BTP: torch.Tensor) -> dict[str, float]:
    x_BTHP = projected_BTP.unflatten(-1, (core.num_heads, core.features_per_head))
    inputs, _, _ = core.streams(x_BTHP, None, None)
    start, stack = core.starts(projected_BTP.shape[0], inputs.k.dtype)
    generated, _ = core.generate(inputs, stack, stack, None)
    state, errors, ratios = start, [], []
    chunk = core.config.chunk_mem
    begin = _norm(start.weights).clamp_min(1e-12)
    for first in range(0, inputs.k.shape[2], chunk):
        window = slice(first, first + chunk)
        part = type(generated)(*(t[:, :, window] for t in generated.tensors()))
        errors.append(surprise(state.weights, part.k, part.v, core.rule)[-1].delta.norm(dim=-1))
        log_mu = None if inputs.log_mu is None else inputs.log_mu[:, :, window]
        _, state = core.remember(part, log_mu, state, start, None)
        ratios.append(_norm(state.weights) / begin)
    moved = _norm(tuple(a - b for a, b in zip(state.weights, start.weights, strict=True)))
    return {
        "eta_mean": generated.eta.mean().item(),
        "alpha_mean": generated.log_alpha.exp().mean().item(),
        "surprise": torch.cat(errors, -1).mean().item(),
        "surprise_p95": _p95(torch.cat(errors, -1)),
        "norm_ratio": ratios[-1].mean().item(),
        "norm_ratio_max": torch.stack(ratios).max().item(),
        "drift": (moved / begin).mean().item(),
    }
