"""Causal softmax attention with rotary positions: the mixer of HOPE-Attention and Transformer++ (SPEC 1).

Positions and visibility are per document. The state is the key-value cache of the row's current document and grows with it.
Legend: B batch, T tokens of this call, P past tokens in the cache, H heads, K head width.
"""

import torch
import torch.nn.functional as F
from torch import nn

from hope_pt.config.schema import ModelConfig
from hope_pt.nn.layout import Layout
from hope_pt.nn.state import LayerState


class AttentionCore(nn.Module):
    """The head-local part: [B, T, H * 3 K], interleaved per head as q, k, v -> [B, T, H * K]. It has no parameters."""

    def __init__(self, config: ModelConfig, *, num_heads: int):
        super().__init__()
        self.num_heads, self.head_width, self.theta = num_heads, config.head_width, config.attention.rope_theta

    @property
    def features_per_head(self) -> int:
        """Columns of the input projection for one head."""
        return 3 * self.head_width

    def forward(
        self, projected_BTP: torch.Tensor, *, state: LayerState | None = None, layout: Layout | None = None, keep_state: bool = False
    ):
        """(y [B, T, H * K], the new state or None). The input says how many heads; a state comes back as from `TitansCore`."""
        x_BTHP = projected_BTP.unflatten(-1, (-1, self.features_per_head))
        if keep_state and state is None:
            state = self._empty(x_BTHP.shape[0], x_BTHP.shape[2], past=0, dtype=x_BTHP.dtype, device=x_BTHP.device)
        q, k, v = x_BTHP.transpose(1, 2).unflatten(-1, (3, self.head_width)).unbind(-2)
        length = q.shape[2]
        position = torch.arange(length, device=q.device).unsqueeze(0) if layout is None else layout.position_BT
        q, k = rotate(q, position, self.theta), rotate(k, position, self.theta)
        if layout is None:
            return _merge(F.scaled_dot_product_attention(q, k, v, is_causal=True)), None
        causal = torch.ones(length, length, dtype=torch.bool, device=q.device).tril()
        same = layout.document_BT.unsqueeze(2) == layout.document_BT.unsqueeze(1)
        visible = causal & same & layout.mask_BT.unsqueeze(1)
        real = layout.mask_BT
        if state is not None:
            past = (layout.document_BT == 0).unsqueeze(2) & state["valid"].unsqueeze(1)
            visible = torch.cat([past, visible], 2)
            k, v = torch.cat([state["k"], k], 2), torch.cat([state["v"], v], 2)
        # a padded query sees itself, so that its softmax is defined; its output is zeroed
        visible[:, torch.arange(length), k.shape[2] - length + torch.arange(length)] = True
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=visible.unsqueeze(1))
        y = _merge(y * real[:, None, :, None].to(y.dtype))
        return y, None if state is None else self._cache(k, v, state, layout)

    def _cache(self, k: torch.Tensor, v: torch.Tensor, state: LayerState, layout: Layout) -> LayerState:
        last = layout.document_BT[:, -1:]
        valid = torch.cat([state["valid"] & (last == 0), layout.mask_BT & (layout.document_BT == last)], 1)
        return {"k": k, "v": v, "valid": valid}

    def init_state(self, batch: int, *, dtype: torch.dtype, device: torch.device, past: int = 0) -> LayerState:
        """An empty cache with room for `past` tokens, of which none is valid."""
        return self._empty(batch, self.num_heads, past=past, dtype=dtype, device=device)

    def _empty(self, batch: int, heads: int, *, past: int, dtype: torch.dtype, device: torch.device) -> LayerState:
        k, v = (torch.zeros(batch, heads, past, self.head_width, dtype=dtype, device=device) for _ in range(2))
        return {"k": k, "v": v, "valid": torch.zeros(batch, past, dtype=torch.bool, device=device)}


def _merge(y_BHTK: torch.Tensor) -> torch.Tensor:
    return y_BHTK.transpose(1, 2).flatten(2)


def rotate(x_BHTK: torch.Tensor, position_BT: torch.Tensor, theta: float) -> torch.Tensor:
    """Rotary embedding: the pairs (i, i + K/2) turn by position * theta^(-2 i / K); same shape and dtype."""
    half = x_BHTK.shape[-1] // 2
    frequency = theta ** (-torch.arange(half, device=x_BHTK.device, dtype=torch.float32) / half)
    angle = position_BT.to(torch.float32).unsqueeze(-1) * frequency
    cos, sin = angle.cos().unsqueeze(1).to(x_BHTK.dtype), angle.sin().unsqueeze(1).to(x_BHTK.dtype)
    first, second = x_BHTK[..., :half], x_BHTK[..., half:]
    return torch.cat([first * cos - second * sin, first * sin + second * cos], -1)
