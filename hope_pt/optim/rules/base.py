"""What a rule of the outer optimizer is: state of a stack of parameters, and a direction from their gradients (SPEC 4).

`DeepOptimizer` then does W <- (1 - lr * weight_decay) W + lr * direction. Each rule stands in its own file twice: `reference`, the
equation for one matrix, and a class with the batched form that runs. The class also says what others must know of the rule: its
exponent by width, what an update costs, and whether its directions are orthogonal.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from hope_kernels.newton_schulz import newton_schulz
from hope_pt.optim.matrices import Matrices

ADAMW_RMS = 0.2
"""Root mean square of a typical AdamW update over lr, to which orthogonalised updates are scaled (Moonshot, arXiv 2502.16982)."""
COEFFICIENTS = (3.48, -5.22, 2.48)
"""Coefficients of s, s^3 and s^5: five to eight steps bring every singular value from 1.6e-3 of the Frobenius norm between 0.73 and 1.18.
They were searched for that. Muon's (3.4445, -4.7750, 2.0315) are no steeper at 0 and leave 0.68 to 1.21."""

EPS = 1e-20
"""Added to the Frobenius norm: next to nothing, because gradients of small matrices (a head's memory) may be as small as 1e-7."""


@dataclass(frozen=True)
class NewtonSchulz:
    """Settings of the orthogonalisation. dtype: of the computation; None is bf16 on a GPU and the matrices' own elsewhere."""

    steps: int = 5
    coefficients: tuple[float, float, float] = COEFFICIENTS
    dtype: torch.dtype | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """[..., R, C] -> the nearest thing to U V^T of x = U S V^T, same shape and dtype."""
        dtype = self.dtype or (torch.bfloat16 if x.is_cuda else x.dtype)
        return newton_schulz(x, steps=self.steps, coefficients=self.coefficients, eps=EPS, dtype=dtype)

    def flops(self, rows: int, columns: int) -> float:
        """Of one m x n matrix, m <= n: X X^T, A A and P X in every step, 4 m^2 n + 2 m^3.

        The Triton kernel computes half of the symmetric products; this is the count without that.
        """
        short, long = sorted((rows, columns))
        return float(self.steps * (4 * short**2 * long + 2 * short**3))


@dataclass(frozen=True)
class Step:
    """What `update` may need beside gradients and state.

    number: of the update of these parameters, from 1. lr: the learning rate. matrices: the parameters as matrices. params: their values
    [N, *shape] where the rule has `reads_params`, else None.
    """

    number: int
    lr: float
    matrices: Matrices
    params: Tensor | None = None


class UpdateRule(ABC):
    """One rule with its settings.

    keys: names of the state tensors that have the parameter's shape. reads_params: whether `update` needs the parameters' values.
    reads_inputs: whether it needs what the layers saw, the sum of x x^T that `hope_pt.optim.inputs` adds to its state "gram" [C, C].
    """

    keys: tuple[str, ...] = ()
    reads_params: bool = False
    reads_inputs: bool = False

    @property
    @abstractmethod
    def width_exponent(self) -> float:
        """The exponent e of lr = optim.lr (base_width / width)^e for a matrix of which both sides grow with the width.

        What a layer computes must move as much at every width. An update with entries of a fixed size that are aligned with the inputs, as
        AdamW's are, has e = 1 (muP, arXiv 2203.03466). An orthogonalised update with entries of a fixed size is not aligned, it turns all
        inputs by as much: e = 1/2, and e = 0 where its singular values are of a fixed size. An update of the gradient's size has e = 0.
        """

    @property
    @abstractmethod
    def orthogonalises(self) -> bool:
        """Whether the directions come out of Newton-Schulz."""

    @property
    @abstractmethod
    def exchanged(self) -> float:
        """Tensors of the parameter's size that go through `Matrices.apply`, in or out, in one update on the mean over the updates."""

    @abstractmethod
    def flops(self, rows: int, columns: int) -> float:
        """Matrix products in one update of a matrix [rows, columns], on the mean over the updates."""

    def matrix_keys(self, rows: int, columns: int) -> dict[str, tuple[int, int]]:
        """State tensors with a shape of their own for every whole matrix [rows, columns], by name. Every tensor-parallel rank has them."""
        return {}

    @abstractmethod
    def update(self, grads: Tensor, state: dict[str, Tensor], step: Step) -> Tensor:
        """The direction [N, *shape] of N parameters with gradients [N, *shape]; W += lr * direction.

        state: [N, *shape] for every name in `keys`, [N, *lead, ...] for `matrix_keys`, zero before the first update; changed in place, or
        an entry is replaced.
        """


def rms_scale(rows: Tensor, columns: int) -> Tensor:
    """Factor that gives an orthogonal matrix of the given rows ([M, 1, 1]) and columns the root mean square 1."""
    return rows.clamp(min=columns).sqrt()


def flat(state: Tensor) -> Tensor:
    """State of matrices [N, *lead, r, c] -> [M, r, c], a view."""
    return state.view(-1, *state.shape[-2:])


def adam_preconditioned(grads: Tensor, second: Tensor, *, beta: float, eps: float, number: int) -> Tensor:
    """Adam's preconditioner, g / (sqrt(v) + eps): v is the average of g^2 in `second`, which changes in place, over 1 - beta^number."""
    second.mul_(beta).addcmul_(grads, grads, value=1 - beta)
    return grads / (second / (1 - beta**number)).sqrt_().add_(eps)
