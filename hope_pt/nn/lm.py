"""The language model in plain torch, on one device: the oracle of every parallel test and the model of inference and evaluation.

    tokens -> embedding -> blocks -> norm -> head (the embedding, where tied)

Legend: B batch, T tokens, V vocabulary, D width.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from hope_kernels.linear_cross_entropy import linear_cross_entropy
from hope_pt.config.schema import ModelConfig
from hope_pt.nn.block import HopeBlock
from hope_pt.nn.init import init_parameters
from hope_pt.nn.layout import Layout, build_layout
from hope_pt.nn.parts import RMSNorm
from hope_pt.nn.state import LMState


def model_layout(
    config: ModelConfig,
    shape: tuple[int, int],
    *,
    mask_BT: torch.Tensor | None = None,
    doc_start_BT: torch.Tensor | None = None,
    seen_B: torch.Tensor | None = None,
    device: torch.device | None = None,
) -> Layout | None:
    """`build_layout` with a model's chunk lengths and convolution width."""
    titans = config.titans
    return build_layout(
        shape,
        chunk_proj=titans.chunk_proj,
        chunk_mem=titans.chunk_mem,
        conv_width=titans.conv_width,
        mask_BT=mask_BT,
        doc_start_BT=doc_start_BT,
        seen_B=seen_B,
        device=device,
    )


class HopeLM(nn.Module):
    """A causal language model; train() and eval() compute the same."""

    def __init__(self, config: ModelConfig, *, seed: int = 0, device: torch.device | None = None):
        super().__init__()
        self.config = config
        with torch.device(device or "cpu"):
            self.embedding = nn.Embedding(config.vocab_size, config.width)
            self.blocks: Sequence[HopeBlock] = nn.ModuleList(HopeBlock(config) for _ in range(config.num_layers))  # type: ignore[assignment]
            self.final_norm = RMSNorm(config.width, config.norm_eps)
            self.head = None if config.tie_embeddings else nn.Linear(config.width, config.vocab_size, bias=False)
        if self.embedding.weight.device.type != "meta":
            init_parameters(self, config=config, seed=seed)

    def forward(
        self,
        tokens_BT: torch.Tensor,
        *,
        state: LMState | None = None,
        doc_start_BT: torch.Tensor | None = None,
        mask_BT: torch.Tensor | None = None,
        return_state: bool = False,
    ) -> tuple[torch.Tensor, LMState | None]:
        """(logits [B, T, V] fp32, state).

        tokens_BT int64. state: continue the rows' documents; None: every row is a fresh document. doc_start_BT: a document starts at this
        token. mask_BT: false at padding, which is skipped as if absent. The state is returned where one was given or return_state is set.
        """
        if return_state and state is None:
            state = self.init_state(tokens_BT.shape[0])
        hidden, state = self._hidden(tokens_BT, state=state, doc_start_BT=doc_start_BT, mask_BT=mask_BT)
        logits = F.linear(hidden, self._head_weight)
        return logits.to(torch.promote_types(logits.dtype, torch.float32)), state

    @property
    def _head_weight(self) -> torch.Tensor:
        return self.embedding.weight if self.head is None else self.head.weight

    def _hidden(
        self,
        tokens_BT: torch.Tensor,
        *,
        state: LMState | None = None,
        doc_start_BT: torch.Tensor | None = None,
        mask_BT: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, LMState | None]:
        """(what the head reads [B, T, D], state where one was given); arguments as `forward`."""
        seen = None if state is None else state.seen_B
        shape = (tokens_BT.shape[0], tokens_BT.shape[1])
        layout = model_layout(self.config, shape, mask_BT=mask_BT, doc_start_BT=doc_start_BT, seen_B=seen, device=tokens_BT.device)
        x = self.embedding(tokens_BT)
        layers = []
        for index, block in enumerate(self.blocks):
            x, layer = block(x, state=None if state is None else state.layers[index], layout=layout)
            layers.append(layer)
        return self.final_norm(x), None if state is None else LMState(layout.seen_B, tuple(layers))

    def init_state(self, batch: int) -> LMState:
        """The state before the first token of `batch` fresh documents; at least fp32, constant in context length for memory mixers."""
        weight = self.embedding.weight
        layers = tuple(block.mixer.core.init_state(batch, dtype=weight.dtype, device=weight.device) for block in self.blocks)
        return LMState(torch.zeros(batch, dtype=torch.long, device=weight.device), layers)

    def token_losses(self, tokens_BT: torch.Tensor, targets_BT: torch.Tensor, *, doc_start_BT: torch.Tensor | None = None) -> torch.Tensor:
        """Negative log likelihood of every target in nats, [B, T] fp32; no state is carried.

        A target that is no token, such as -100, is ignored: its loss is 0.
        """
        hidden, _ = self._hidden(tokens_BT, doc_start_BT=doc_start_BT)
        losses = linear_cross_entropy(hidden.flatten(0, 1), self._head_weight, targets_BT.flatten(), backend=self.config.head_backend)
        return losses.view_as(targets_BT)
