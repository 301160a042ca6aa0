"""MLP memories without momentum, forward and backward by hand: what the default rule runs on (SPEC 2.1).

`memory.py` and `chunk.py` say the same for every rule in operations that autograd differentiates one by one. Here a chunk is a pair of
plain functions, forward and backward, that keep few tensors and work in place; the scans call them chunk by chunk inside one autograd
function each:

    terms    decays, Y and M of `chunk.py`, from the keys (and queries)
    written  the same for a chunk that nobody reads inside, put together from tiles
    chunk    error signals, the causal read and the new weights of a stack of memories

Legend: L = B * H, S memories that share their tokens (R = S * L rows, memory by memory), C tokens of the chunk, K head width, F hidden
width. W2 [R, F, K], W1 [R, K, F].
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from hope_kernels.memory import L2_EPS
from hope_kernels.rule import MemoryRule

TILE = 64
"""Tokens of a tile of `written_forward`."""

Weights = tuple[torch.Tensor, ...]
silu_into = torch.ops.aten.silu.out
silu_backward_into = torch.ops.aten.silu_backward.grad_input


def supports(rule: MemoryRule) -> bool:
    """Whether this module computes the rule; `chunk.py` computes every rule."""
    return rule.memory == "mlp" and rule.objective != "dot" and not (rule.momentum or rule.erases(1))


def dot(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Inner products over the last dimension, kept."""
    return (a * b).sum(-1, keepdim=True)


def unit_length(x: torch.Tensor) -> torch.Tensor:
    """Scale x [..., K] in place to x r with r = 1 / sqrt(|x|^2 + 1e-6), as `memory.l2norm`; returns r [..., 1]."""
    scale = dot(x, x).add_(L2_EPS).rsqrt_()
    x.mul_(scale)
    return scale


