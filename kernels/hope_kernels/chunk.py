"""The exact closed form of one chunk of writes to one weight matrix (SPEC 2.1), with or without momentum.

The token recurrence, with x_t the layer's input, delta_t its error signal at the anchor W_0, and p_t = W_{t-1} x_t:

    S_t = mu_t S_{t-1} - eta_t delta_t x_t^T          W_t = alpha_t W_{t-1} [- eta_t p_t x_t^T] + S_t

(the bracket is the erase of DGD; without momentum mu = 0 and S is not kept). Everything that depends on x, eta, alpha and mu only is
collected in `ChunkTerms`, shared by all memories that see the same x; what is left for a memory are products with its own W_0, S_0 and
delta:

    r_t = g_{t-1} W_0 x_t + kappa_{t-1} S_0 x_t
    W_C = g_C W_0 + kappa_C S_0 - r^T Y - delta^T Y_delta
    W_t q_t = g_t W_0 q_t + kappa_t S_0 q_t - (M r + M_delta delta)_t

g_t is the product of alpha up to t and kappa_t the weight of S_0 in W_t. The r terms exist only with the erase; without momentum
Y = Y_delta and M = M_delta. All ratios of products come from differences of cumulative logarithms, masked before the exponential:
nothing overflows and nothing is divided.
Legend: leading dimensions L, C tokens of the chunk, I width of x.
"""

from dataclasses import dataclass

import torch

from hope_kernels.memory import LayerSignal


@dataclass(frozen=True)
class Decay:
    """Products of alpha and mu in a chunk; the same for every weight matrix.

    g, g_prev [L, C, 1]: product of alpha up to and before t. ratio [L, C, C]: g_t / g_s for s <= t, else 0. rho [L, C, C]: weight of
    the write at s in W_t (equal to ratio without momentum). kappa, kappa_prev [L, C, 1] and mu_end [L, C, 1] (m_C / m_s), mu_total
    [L, 1, 1]: with momentum only.
    """

    eta: torch.Tensor
    g: torch.Tensor
    g_prev: torch.Tensor
    ratio: torch.Tensor
    rho: torch.Tensor
    kappa: torch.Tensor | None = None
    kappa_prev: torch.Tensor | None = None
    mu_end: torch.Tensor | None = None
    mu_total: torch.Tensor | None = None

    def unsqueeze(self, dim: int) -> "Decay":
        """Insert a dimension for a stack of memories."""
        return Decay(*(None if t is None else t.unsqueeze(dim) for t in self.__dict__.values()))


def _lower_ratios(log_cumsum: torch.Tensor) -> torch.Tensor:
    """exp(c_t - c_s) for s <= t, else 0: [L, C] -> [L, C, C]."""
    size = log_cumsum.shape[-1]
    above = torch.ones(size, size, dtype=torch.bool, device=log_cumsum.device).triu(1)
    return (log_cumsum.unsqueeze(-1) - log_cumsum.unsqueeze(-2)).masked_fill(above, float("-inf")).exp()


def _shift(x: torch.Tensor, first: float) -> torch.Tensor:
    """The rows one step earlier: row 0 becomes `first`."""
    return torch.cat([torch.full_like(x[..., :1, :], first), x[..., :-1, :]], -2)


def decay(eta: torch.Tensor, log_alpha: torch.Tensor, log_mu: torch.Tensor | None) -> Decay:
    """Products of a chunk from eta, log alpha and log mu, each [L, C]."""
    log_g = log_alpha.cumsum(-1)
    g = log_g.exp().unsqueeze(-1)
    ratio = _lower_ratios(log_g)
    if log_mu is None:
        return Decay(eta, g, _shift(g, 1.0), ratio, ratio)
    log_m = log_mu.cumsum(-1)
    kappa = ratio @ log_m.exp().unsqueeze(-1)
    mu_end = (log_m[..., -1:] - log_m).exp().unsqueeze(-1)
    rho = ratio @ _lower_ratios(log_m)
    return Decay(eta, g, _shift(g, 1.0), ratio, rho, kappa, _shift(kappa, 0.0), mu_end, log_m[..., -1:].exp().unsqueeze(-1))


