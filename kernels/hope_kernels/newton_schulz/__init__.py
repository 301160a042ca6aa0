"""Newton-Schulz orthogonalisation of batches of matrices: the step of M3 and Muon (SPEC 4; NL Algorithm 1).

    direction = newton_schulz(momentum)

`reference` applies the polynomial to singular values, `chunked` iterates in plain torch, `triton` computes one half of each symmetric
product.
"""

import torch

from hope_kernels.backend import choose, triton_obstacle
from hope_kernels.newton_schulz import chunked, reference

QUINTIC = (3.4445, -4.7750, 2.0315)
"""Coefficients of s, s^3 and s^5, steep at 0: five steps bring every singular value of at least 2e-3 between 0.68 and 1.21."""


def _triton(*arguments, **settings):
    from hope_kernels.newton_schulz import triton_

    return triton_.newton_schulz(*arguments, **settings)


BACKENDS = {"triton": _triton, "chunked": chunked.newton_schulz, "reference": reference.newton_schulz}


def newton_schulz(
    x: torch.Tensor,
    *,
    steps: int = 5,
    coefficients: tuple[float, float, float] = QUINTIC,
    eps: float = 1e-7,
    dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """Take every singular value s of x / (|x| + eps), |x| the Frobenius norm, `steps` times through a s + b s^3 + c s^5.

    x: [..., m, n], leading dimensions are a batch of matrices of any m and n; a zero matrix stays zero. coefficients: (a, b, c).
    dtype: of the computation, that of x if None; norms and sums are at least fp32. Returns a contiguous tensor of the shape and dtype
    of x. backend: "auto" is "triton" on a GPU and "chunked" elsewhere. This is an optimizer step and has no gradient.
    Raises ValueError for fewer than two dimensions, for a backend that cannot run here, and where a gradient would be recorded.
    """
    if x.dim() < 2:
        raise ValueError(f"newton_schulz takes matrices [..., m, n], this tensor has shape {tuple(x.shape)}")
    if x.requires_grad and torch.is_grad_enabled():
        raise ValueError("newton_schulz is an optimizer step without a gradient: call it under torch.no_grad() or on x.detach()")
    dtype = x.dtype if dtype is None else dtype
    if backend != "auto" or x.is_cuda:
        backend = choose("newton_schulz", backend=backend, obstacle=_obstacle(x.device, dtype))
    else:
        backend = "chunked"
    matrices = x.reshape(-1, *x.shape[-2:])
    result = BACKENDS[backend](matrices, steps=steps, coefficients=coefficients, eps=eps, dtype=dtype)
    return result.view(x.shape)


def _obstacle(device: torch.device, dtype: torch.dtype) -> str:
    """Why the Triton kernel cannot run, or ""."""
    return triton_obstacle(device) or ("" if dtype in (torch.float32, torch.bfloat16) else f"computation in {dtype} has no kernel")
