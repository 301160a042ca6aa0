"""Newton-Schulz in plain torch: three batched products a step, the Gram matrix always on the shorter side."""

from collections.abc import Callable

import torch

Polynomial = Callable[[torch.Tensor, float, float], torch.Tensor]


def newton_schulz(
    x_BMN: torch.Tensor, *, steps: int, coefficients: tuple[float, float, float], eps: float, dtype: torch.dtype
) -> torch.Tensor:
    """See `hope_kernels.newton_schulz`."""
    return iterate(x_BMN, gram_polynomial, steps=steps, coefficients=coefficients, eps=eps, dtype=dtype)


def iterate(
    x_BMN: torch.Tensor,
    polynomial: Polynomial,
    *,
    steps: int,
    coefficients: tuple[float, float, float],
    eps: float,
    dtype: torch.dtype,
) -> torch.Tensor:
    """The iteration X <- a X + P X, P = b A + c A A, A = X X^T, with `polynomial`(X, b, c) for P.

    A tall X multiplies from the other side, a X + X P with A = X^T X, which is the transposed iteration without a transposed copy.
    """
    a, b, c = coefficients
    wide = x_BMN.shape[-2] <= x_BMN.shape[-1]
    norm = torch.linalg.vector_norm(x_BMN, dim=(-2, -1), keepdim=True, dtype=torch.promote_types(x_BMN.dtype, torch.float32))
    x = (x_BMN / (norm + eps)).to(dtype).contiguous()
    for _ in range(steps):
        if wide:
            x = torch.baddbmm(x, polynomial(x, b, c), x, beta=a)
        else:
            x = torch.baddbmm(x, x, polynomial(x.mT, b, c), beta=a)
    return x.to(x_BMN.dtype)


def gram_polynomial(x_BMN: torch.Tensor, b: float, c: float) -> torch.Tensor:
    """P = b A + c A A of A = x x^T: [B, M, M]."""
    gram = torch.bmm(x_BMN, x_BMN.mT)
    return torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
