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

    eta, g, g_prev [L, C, 1]: learning rate, product of alpha up to and before t. before [L, C, C]: g_{t-1} / g_s for s < t, else 0.
    end [L, C, 1]: weight of the write at s in W_C; keep [L, C, 1]: g_C / g_s (the same without momentum). inside [L, C, C]: weight of the
    write at s in W_t, and ratio [L, C, C]: g_t / g_s for s <= t (the same without momentum); both None where no token reads inside the
    chunk. With momentum only: rho_before [L, C, C], the weight of the write at s in W_{t-1}; kappa, kappa_prev and mu_end (m_C / m_s)
    [L, C, 1]; mu_total [L, 1, 1].
    """

    eta: torch.Tensor
    g: torch.Tensor
    g_prev: torch.Tensor
    before: torch.Tensor
    keep: torch.Tensor
    end: torch.Tensor
    ratio: torch.Tensor | None = None
    inside: torch.Tensor | None = None
    rho_before: torch.Tensor | None = None
    kappa: torch.Tensor | None = None
    kappa_prev: torch.Tensor | None = None
    mu_end: torch.Tensor | None = None
    mu_total: torch.Tensor | None = None

    def unsqueeze(self, dim: int) -> "Decay":
        """Insert a dimension for a stack of memories."""
        return Decay(*(None if t is None else t.unsqueeze(dim) for t in self.__dict__.values()))


class _Ratios(torch.autograd.Function):
    """exp(a_t - b_s) below a diagonal, else 0: a, b [L, C] -> [L, C, C]. The mask comes first, so nothing above it can overflow."""

    @staticmethod
    def forward(ctx, a, b, diagonal):
        size = a.shape[-1]
        above = torch.ones(size, size, dtype=torch.bool, device=a.device).triu(diagonal)
        out = (a.unsqueeze(-1) - b.unsqueeze(-2)).masked_fill_(above, float("-inf")).exp_()
        ctx.save_for_backward(out)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, upstream):
        (out,) = ctx.saved_tensors
        flow = upstream * out
        return flow.sum(-1), -flow.sum(-2), None


def decay(eta: torch.Tensor, log_alpha: torch.Tensor, log_mu: torch.Tensor | None, *, reads: bool) -> Decay:
    """Products of a chunk from eta, log alpha and log mu, each [L, C]; reads: tokens read inside the chunk."""
    log_g = log_alpha.cumsum(-1)
    log_g_prev = log_g - log_alpha
    g, g_prev, eta = log_g.exp().unsqueeze(-1), log_g_prev.exp().unsqueeze(-1), eta.unsqueeze(-1)
    before = _Ratios.apply(log_g_prev, log_g, 0)
    ratio = _Ratios.apply(log_g, log_g, 1) if reads else None
    keep = (log_g[..., -1:] - log_g).exp().unsqueeze(-1)
    if log_mu is None:
        return Decay(eta, g, g_prev, before, keep, keep, ratio, ratio)
    log_m = log_mu.cumsum(-1)
    m = log_m.exp().unsqueeze(-1)
    carried = _Ratios.apply(log_m, log_m, 1)
    rho_before = before @ carried
    kappa_prev = before @ m
    return Decay(
        eta, g, g_prev, before, keep,
        end=carried.mT @ keep,
        ratio=ratio,
        inside=ratio @ carried if reads else None,
        rho_before=rho_before,
        kappa=log_alpha.exp().unsqueeze(-1) * kappa_prev + m,
        kappa_prev=kappa_prev,
        mu_end=(log_m[..., -1:] - log_m).exp().unsqueeze(-1),
        mu_total=log_m[..., -1:].exp().unsqueeze(-1),
    )  # fmt: skip


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
    with_momentum = decay.kappa is not None
    paced = decay.eta * x  # eta_s x_s
    momentum = decay.mu_end * paced if with_momentum else None
    scores = None if queries is None else queries @ paced.mT
    if not erase:
        return ChunkTerms(decay, None, decay.end * paced, None, None if scores is None else decay.inside * scores, momentum)
    gram = x @ paced.mT
    system = decay.before * gram  # its unit diagonal is implied by `unitriangular`
    erased = decay.keep * paced
    if scores is None:
        y = torch.linalg.solve_triangular(system.mT, erased, upper=True, unitriangular=True)
        m = None
    else:
        identity = torch.eye(system.shape[-1], dtype=system.dtype, device=system.device).expand_as(system)
        inverse = torch.linalg.solve_triangular(system, identity, upper=False, unitriangular=True)
        y = inverse.mT @ erased
        m = (decay.ratio * scores) @ inverse
    if not with_momentum:
        return ChunkTerms(decay, y, y, m, m, None)
    rho_gram = decay.rho_before * gram
    y_delta = decay.end * paced - rho_gram.mT @ y
    m_delta = None if m is None else decay.inside * scores - m @ rho_gram
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
