"""Training through the token clock: the loss of sequences read with the clock on, as a function of the engine's parameters.

`hope_pt.nn.token_clock.meta_loss` runs a plain HopeLM whose parameters are the engine's own, so their gradients arrive where megatron's
wrapper waits for them, and micro-batches, data-parallel ranks, clipping and optimizer are those of every run.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.func import functional_call

from hope_pt.config.schema import RunConfig
from hope_pt.engine.mesh import Mesh
from hope_pt.engine.micro import MicroBatch
from hope_pt.errors import ConfigError
from hope_pt.nn import HopeLM
from hope_pt.nn.layout import Layout
from hope_pt.nn.token_clock import ClockedLM, meta_loss


class MetaLosses(nn.Module):
    """MicroBatch -> loss of every token [B, T] in nats, with the clock on; second-order gradients where gradients are on.

    parameters: of the whole model, by HopeLM's names. ConfigError for a layout or setting that this path does not have.
    """

    def __init__(self, config: RunConfig, *, mesh: Mesh, parameters: Mapping[str, nn.Parameter]):
        super().__init__()
        _check(config, mesh)
        self.skeleton = ClockedLM(HopeLM(config.model, device=torch.device("meta")), config.token_clock, differentiable=True)
        # a plain mapping: they belong to the engine's model
        self._own: dict[str, Tensor] = {f"skeleton.lm.{name}": parameter for name, parameter in parameters.items()}

    def losses(self, micro: MicroBatch) -> Tensor:
        """The losses of a micro-batch."""
        starts_BT = None if micro.passage.layout is None else _starts(micro.passage.layout)
        return functional_call(self, self._own, (micro.tokens_BT, micro.targets_BT, starts_BT))

    def forward(self, tokens_BT: Tensor, targets_BT: Tensor, doc_start_BT: Tensor | None) -> Tensor:
        """`meta_loss` with whatever parameters the skeleton has at the moment."""
        return meta_loss(self.skeleton, tokens_BT, targets_BT, doc_start_BT=doc_start_BT)


def _starts(layout: Layout) -> Tensor:
    """Where a document starts inside a row [B, T]; the first token of a row begins one in any case."""
    return layout.document_BT.diff(dim=1, prepend=layout.document_BT[:, :1]) > 0


def _check(config: RunConfig, mesh: Mesh) -> None:
    engine = config.engine
    wanted = {
        "engine.tensor_parallel": (mesh.tensor, 1),
        "engine.pipeline_parallel": (mesh.pipeline, 1),
        "engine.context_parallel": (mesh.context, 1),
        "engine.precision": (engine.precision, "fp32"),
        "engine.recompute": (engine.recompute, "none"),
        "engine.overlap_grad_reduce": (engine.overlap_grad_reduce, False),
        "engine.overlap_param_gather": (engine.overlap_param_gather, False),
        "train.segments": (config.train.segments, 1),
    }
    for key, (value, needed) in wanted.items():
        if value != needed:
            raise ConfigError(
                f"token_clock.meta_train = true runs with {key} = {needed} only, got {value}; set it, or switch meta_train off"
            )
    for key, names in {"optim.name": (config.optim.name,), "optim.levels": config.optim.levels}.items():
        if "dgd" in names:
            raise ConfigError(
                f'token_clock.meta_train = true does not go with "dgd" in {key}: the inputs of a layer are seen where its own module runs, '
                "and meta-training runs another with its weights; choose another rule, or switch meta_train off"
            )
