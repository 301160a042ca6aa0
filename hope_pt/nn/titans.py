"""The memory mixer: self-modifying Titans and every special case of it (SPEC 2; NL eq. 76-97).

    in_proj -> convolution, SiLU -> projection scan (k, v, q, eta, alpha) -> memory scan -> per-head norm * gate -> out_proj

`TitansCore` is everything between the two projections; it works on whole heads and never mixes them, so a tensor-parallel rank runs it
on its own heads. M_mem never influences k, v, eta or alpha, which is why the two scans are separate.
Legend: B batch, T tokens, G grid slots, H heads, S stacked memories, K head width, F memory hidden width, W convolution width.
"""

import torch
import torch.nn.functional as F
from torch import nn

from hope_kernels.backend import scan_backend
from hope_kernels.memory_scan import memory_scan
from hope_kernels.pointwise import conv_silu, norm_gate
from hope_kernels.projection_scan import Generated, Inputs, Readout, projection_scan
from hope_kernels.rule import ChunkMasks, MemoryRule, MemoryState
from hope_pt.config.schema import ModelConfig, TitansConfig
from hope_pt.nn.layout import Layout, take
from hope_pt.nn.state import LayerState


def memory_rule(config: TitansConfig) -> MemoryRule:
    """The rule of a configuration's memories."""
    return MemoryRule(
        memory=config.memory,
        objective=config.objective,
        huber_delta=config.huber_delta,
        update=config.update,
        dgd_scope=config.dgd_scope,
        momentum=config.momentum == "titans",
        self_target=config.self_target,
        normalize_v=config.normalize_v,
    )


def adaptive_streams(config: TitansConfig) -> tuple[str, ...]:
    """Names of the streams that a memory generates, in the order of the stack."""
    static = {"k": config.static_k, "eta": config.static_eta, "alpha": config.static_alpha, "v": config.static_v}
    return tuple(name for name, is_static in {**static, "q": not config.adaptive_q}.items() if not is_static)


