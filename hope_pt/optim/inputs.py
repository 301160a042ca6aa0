"""What delta gradient descent must know of a linear layer beside its gradient: the inputs that it saw (SPEC 4; `rules.dgd`).

    forward of the layer -> hook -> sum of x x^T, |x| = 1, over the tokens of all micro-batches -> `take` -> state "gram" of the optimizer

A layer with C inputs has a sum of C x C fp32 values, whatever the batch. What a backward pass computes again is not counted again.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

Whole = Callable[[str, Tensor], Tensor]


class LayerInputs:
    """Collects the sums of `layers`, by the name of their weight.

    layers: modules whose first argument has the inputs in its last dimension. whole: makes the whole inputs of the named layer out of this
    rank's, where they are divided over tensor-parallel ranks by feature; not called in one process.
    """

    def __init__(self, layers: Mapping[str, nn.Module], *, whole: Whole | None = None):
        self._sums: dict[str, Tensor] = {}
        self._whole, self._enabled = whole, True
        self._handles = [layer.register_forward_pre_hook(self._hook(name)) for name, layer in layers.items()]

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Nothing is collected inside: evaluation, probes."""
        before, self._enabled = self._enabled, False
        try:
            yield
        finally:
            self._enabled = before

    def take(self, reduce: Callable[[str, Tensor], None] | None = None) -> dict[str, Tensor]:
        """The sums [C, C] since the last call, by name; layers that saw nothing are missing.

        reduce(name, sum) adds, in place, what other ranks saw: the data- and context-parallel ones, and the tensor-parallel ones of a
        layer whose tokens they divide.
        """
        sums, self._sums = self._sums, {}
        if reduce is not None:
            for name in sorted(sums):
                reduce(name, sums[name])
        return sums

    def close(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()

    def _hook(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        @torch.no_grad()
        def collect(_: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            # A backward pass that computes a layer again (recomputation of activations) sees the same tokens once more.
            if not self._enabled or torch._C._current_graph_task_id() >= 0:
                return
            inputs = arguments[0].detach()
            if self._whole is not None:
                inputs = self._whole(name, inputs)
            gram = normalised_gram(inputs)
            if name in self._sums:
                self._sums[name].add_(gram)
            else:
                self._sums[name] = gram

        return collect


def normalised_gram(x: Tensor) -> Tensor:
    """Sum of x x^T / |x|^2 over all leading indices: [..., C] -> [C, C], at least fp32. A zero vector adds nothing."""
    x = x.reshape(-1, x.shape[-1]).to(torch.promote_types(x.dtype, torch.float32))
    x = torch.nn.functional.normalize(x, dim=-1)
    return x.T @ x
