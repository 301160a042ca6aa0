"""One chunk of an MLP memory without momentum, with hand-derived backward passes: what the default rule runs on (SPEC 2.1).

`memory.py` and `chunk.py` say the same for every rule in operations that autograd differentiates one by one. Here a chunk is a few
autograd functions that keep few tensors, work in place and touch nothing twice:

    read     M(z) = z + silu(z W2^T) W1^T
    readout  r . M(z) = z r + silu(z W2^T) (W1^T r): the product with W1 never runs over tokens
    terms    decays, Y and M of `chunk.py`, from the keys (and queries)
    chunk    both error signals, the causal read and both new weights of one memory

Legend: L = B * H, C tokens of the chunk, K head width, F hidden width. W2 [L, F, K], W1 [L, K, F].
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from hope_kernels.memory import L2_EPS
from hope_kernels.rule import MemoryRule

silu_backward_into = torch.ops.aten.silu_backward.grad_input


def supports(rule: MemoryRule) -> bool:
    """Whether this module computes the rule; `chunk.py` computes every rule."""
    return rule.memory == "mlp" and rule.objective != "dot" and not (rule.momentum or rule.erases(1))


def _dot(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Inner products over the last dimension, kept."""
    return (a * b).sum(-1, keepdim=True)


class _UnitLength(torch.autograd.Function):
    """y = x r with r = 1 / sqrt(|x|^2 + 1e-6); dL/dx = r (G - y (y . G))."""

    @staticmethod
    def forward(ctx, x):
        scale = _dot(x, x).add_(L2_EPS).rsqrt_()
        y = x * scale
        ctx.save_for_backward(y, scale)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream):
        y, scale = ctx.saved_tensors
        return torch.addcmul(upstream, y, _dot(y, upstream), value=-1).mul_(scale)


def unit_length(x: torch.Tensor) -> torch.Tensor:
    """`memory.l2norm` with its backward by hand."""
    return _UnitLength.apply(x)


class _Read(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z, w2, w1):
        pre = torch.bmm(z, w2.mT)
        ctx.save_for_backward(z, w2, w1, pre)
        return torch.baddbmm(z, F.silu(pre), w1.mT)

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream):
        z, w2, w1, pre = ctx.saved_tensors
        d_pre = torch.bmm(upstream, w1)
        silu_backward_into(d_pre, pre, grad_input=d_pre)
        return torch.baddbmm(upstream, d_pre, w2), torch.bmm(d_pre.mT, z), torch.bmm(upstream.mT, F.silu(pre))


def read(z: torch.Tensor, w2: torch.Tensor, w1: torch.Tensor) -> torch.Tensor:
    """M(z): z [L, C, K] -> [L, C, K]."""
    return _Read.apply(z, w2, w1)


class _Readout(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z, w2, w1, r):
        pre = torch.bmm(z, w2.mT)
        ctx.save_for_backward(z, w2, w1, r, pre)
        return torch.bmm(z, r).baddbmm_(F.silu(pre), torch.bmm(w1.mT, r))

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream):
        z, w2, w1, r, pre = ctx.saved_tensors
        d_inner = torch.bmm(F.silu(pre).mT, upstream)
        d_pre = upstream * torch.bmm(w1.mT, r).mT
        silu_backward_into(d_pre, pre, grad_input=d_pre)
        d_z = (upstream * r.mT).baddbmm_(d_pre, w2)
        return d_z, torch.bmm(d_pre.mT, z), r * d_inner.mT, torch.bmm(z.mT, upstream).baddbmm_(w1, d_inner)


def readout(z: torch.Tensor, w2: torch.Tensor, w1: torch.Tensor, r: torch.Tensor) -> torch.Tensor:
    """The product r . M(z): z [L, C, K], r [L, K, 1] -> [L, C, 1]."""
    return _Readout.apply(z, w2, w1, r)


