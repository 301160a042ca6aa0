"""A memory and its error signals, hand-derived (SPEC 2 and 2.1).

Legend: leading dimensions L (B, H or B, H, S), C tokens, K head width, F hidden width. The inner gradient with respect to a weight W
with input x is delta x^T; `surprise` returns x, delta and the product W x that it needed on the way. `inner_loss` is the objective
whose gradient that is; the reference differentiates it by autograd.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from hope_kernels.rule import MemoryRule

L2_EPS = 1e-6


def l2norm(x: torch.Tensor) -> torch.Tensor:
    """x / sqrt(|x|^2 + 1e-6) over the last dimension; smooth at zero."""
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + L2_EPS)


def bounded(error: torch.Tensor, rule: MemoryRule) -> torch.Tensor:
    """Gradient of the pseudo-Huber loss d^2 (sqrt(1 + |e|^2/d^2) - 1): at most d long. Unchanged for the other objectives."""
    if rule.objective != "huber":
        return error
    return error * torch.rsqrt(1 + error.square().sum(-1, keepdim=True) / rule.huber_delta**2)


def read_memory(weights: tuple[torch.Tensor, ...], z: torch.Tensor) -> torch.Tensor:
    """M(z): z [L, C, K] -> [L, C, K] (NL eq. 89, or W z)."""
    if len(weights) == 1:
        return z @ weights[0].mT
    return z + F.silu(z @ weights[0].mT) @ weights[1].mT


def generated_target(weights: tuple[torch.Tensor, ...], v: torch.Tensor, rule: MemoryRule) -> torch.Tensor:
    """What the memory is to answer for the key: M(v) (NL eq. 84) or v."""
    target = read_memory(weights, v) if rule.self_target else v
    return l2norm(target) if rule.normalize_v else target


def inner_loss(prediction: torch.Tensor, target: torch.Tensor, rule: MemoryRule) -> torch.Tensor:
    """The inner objective per token, [L, C]."""
    if rule.objective == "dot":
        return -(prediction * target).sum(-1)
    square = (prediction - target).square().sum(-1)
    if rule.objective == "l2":
        return square / 2
    return rule.huber_delta**2 * (torch.sqrt(1 + square / rule.huber_delta**2) - 1)


@dataclass(frozen=True)
class LayerSignal:
    """One weight matrix seen from a chunk: its inputs x [L, C, in], error signals delta [L, C, out], and W x [L, C, out] or None."""

    x: torch.Tensor
    delta: torch.Tensor
    wx: torch.Tensor | None


def surprise(weights: tuple[torch.Tensor, ...], k: torch.Tensor, v: torch.Tensor, rule: MemoryRule) -> list[LayerSignal]:
    """Error signals of every layer for keys k and values v [L, C, K], all at the given (anchor) weights."""
    num_k = k.shape[-2]
    z = torch.cat([k, v], -2) if rule.self_target else k
    pre = z @ weights[0].mT
    if rule.memory == "linear":
        target = pre[..., num_k:, :] if rule.self_target else v
        pre_k = pre[..., :num_k, :]
        return [LayerSignal(k, _error(pre_k, target, rule), pre_k)]
    sig = torch.sigmoid(pre)
    act = pre * sig
    out = z + act @ weights[1].mT
    pre_k, sig_k, act_k = pre[..., :num_k, :], sig[..., :num_k, :], act[..., :num_k, :]
    error = _error(out[..., :num_k, :], out[..., num_k:, :] if rule.self_target else v, rule)
    slope = sig_k + act_k * (1 - sig_k)  # derivative of silu
    delta = bounded((error @ weights[1]) * slope, rule)
    if rule.erases(1):
        hidden = l2norm(act_k)
        return [LayerSignal(k, delta, pre_k), LayerSignal(hidden, error, hidden @ weights[1].mT)]
    return [LayerSignal(k, delta, pre_k), LayerSignal(act_k, error, None)]


def _error(prediction: torch.Tensor, target: torch.Tensor, rule: MemoryRule) -> torch.Tensor:
    if rule.normalize_v:
        target = l2norm(target)
    return -target if rule.objective == "dot" else bounded(prediction - target, rule)
