"""M3, multi-scale momentum Muon: a fast and a slow momentum, both orthogonalised, over a second moment (NL Algorithm 1, section 7.2).

    every step        M1 <- avg(M1, G);  V <- avg(V, G^2);  W <- W - lr (NS(M1) + a O2) / (sqrt(V) + eps)
    every f-th step   M2 <- avg(M2, sum of the last f gradients);  O2 = NS(M2), used from the next step on

mode = "literal": avg adds b G to a sum that never decays, and the update is what it is, as printed. mode = "ema" [choice]: decaying
averages, Nesterov's look-ahead for M1 as in Muon, and updates of Muon's size. The quotient has no size of its own (1 / sqrt(V) is that of
an inverse gradient), so the division keeps the Frobenius norm of X = NS(M1) + a O2, measured over the whole matrix:

    W <- W - lr 0.2 sqrt(max(R, C)) / (1 + a) * |X| / |X / (sqrt(V) + eps)| * X / (sqrt(V) + eps)

The root mean square is then that of AdamW's updates, 0.2, where gradients have full rank and both momenta agree, and less where they do
not; without second moment and slow momentum M3 is Muon. A quotient brought to 0.2 in every case would move along the few directions of a
gradient of low rank the more, the wider the matrix is (docs/optimizers.md). V needs no correction at the start, when all of it is too small
by one factor.
"""

import math

import torch
from torch import Tensor

from hope_pt.config.optim import M3Config
from hope_pt.optim.rules.base import ADAMW_RMS, NewtonSchulz, Step, UpdateRule, rms_scale

TINY = 1e-30
"""Keeps a zero matrix zero."""


def reference(
    grad: Tensor, state: dict[str, Tensor], *, number: int, config: M3Config, orthogonalise: NewtonSchulz
) -> tuple[Tensor, dict[str, Tensor]]:
    """Update `number` (from 1) of one matrix [R, C]: (direction, the new state). state: fast, second, slow, slow_sum, slow_direction."""
    ema, (b1, b2, b3) = config.mode == "ema", config.betas

    def average(old: Tensor, new: Tensor, b: float) -> Tensor:
        return b * old + (1 - b) * new if ema else old + b * new

    fast, second = average(state["fast"], grad, b1), average(state["second"], grad**2, b2)
    slow, slow_sum, slow_direction = state["slow"], state["slow_sum"] + grad, state["slow_direction"]
    update = orthogonalise(average(fast, grad, b1) if ema and config.nesterov else fast) + config.slow_weight * slow_direction
    size = update.norm()
    if config.second_moment:
        update = update / (second.sqrt() + config.eps)
    if ema:
        update = update * size / (update.norm() + TINY) * ADAMW_RMS * math.sqrt(max(grad.shape)) / (1 + config.slow_weight)
    if number % config.slow_every == 0:
        slow, slow_sum = average(slow, slow_sum, b3), slow_sum * 0
        slow_direction = orthogonalise(slow)
    return -update, {"fast": fast, "second": second, "slow": slow, "slow_sum": slow_sum, "slow_direction": slow_direction}


class M3(UpdateRule):
    """The batched form. State: "fast", "second" with second_moment, "slow", "slow_sum", "slow_direction" with slow_weight > 0."""

    orthogonalises = True

    def __init__(self, config: M3Config, *, orthogonalise: NewtonSchulz | None = None):
        self.config, self.ema = config, config.mode == "ema"
        self.orthogonalise = orthogonalise or NewtonSchulz(config.ns_steps)
        self.keys = (
            "fast",
            *(["second"] if config.second_moment else []),
            *(["slow", "slow_sum", "slow_direction"] if config.slow_weight else []),
        )

    @property
    def width_exponent(self) -> float:
        """See `UpdateRule.width_exponent`."""
        return 0.5 if self.ema else 0.0

    @property
    def exchanged(self) -> float:
        """See `UpdateRule.exchanged`."""
        return 2 + self.config.second_moment + (1 + 2 / self.config.slow_every if self.config.slow_weight else 0)

    def flops(self, rows: int, columns: int) -> float:
        """See `UpdateRule.flops`; the slow momentum is the rarer one."""
        times = 1 + (1 / self.config.slow_every if self.config.slow_weight else 0)
        return times * self.orthogonalise.flops(rows, columns)

    def update(self, grads: Tensor, state: dict[str, Tensor], step: Step) -> Tensor:
        """See `UpdateRule.update`."""
        config, (b1, b2, _) = self.config, self.config.betas
        fast = self._average(state["fast"], grads, b1)
        ahead = grads.lerp(fast, b1) if self.ema and config.nesterov else fast
        parts = [ahead]
        if config.slow_weight:
            parts.append(state["slow_direction"])
        if config.second_moment:
            second = state["second"].mul_(b2 if self.ema else 1.0)
            parts.append(second.addcmul_(grads, grads, value=1 - b2 if self.ema else b2))
        (direction,) = step.matrices.apply(self._direct, *parts, constants=[step.matrices.rows(grads)])
        if config.slow_weight:
            self._advance_slow(grads, state, step)
        return direction

    def _average(self, old: Tensor, new: Tensor, b: float) -> Tensor:
        return old.lerp_(new, 1 - b) if self.ema else old.add_(new, alpha=b)

    def _direct(self, ahead: Tensor, *others: Tensor) -> tuple[Tensor]:
        """The direction [M, R, C] from the fast momentum, O2 and V where there are such, and the rows [M, 1, 1]."""
        config, (*parts, rows) = self.config, others
        x = self.orthogonalise(ahead)
        if config.slow_weight:
            x = x.add_(parts[0], alpha=config.slow_weight)
        size = _norm(x)
        if config.second_moment:
            x = x.div_(parts[-1].sqrt().add_(config.eps))
        if self.ema:
            x = x.mul_(size / (_norm(x) + TINY) * rms_scale(rows, x.shape[-1]) * (ADAMW_RMS / (1 + config.slow_weight)))
        return (x.neg_(),)

    def _advance_slow(self, grads: Tensor, state: dict[str, Tensor], step: Step) -> None:
        total = state["slow_sum"].add_(grads)
        if step.number % self.config.slow_every == 0:
            slow = self._average(state["slow"], total, self.config.betas[2])
            total.zero_()
            (state["slow_direction"],) = step.matrices.apply(lambda slow_MRC: (self.orthogonalise(slow_MRC),), slow)


def _norm(x: Tensor) -> Tensor:
    """Frobenius norms [M, 1, 1]."""
    return torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True)