class ChunkDecays(NamedTuple):
    """What a chunk's gates and inputs do to any memory; the outputs of `terms`.

    g, g_prev [..., C, 1]: product of alpha up to and before t. g_end [..., 1, 1]: of the whole chunk. w [..., C, 1]: eta_s g_C / g_s.
    y [..., C, K] and m [..., C, C]: Y and M of `chunk.py`. n [..., C, C]: eta_s g_t / g_s for s <= t. m and n are None without queries.
    """

    g: torch.Tensor
    g_prev: torch.Tensor
    g_end: torch.Tensor
    w: torch.Tensor
    y: torch.Tensor
    m: torch.Tensor | None
    n: torch.Tensor | None


def _ratios(a: torch.Tensor, b: torch.Tensor, diagonal: int) -> torch.Tensor:
    """exp(a_t - b_s) up to a diagonal, else 0: [..., C] -> [..., C, C]. What overflows lies above the diagonal and is cut off."""
    return (a.unsqueeze(-1) - b.unsqueeze(-2)).exp_().tril_(diagonal)


def _solve(system: torch.Tensor, right: torch.Tensor, *, transposed: bool) -> torch.Tensor:
    """T^-1 B, or T^-T B, of the unit lower triangular T = I + system. As a system from the right, which LAPACK does without copies."""
    matrix = system if transposed else system.mT
    return torch.linalg.solve_triangular(matrix, right.mT, upper=not transposed, left=False, unitriangular=True).mT


def _add(total: torch.Tensor | None, part: torch.Tensor) -> torch.Tensor:
    return part if total is None else total.add_(part)


class _Terms(torch.autograd.Function):
    """Terms of a chunk by T = I + before o (x paced^T), paced = eta x.

    Y = T^-T (w x); with queries P = ratio o (q paced^T) and M = P T^-1. Hence
    d(w x) = T^-1 dY,  dP = dM T^-T,  dT = -(Y d(w x)^T + M^T dP) below the diagonal. Without the erase T = I.
    """

    @staticmethod
    def forward(ctx, x, queries, eta, log_alpha, erase):
        log_g = log_alpha.cumsum(-1)
        log_g_prev = log_g - log_alpha
        g, g_prev, keep = log_g.exp(), log_g_prev.exp(), (log_g[..., -1:] - log_g).exp_()
        w = keep * eta
        paced = x * eta.unsqueeze(-1)
        y = x * w.unsqueeze(-1)
        inverse = m = n = None
        if queries is not None:
            ratio = _ratios(log_g, log_g, 0)
            m = inside = ratio * (queries @ paced.mT)
            n = ratio * eta.unsqueeze(-2)
        if erase:
            before = _ratios(log_g_prev, log_g, -1)
            system = before * (x @ paced.mT)
            if queries is None:
                y = _solve(system, y, transposed=True)
            else:
                identity = torch.eye(system.shape[-1], dtype=x.dtype, device=x.device).expand_as(system)
                inverse = _solve(system, identity, transposed=True).mT
                y, m = inverse.mT @ y, inside @ inverse
        ctx.erase = erase
        ctx.save_for_backward(x, queries, eta, log_alpha, inverse, y, m)  # what is one exponential or one product away is not kept
        return g.unsqueeze(-1), g_prev.unsqueeze(-1), g[..., -1:].unsqueeze(-1), w.unsqueeze(-1), y, m, n

    @staticmethod
    @once_differentiable
    def backward(ctx, d_g, d_g_prev, d_g_end, d_w, d_y, d_m, d_n):
        x, queries, eta, log_alpha, inverse, y, m = ctx.saved_tensors
        log_g = log_alpha.cumsum(-1)
        log_g_prev = log_g - log_alpha
        g, g_prev, keep = log_g.exp(), log_g_prev.exp(), (log_g[..., -1:] - log_g).exp_()
        paced, w = x * eta.unsqueeze(-1), keep * eta
        d_log_g, d_log_g_prev = d_g.squeeze(-1) * g, d_g_prev.squeeze(-1) * g_prev
        d_log_g[..., -1:].addcmul_(d_g_end.squeeze(-1), g[..., -1:])
        d_written, d_eta, d_x, d_queries, d_paced, d_system = d_y, torch.zeros_like(eta), None, None, None, None
        if queries is not None:
            ratio = _ratios(log_g, log_g, 0)
            inside = ratio * (queries @ paced.mT)
            d_inside = d_m if inverse is None else d_m @ inverse.mT
            d_system = None if inverse is None else m.mT @ d_inside
            d_scores = d_inside * ratio
            d_queries, d_paced = d_scores @ paced, d_scores.mT @ queries
            by_ratio = d_n * ratio
            d_eta = by_ratio.sum(-2)
            flow = by_ratio.mul_(eta.unsqueeze(-2)).addcmul_(d_inside, inside)
            d_log_g.add_(flow.sum(-1)).sub_(flow.sum(-2))
        if ctx.erase:
            before = _ratios(log_g_prev, log_g, -1)
            system = before * (x @ paced.mT)
            d_written = _solve(system, d_y, transposed=False) if inverse is None else inverse @ d_y
            d_system = _add(d_system, y @ d_written.mT).neg_()
            flow = d_system * system
            d_log_g_prev.add_(flow.sum(-1))
            d_log_g.sub_(flow.sum(-2))
            d_gram = d_system.mul_(before)
            d_x, d_paced = d_gram @ paced, _add(d_paced, d_gram.mT @ x)
        d_x = _add(d_x, d_written * w.unsqueeze(-1))
        d_w = d_w.squeeze(-1) + (d_written * x).sum(-1)
        if d_paced is not None:
            d_x.addcmul_(d_paced, eta.unsqueeze(-1))
            d_eta.add_((d_paced * x).sum(-1))
        d_eta.addcmul_(d_w, keep)
        flow = d_w * w
        d_log_g.sub_(flow)
        d_log_g[..., -1].add_(flow.sum(-1))
        later = (d_log_g + d_log_g_prev).flip(-1).cumsum(-1).flip(-1)  # log_g is a cumulative sum
        return d_x, d_queries, d_eta, later - d_log_g_prev, None