class TitansCore(nn.Module):
    """The head-local part of the mixer: [B, T, H * (4 K [+ 1])] -> [B, T, H * K].

    All parameters are head-first, [H, ...]. The input is interleaved per head: q, k, v, gate (K each), then the momentum logit where
    momentum is on. States and scans are at least fp32 whatever the input's dtype.
    """

    def __init__(self, config: ModelConfig, *, num_heads: int):
        super().__init__()
        titans = config.titans
        self.config = titans
        self.rule = memory_rule(titans)
        self.stack = adaptive_streams(titans)
        self.head_width, self.norm_eps = config.head_width, config.norm_eps
        heads, width, hidden = num_heads, config.head_width, config.memory_hidden
        shapes = [(hidden, width), (width, hidden)] if titans.memory == "mlp" else [(width, width)]
        self.conv_weight = nn.Parameter(torch.empty(heads, 3 * width, titans.conv_width))
        self.mem_weights = nn.ParameterList([nn.Parameter(torch.empty(heads, *shape)) for shape in shapes])
        self.proj_weights = nn.ParameterList([nn.Parameter(torch.empty(heads, len(self.stack), *s)) for s in shapes if self.stack])
        self.eta_weight = nn.Parameter(torch.empty(heads, width))
        self.eta_bias = nn.Parameter(torch.empty(heads))
        self.alpha_weight = nn.Parameter(torch.empty(heads, width))
        self.alpha_bias = nn.Parameter(torch.empty(heads))
        self.mu_bias = nn.Parameter(torch.empty(heads)) if self.rule.momentum else None
        self.out_norm = nn.Parameter(torch.empty(heads, width))

    @property
    def num_heads(self) -> int:
        """Heads held here."""
        return len(self.out_norm)

    def backend(self, device: torch.device) -> tuple[str, str]:
        """(implementation of the scans on a device, why not Triton's or "")."""
        hidden = self.mem_weights[0].shape[-2]
        taps = self.conv_weight.shape[-1]
        return scan_backend(self.config.backend, rule=self.rule, width=self.head_width, hidden=hidden, conv_width=taps, device=device)

    @property
    def features_per_head(self) -> int:
        """Columns of the input projection for one head."""
        return 4 * self.head_width + (1 if self.rule.momentum else 0)

    def forward(
        self, projected_BTP: torch.Tensor, *, state: LayerState | None = None, layout: Layout | None = None, keep_state: bool = False
    ):
        """(y [B, T, H * K], the new state or None).

        layout: None for fresh full rows. A state is returned where one was given, or where keep_state is set; both need a layout.
        """
        if keep_state and state is None:
            state = self.init_state(projected_BTP.shape[0], dtype=projected_BTP.dtype, device=projected_BTP.device)
        x_BTHP = projected_BTP.unflatten(-1, (self.num_heads, self.features_per_head))
        qkv, gate, *logit = x_BTHP.split([3 * self.head_width, self.head_width, *([1] if self.rule.momentum else [])], -1)
        inputs, tail, opened = self._streams(qkv, logit[0].squeeze(-1) if logit else None, state, layout)
        generated, memory = self._scans(inputs, state, layout, keep=state is not None)
        y_BHTK = generated if layout is None else layout.from_grid(generated.transpose(1, 2)).transpose(1, 2)
        y_BTHK = norm_gate(y_BHTK, self.out_norm, gate, eps=self.norm_eps, backend=self.backend(gate.device)[0])
        new_state = None if state is None else {**memory, "tail": tail, **opened}
        return y_BTHK.flatten(2), new_state

    def streams(self, x_BTHP: torch.Tensor, state: LayerState | None, layout: Layout | None):
        """Convolved static streams on the grid as scan inputs, the new convolution tail, and the open part of the last chunk."""
        logit_BTH = x_BTHP[..., -1] if self.rule.momentum else None
        return self._streams(x_BTHP[..., : 3 * self.head_width], logit_BTH, state, layout)

    def _streams(self, qkv_BTHX: torch.Tensor, logit_BTH: torch.Tensor | None, state: LayerState | None, layout: Layout | None):
        wide = torch.promote_types(qkv_BTHX.dtype, torch.float32)
        # the fused kernels take bf16 operands and compute gates, states and sums in fp32; plain torch computes in one dtype
        backend, _ = self.backend(qkv_BTHX.device)
        operands = qkv_BTHX.dtype if backend == "triton" else wide
        mu = F.logsigmoid(logit_BTH.to(wide) + self.mu_bias.to(wide)) if self.rule.momentum else None
        if layout is None:
            q, k, v = conv_silu(qkv_BTHX, self.conv_weight, dtype=operands, backend=backend)
            return Inputs(k, v, q, None, None if mu is None else mu.transpose(1, 2)), None, {}
        conv, tail = causal_conv(qkv_BTHX.to(wide), self.conv_weight.to(wide), None if state is None else state["tail"], layout)
        streams = layout.to_grid(F.silu(conv), None if state is None else state["open"])
        live = (layout.source_BG != 0).unsqueeze(1).to(wide)
        if mu is not None:
            mu = layout.to_grid(mu, None if state is None else state["open_log_mu"])
        opened = {}
        if state is not None:
            opened["open"] = layout.open_part(streams)
            if mu is not None:
                opened["open_log_mu"] = layout.open_part(mu)
        q, k, v = streams.to(operands).transpose(1, 2).unflatten(-1, (3, self.head_width)).unbind(-2)
        log_mu = None if mu is None else mu.transpose(1, 2)
        return Inputs(k, v, q, live, log_mu), tail, opened

    def readout(self, dtype: torch.dtype) -> Readout:
        """Parameters and switches of eta and alpha."""
        parameters = (self.eta_weight, self.eta_bias, self.alpha_weight, self.alpha_bias)
        cast = [p.to(dtype) for p in parameters]
        return Readout(*cast, eta_max=self.config.eta_max, retention=self.config.retention, writes=not self.config.memory_off)

    def starts(self, batch: int, dtype: torch.dtype) -> tuple[MemoryState, MemoryState | None]:
        """The learned start of M_mem and of the stack (None where every stream is static)."""
        momentum = self.rule.momentum
        mem = MemoryState.start(tuple(w.to(dtype) for w in self.mem_weights), batch=batch, momentum=momentum)
        if not self.stack:
            return mem, None
        return mem, MemoryState.start(tuple(w.to(dtype) for w in self.proj_weights), batch=batch, momentum=momentum)

    def _scans(self, inputs: Inputs, state: LayerState | None, layout: Layout | None, *, keep: bool):
        """Both scans: (y [B, H, G, K], the memories' new anchors as named tensors)."""
        mem_start, proj_start = self.starts(inputs.k.shape[0], torch.promote_types(inputs.k.dtype, torch.float32))
        mem, proj = (mem_start, proj_start) if state is None else unpack(state, mem_start, proj_start)
        masks = None if layout is None else ChunkMasks(layout.commit_proj_BN, layout.reset_proj_BN)
        generated, proj = self.generate(inputs, proj, proj_start, masks, keep_state=keep)
        mem_masks = None if layout is None else ChunkMasks(layout.commit_mem_BN, layout.reset_mem_BN)
        first_chunk = layout.first_mem if layout else 0
        y, mem = self.remember(generated, inputs.log_mu, mem, mem_start, mem_masks, first_chunk=first_chunk, keep_state=keep)
        return y, pack(mem, proj) if keep else {}

    def generate(
        self, inputs: Inputs, state: MemoryState | None, start: MemoryState | None, masks: ChunkMasks | None, *, keep_state: bool = True
    ):
        """The projection scan with this mixer's settings."""
        return projection_scan(
            inputs,
            self.readout(torch.promote_types(inputs.k.dtype, torch.float32)),
            state,
            rule=self.rule,
            stack=self.stack,
            chunk=self.config.chunk_proj,
            start=start,
            masks=masks,
            save_every=self.config.save_every,
            keep_state=keep_state,
            backend=self.backend(inputs.k.device)[0],
        )

    def remember(
        self,
        generated: Generated,
        log_mu: torch.Tensor | None,
        state: MemoryState,
        start: MemoryState,
        masks: ChunkMasks | None,
        *,
        first_chunk: int = 0,
        keep_state: bool = True,
    ) -> tuple[torch.Tensor, MemoryState | None]:
        """The memory scan with this mixer's settings; chunks before first_chunk are already committed in every row and are skipped."""
        skip = first_chunk * self.config.chunk_mem
        streams = [None if t is None else t[:, :, skip:] for t in (*generated.tensors(), log_mu)]
        k, v, q, eta, log_alpha, log_mu = streams
        if masks is not None:
            masks = ChunkMasks(masks.commit_BN[:, first_chunk:], masks.reset_BN[:, first_chunk:])
        y, state = memory_scan(
            q, k, v, eta, log_alpha, state,
            rule=self.rule,
            chunk=self.config.chunk_mem,
            log_mu_BHT=log_mu,
            start=start,
            masks=masks,
            read=self.config.read,
            save_every=self.config.save_every,
            keep_state=keep_state,
            backend=self.backend(q.device)[0],
        )  # fmt: skip
        return F.pad(y, (0, 0, skip, 0)), state

    def init_state(self, batch: int, *, dtype: torch.dtype, device: torch.device, past: int = 0) -> LayerState:
        """The state before the first token, at least fp32; its shapes are the same after any number of `past` tokens."""
        dtype = torch.promote_types(dtype, torch.float32)
        mem, proj = self.starts(batch, dtype)
        chunk, heads, width = self.config.chunk_proj, self.num_heads, 3 * self.head_width
        state = pack(mem, proj)
        state["tail"] = torch.zeros(batch, self.config.conv_width - 1, heads, width, dtype=dtype, device=device)
        state["open"] = torch.zeros(batch, chunk, heads, width, dtype=dtype, device=device)
        if self.rule.momentum:
            state["open_log_mu"] = torch.zeros(batch, chunk, heads, dtype=dtype, device=device)
        return state


