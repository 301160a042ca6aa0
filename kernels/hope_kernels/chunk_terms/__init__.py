"""Terms of the tiles of a sequence: all that its keys, queries and gates do to any memory, and the triangular inverse they need (SPEC 2.1).

`reference` is the token recurrence, `fused.terms` of every tile the plain torch form, `triton_` holds the kernels (`chunk_terms` and
`chunk_terms_backward`, which the scans call inside their own), `momentum` the terms with momentum. Derivations are in README.md.
Legend: L = B * H rows, T tokens, K head width, C a tile's length.
"""

import torch

from hope_kernels.backend import choose, triton_obstacle
from hope_kernels.chunk_terms import chunked
from hope_kernels.tiling import Tiling

LARGEST = 64
"""Most rows of a system that the kernels invert; the tuning table has no larger tile."""


def chunk_inverse(
    k_LTK: torch.Tensor, eta_LT: torch.Tensor, log_alpha_LT: torch.Tensor, *, tiling: Tiling, backend: str = "auto"
) -> torch.Tensor:
    """(I + before o (k (eta k)^T))^-1 of every tile: [L, T, C], rows are tokens, columns places in the token's tile.

    before_ts = g_{t-1} / g_s for s < t, else 0, with g the product of alpha in the tile. k: fp32 or bf16 (float64 in plain torch); eta,
    log_alpha and the result: fp32 (float64). Raises ValueError for a backend that cannot run.
    """
    obstacle = _obstacle(eta_LT, tiling.tile)
    if choose("chunk_inverse", backend=backend, obstacle=obstacle, available=("triton", "chunked")) == "chunked":
        return chunked.chunk_inverse(k_LTK, eta_LT, log_alpha_LT, tiling=tiling)
    from hope_kernels.chunk_terms import triton_

    return triton_.chunk_inverse(k_LTK, eta_LT, log_alpha_LT, tiling.chunk, tiling.tile)


def unit_lower_inverse(system: torch.Tensor, *, precise: bool = True, backend: str = "auto") -> torch.Tensor:
    """(I + strict lower triangle of system)^-1 of matrices [..., C, C] in fp32 (float64 in plain torch); what lies above does not count.

    precise: whether the kernel takes fp32 products as three of tf32 (error 1e-7) or one (4e-4). Raises ValueError for a backend that
    cannot run.
    """
    obstacle = _obstacle(system, system.shape[-1])
    if choose("unit_lower_inverse", backend=backend, obstacle=obstacle, available=("triton", "chunked")) == "chunked":
        return chunked.unit_lower_inverse(system)
    from hope_kernels.chunk_terms import triton_

    return triton_.unit_lower_inverse(system, precise)


def _obstacle(data: torch.Tensor, size: int) -> str:
    """Why the kernels cannot invert systems of `size` rows in the type of `data`, or ""."""
    if data.dtype != torch.float32:
        return f"{data.dtype} instead of float32"
    if size > LARGEST:
        return f"{size} rows are more than {LARGEST}"
    return triton_obstacle(data.device)