def unit_length_backward(grad: torch.Tensor, y: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """From the gradient of the scaled y to that of x: r (G - y (y . G)), a new tensor."""
    return torch.addcmul(grad, y, dot(y, grad), value=-1).mul_(scale)


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


def at(decays: ChunkDecays, place: int) -> ChunkDecays:
    """The decays of one chunk of several, [G, ...]."""
    return ChunkDecays(*(None if t is None else t[place] for t in decays))


def joined(grads: list[ChunkDecays], decays: ChunkDecays) -> ChunkDecays:
    """Gradients of the decays of several chunks from those of each; None = 0."""
    each = zip(zip(*grads, strict=True), decays, strict=True)
    return ChunkDecays(*(None if t is None else torch.stack([torch.zeros_like(t[0]) if g is None else g for g in gs]) for gs, t in each))


class _Pace(NamedTuple):
    """Gates of a chunk: cumulative log alpha, g, g_prev, keep = g_C / g_s and w = eta keep, [..., C] each."""

    log_g: torch.Tensor
    g: torch.Tensor
    g_prev: torch.Tensor
    keep: torch.Tensor
    w: torch.Tensor


def _pace(eta: torch.Tensor, log_alpha: torch.Tensor) -> _Pace:
    log_g = log_alpha.cumsum(-1)
    keep = (log_g[..., -1:] - log_g).exp_()
    return _Pace(log_g, log_g.exp(), (log_g - log_alpha).exp_(), keep, keep * eta)


def _pace_backward(pace: _Pace, grads: tuple[torch.Tensor | None, ...], d_eta: torch.Tensor, d_log_g: torch.Tensor, d_log_g_prev):
    """(d_eta, d_log_alpha) [..., C] from the gradients of g, g_prev, g_end, w (None = 0) and what reached eta, log g and log g_prev."""
    d_g, d_g_prev, d_g_end, d_w = grads
    if d_g is not None:
        d_log_g.addcmul_(d_g.squeeze(-1), pace.g)
    if d_g_end is not None:
        d_log_g[..., -1:].addcmul_(d_g_end.squeeze(-1), pace.g[..., -1:])
    if d_g_prev is not None:
        d_log_g_prev.addcmul_(d_g_prev.squeeze(-1), pace.g_prev)
    if d_w is not None:
        d_eta.addcmul_(d_w.squeeze(-1), pace.keep)
        flow = d_w.squeeze(-1) * pace.w
        d_log_g.sub_(flow)
        d_log_g[..., -1].add_(flow.sum(-1))
    later = (d_log_g + d_log_g_prev).flip(-1).cumsum(-1).flip(-1)  # log g is a cumulative sum
    return d_eta, later.sub_(d_log_g_prev)


def _ratios(log_g: torch.Tensor) -> torch.Tensor:
    """g_t / g_s for s <= t, else 0: [..., C] -> [..., C, C]. What overflows lies above the diagonal and is cut off."""
    return (log_g.unsqueeze(-1) - log_g.unsqueeze(-2)).exp_().tril_()


def _before(ratio: torch.Tensor) -> torch.Tensor:
    """g_{t-1} / g_s for s < t, else 0: the ratios one row later."""
    return F.pad(ratio[..., :-1, :], (0, 0, 1, 0))


def _inverse(system: torch.Tensor) -> torch.Tensor:
    """Inverse of the unit lower triangular I + system. As a system from the right, which LAPACK does without copies."""
    identity = torch.eye(system.shape[-1], dtype=system.dtype, device=system.device).expand_as(system)
    return torch.linalg.solve_triangular(system.mT, identity, upper=True, left=False, unitriangular=True).mT


def _add(total: torch.Tensor | None, part: torch.Tensor) -> torch.Tensor:
    return part if total is None else total.add_(part)


def terms_forward(
    x: torch.Tensor, queries: torch.Tensor | None, eta: torch.Tensor, log_alpha: torch.Tensor, *, erase: bool
) -> tuple[ChunkDecays, torch.Tensor | None]:
    """(decays, T^-1 or None) of keys x [..., C, K], queries or None, eta and log_alpha [..., C].

    By T = I + before o (x paced^T), paced = eta x: Y = T^-T (w x); with queries P = ratio o (q paced^T) and M = P T^-1. Without the
    erase T = I.
    """
    pace = _pace(eta, log_alpha)
    y = x * pace.w.unsqueeze(-1)
    inverse = m = n = None
    if erase or queries is not None:
        ratio, paced = _ratios(pace.log_g), x * eta.unsqueeze(-1)
    if queries is not None:
        m = (queries @ paced.mT).mul_(ratio)
        n = ratio * eta.unsqueeze(-2)
    if erase:
        inverse = _inverse((x @ paced.mT).mul_(_before(ratio)))
        y = inverse.mT @ y
        m = None if m is None else m @ inverse
    g = pace.g.unsqueeze(-1)
    decays = ChunkDecays(g, pace.g_prev.unsqueeze(-1), g[..., -1:, :], pace.w.unsqueeze(-1), y, m, n)
    return decays, inverse


def terms_backward(
    grads: ChunkDecays,
    x: torch.Tensor,
    queries: torch.Tensor | None,
    eta: torch.Tensor,
    log_alpha: torch.Tensor,
    inverse: torch.Tensor | None,
    y: torch.Tensor,
    m: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor, torch.Tensor]:
    """Gradients of x, queries, eta and log_alpha from those of the decays (None = 0 for the first four), with the results of the forward.

    d(w x) = T^-1 dY,  dP = dM T^-T,  dT = -(Y d(w x)^T + M^T dP) below the diagonal.
    """
    pace = _pace(eta, log_alpha)
    d_eta, d_log_g, d_log_g_prev = (torch.zeros_like(eta) for _ in range(3))
    d_queries = d_paced = d_system = None
    if inverse is not None or queries is not None:
        ratio, paced = _ratios(pace.log_g), x * eta.unsqueeze(-1)
    if queries is not None:
        d_inside = grads.m if inverse is None else grads.m @ inverse.mT
        d_system = None if inverse is None else m.mT @ d_inside
        flow = (queries @ paced.mT).mul_(d_inside)
        d_scores = d_inside * ratio
        d_queries, d_paced = d_scores @ paced, d_scores.mT @ queries
        d_eta.add_(torch.linalg.vecdot(grads.n, ratio, dim=-2))
        flow.addcmul_(grads.n, eta.unsqueeze(-2)).mul_(ratio)
        d_log_g.add_(flow.sum(-1)).sub_(flow.sum(-2))
    d_written = grads.y
    if inverse is None:
        d_x = d_written * pace.w.unsqueeze(-1)
    else:
        before = _before(ratio)
        d_written = inverse @ d_written
        d_gram = _add(d_system, y @ d_written.mT).mul_(before).neg_()
        flow = (x @ paced.mT).mul_(d_gram)
        d_log_g_prev.add_(flow.sum(-1))
        d_log_g.sub_(flow.sum(-2))
        d_x, d_paced = d_gram @ paced, _add(d_paced, d_gram.mT @ x)
        d_x.addcmul_(d_written, pace.w.unsqueeze(-1))
    d_w = dot(d_written, x)
    if d_paced is not None:
        d_x.addcmul_(d_paced, eta.unsqueeze(-1))
        d_eta.add_(dot(d_paced, x).squeeze(-1))
    d_w = d_w if grads.w is None else d_w.add_(grads.w)
    d_eta, d_log_alpha = _pace_backward(pace, (grads.g, grads.g_prev, grads.g_end, d_w), d_eta, d_log_g, d_log_g_prev)
    return d_x, d_queries, d_eta, d_log_alpha


class _Terms(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, queries, eta, log_alpha, erase):
        decays, inverse = terms_forward(x, queries, eta, log_alpha, erase=erase)
        ctx.save_for_backward(x, queries, eta, log_alpha, inverse, decays.y, decays.m)
        return tuple(decays)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        return *terms_backward(ChunkDecays(*grads), *ctx.saved_tensors), None


def terms(x: torch.Tensor, queries: torch.Tensor | None, eta: torch.Tensor, log_alpha: torch.Tensor, *, erase: bool) -> ChunkDecays:
    """`terms_forward` under autograd."""
    return ChunkDecays(*_Terms.apply(x, queries, eta, log_alpha, erase))


def tiles(size: int, width: int) -> int:
    """Tiles of a chunk in `written_forward`: their [K, K] transitions must cost less than the rest of the Gram matrix."""
    return size // TILE if size % TILE == 0 and size >= 2 * max(width, TILE) else 1


def written_forward(
    x: torch.Tensor, eta: torch.Tensor, log_alpha: torch.Tensor, *, erase: bool
) -> tuple[ChunkDecays, tuple[torch.Tensor | None, ...]]:
    """`terms_forward` without queries of x [L, C, K], from tiles: no Gram matrix and no decays between tokens of two tiles.

    With Yt_i and gt_i the Y and g_prev of tile i alone, Y_i = Yt_i Q_i, where Q = I for the last tile and Q_{i-1} = A_i Q_i with the
    tile's transition A_i = g_end I - (gt_i x_i)^T Yt_i: what all later tiles do to a write.
    """
    rows, size, width = x.shape
    count = tiles(size, width)
    if count == 1 or not erase:
        decays, inverse = terms_forward(x, None, eta, log_alpha, erase=erase)
        return decays, (inverse, None, None, None)
    local, inverse = terms_forward(
        x.unflatten(1, (count, -1)), None, eta.unflatten(1, (count, -1)), log_alpha.unflatten(1, (count, -1)), erase=True
    )
    y = local.y
    across = torch.empty(count, rows, width, width, dtype=x.dtype, device=x.device)  # Q
    across[-1] = torch.eye(width, dtype=x.dtype, device=x.device)
    moves = -(x.unflatten(1, (count, -1)) * local.g_prev).mT @ y  # A; that of the first tile is not needed
    moves.diagonal(dim1=-2, dim2=-1).add_(local.g_end.squeeze(-1))
    for tile in range(count - 1, 0, -1):
        torch.bmm(moves[:, tile], across[tile], out=across[tile - 1])
    across = across.transpose(0, 1)
    pace = _pace(eta, log_alpha)
    g = pace.g.unsqueeze(-1)
    full = (y @ across).flatten(1, 2)
    return ChunkDecays(g, pace.g_prev.unsqueeze(-1), g[..., -1:, :], pace.w.unsqueeze(-1), full, None, None), (inverse, y, moves, across)


def written_backward(
    grads: ChunkDecays,
    x: torch.Tensor,
    eta: torch.Tensor,
    log_alpha: torch.Tensor,
    decays: ChunkDecays,
    saved: tuple[torch.Tensor | None, ...],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of x, eta, log_alpha: dQ_i = Yt_i^T dY_i + A_i^T dQ_{i-1},  dA_i = dQ_{i-1} Q_i^T,  dYt_i = dY_i Q_i^T - gt_i x_i dA_i."""
    inverse, y, moves, across = saved
    if y is None:
        d_x, _, d_eta, d_log_alpha = terms_backward(grads, x, None, eta, log_alpha, inverse, decays.y, None)
        return d_x, d_eta, d_log_alpha
    count = y.shape[1]
    x_tiles, eta_tiles, log_alpha_tiles = (t.unflatten(1, (count, -1)) for t in (x, eta, log_alpha))
    d_y = grads.y.unflatten(1, (count, -1))
    d_across = y[:, :-1].mT @ d_y[:, :-1]
    for tile in range(1, count - 1):
        d_across[:, tile].baddbmm_(moves[:, tile].mT, d_across[:, tile - 1])
    d_moves = d_across @ across[:, 1:].mT
    g_prev = _pace(eta_tiles, log_alpha_tiles).g_prev.unsqueeze(-1)
    d_local = d_y @ across.mT
    d_local[:, 1:] -= (x_tiles[:, 1:] * g_prev[:, 1:]) @ d_moves
    d_scaled = F.pad(y[:, 1:] @ d_moves.mT, (0, 0, 0, 0, 1, 0)).neg_()
    d_end = F.pad(d_moves.diagonal(dim1=-2, dim2=-1).sum(-1), (1, 0))[..., None, None]
    of_tiles = ChunkDecays(None, dot(d_scaled, x_tiles), d_end, None, d_local, None, None)
    d_x, _, d_eta, d_log_alpha = terms_backward(of_tiles, x_tiles, None, eta_tiles, log_alpha_tiles, inverse, y, None)
    d_x.addcmul_(d_scaled, g_prev)
    zero = torch.zeros_like(eta)
    of_chunk = (None, grads.g_prev, grads.g_end, grads.w)
    more = _pace_backward(_pace(eta, log_alpha), of_chunk, d_eta.flatten(1), zero, torch.zeros_like(eta))
    return d_x.flatten(1, 2), more[0], more[1].add_(d_log_alpha.flatten(1))


def _bound(error: torch.Tensor, rule: MemoryRule) -> torch.Tensor | None:
    """Bound error [R, C, I] in place (`memory.bounded`); returns its factor [R, C, 1], None where the objective has no bound."""
    if rule.objective != "huber":
        return None
    scale = dot(error, error).div_(rule.huber_delta**2).add_(1).rsqrt_()
    error.mul_(scale)
    return scale


def _bound_backward(grad: torch.Tensor, error: torch.Tensor, scale: torch.Tensor | None, rule: MemoryRule) -> torch.Tensor:
    """From the gradient of the bounded error to that of the error, in place: s (G - E (E . G) / d^2)."""
    if scale is None:
        return grad
    return grad.addcmul_(error, dot(error, grad).div_(-(rule.huber_delta**2))).mul_(scale)


def through(tokens: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Tokens [L, N, K], the same for every memory, times the transposes of weights [R, I, K]: [R, N, I]."""
    out = torch.empty(len(weights), tokens.shape[1], weights.shape[1], dtype=tokens.dtype, device=tokens.device)
    for weight, part in zip(weights.split(len(tokens)), out.split(len(tokens)), strict=True):
        torch.bmm(tokens, weight.mT, out=part)
    return out


def _summed(grad: torch.Tensor, weights: torch.Tensor, rows: int) -> torch.Tensor:
    """Sum over the memories of grad [R, N, I] times weights [R, I, K]: [L, N, K]."""
    first, *others = zip(grad.split(rows), weights.split(rows), strict=True)
    total = torch.bmm(*first)
    for pair in others:
        total.baddbmm_(*pair)
    return total


def _sum_rows(t: torch.Tensor, rows: int) -> torch.Tensor:
    return t if len(t) == rows else t.unflatten(0, (-1, rows)).sum(0)


class Signals(NamedTuple):
    """What the forward pass of a chunk leaves for its backward pass, [R, C, ...]; see `chunk_forward`.

    pre_k, pre_v: x W2^T. target: M(v), of unit length where the rule says so, and its scale. error: E. back: E W1. Of the causal read:
    pre_q, z and scores = silu(z) h_k^T.
    """

    pre_k: torch.Tensor
    pre_v: torch.Tensor | None
    target: torch.Tensor | None
    target_scale: torch.Tensor | None
    error: torch.Tensor
    error_scale: torch.Tensor | None
    back: torch.Tensor
    delta_scale: torch.Tensor | None
    pre_q: torch.Tensor | None = None
    z: torch.Tensor | None = None
    scores: torch.Tensor | None = None


NO_SIGNALS = (None,) * len(Signals._fields)


def _expanded(decays: ChunkDecays, copies: int) -> list[torch.Tensor]:
    """g_prev, g_end and w for every row."""
    columns = (decays.g_prev, decays.g_end, decays.w)
    return [t.repeat(copies, 1, 1) if copies > 1 else t for t in columns]


def _answer(tokens: torch.Tensor, hidden: torch.Tensor, w1: torch.Tensor) -> torch.Tensor:
    """M(x) = x + hidden W1^T for tokens x [L, C, K] that all memories share."""
    answer = torch.bmm(hidden, w1.mT)
    answer.unflatten(0, (-1, len(tokens))).add_(tokens)
    return answer


def chunk_forward(
    k: torch.Tensor,
    v: torch.Tensor,
    queries: torch.Tensor | None,
    weights: Weights,
    decays: ChunkDecays,
    *,
    rule: MemoryRule,
    writes: bool = True,
) -> tuple[torch.Tensor | None, Weights | None, Signals]:
    """(out, weights after the chunk, signals) for k, v, queries [L, C, K] and weights at the anchor.

    With h = silu(pre), and the target M(v) (or v) of unit length where the rule normalises it:

    pre = x W2^T for x = k, v, q          E = bounded(k + h_k W1^T - target)           back = E W1
    delta = bounded(back * silu'(pre_k))  R = g_prev pre_k + delta
    z = g pre_q - M R                     out = q + g silu(z) W1^T - (n o silu(z) h_k^T) E
    W2_C = g_C W2 - R^T Y                 W1_C = g_C W1 - (w E)^T h_k

    out [L, C, K] is the causal read of one memory (S = 1), None without queries. Without `writes` there are no new weights.
    """
    w2, w1 = weights
    rows = len(k)
    g_prev, g_end, w = _expanded(decays, len(w2) // rows)
    pre_k, pre_v, target, target_scale = through(k, w2), None, None, None
    hidden_k = F.silu(pre_k)
    error = _answer(k, hidden_k, w1)
    if rule.self_target:
        pre_v = through(v, w2)
        target = _answer(v, F.silu(pre_v), w1)
    elif rule.normalize_v:
        target = v.clone()
    if rule.normalize_v:
        target_scale = unit_length(target)
    error.unflatten(0, (-1, rows)).sub_((v if target is None else target).unflatten(0, (-1, rows)))
    error_scale = _bound(error, rule)
    back = torch.bmm(error, w1)
    residual = torch.ops.aten.silu_backward(back, pre_k)
    delta_scale = _bound(residual, rule)
    if rule.erases(0):
        residual.addcmul_(g_prev, pre_k)
    pre_q = z = scores = out = ends = None
    if queries is not None:
        pre_q = torch.bmm(queries, w2.mT)
        z = (decays.g * pre_q).baddbmm_(decays.m, residual, alpha=-1)
        read = F.silu(z)
        scores = torch.bmm(read, hidden_k.mT)
        out = torch.baddbmm(queries, read.mul_(decays.g), w1.mT).baddbmm_(decays.n * scores, error, alpha=-1)
    if writes:
        ends = g_end * w2, g_end * w1
        for end, part in zip(ends[0].split(rows), residual.split(rows), strict=True):
            end.baddbmm_(part.mT, decays.y, alpha=-1)
        ends[1].baddbmm_((w * error).mT, hidden_k, alpha=-1)
    return out, ends, Signals(pre_k, pre_v, target, target_scale, error, error_scale, back, delta_scale, pre_q, z, scores)


def chunk_backward(
    d_out: torch.Tensor | None,
    d_ends: Weights | None,
    k: torch.Tensor,
    v: torch.Tensor,
    queries: torch.Tensor | None,
    weights: Weights,
    decays: ChunkDecays,
    signals: Signals,
    *,
    rule: MemoryRule,
) -> tuple[tuple[torch.Tensor | None, ...], Weights, ChunkDecays]:
    """Gradients of (k, v, queries), the weights and the decays from those of the outputs of `chunk_forward` (None = 0).

    d_ends, where given, are overwritten with the gradients of the weights.
    """
    w2, w1 = weights
    s = signals
    rows, erase = len(k), rule.erases(0)
    g_prev, g_end, w = _expanded(decays, len(w2) // rows)
    slope = torch.sigmoid(s.pre_k)
    hidden, falling = slope * s.pre_k, 1 - slope
    slope.addcmul_(hidden, falling)  # silu' = s + silu (1 - s)
    delta = s.back * slope
    if s.delta_scale is not None:
        delta.mul_(s.delta_scale)
    residual = torch.addcmul(delta, g_prev, s.pre_k) if erase else delta
    grads: dict[str, torch.Tensor] = {}
    d_w2, d_w1 = (torch.zeros_like(w2), torch.zeros_like(w1)) if d_ends is None else d_ends
    if d_ends is not None:
        toward = d_w2.neg(), d_w1.neg()
        grads["g_end"] = _sum_rows((w2 * d_w2).sum((-2, -1), keepdim=True).add_((w1 * d_w1).sum((-2, -1), keepdim=True)), rows)
        d_w2.mul_(g_end)
        d_w1.mul_(g_end)
    d_residual = d_error = d_hidden = d_pre_q = None
    if d_out is not None:
        d_residual, d_error, d_hidden, d_pre_q = _read_backward(d_out, hidden, residual, w1, decays, s, d_w1, grads)
    if d_ends is not None:
        grads["y"] = _summed(residual, toward[0], rows)
        d_residual = through(decays.y, toward[0]) if d_residual is None else d_residual.baddbmm_(decays.y, toward[0].mT)
        passed = torch.bmm(s.error, toward[1])
        grads["w"] = _sum_rows(dot(passed, hidden), rows)
        d_hidden = _add(d_hidden, passed.mul_(w))
        paced = hidden * w
        d_error = torch.bmm(paced, toward[1].mT) if d_error is None else d_error.baddbmm_(paced, toward[1].mT)
    if erase:
        grads["g_prev"] = _sum_rows(dot(d_residual, s.pre_k), rows)
        d_pre_k = d_residual * g_prev
    d_delta = _bound_backward(d_residual, delta, s.delta_scale, rule)
    curve = torch.sub(slope, hidden, alpha=0.5).mul_(falling).mul_(s.back)  # silu'' = 2 (1 - s) (silu' - silu / 2)
    d_back = torch.mul(d_delta, slope, out=delta)  # what nobody reads any more is overwritten: it lies in the cache
    d_w1.baddbmm_(s.error.mT, d_back)
    d_error = _bound_backward(d_error.baddbmm_(d_back, w1.mT), s.error, s.error_scale, rule)
    d_w1.baddbmm_(d_error.mT, hidden)
    d_hidden.baddbmm_(d_error, w1)
    d_pre_k = d_pre_k.addcmul_(d_hidden, slope) if erase else d_hidden.mul_(slope)
    d_pre_k.addcmul_(curve, d_delta, value=2)
    flows = [(k, d_pre_k)]
    d_k = _summed(d_pre_k, w2, rows).add_(_sum_rows(d_error, rows))
    d_v, d_queries = _target_backward(d_error, s, rows), None
    if s.pre_v is not None:
        d_w1.baddbmm_(d_v.mT, silu_into(s.pre_v, out=hidden))
        d_pre_v = torch.bmm(d_v, w1, out=slope)
        silu_backward_into(d_pre_v, s.pre_v, grad_input=d_pre_v)
        flows.append((v, d_pre_v))
        d_v = _summed(d_pre_v, w2, rows).add_(_sum_rows(d_v, rows))
    if d_pre_q is not None:
        flows.append((queries, d_pre_q))
        d_queries = torch.baddbmm(d_out, d_pre_q, w2)
    for tokens, flow in flows:
        for total, part in zip(d_w2.split(rows), flow.split(rows), strict=True):
            total.baddbmm_(part.mT, tokens)
    return (d_k, d_v, d_queries), (d_w2, d_w1), ChunkDecays(*(grads.get(name) for name in ChunkDecays._fields))


def _target_backward(d_error: torch.Tensor, signals: Signals, rows: int) -> torch.Tensor:
    """The gradient of M(v) [R, C, K], or of v [L, C, K]: the target's is minus that of the error, summed over memories where it is v.

    Overwrites d_error.
    """
    target, scale = signals.target, signals.target_scale
    if signals.pre_v is None:
        d_error = _sum_rows(d_error, rows)
    if scale is None:
        return d_error.neg_()
    return d_error.addcmul_(target, dot(target, d_error), value=-1).mul_(-scale)


def _read_backward(d_out, hidden, residual, w1, decays, signals, d_w1, grads):
    """Backward of z and out in `chunk_forward`: adds to d_w1, fills the gradients of g, m and n, returns those of R, E, h_k and pre_q."""
    error, pre_q, z, scores = signals.error, signals.pre_q, signals.z, signals.scores
    read, minus = F.silu(z), d_out.neg()
    d_scores = torch.bmm(minus, error.mT)
    d_error = torch.bmm((decays.n * scores).mT, minus)
    grads["n"] = d_scores * scores
    d_scores.mul_(decays.n)
    d_z = torch.bmm(d_out, w1)
    d_g = dot(d_z, read)
    d_z.mul_(decays.g).baddbmm_(d_scores, hidden)
    silu_backward_into(d_z, z, grad_input=d_z)
    grads["g"] = d_g.add_(dot(d_z, pre_q))
    d_hidden = torch.bmm(d_scores.mT, read)
    d_w1.baddbmm_(d_out.mT, read.mul_(decays.g))
    d_pre_q = d_z * decays.g
    grads["m"] = torch.bmm(d_z.neg_(), residual.mT)
    return torch.bmm(decays.m.mT, d_z), d_error, d_hidden, d_pre_q


def read(z: torch.Tensor, weights: Weights) -> torch.Tensor:
    """M(z): z [L, C, K] -> [L, C, K]."""
    return torch.baddbmm(z, F.silu(torch.bmm(z, weights[0].mT)), weights[1].mT)


def read_backward(grad: torch.Tensor, z: torch.Tensor, weights: Weights) -> tuple[torch.Tensor, Weights]:
    """Gradients of z and of the weights."""
    pre, d_pre = torch.bmm(z, weights[0].mT), torch.bmm(grad, weights[1])
    silu_backward_into(d_pre, pre, grad_input=d_pre)
    return torch.baddbmm(grad, d_pre, weights[0]), (torch.bmm(d_pre.mT, z), torch.bmm(grad.mT, F.silu(pre)))


def choose(rows: torch.Tensor, where: tuple[torch.Tensor, ...], otherwise: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """Weights `where` in the rows [L] that are true, `otherwise` elsewhere."""
    return tuple(torch.where(rows.view(-1, 1, 1), a, b) for a, b in zip(where, otherwise, strict=True))


def only(rows: torch.Tensor, weights: Weights) -> Weights:
    """Weights in the rows [L] that are true, 0 elsewhere; new tensors."""
    return tuple(t.masked_fill(~rows.view(-1, 1, 1), 0) for t in weights)


def plus(a: Weights, b: Weights) -> Weights:
    """The sum, in place of a."""
    return tuple(x.add_(y) for x, y in zip(a, b, strict=True))
