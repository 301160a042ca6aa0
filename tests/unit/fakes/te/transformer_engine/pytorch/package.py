import importlib

import torch
from torch import nn


def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)
    return importlib.import_module(f"{__name__}.{name}")


class Linear(nn.Module):
    def __init__(
        self,
        in_features,
        out_features,
        sequence_parallel=False,
        fuse_wgrad_accumulation=False,
        tp_group=None,
        tp_size=1,
        get_rng_state_tracker=None,
        init_method=None,
        bias=True,
        return_bias=False,
        params_dtype=None,
        parallel_mode=None,
        parameters_split=None,
        device="cuda",
        rng_tracker_name=None,
    ):
        super().__init__()
        assert tp_size == 1 and not bias and not return_bias and parallel_mode in ("column", "row")
        self.weight = nn.Parameter(torch.empty(out_features, in_features, dtype=params_dtype, device=device))
        self.weight.tensor_model_parallel, self.weight.partition_dim, self.weight.partition_stride = True, int(parallel_mode == "row"), 1
        # As the real one: an empty tensor that is no parameter.
        self.bias = torch.empty(0, dtype=params_dtype, device=device)
        init_method(self.weight)

    def forward(self, inp, is_first_microbatch=None):
        # As the real one outside autocast.
        assert inp.dtype == self.weight.dtype, "Data types for parameters must match when outside of autocasted region."
        return inp @ self.weight.T


class RMSNorm(nn.Module):
    def __init__(
        self,
        normalized_shape=None,
        eps=1e-5,
        sequence_parallel=None,
        params_dtype=None,
        zero_centered_gamma=False,
        hidden_size=None,
        device="cuda",
    ):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(normalized_shape or hidden_size, dtype=params_dtype, device=device))
        self.weight.sequence_parallel = sequence_parallel

    def forward(self, x):
        wide = x.float()
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return (normed * self.weight.float()).to(self.weight.dtype)


class LayerNormLinear(nn.Module): ...


class LayerNorm(nn.Module): ...


class DotProductAttention(nn.Module): ...


class GroupedLinear(nn.Module): ...