@dataclass(frozen=True)
class ChunkTerms:
    """What a chunk of inputs does to any memory that receives it; see the module docstring.

    y [L, C, I] or None (no erase), y_delta [L, C, I]; m, m_delta [L, C, C] or None (no read inside the chunk); momentum [L, C, I] or None.
    """

    decay: Decay
    y: torch.Tensor | None
    y_delta: torch.Tensor
    m: torch.Tensor | None = None
    m_delta: torch.Tensor | None = None
    momentum: torch.Tensor | None = None

    def unsqueeze(self, dim: int) -> "ChunkTerms":
        """Insert a dimension for a stack of memories."""
        rest = [None if t is None else t.unsqueeze(dim) for t in (self.y, self.y_delta, self.m, self.m_delta, self.momentum)]
        return ChunkTerms(self.decay.unsqueeze(dim), *rest)


def chunk_terms(x: torch.Tensor, decay: Decay, *, erase: bool, queries: torch.Tensor | None = None) -> ChunkTerms:
    """Terms of inputs x [L, C, I]; with queries [L, C, I] those of the causal inclusive read too."""
    eta = decay.eta.unsqueeze(-1)
    with_momentum = decay.kappa is not None
    momentum = decay.mu_end * eta * x if with_momentum else None
    write = decay.rho[..., -1, :].unsqueeze(-1) * eta * x  # rho_Cs eta_s x_s
    scores = None if queries is None else queries @ x.mT * eta.mT  # eta_s x_s . q_t
    if not erase:
        return ChunkTerms(decay, None, write, None, None if scores is None else decay.rho * scores, momentum)
    gram = (x @ x.mT) * eta.mT
    system = _shift(decay.ratio, 0.0) * gram  # its unit diagonal is implied by `unitriangular`
    erased = decay.ratio[..., -1, :].unsqueeze(-1) * eta * x
    if scores is None:
        inverse = None
        y = torch.linalg.solve_triangular(system.mT, erased, upper=True, unitriangular=True)
    else:
        identity = torch.eye(system.shape[-1], dtype=system.dtype, device=system.device).expand_as(system)
        inverse = torch.linalg.solve_triangular(system, identity, upper=False, unitriangular=True)
        y = inverse.mT @ erased
    m = None if scores is None else (decay.ratio * scores) @ inverse
    if not with_momentum:
        return ChunkTerms(decay, y, y, m, m, None)
    rho_prev = _shift(decay.rho, 0.0) * gram
    y_delta = write - rho_prev.mT @ y
    m_delta = None if m is None else decay.rho * scores - m @ rho_prev
    return ChunkTerms(decay, y, y_delta, m, m_delta, momentum)


def _residual(terms: ChunkTerms, wx: torch.Tensor, sx: torch.Tensor | None) -> torch.Tensor:
    """r_t = g_{t-1} W_0 x_t + kappa_{t-1} S_0 x_t."""
    r = terms.decay.g_prev * wx
    return r if sx is None else r + terms.decay.kappa_prev * sx


def end_weight(terms: ChunkTerms, signal: LayerSignal, weight: torch.Tensor, momentum: torch.Tensor | None):
    """(W_C, S_C) of one matrix [L, out, I] after the chunk; S_C is None without momentum."""
    d = terms.decay
    kept = d.g[..., -1:, :] * weight
    if momentum is None:
        delta = signal.delta if terms.y is None else _residual(terms, signal.wx, None) + signal.delta
        return kept - delta.mT @ terms.y_delta, None
    kept = kept + d.kappa[..., -1:, :] * momentum - signal.delta.mT @ terms.y_delta
    if terms.y is not None:
        kept = kept - _residual(terms, signal.wx, signal.x @ momentum.mT).mT @ terms.y
    return kept, d.mu_total * momentum - signal.delta.mT @ terms.momentum


def read_inside(
    terms: ChunkTerms, signal: LayerSignal, queries: torch.Tensor, weight_q: torch.Tensor, momentum: torch.Tensor | None
) -> torch.Tensor:
    """W_t q_t for every token of the chunk, writes up to and including t: [L, C, out]. weight_q is W_0 q."""
    d = terms.decay
    out = d.g * weight_q
    if momentum is None:
        delta = signal.delta if terms.m is None else _residual(terms, signal.wx, None) + signal.delta
        return out - terms.m_delta @ delta
    out = out + d.kappa * (queries @ momentum.mT) - terms.m_delta @ signal.delta
    if terms.m is not None:
        out = out - terms.m @ _residual(terms, signal.wx, signal.x @ momentum.mT)
    return out
