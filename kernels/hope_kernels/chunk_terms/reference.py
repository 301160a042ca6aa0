"""Terms of one tile by the token recurrence they describe: no Gram matrix, no products of ratios, no solve.

A memory that starts at zero and writes the error signal delta_t = e_t (the t-th unit vector) collects them:

    P_t = W_{t-1} x_t + e_t        W_t = alpha_t W_{t-1} - eta_t P_t x_t^T        W [C, K]

P is the inverse (row t), -W_C is Y, -W_t q_t is row t of M. Retention alone, N_t = alpha_t N_{t-1} + eta_t e_t, is n, and N_C is w.
"""

import torch

from hope_kernels.fused import ChunkDecays


def terms(
    x: torch.Tensor, queries: torch.Tensor | None, eta: torch.Tensor, log_alpha: torch.Tensor, *, erase: bool
) -> tuple[ChunkDecays, torch.Tensor]:
    """(`fused.terms`, the inverse [..., C, C]) of keys x [..., C, K], queries [..., C, K] or None, eta and log_alpha [..., C]."""
    size = x.shape[-2]
    unit = torch.eye(size, dtype=x.dtype, device=x.device)
    alpha = log_alpha.exp()
    written = x.new_zeros(*x.shape[:-2], size, x.shape[-1])
    kept = x.new_zeros(*x.shape[:-2], size)
    g = [torch.ones_like(alpha[..., 0])]
    inverse, m, n = [], [], []
    for t in range(size):
        p = unit[t] + (written @ x[..., t, :, None]).squeeze(-1)
        write = p if erase else unit[t].expand_as(p)
        written = alpha[..., t, None, None] * written - eta[..., t, None, None] * write[..., :, None] * x[..., t, None, :]
        kept = alpha[..., t, None] * kept + eta[..., t, None] * unit[t]
        g.append(alpha[..., t] * g[-1])
        inverse.append(p)
        n.append(kept)
        if queries is not None:
            m.append(-(written @ queries[..., t, :, None]).squeeze(-1))
    read = (None, None) if queries is None else (torch.stack(m, -2), torch.stack(n, -2))
    products = torch.stack(g, -1)[..., None]
    found = ChunkDecays(products[..., 1:, :], products[..., :-1, :], products[..., -1:, :], kept[..., None], -written, *read)
    return found, torch.stack(inverse, -2)