def terms(x: torch.Tensor, queries: torch.Tensor | None, eta: torch.Tensor, log_alpha: torch.Tensor, *, erase: bool) -> ChunkDecays:
    """What chunks with keys x [..., C, K], queries [..., C, K] or None, eta and log_alpha [..., C] do to any memory."""
    return ChunkDecays(*_Terms.apply(x, queries, eta, log_alpha, erase))


def _bound(error: torch.Tensor, rule: MemoryRule) -> torch.Tensor | None:
    """Bound error [L, C, I] in place (`memory.bounded`); returns its factor [L, C, 1], None where the objective has no bound."""
    if rule.objective != "huber":
        return None
    scale = _dot(error, error).div_(rule.huber_delta**2).add_(1).rsqrt_()
    error.mul_(scale)
    return scale


def _bound_backward(grad: torch.Tensor, error: torch.Tensor, scale: torch.Tensor | None, rule: MemoryRule) -> torch.Tensor:
    """From the gradient of the bounded error to that of the error, in place: s (G - E (E . G) / d^2)."""
    if scale is None:
        return grad
    return grad.addcmul_(error, _dot(error, grad).div_(-(rule.huber_delta**2))).mul_(scale)


def _tokens(k: torch.Tensor, v: torch.Tensor, queries: torch.Tensor | None, rule: MemoryRule) -> torch.Tensor:
    """All that the first weight sees: k, v where the target is self-generated, and the queries, along the token dimension."""
    return torch.cat([k, *((v,) if rule.self_target else ()), *(() if queries is None else (queries,))], 1)


