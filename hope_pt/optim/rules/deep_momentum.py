"""Deep momentum (DMGD): the momentum is a small MLP that is trained on the gradients while the model trains (NL eq. 50).

Momentum is a linear memory M of one gradient matrix (`rules.momentum`): keys are the R rows u_i of U = P(g), the value of row i is the unit
vector e_i, and one step a step on the objective <M(u_i), e_i> gives M <- a M - (1 - a) U, the parameters with which W += lr M. Here the
memory has a hidden layer beside the linear path, and the update is what it answers to the unit vectors, M(I), which for a linear memory
are its parameters:

    m(z) = M z + W1 tanh(W2 z)          M [R, C], W1 [R, F], W2 [F, C]
    M  <- a M - (1 - a) U
    W1 <- a W1 - (1 - a) b H             H = tanh(Uhat W2^T) [R, F]                    (gradient of <m, e_i> in W1)
    W2 <- S + a (W2 - S) - (1 - a) b mean_i ((1 - h_i^2) * w1_i) uhat_i^T              (and in W2)
    W  <- W + lr (M + diag(|u_i|) W1 tanh(W2) / sqrt(F C))

[choices] NL eq. 50 writes W += m(u), whose shape fits no rectangular W, and does not give momentum for a linear m; M(I) does both. The keys
of the hidden layer are rows of length 1 (uhat_i), and what it answers is scaled by the rows' lengths: the size of the gradients cancels.
W2 starts at S, standard normal and the same for every matrix, and decays towards it; W1 starts at zero. tanh is odd, as momentum is, and
bounded: with W1 within b and W2 within b^2 of S, neither layer can run away. W1 has a gradient for every row, W2 the mean over the rows,
which share it. hidden = 0 leaves M: momentum. output = "newton_schulz" orthogonalises the update (the nonlinear output of NL section 4.4),
with Muon's factor.
"""

import math

import torch
from torch import Tensor

from hope_pt.config.optim import DeepMomentumConfig
from hope_pt.optim.rules.base import ADAMW_RMS, NewtonSchulz, Step, UpdateRule, adam_preconditioned, flat, rms_scale

TINY = 1e-30
"""Keeps the direction of a zero row zero."""