def pack(mem: MemoryState, proj: MemoryState | None) -> LayerState:
    """Named tensors of both memory states."""
    named = {f"mem.{i}": t for i, t in enumerate(mem.tensors())}
    return named if proj is None else {**named, **{f"proj.{i}": t for i, t in enumerate(proj.tensors())}}


def unpack(state: LayerState, mem: MemoryState, proj: MemoryState | None) -> tuple[MemoryState, MemoryState | None]:
    """The inverse of `pack`, with the structure of the given states."""
    mem = mem.like(tuple(state[f"mem.{i}"] for i in range(len(mem.tensors()))))
    return mem, None if proj is None else proj.like(tuple(state[f"proj.{i}"] for i in range(len(proj.tensors()))))


def causal_conv(
    x_BTHX: torch.Tensor, weight_HXW: torch.Tensor, tail: torch.Tensor | None, layout: Layout
) -> tuple[torch.Tensor, torch.Tensor]:
    """Causal depthwise convolution over the tokens of a document: (y like x, the last W - 1 inputs of the last document).

    tail [B, W - 1, H, X]: inputs before the first token, None for a fresh document. The last tap is the token itself.
    """
    batch, _, heads, width = x_BTHX.shape
    taps = weight_HXW.shape[-1]
    before = x_BTHX.new_zeros(batch, taps, heads, width) if tail is None else F.pad(tail, (0, 0, 0, 0, 1, 0))
    pool = torch.cat([before, x_BTHX], 1)
    parts = [take(pool, source) * weight_HXW[..., tap] for tap, source in enumerate(layout.taps_BTW.unbind(-1))]
    return torch.stack(parts).sum(0), take(pool, layout.tail_BW)
