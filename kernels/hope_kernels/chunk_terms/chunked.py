"""The inverse of a chunk's tiles in plain torch; the terms themselves are `fused.terms` of every tile."""

import torch

from hope_kernels.chunk import decay
from hope_kernels.chunk_terms.tiles import join_tiles, split_tiles
from hope_kernels.tiling import Tiling


def system(k: torch.Tensor, eta: torch.Tensor, log_alpha: torch.Tensor) -> torch.Tensor:
    """The system before o (k (eta k)^T), strictly lower triangular [..., C, C], of tiles k [..., C, K], eta and log_alpha [..., C]."""
    return decay(eta, log_alpha, None, reads=False).before * (k @ (eta.unsqueeze(-1) * k).mT)


def unit_lower_inverse(system: torch.Tensor) -> torch.Tensor:
    """(I + strict lower triangle of system)^-1, [..., C, C]."""
    identity = torch.eye(system.shape[-1], dtype=system.dtype, device=system.device).expand_as(system)
    return torch.linalg.solve_triangular(system, identity, upper=False, unitriangular=True)


def chunk_inverse(k: torch.Tensor, eta: torch.Tensor, log_alpha: torch.Tensor, *, tiling: Tiling) -> torch.Tensor:
    """See `hope_kernels.chunk_terms.chunk_inverse`."""
    k, eta, log_alpha = (split_tiles(t, tiling) for t in (k.to(eta.dtype), eta, log_alpha))
    return join_tiles(unit_lower_inverse(system(k, eta, log_alpha)), tiling)
