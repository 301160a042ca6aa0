"""Elementwise parts of the memory mixer, each in one pass over memory: convolution with SiLU, and norm with gate (SPEC 1, 2).

    q, k, v = conv_silu(qkv, weight, dtype=torch.float32)        from columns of the input projection to the scans
    out = norm_gate(y, weight, gate, eps=1e-6)                   from the scans to the output projection

`reference` is torch's own operations, `chunked` plain torch with the backward by hand, `triton` the same in one kernel each way. The
projections lie as [B, T, H, ...] and the scans want [B, H, T, K]: the kernels read the one and write the other, so nothing is transposed.
Legend: B batch, T tokens, H heads, K head width, W convolution width.
"""

import torch

from hope_kernels.backend import CONV_WIDTH, choose, triton_obstacle
from hope_kernels.pointwise import chunked, reference

TORCH = {"chunked": chunked, "reference": reference}


def conv_silu(
    x_BTHX: torch.Tensor, weight_HXW: torch.Tensor, *, dtype: torch.dtype, backend: str = "auto"
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """SiLU of the causal depthwise convolution of full rows, cut into (q, k, v), [B, H, T, K] each.

    x [B, T, H, 3 K] with the features of q, k, v one after the other, any strides; weight [H, 3 K, W], the last tap is the token itself,
    zero before the first token. dtype: of the results; sums are at least fp32. With "triton" the results are contiguous, W is 4, and x and
    dtype are fp32 or bf16. backend: "auto" is "triton" where it can run on a GPU, else "chunked".
    Raises ValueError for shapes that do not fit and for a backend that cannot run.
    """
    if x_BTHX.shape[-1] % 3 or weight_HXW.shape[:-1] != x_BTHX.shape[2:]:
        shapes = f"x {tuple(x_BTHX.shape)} and weight {tuple(weight_HXW.shape)}"
        raise ValueError(f"conv_silu takes x [B, T, H, 3 K] and weight [H, 3 K, W], got {shapes}")
    obstacle = "" if weight_HXW.shape[-1] == CONV_WIDTH else f"a convolution of width {weight_HXW.shape[-1]} has no kernel"
    backend = _backend("conv_silu", backend, x_BTHX.device, (x_BTHX.dtype, dtype), obstacle)
    if backend == "triton":
        from hope_kernels.pointwise import triton_

        return triton_.conv_silu(x_BTHX, weight_HXW, dtype)
    wide = torch.promote_types(x_BTHX.dtype, torch.float32)
    streams = TORCH[backend].conv_silu(x_BTHX.to(wide), weight_HXW.to(wide)).to(dtype)
    q, k, v = streams.transpose(1, 2).unflatten(-1, (3, -1)).unbind(-2)
    return q, k, v


def norm_gate(y_BHTK: torch.Tensor, weight_HK: torch.Tensor, gate_BTHK: torch.Tensor, *, eps: float, backend: str = "auto") -> torch.Tensor:
    """RMS norm of every head times its weight, times silu(gate): [B, T, H, K] in the dtype of the gate.

    y [B, H, T, K] and gate [B, T, H, K] of any strides, weight [H, K]; eps is added to the mean square; sums are at least fp32. With
    "triton" the result is contiguous and y and gate are fp32 or bf16. backend: "auto" is "triton" where it can run on a GPU, else
    "chunked".
    Raises ValueError for shapes that do not fit and for a backend that cannot run.
    """
    if gate_BTHK.shape != y_BHTK.transpose(1, 2).shape or weight_HK.shape != gate_BTHK.shape[2:]:
        shapes = f"y {tuple(y_BHTK.shape)}, weight {tuple(weight_HK.shape)} and gate {tuple(gate_BTHK.shape)}"
        raise ValueError(f"norm_gate takes y [B, H, T, K], weight [H, K] and gate [B, T, H, K], got {shapes}")
    backend = _backend("norm_gate", backend, y_BHTK.device, (y_BHTK.dtype, gate_BTHK.dtype), "")
    if backend == "triton":
        from hope_kernels.pointwise import triton_

        return triton_.norm_gate(y_BHTK, weight_HK, gate_BTHK, eps)
    wide = torch.promote_types(torch.promote_types(y_BHTK.dtype, gate_BTHK.dtype), torch.float32)
    out = TORCH[backend].norm_gate(y_BHTK.transpose(1, 2).to(wide), weight_HK.to(wide), gate_BTHK.to(wide), eps=eps)
    return out.to(gate_BTHK.dtype)


def _backend(name: str, backend: str, device: torch.device, dtypes: tuple[torch.dtype, ...], obstacle: str) -> str:
    """The implementation; obstacle: why the kernel does not compute this case, beside its dtypes, or ""."""
    if backend == "auto" and device.type != "cuda":
        return "chunked"
    unknown = [str(dtype) for dtype in dtypes if dtype not in (torch.float32, torch.bfloat16)]
    obstacle = obstacle or triton_obstacle(device) or (f"{unknown[0]} has no kernel" if unknown else "")
    return choose(name, backend=backend, obstacle=obstacle)
