"""Terms of tiles whose writes have momentum (SPEC 2.1), plain torch over all tiles at once; autograd differentiates it.

`chunk.py` has the algebra for a run of tokens without holes; here the end of a tile may have places without a token. They read nothing and
write nothing, and what holds at a tile's end is what holds at its last token: there mu counts as 0 in the weights of writes and of the
carried momentum in W (so W stays as it is) and as 1 in the momentum's own (so S stays as it is).
Legend: L = B * H rows, T tokens, K head width, NT tiles of C places.
"""

from typing import NamedTuple

import torch

from hope_kernels.chunk import Decay, decay
from hope_kernels.chunk_terms import unit_lower_inverse
from hope_kernels.chunk_terms.tiles import join_tiles, live_places, split_tiles
from hope_kernels.tiling import Tiling

NO_MOMENTUM = -1e3
"""Log of a mu that is 0 in fp32 and float64, finite so that differences of its sums are numbers."""


class MomentumTerms(NamedTuple):
    """What the tokens of every tile do to any memory with momentum: rows are tokens, columns of [L, T, C] places in the token's tile.

    With r_t = g_prev_t W_0 x_t + kappa_prev_t S_0 x_t and error signals delta of inputs x (the keys):

    W_t q_t = g_t W_0 q_t + kappa_t S_0 q_t - (m r + m_delta delta)_t
    W_end = g_end W_0 + kappa_end S_0 - r^T y - delta^T y_delta         S_end = mu_total S_0 - (u delta)^T x

    g, g_prev, kappa, kappa_prev, w, u [L, T]; g_end, kappa_end, mu_total [L, NT]: in the dtype of eta. y, y_delta [L, T, K], m, m_delta,
    n [L, T, C]: in the dtype of the keys. y and m are None without the erase; m, m_delta and n without queries. For a layer that does not
    erase, of inputs h: n_ts weighs delta_s (h_s . h) in a read at t, and w_s the write delta_s h_s^T in W_end; both contain eta.
    """

    g: torch.Tensor
    g_prev: torch.Tensor
    w: torch.Tensor
    g_end: torch.Tensor
    y: torch.Tensor | None
    m: torch.Tensor | None
    n: torch.Tensor | None
    y_delta: torch.Tensor
    m_delta: torch.Tensor | None
    kappa: torch.Tensor
    kappa_prev: torch.Tensor
    u: torch.Tensor
    kappa_end: torch.Tensor
    mu_total: torch.Tensor


def momentum_terms(
    k: torch.Tensor,
    q: torch.Tensor | None,
    eta: torch.Tensor,
    log_alpha: torch.Tensor,
    log_mu: torch.Tensor,
    *,
    tiling: Tiling,
    erase: bool,
    backend: str = "auto",
) -> MomentumTerms:
    """Terms of all tiles of a sequence: k, q [L, T, K] fp32 or bf16 (float64), q None where no token reads inside its chunk.

    eta, log_alpha, log_mu: [L, T] fp32 (float64). backend: of the inverse ("auto", "triton", "chunked"). Raises ValueError for one that
    cannot run.
    """
    dtype = k.dtype
    _, live = live_places(tiling, k.device)
    x, eta, log_alpha, log_mu = (split_tiles(t.to(eta.dtype), tiling) for t in (k, eta, log_alpha, log_mu))
    # differences of sums of log alpha = -20 would be off by 3e-5 in fp32
    wide = decay(eta.double(), log_alpha.double(), log_mu.where(live, NO_MOMENTUM).double(), reads=q is not None)
    d = Decay(*(None if t is None else t.to(eta.dtype) for t in vars(wide).values()))
    log_m = log_mu.double().cumsum(-1)
    paced = d.eta * x
    end, u = d.end * d.eta, (log_m[..., -1:] - log_m).exp().to(eta.dtype) * eta
    scores = None if q is None else split_tiles(q.to(eta.dtype), tiling) @ paced.mT
    y, m, y_delta, m_delta = None, None, d.end * paced, None if scores is None else d.inside * scores
    if erase:
        gram = x @ paced.mT
        inverse = unit_lower_inverse(d.before * gram, precise=dtype != torch.bfloat16, backend=backend)
        rho_gram = d.rho_before * gram
        y = inverse.mT @ (d.keep * paced)
        y_delta = y_delta - rho_gram.mT @ y
        if scores is not None:
            m = (d.ratio * scores) @ inverse
            m_delta = m_delta - m @ rho_gram
    n = None if q is None else d.inside * d.eta.mT

    def by_token(t: torch.Tensor | None, kind: torch.dtype) -> torch.Tensor | None:
        return None if t is None else join_tiles(t, tiling).to(kind)

    g, g_prev, w, kappa, kappa_prev = (by_token(t.squeeze(-1), eta.dtype) for t in (d.g, d.g_prev, end, d.kappa, d.kappa_prev))
    y, m, n, y_delta, m_delta = (by_token(t, dtype) for t in (y, m, n, y_delta, m_delta))
    ends = d.g[..., -1, 0], d.kappa[..., -1, 0], log_m[..., -1].exp().to(eta.dtype)
    return MomentumTerms(g, g_prev, w, ends[0], y, m, n, y_delta, m_delta, kappa, kappa_prev, by_token(u, eta.dtype), ends[1], ends[2])
