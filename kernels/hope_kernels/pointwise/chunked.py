"""Elementwise parts of the memory mixer with their backward passes by hand: convolution with SiLU, and norm with gate (SPEC 2).

Written out, because as single operations they keep and fill more memory than the mixer's products do. Legend: B batch, T tokens, H heads,
X convolved features of a head, K head width, W convolution width.
"""

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable


class _ConvSilu(torch.autograd.Function):
    """See `conv_silu`: y = silu(pre), pre_t = sum_s w_s x_{t-s}, so dx_t = sum_s w_s dpre_{t+s} and dw_s = sum_t dpre_t x_{t-s}."""

    @staticmethod
    def forward(ctx, x, weight):
        taps = weight.shape[-1]
        pre = x * weight[..., -1]
        for back in range(1, taps):
            pre[:, back:].addcmul_(x[:, : max(0, x.shape[1] - back)], weight[..., taps - 1 - back])
        ctx.save_for_backward(x, weight, pre)
        return F.silu(pre)

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream):
        x, weight, pre = ctx.saved_tensors
        length, taps = x.shape[1], weight.shape[-1]
        d_pre = torch.ops.aten.silu_backward(upstream, pre)
        d_x = d_pre * weight[..., -1]
        d_weight = [(d_pre * x).sum((0, 1))]
        for back in range(1, taps):
            end = max(0, length - back)
            d_x[:, :end].addcmul_(d_pre[:, back:], weight[..., taps - 1 - back])
            d_weight.append((d_pre[:, back:] * x[:, :end]).sum((0, 1)))
        return d_x, torch.stack(d_weight[::-1], -1)


def conv_silu(x_BTHX: torch.Tensor, weight_HXW: torch.Tensor) -> torch.Tensor:
    """SiLU of the causal depthwise convolution of full rows, zero before the first token; the last tap is the token itself. Like x."""
    return _ConvSilu.apply(x_BTHX, weight_HXW)


class _NormGate(torch.autograd.Function):
    """See `norm_gate`: with n = y r, r = 1 / rms(y), and G the gradient of n: dL/dy = r (G - n mean(n G))."""

    @staticmethod
    def forward(ctx, y, weight, gate, eps):
        scale = y.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
        normed = y * scale
        ctx.save_for_backward(normed, scale, weight, gate)
        return F.silu(gate).mul_(normed).mul_(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream):
        normed, scale, weight, gate = ctx.saved_tensors
        opened = F.silu(gate)
        along = upstream * normed
        d_weight = (along * opened).sum((0, 1))
        along.mul_(weight)  # the gradient of the open gate
        mean = (along * opened).mean(-1, keepdim=True)
        d_y = opened.mul_(upstream).mul_(weight).addcmul_(normed, mean, value=-1).mul_(scale)
        return d_y, d_weight, torch.ops.aten.silu_backward.grad_input(along, gate, grad_input=along), None


def norm_gate(y_BTHK: torch.Tensor, weight_HK: torch.Tensor, gate_BTHK: torch.Tensor, *, eps: float) -> torch.Tensor:
    """RMS norm of every head times its weight, times silu(gate), all of one dtype."""
    return _NormGate.apply(y_BTHK, weight_HK, gate_BTHK, eps)
