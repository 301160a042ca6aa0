"""Momentum as an associative memory, and delta momentum (NL section 4.2-4.3, eq. 48-49).

    m <- m D - (1 - a) P(g),   W <- W + lr m
    momentum: D = a I          delta momentum: D = a I - d g^T g on the right, or on the left, with g scaled to length 1

Momentum is a linear memory m of the gradients' rows (keys) whose values are -P, trained by one gradient step a step: the dot product
<m g^T, P> gives momentum, the regression |m g^T + P|^2 the delta rule, which erases what the memory answers to a key before it writes the
new value. P is nothing, division by the root of the second moment (Adam's, with its correction at the start), or orthogonalisation.

[choices] The step of the inner problem is 1 - a, so that m is an average and lr means the same for every a (the equation leaves it free);
with P = nothing and d = 0 that is SGD with momentum a at the rate lr (1 - a). P(g) has the root mean square 1, orthogonalised ones too.
g^T g has a meaning as a projection only for a normalised g: Frobenius length 1 keeps all eigenvalues of D within [a - d, a]. NL eq. 49
writes the factor on the right (NeurIPS eq. 22 on the left): side.
"""

import math

from torch import Tensor

from hope_pt.config.optim import MomentumConfig
from hope_pt.optim.rules.base import NewtonSchulz, Step, UpdateRule, adam_preconditioned, rms_scale

TINY = 1e-30
"""Keeps the direction of a zero gradient zero."""


def reference(
    grad: Tensor, state: dict[str, Tensor], *, number: int, config: MomentumConfig, delta: float, orthogonalise: NewtonSchulz
) -> tuple[Tensor, dict[str, Tensor]]:
    """Update `number` (from 1) of one matrix [R, C]: (direction, the new state). state: momentum, second. delta: d, 0 for momentum."""
    a, b2, m = config.decay, config.beta2, state["momentum"]
    second = b2 * state["second"] + (1 - b2) * grad**2
    p = {
        "none": lambda: grad,
        "adam": lambda: grad / ((second / (1 - b2**number)).sqrt() + config.eps),
        "newton_schulz": lambda: orthogonalise(grad) * math.sqrt(max(grad.shape)),
    }[config.preconditioner]()
    g = grad / (grad.norm() + TINY)
    erased = m @ g.mT @ g if config.side == "right" else g @ g.mT @ m
    m = a * m - delta * erased - (1 - a) * p
    return m, {"momentum": m, "second": second}


class Momentum(UpdateRule):
    """The batched form of both. State: "momentum", and "second" with preconditioner = "adam"."""

    def __init__(self, config: MomentumConfig, *, delta: float, orthogonalise: NewtonSchulz | None = None):
        self.config, self.delta = config, delta
        self.orthogonalise = orthogonalise or NewtonSchulz()
        self.keys = ("momentum", "second") if config.preconditioner == "adam" else ("momentum",)

    @property
    def width_exponent(self) -> float:
        """See `UpdateRule.width_exponent`."""
        return {"none": 0.0, "adam": 1.0, "newton_schulz": 0.5}[self.config.preconditioner]

    @property
    def orthogonalises(self) -> bool:
        """See `UpdateRule.orthogonalises`."""
        return self.config.preconditioner == "newton_schulz"

    @property
    def exchanged(self) -> float:
        """See `UpdateRule.exchanged`."""
        return (3.0 if self.delta else 0.0) + (2.0 if self.orthogonalises else 0.0)

    def flops(self, rows: int, columns: int) -> float:
        """See `UpdateRule.flops`."""
        short, long = sorted((rows, columns))
        erased = 4.0 * short**2 * long if self.delta else 0.0
        return erased + (self.orthogonalise.flops(rows, columns) if self.orthogonalises else 0.0)

    def update(self, grads: Tensor, state: dict[str, Tensor], step: Step) -> Tensor:
        """See `UpdateRule.update`."""
        config, momentum = self.config, state["momentum"]
        erased = step.matrices.apply(self._erased, momentum, grads)[0] if self.delta else None
        momentum.mul_(config.decay).sub_(self._precondition(grads, state, step), alpha=1 - config.decay)
        if erased is not None:
            momentum.sub_(erased, alpha=self.delta)
        return momentum

    def _erased(self, momentum: Tensor, grads: Tensor) -> tuple[Tensor]:
        """What the memories answer to the keys, m g^T g or g g^T m with |g| = 1: the product over the shorter side first."""
        g = grads / (grads.square().sum((-2, -1), keepdim=True).sqrt() + TINY)
        right, wide = self.config.side == "right", g.shape[-2] <= g.shape[-1]
        if right:
            return ((momentum @ g.mT) @ g if wide else momentum @ (g.mT @ g),)
        return ((g @ g.mT) @ momentum if wide else g @ (g.mT @ momentum),)

    def _precondition(self, grads: Tensor, state: dict[str, Tensor], step: Step) -> Tensor:
        if self.config.preconditioner == "none":
            return grads
        if self.config.preconditioner == "adam":
            return adam_preconditioned(grads, state["second"], beta=self.config.beta2, eps=self.config.eps, number=step.number)

        def orthogonal(grads_MRC: Tensor, rows_M: Tensor) -> tuple[Tensor]:
            return (self.orthogonalise(grads_MRC).mul_(rms_scale(rows_M, grads_MRC.shape[-1])),)

        return step.matrices.apply(orthogonal, grads, constants=[step.matrices.rows(grads)])[0]