def start(config: DeepMomentumConfig, columns: int) -> Tensor:
    """S [F, C], float64 on the CPU: standard normal."""
    return torch.randn(config.hidden, columns, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def reference(
    grad: Tensor, state: dict[str, Tensor], *, number: int, config: DeepMomentumConfig, orthogonalise: NewtonSchulz
) -> tuple[Tensor, dict[str, Tensor]]:
    """Update `number` (from 1) of one matrix [R, C]: (direction, the new state). state: linear, second, w1, and w2 as W2 - S."""
    a, b, b2, f = config.decay, config.inner_lr, config.beta2, config.hidden
    rows, columns = grad.shape
    second = b2 * state["second"] + (1 - b2) * grad**2
    u = grad / ((second / (1 - b2**number)).sqrt() + config.eps) if config.preconditioner == "adam" else grad
    linear = a * state["linear"] - (1 - a) * u
    direction, w1, offset = linear, state["w1"], state["w2"]
    if f:
        s = start(config, columns).to(grad)
        key = u / (u.norm(dim=1, keepdim=True) + TINY)
        h = torch.tanh(key @ (s + offset).T)
        offset = a * offset - (1 - a) * b * ((1 - h**2) * w1).T @ key / rows
        w1 = a * w1 - (1 - a) * b * h
        direction = linear + u.norm(dim=1, keepdim=True) * (w1 @ torch.tanh(s + offset)) / math.sqrt(f * columns)
    if config.output == "newton_schulz":
        direction = orthogonalise(direction) * ADAMW_RMS * math.sqrt(max(rows, columns))
    return direction, {"linear": linear, "second": second, "w1": w1, "w2": offset}


class DeepMomentum(UpdateRule):
    """The batched form. State: "linear", "second" with preconditioner = "adam"; for every matrix "w1" [R, F] and "w2" [F, C], W2 - S."""

    def __init__(self, config: DeepMomentumConfig, *, orthogonalise: NewtonSchulz | None = None):
        self.config = config
        self.orthogonalise = orthogonalise or NewtonSchulz()
        self.keys = ("linear", "second") if config.preconditioner == "adam" else ("linear",)
        self._starts: dict[tuple[int, torch.device, torch.dtype], Tensor] = {}

    @property
    def width_exponent(self) -> float:
        """See `UpdateRule.width_exponent`."""
        return 0.5 if self.orthogonalises else {"none": 0.0, "adam": 1.0}[self.config.preconditioner]

    @property
    def orthogonalises(self) -> bool:
        """See `UpdateRule.orthogonalises`."""
        return self.config.output == "newton_schulz"

    @property
    def exchanged(self) -> float:
        """See `UpdateRule.exchanged`."""
        return (2.0 if self.config.hidden else 0.0) + (2.0 if self.orthogonalises else 0.0)

    def flops(self, rows: int, columns: int) -> float:
        """See `UpdateRule.flops`."""
        output = self.orthogonalise.flops(rows, columns) if self.orthogonalises else 0.0
        return 6.0 * rows * columns * self.config.hidden + output

    def matrix_keys(self, rows: int, columns: int) -> dict[str, tuple[int, int]]:
        """See `UpdateRule.matrix_keys`."""
        hidden = self.config.hidden
        return {"w1": (rows, hidden), "w2": (hidden, columns)} if hidden else {}

    def update(self, grads: Tensor, state: dict[str, Tensor], step: Step) -> Tensor:
        """See `UpdateRule.update`."""
        config, matrices = self.config, step.matrices
        keys = grads
        if config.preconditioner == "adam":
            keys = adam_preconditioned(grads, state["second"], beta=config.beta2, eps=config.eps, number=step.number)
        direction = state["linear"].mul_(config.decay).sub_(keys, alpha=1 - config.decay)
        if config.hidden:
            own = [flat(state["w1"]), flat(state["w2"])]
            answer, w1, w2 = matrices.apply(self._learn, keys, constants=[matrices.rows(grads)], own=own)
            state["w1"], state["w2"] = w1.view_as(state["w1"]), w2.view_as(state["w2"])
            direction = direction + answer
        if config.output == "newton_schulz":
            (direction,) = matrices.apply(self._orthogonal, direction, constants=[matrices.rows(grads)])
        return direction

    def _learn(self, keys: Tensor, rows: Tensor, w1: Tensor, w2: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The hidden layer learns [M, R, C] gradients: (its answer to the unit vectors [M, R, C], new w1, new w2)."""
        a, rate = self.config.decay, (1 - self.config.decay) * self.config.inner_lr
        first = self._start(keys)
        length = keys.square().sum(-1, keepdim=True).sqrt()
        keys = keys / (length + TINY)
        hidden = torch.tanh(keys @ (first + w2).mT)
        w2 = a * w2 - ((1 - hidden.square()) * w1).mT @ keys * (rate / rows)
        w1 = a * w1 - rate * hidden
        return length * (w1 @ torch.tanh(first + w2)) / math.sqrt(self.config.hidden * keys.shape[-1]), w1, w2

    def _start(self, like: Tensor) -> Tensor:
        """S for matrices such as `like`, made once."""
        key = (like.shape[-1], like.device, like.dtype)
        if key not in self._starts:
            self._starts[key] = start(self.config, like.shape[-1]).to(like)
        return self._starts[key]

    def _orthogonal(self, x: Tensor, rows: Tensor) -> tuple[Tensor]:
        return (self.orthogonalise(x).mul_(ADAMW_RMS * rms_scale(rows, x.shape[-1])),)
