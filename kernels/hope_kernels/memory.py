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
    """Unit length: x / sqrt(|x|^2 + 1e-6) over the last dimension; smooth at zero."""
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + L2_EPS)


def bounded(error: torch.Tensor, rule: MemoryRule) -> torch.Tensor:
    """Gradient of the pseudo-Huber loss d^2 (sqrt(1 + |e|^2/d^2) - 1): at most d long. Unchanged for the other objectives."""
    if rule.objective != "huber":
        return error
    return _Bounded.apply(error, rule.huber_delta)


class _Bounded(torch.autograd.Function):
    """e / sqrt(1 + |e|^2/d^2) with its derivative: with y the result and s the factor, dL/de = s (G - y (y . G) / d^2)."""

    @staticmethod
    def forward(ctx, error, delta):
        scale = torch.rsqrt(1 + (error * error).sum(-1, keepdim=True) / delta**2)
        out = error * scale
        ctx.save_for_backward(out, scale)
        ctx.delta = delta
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, upstream):
        out, scale = ctx.saved_tensors
        along = (out * upstream).sum(-1, keepdim=True) / -(ctx.delta**2)
        return torch.addcmul(upstream, out, along) * scale, None


class _SiluVJP(torch.autograd.Function):
    """grad * silu'(x) as one kernel, with its own first derivative: silu'' = s (1 - s) (2 + x (1 - 2 s))."""

    @staticmethod
    def forward(ctx, grad, x):
        ctx.save_for_backward(grad, x)
        return torch.ops.aten.silu_backward(grad, x)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, upstream):
        grad, x = ctx.saved_tensors
        sig = torch.sigmoid(x)
        curvature = (sig - sig.square()) * (2 + x - 2 * x * sig)
        return torch.ops.aten.silu_backward(upstream, x), upstream * grad * curvature


def silu_vjp(grad: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Gradient grad of silu(x) carried to x: grad * silu'(x). Differentiable once."""
    return _SiluVJP.apply(grad, x)


def read_memory(weights: tuple[torch.Tensor, ...], z: torch.Tensor) -> torch.Tensor:
    """Read M(z): z [L, C, K] -> [L, C, K] (NL eq. 89, or W z)."""
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
        pre_k, *target = pre.split(num_k, -2)
        return [LayerSignal(k, _error(pre_k, target[0] if target else v, rule), pre_k)]
    hidden = F.silu(pre)
    out_k, *target = (z + hidden @ weights[1].mT).split(num_k, -2)
    pre_k, hidden_k = pre.split(num_k, -2)[0], hidden.split(num_k, -2)[0]
    error = _error(out_k, target[0] if target else v, rule)
    delta = bounded(silu_vjp(error @ weights[1], pre_k), rule)
    if rule.erases(1):
        x1 = l2norm(hidden_k)
        return [LayerSignal(k, delta, pre_k), LayerSignal(x1, error, x1 @ weights[1].mT)]
    return [LayerSignal(k, delta, pre_k), LayerSignal(hidden_k, error, None)]


def _error(prediction: torch.Tensor, target: torch.Tensor, rule: MemoryRule) -> torch.Tensor:
    if rule.normalize_v:
        target = l2norm(target)
    return -target if rule.objective == "dot" else bounded(prediction - target, rule)
