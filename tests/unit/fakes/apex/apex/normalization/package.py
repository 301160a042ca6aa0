import torch
from torch import nn


class MixedFusedRMSNorm(nn.Module):
    def __init__(self, normalized_shape, eps=1e-5, *, memory_efficient=False):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(normalized_shape))

    def forward(self, input):
        wide = input.float()
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        # The dtype of the weight, whatever that of the input.
        return normed.to(self.weight.dtype) * self.weight
