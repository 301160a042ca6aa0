"""M3, multi-scale momentum Muon: a fast and a slow momentum, both orthogonalised, over a second moment (NL Algorithm 1, section 7.2).

    every step        M1 <- avg(M1, G);  V <- avg(V, G^2);  W <- W - lr (NS(M1) + a O2) / (sqrt(V) + eps)
    every f-th step   M2 <- avg(M2, sum of the last f gradients);  O2 = NS(M2), used from the next step on

mode = "literal": avg adds b G to a sum that never decays, and the update is what it is, as printed. mode = "ema" [choice]: decaying
averages, Nesterov's look-ahead for M1 as in Muon, and updates of AdamW's size. The size: the direction, divided by the second moment or
with a slow part, has no known scale (1 / sqrt(V) alone is that of an inverse gradient), so it is brought to the root mean square 0.2,
measured over the whole matrix; a step of lr then is one of AdamW's, whatever the layout. A lone NS(M1) has Muon's factor, which is the same
number for exactly orthogonal matrices: with slow_weight = 0 and second_moment = false M3 is Muon. V needs no correction at the start, when
all of it is too small by one factor.
"""

import math

from torch import Tensor

from hope_pt.config.schema import M3Config
from hope_pt.optim.rules.base import ADAMW_RMS, NewtonSchulz, Step, UpdateRule, rms_scale

TINY = 1e-30
"""Keeps the scale of a zero matrix finite; far below any square of a root mean square in fp32."""


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
    if config.second_moment:
        update = update / (second.sqrt() + config.eps)
    if ema and (config.second_moment or config.slow_weight):
        update = update * (ADAMW_RMS / (update.square().mean() + TINY).sqrt())
    elif ema:
        update = update * ADAMW_RMS * math.sqrt(max(grad.shape))
    if number % config.slow_every == 0:
        slow, slow_sum = average(slow, slow_sum, b3), slow_sum * 0
        slow_direction = orthogonalise(slow)
    return -update, {"fast": fast, "second": second, "slow": slow, "slow_sum": slow_sum, "slow_direction": slow_direction}


class M3(UpdateRule):
    """The batched form. State: "fast", "second" with second_moment, "slow", "slow_sum", "slow_direction" with slow_weight > 0."""

    def __init__(self, config: M3Config, *, orthogonalise: NewtonSchulz | None = None):
        self.config, self.ema = config, config.mode == "ema"
        self.orthogonalise = orthogonalise or NewtonSchulz(config.ns_steps)
        self.keys = (
            "fast",
            *(["second"] if config.second_moment else []),
            *(["slow", "slow_sum", "slow_direction"] if config.slow_weight else []),
        )

    def update(self, grads: Tensor, state: dict[str, Tensor], step: Step) -> Tensor:
        """See `UpdateRule.update`."""
        config, (b1, b2, _) = self.config, self.config.betas
        fast = self._average(state["fast"], grads, b1)
        ahead = grads.lerp(fast, b1) if self.ema and config.nesterov else fast
        (direction,) = step.matrices.apply(lambda ahead_MRC: (self.orthogonalise(ahead_MRC),), ahead)
        if config.slow_weight:
            direction.add_(state["slow_direction"], alpha=config.slow_weight)
        if config.second_moment:
            second = state["second"]
            if self.ema:
                second.mul_(b2).addcmul_(grads, grads, value=1 - b2)
            else:
                second.addcmul_(grads, grads, value=b2)
            direction.div_(second.sqrt().add_(config.eps))
        if self.ema:
            measured = config.second_moment or config.slow_weight > 0
            scale = measured_scale if measured else orthogonal_scale
            (direction,) = step.matrices.apply(scale, direction, constants=[step.matrices.rows(grads)])
        if config.slow_weight:
            self._advance_slow(grads, state, step)
        return direction.neg_()

    def _average(self, old: Tensor, new: Tensor, b: float) -> Tensor:
        return old.lerp_(new, 1 - b) if self.ema else old.add_(new, alpha=b)

    def _advance_slow(self, grads: Tensor, state: dict[str, Tensor], step: Step) -> None:
        total = state["slow_sum"].add_(grads)
        if step.number % self.config.slow_every == 0:
            slow = self._average(state["slow"], total, self.config.betas[2])
            total.zero_()
            (state["slow_direction"],) = step.matrices.apply(lambda slow_MRC: (self.orthogonalise(slow_MRC),), slow)


def measured_scale(x_MRC: Tensor, rows_M: Tensor) -> tuple[Tensor]:
    """Bring each matrix, of the given rows (others are zero), to the root mean square of AdamW's updates."""
    mean_square = x_MRC.square().sum((-2, -1), keepdim=True) / (rows_M * x_MRC.shape[-1])
    return (x_MRC * (ADAMW_RMS / (mean_square + TINY).sqrt()),)


def orthogonal_scale(x_MRC: Tensor, rows_M: Tensor) -> tuple[Tensor]:
    """The same for orthogonal matrices, from their shape alone."""
    return (x_MRC * (ADAMW_RMS * rms_scale(rows_M, x_MRC.shape[-1])),)