class _Chunk(torch.autograd.Function):
    """See `chunk`.

    With h = silu(pre) at the anchors W2 and W1, and the target M(v) (or v) of unit length where the rule normalises it:

    pre = x W2^T for x = k, v, q          E = bounded(k + h_k W1^T - target)           back = E W1
    delta = bounded(back * silu'(pre_k))  R = g_prev pre_k + delta
    z = g pre_q - M R                     out = q + g silu(z) W1^T - (n o silu(z) h_k^T) E
    W2_C = g_C W2 - R^T Y                 W1_C = g_C W1 - (w E)^T h_k
    """

    @staticmethod
    def forward(ctx, k, v, queries, w2, w1, rule, writes, *decays):
        g, g_prev, g_end, w, y, m, n = decays
        size = k.shape[1]
        pre = torch.bmm(_tokens(k, v, queries, rule), w2.mT)
        pre_k = pre[:, :size]
        hidden = F.silu(pre[:, : 2 * size] if rule.self_target else pre_k)
        hidden_k = hidden[:, :size]
        target = torch.baddbmm(v, hidden[:, size:], w1.mT) if rule.self_target else v
        target_scale = _dot(target, target).add_(L2_EPS).rsqrt_() if rule.normalize_v else None
        target = target if target_scale is None else target * target_scale
        error = torch.baddbmm(k, hidden_k, w1.mT).sub_(target)
        error_scale = _bound(error, rule)
        target = None if target_scale is None else target
        back = torch.bmm(error, w1)
        delta = torch.ops.aten.silu_backward(back, pre_k)
        delta_scale = _bound(delta, rule)
        residual = torch.addcmul(delta, g_prev, pre_k) if rule.erases(0) else delta
        out = z = scores = w2_end = w1_end = None
        if queries is not None:
            z = (g * pre[:, -size:]).baddbmm_(m, residual, alpha=-1)
            read = F.silu(z)
            scores = torch.bmm(read, hidden_k.mT)
            out = torch.baddbmm(queries, read.mul_(g), w1.mT).baddbmm_(n * scores, error, alpha=-1)
        if writes:
            w2_end = (g_end * w2).baddbmm_(residual.mT, y, alpha=-1)
            w1_end = (g_end * w1).baddbmm_((w * error).mT, hidden_k, alpha=-1)
        ctx.rule = rule
        saved = pre, target, target_scale, error, error_scale, back, delta_scale, z, scores
        ctx.save_for_backward(k, v, queries, w2, w1, *decays, *saved)
        return out, w2_end, w1_end

    @staticmethod
    @once_differentiable
    def backward(ctx, d_out, d_w2_end, d_w1_end):
        rule, (k, v, queries, w2, w1, g, g_prev, g_end, w, y, m, n, *saved) = ctx.rule, ctx.saved_tensors
        pre, target, target_scale, error, error_scale, back, delta_scale, z, scores = saved
        size = k.shape[1]
        pre_k = pre[:, :size]
        sigmoid = torch.sigmoid(pre[:, : 2 * size] if rule.self_target else pre_k)
        hidden = sigmoid * pre[:, : sigmoid.shape[1]]
        falling = 1 - sigmoid
        slope = torch.addcmul(sigmoid, hidden, falling)  # silu'
        hidden_k, slope_k = hidden[:, :size], slope[:, :size]
        delta = back * slope_k if delta_scale is None else (back * slope_k).mul_(delta_scale)
        residual = torch.addcmul(delta, g_prev, pre_k) if rule.erases(0) else delta
        d_pre = torch.empty_like(pre)
        d_w2, d_w1, d_residual, d_error, d_hidden_k = (torch.zeros_like(t) for t in (w2, w1, delta, error, hidden_k))
        d_g = d_g_end = d_w = d_y = d_m = d_n = None
        if d_out is not None:
            part = _read_backward(d_out, hidden_k, pre[:, -size:], residual, (error, z, scores), (g, m, n), w1, d_pre[:, -size:])
            d_g, d_m, d_n, d_residual, d_error, d_hidden_k, d_w1 = part
        if d_w2_end is not None:
            d_residual.baddbmm_(y, d_w2_end.mT, alpha=-1)
            d_y = torch.bmm(residual, d_w2_end).neg_()
            through = torch.bmm(hidden_k, d_w1_end.mT)
            d_w = _dot(through, error).neg_()
            d_error.addcmul_(through, w, value=-1)
            d_hidden_k.baddbmm_(w * error, d_w1_end, alpha=-1)
            d_w2.addcmul_(g_end, d_w2_end)
            d_w1.addcmul_(g_end, d_w1_end)
            d_g_end = (w2 * d_w2_end).sum((-2, -1), keepdim=True).add_((w1 * d_w1_end).sum((-2, -1), keepdim=True))
        d_g_prev = _dot(d_residual, pre_k) if rule.erases(0) else None
        d_pre_k = torch.mul(d_residual, g_prev if rule.erases(0) else 0, out=d_pre[:, :size])
        d_inner = _bound_backward(d_residual, delta, delta_scale, rule)
        curve = torch.sub(slope_k, hidden_k, alpha=0.5).mul_(falling[:, :size]).mul_(back)  # silu'' = 2 (1 - s) (silu' - silu / 2)
        d_pre_k.addcmul_(d_inner, curve, value=2)
        d_back = d_inner.mul_(slope_k)
        d_w1.baddbmm_(error.mT, d_back)
        d_error = _bound_backward(d_error.baddbmm_(d_back, w1.mT), error, error_scale, rule)
        d_w1.baddbmm_(d_error.mT, hidden_k)
        d_pre_k.addcmul_(d_hidden_k.baddbmm_(d_error, w1), slope_k)
        d_target = d_error.neg()
        if target_scale is not None:
            d_target.addcmul_(target, _dot(target, d_target), value=-1).mul_(target_scale)
        if rule.self_target:
            d_w1.baddbmm_(d_target.mT, hidden[:, size:])
            torch.mul(torch.bmm(d_target, w1), slope[:, size:], out=d_pre[:, size : 2 * size])
        d_w2.baddbmm_(d_pre.mT, _tokens(k, v, queries, rule))
        d_tokens = torch.bmm(d_pre, w2)
        d_k = d_tokens[:, :size].add_(d_error)
        d_v = d_tokens[:, size : 2 * size].add_(d_target) if rule.self_target else d_target
        d_q = None if queries is None else d_tokens[:, -size:].add_(d_out)
        return d_k, d_v, d_q, d_w2, d_w1, None, None, d_g, d_g_prev, d_g_end, d_w, d_y, d_m, d_n


