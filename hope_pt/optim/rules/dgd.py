"""Delta gradient descent of the outer weights (NL eq. 56-57, App. C): a linear layer forgets what it answers to the inputs it sees.

    W <- W (I - eta' C) - eta' G,   eta' = lr / (1 + lr),   C = mean over tokens of x x^T with |x| = 1

One token: the closed form of App. C, the minimum over W' of <W' x, grad_y L> + |W' x|^2 / 2 + |W' - W|^2 / (2 lr), by Sherman-Morrison. A
batch [choice]: the mean of the updates of its tokens, each from the same W. Unlike the exact minimum for the batch it needs no solve with a
C x C matrix, and the eigenvalues of I - eta' C lie between 1 - eta' and 1 for every lr. G is the ordinary gradient of the layer, of the
mean loss and with the inputs as they are [choice]: clipping, sums over an interval and the other rules use the same one.

C comes from `hope_pt.optim.inputs`: "gram", a sum of x x^T over all tokens since the last update. Its trace is the number of tokens,
because each x x^T has trace 1. The rows of W do not meet, so the streams of an input projection are not taken apart.
"""

from torch import Tensor

from hope_pt.optim.rules.base import Step, UpdateRule, flat

TINY = 1e-30
"""Makes C zero where no input was seen."""


def reference(grad: Tensor, weight: Tensor, inputs: Tensor, *, lr: float) -> Tensor:
    """The new weight [R, C] of one linear layer after the inputs [T, C] of length 1."""
    share = lr / (1 + lr)
    return weight - share * weight @ (inputs.T @ inputs / len(inputs)) - share * grad


class DGD(UpdateRule):
    """The batched form. State "gram" [C, C] of every layer: the sum of x x^T that its hooks have seen; an update empties it."""

    reads_params = True
    reads_inputs = True
    width_exponent = 0.0
    orthogonalises = False
    exchanged = 3.0

    def flops(self, rows: int, columns: int) -> float:
        """See `UpdateRule.flops`."""
        return 2.0 * rows * columns**2

    def matrix_keys(self, rows: int, columns: int) -> dict[str, tuple[int, int]]:
        """See `UpdateRule.matrix_keys`."""
        return {"gram": (columns, columns)}

    def update(self, grads: Tensor, state: dict[str, Tensor], step: Step) -> Tensor:
        """See `UpdateRule.update`."""
        gram, lr = flat(state["gram"]), step.lr
        tokens = gram.diagonal(dim1=-2, dim2=-1).sum(-1).view(-1, 1, 1)

        def direct(params_MRC: Tensor, grads_MRC: Tensor, gram_MCC: Tensor) -> tuple[Tensor]:
            return ((params_MRC @ gram_MCC + grads_MRC) / -(1 + lr),)

        assert step.params is not None
        (direction,) = step.matrices.apply(direct, step.params, grads, constants=[gram / (tokens + TINY)])
        state["gram"].zero_()
        return direction
