"""Newton-Schulz by what it means: the odd polynomial acts on the singular values (README.md)."""

import torch


def newton_schulz(
    x_BMN: torch.Tensor, *, steps: int, coefficients: tuple[float, float, float], eps: float, dtype: torch.dtype
) -> torch.Tensor:
    """See `hope_kernels.newton_schulz`; dtype is fp32 or fp64, which is what singular value decompositions exist in."""
    a, b, c = coefficients
    x = x_BMN.to(dtype)
    left, values, right = torch.linalg.svd(x / (torch.linalg.matrix_norm(x, keepdim=True) + eps), full_matrices=False)
    for _ in range(steps):
        values = a * values + b * values**3 + c * values**5
    return ((left * values.unsqueeze(-2)) @ right).to(x_BMN.dtype)