def _read_backward(d_out, hidden_k, pre_q, residual, saved, decays, w1, d_pre_q):
    """Backward of z and out in `_Chunk`: writes d_pre_q; returns the gradients of g, m, n, R, E, h_k and W1."""
    (error, z, scores), (g, m, n) = saved, decays
    read = F.silu(z)
    d_inner = torch.bmm(d_out, error.mT).neg_()
    d_error = torch.bmm((n * scores).mT, d_out).neg_()
    d_n, d_scores = d_inner * scores, d_inner.mul_(n)
    through = torch.bmm(d_out, w1)
    d_g = _dot(through, read)
    d_z = through.mul_(g).baddbmm_(d_scores, hidden_k)
    silu_backward_into(d_z, z, grad_input=d_z)
    d_g.add_(_dot(d_z, pre_q))
    torch.mul(d_z, g, out=d_pre_q)
    d_hidden_k = torch.bmm(d_scores.mT, read)
    d_w1 = torch.bmm(d_out.mT, read.mul_(g))
    return d_g, torch.bmm(d_z, residual.mT).neg_(), d_n, torch.bmm(m.mT, d_z).neg_(), d_error, d_hidden_k, d_w1


def chunk(
    k: torch.Tensor,
    v: torch.Tensor,
    weights: tuple[torch.Tensor, ...],
    decays: ChunkDecays,
    *,
    rule: MemoryRule,
    queries: torch.Tensor | None = None,
    writes: bool = True,
) -> tuple[torch.Tensor | None, tuple[torch.Tensor, ...]]:
    """(out [L, C, K], the weights after the chunk) of one memory: k, v and queries [L, C, K], weights (W2, W1) at the anchor.

    out is M_t(q_t), writes up to and including t, or None without queries. Without `writes` the weights come back as they were.
    """
    out, *ends = _Chunk.apply(k, v, queries, *weights, rule, writes, *decays)
    return out, tuple(ends) if writes else weights


def choose(rows: torch.Tensor, where: tuple[torch.Tensor, ...], otherwise: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """Weights `where` in the rows [L] that are true, `otherwise` elsewhere."""
    return tuple(torch.where(rows.view(-1, 1, 1), a, b) for a, b in zip(where, otherwise, strict=True))
