"""Elementwise parts of the memory mixer with their backward passes by hand: convolution with SiLU, and norm with gate (SPEC 2).

Written out, because as single operations they keep and fill more memory than the mixer's products do. Legend: B batch, T tokens, H heads,
X convolved features of a head, K head width, W convolution width.
"""

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

TILE_TOKENS = 128
"""Tokens of a batch that the convolution takes at once: every pass but the first finds them in the cache."""


def _tiles(x: torch.Tensor) -> list[tuple[int, int]]:
    """(first token, end token) of every tile of x [B, T, ...]."""
    step = max(16, TILE_TOKENS // max(1, x.shape[0]))
    return [(first, min(first + step, x.shape[1])) for first in range(0, x.shape[1], step)]


class _ConvSilu(torch.autograd.Function):
    """See `conv_silu`: y = silu(pre), pre_t = sum_s w_s x_{t-s}, so dx_t = sum_s w_s dpre_{t+s} and dw_s = sum_t dpre_t x_{t-s}."""

    @staticmethod
    def forward(ctx, x, weight):
        taps = weight.movedim(-1, 0).flip(0).contiguous()  # w_s, features side by side
        pre, y = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for _ in range(2))
        for first, end in _tiles(x):
            torch.mul(x[:, first:end], taps[0], out=pre[:, first:end])
            for back in range(1, len(taps)):
                start = min(max(first, back), end)
                pre[:, start:end].addcmul_(x[:, start - back : max(0, end - back)], taps[back])
            torch.ops.aten.silu.out(pre[:, first:end], out=y[:, first:end])
        ctx.save_for_backward(x, taps, pre)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream):
        x, taps, pre = ctx.saved_tensors
        tiles = _tiles(x)
        longest = max((end - first for first, end in tiles), default=0)
        d_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        d_taps = torch.zeros(len(taps), x.shape[0], longest, *x.shape[2:], dtype=x.dtype, device=x.device)  # summed over tiles
        buffer = torch.empty_like(d_taps[0])
        for first, end in tiles:
            d_pre = buffer[:, : end - first]
            torch.ops.aten.silu_backward.grad_input(upstream[:, first:end], pre[:, first:end], grad_input=d_pre)
            torch.mul(d_pre, taps[0], out=d_x[:, first:end])
            d_taps[0, :, : end - first].addcmul_(d_pre, x[:, first:end])
            for back in range(1, len(taps)):
                start = min(max(first, back), end)
                flow, sources = d_pre[:, start - first :], slice(start - back, max(0, end - back))
                d_x[:, sources].addcmul_(flow, taps[back])
                d_taps[back, :, start - first : end - first].addcmul_(flow, x[:, sources])
        return d_x, d_taps.sum((1, 2)).flip(0).movedim(0, -1)


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
