"""Kernels of convolution with SiLU and of norm with gate, forward and backward: one pass over memory each.

Legend: B batch, T tokens, H heads, K head width. Arithmetic is fp32. Weight gradients are sums over tokens: every program writes its own
part, and torch adds the parts up, so results repeat bit for bit. The layouts are in README.md.
"""

import torch
import triton
import triton.language as tl

from hope_kernels.triton_support import operator
from hope_kernels.tuning import DEFAULT_WARPS, padded, tuning

CONV_ELEMENTS, NORM_ELEMENTS = 4, 16
"""Of a thread. The backward of the convolution keeps 17 numbers for each: more of them leave too few warps on a multiprocessor."""
RUN = 16
"""Tokens (at least 3) that a row of a block of the convolution walks; the three before, in backward after, them are read twice."""


@triton.jit
def _load(ptr, offset, mask):
    return tl.load(ptr + offset, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _taps(weight_ptr, feature, inside):
    """The four taps of features, the oldest first, [1, BLOCK_K] fp32 each."""
    first = weight_ptr + feature * 4
    w0 = tl.load(first, mask=inside, other=0.0).to(tl.float32)[None, :]
    w1 = tl.load(first + 1, mask=inside, other=0.0).to(tl.float32)[None, :]
    w2 = tl.load(first + 2, mask=inside, other=0.0).to(tl.float32)[None, :]
    w3 = tl.load(first + 3, mask=inside, other=0.0).to(tl.float32)[None, :]
    return w0, w1, w2, w3


@triton.jit
def _conv_forward(
    x_ptr,
    weight_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    tokens,
    heads,
    stride_b,
    stride_t,
    stride_h,
    stride_x,
    K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ROWS: tl.constexpr,
    RUN: tl.constexpr,
):
    """One of q, k, v for ROWS runs of RUN tokens of one head: every row of the block walks its run and keeps the last three inputs."""
    line = tl.program_id(0).to(tl.int64)
    stream = tl.program_id(2)
    if stream == 0:
        out_ptr = q_ptr
    elif stream == 1:
        out_ptr = k_ptr
    else:
        out_ptr = v_ptr
    feature = tl.arange(0, BLOCK_K)
    inside = feature < K
    token = (tl.program_id(1) * ROWS + tl.arange(0, ROWS)[:, None]) * RUN
    head = line % heads
    x_ptr += line // heads * stride_b + head * stride_h + stream * K * stride_x
    x_ptrs = x_ptr + token.to(tl.int64) * stride_t + feature[None, :] * stride_x
    out_ptrs = out_ptr + (line * tokens + token) * K + feature[None, :]
    w0, w1, w2, w3 = _taps(weight_ptr + (head * 3 + stream) * K * 4, feature, inside)
    inside = inside[None, :]
    x3 = _load(x_ptrs, -3 * stride_t, inside & (token >= 3) & (token - 3 < tokens))
    x2 = _load(x_ptrs, -2 * stride_t, inside & (token >= 2) & (token - 2 < tokens))
    x1 = _load(x_ptrs, -stride_t, inside & (token >= 1) & (token - 1 < tokens))
    ahead = tl.load(x_ptrs, mask=inside & (token < tokens), other=0.0)  # a token ahead, so that its way from memory overlaps
    for _ in tl.range(0, RUN):
        x0 = ahead.to(tl.float32)
        x_ptrs += stride_t
        ahead = tl.load(x_ptrs, mask=inside & (token + 1 < tokens), other=0.0)
        valid = inside & (token < tokens)
        conv = w0 * x3 + w1 * x2 + w2 * x1 + w3 * x0
        tl.store(out_ptrs, (conv * tl.sigmoid(conv)).to(out_ptr.dtype.element_ty), mask=valid)
        x3 = x2
        x2 = x1
        x1 = x0
        token += 1
        out_ptrs += K


@triton.jit
def _conv_slope(d_out, x0, x1, x2, x3, w0, w1, w2, w3):
    """Gradient of the convolution from that of its SiLU."""
    conv = w0 * x3 + w1 * x2 + w2 * x1 + w3 * x0
    opened = tl.sigmoid(conv)
    return d_out * opened * (1.0 + conv * (1.0 - opened))


@triton.jit
def _conv_backward(
    x_ptr,
    weight_ptr,
    d_q_ptr,
    d_k_ptr,
    d_v_ptr,
    d_x_ptr,
    d_weight_ptr,
    tokens,
    heads,
    stride_b,
    stride_t,
    stride_h,
    stride_x,
    K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ROWS: tl.constexpr,
    RUN: tl.constexpr,
):
    """Gradients of x [B, T, H, 3 K] and of the weight by program [B, blocks, H, 3 K, 4]: every row walks its run from the end."""
    line = tl.program_id(0).to(tl.int64)
    stream = tl.program_id(2)
    if stream == 0:
        d_out_ptr = d_q_ptr
    elif stream == 1:
        d_out_ptr = d_k_ptr
    else:
        d_out_ptr = d_v_ptr
    feature = tl.arange(0, BLOCK_K)
    inside_K = feature < K
    inside = inside_K[None, :]
    batch = line // heads
    head = line % heads
    column = (head * 3 + stream) * K
    token = (tl.program_id(1) * ROWS + tl.arange(0, ROWS)[:, None]) * RUN + (RUN + 2)
    x_ptr += batch * stride_b + head * stride_h + stream * K * stride_x
    x_ptrs = x_ptr + token.to(tl.int64) * stride_t + feature[None, :] * stride_x
    d_out_ptrs = d_out_ptr + (line * tokens + token) * K + feature[None, :]
    w0, w1, w2, w3 = _taps(weight_ptr + column * 4, feature, inside_K)
    # Inputs of the token and of the two before it; slopes of the three tokens after it.
    x0 = _load(x_ptrs, 0, inside & (token < tokens))
    x1 = _load(x_ptrs, -stride_t, inside & (token - 1 < tokens))
    x2 = _load(x_ptrs, -2 * stride_t, inside & (token - 2 < tokens))
    slope1 = tl.zeros((ROWS, BLOCK_K), tl.float32)
    slope2 = slope1
    slope3 = slope1
    for _ in tl.static_range(3):
        x3 = _load(x_ptrs, -3 * stride_t, inside & (token - 3 < tokens))
        slope3 = slope2
        slope2 = slope1
        slope1 = _conv_slope(_load(d_out_ptrs, 0, inside & (token < tokens)), x0, x1, x2, x3, w0, w1, w2, w3)
        x0 = x1
        x1 = x2
        x2 = x3
        token -= 1
        x_ptrs -= stride_t
        d_out_ptrs -= K
    d_x_ptrs = d_x_ptr + ((batch * tokens + token) * heads * 3) * K + column + feature[None, :]
    d_w0 = tl.zeros((ROWS, BLOCK_K), tl.float32)
    d_w1 = d_w0
    d_w2 = d_w0
    d_w3 = d_w0
    x_ptrs -= 3 * stride_t
    # Both are read a token ahead, so that their way from memory overlaps.
    x_ahead = tl.load(x_ptrs, mask=inside & (token >= 3) & (token - 3 < tokens), other=0.0)
    d_ahead = tl.load(d_out_ptrs, mask=inside & (token < tokens), other=0.0)
    for _ in tl.range(0, RUN):
        valid = inside & (token < tokens)
        x3 = x_ahead.to(tl.float32)
        d_out = d_ahead.to(tl.float32)
        x_ptrs -= stride_t
        d_out_ptrs -= K
        x_ahead = tl.load(x_ptrs, mask=inside & (token >= 4) & (token - 4 < tokens), other=0.0)
        d_ahead = tl.load(d_out_ptrs, mask=inside & (token >= 1) & (token - 1 < tokens), other=0.0)
        slope0 = _conv_slope(d_out, x0, x1, x2, x3, w0, w1, w2, w3)
        d_x = w0 * slope3 + w1 * slope2 + w2 * slope1 + w3 * slope0
        tl.store(d_x_ptrs, d_x.to(d_x_ptr.dtype.element_ty), mask=valid)
        d_w0 += slope0 * x3
        d_w1 += slope0 * x2
        d_w2 += slope0 * x1
        d_w3 += slope0 * x0
        slope3 = slope2
        slope2 = slope1
        slope1 = slope0
        x0 = x1
        x1 = x2
        x2 = x3
        token -= 1
        d_x_ptrs -= heads * 3 * K
    part = batch * tl.num_programs(1) + tl.program_id(1)
    d_weight_ptrs = d_weight_ptr + (part * heads * 3 * K + column + feature) * 4
    tl.store(d_weight_ptrs, tl.sum(d_w0, 0), mask=inside_K)
    tl.store(d_weight_ptrs + 1, tl.sum(d_w1, 0), mask=inside_K)
    tl.store(d_weight_ptrs + 2, tl.sum(d_w2, 0), mask=inside_K)
    tl.store(d_weight_ptrs + 3, tl.sum(d_w3, 0), mask=inside_K)


@triton.jit
def _norm_forward(
    y_ptr,
    weight_ptr,
    gate_ptr,
    out_ptr,
    tokens,
    heads,
    eps,
    y_b,
    y_h,
    y_t,
    y_k,
    gate_b,
    gate_t,
    gate_h,
    gate_k,
    K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ROWS: tl.constexpr,
):
    """ROWS tokens of one head: out [B, T, H, K] = y / rms(y) * weight * silu(gate)."""
    batch = (tl.program_id(0) // heads).to(tl.int64)
    head = (tl.program_id(0) % heads).to(tl.int64)
    feature = tl.arange(0, BLOCK_K)
    token = (tl.program_id(1) * ROWS + tl.arange(0, ROWS)[:, None]).to(tl.int64)
    valid = (token < tokens) & (feature < K)[None, :]
    y = _load(y_ptr + batch * y_b + head * y_h, token * y_t + feature[None, :] * y_k, valid)
    gate = _load(gate_ptr + batch * gate_b + head * gate_h, token * gate_t + feature[None, :] * gate_k, valid)
    weight = _load(weight_ptr + head * K, feature, feature < K)[None, :]
    scale = tl.rsqrt(tl.sum(y * y, 1, keep_dims=True) / K + eps)
    out = y * scale * weight * gate * tl.sigmoid(gate)
    tl.store(out_ptr + ((batch * tokens + token) * heads + head) * K + feature[None, :], out.to(out_ptr.dtype.element_ty), mask=valid)


@triton.jit
def _norm_backward(
    d_out_ptr,
    y_ptr,
    weight_ptr,
    gate_ptr,
    d_y_ptr,
    d_weight_ptr,
    d_gate_ptr,
    tokens,
    heads,
    eps,
    y_b,
    y_h,
    y_t,
    y_k,
    gate_b,
    gate_t,
    gate_h,
    gate_k,
    K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Gradients of y [B, H, T, K], gate [B, T, H, K], and of the weight by program [B, blocks, H, K], for ROWS tokens of one head."""
    batch = (tl.program_id(0) // heads).to(tl.int64)
    head = (tl.program_id(0) % heads).to(tl.int64)
    feature = tl.arange(0, BLOCK_K)
    token = (tl.program_id(1) * ROWS + tl.arange(0, ROWS)[:, None]).to(tl.int64)
    valid = (token < tokens) & (feature < K)[None, :]
    projected = ((batch * tokens + token) * heads + head) * K + feature[None, :]
    y = _load(y_ptr + batch * y_b + head * y_h, token * y_t + feature[None, :] * y_k, valid)
    gate = _load(gate_ptr + batch * gate_b + head * gate_h, token * gate_t + feature[None, :] * gate_k, valid)
    d_out = _load(d_out_ptr, projected, valid)
    weight = _load(weight_ptr + head * K, feature, feature < K)[None, :]
    scale = tl.rsqrt(tl.sum(y * y, 1, keep_dims=True) / K + eps)
    normed = y * scale
    opened = tl.sigmoid(gate)
    along = d_out * normed
    d_gate = along * weight * opened * (1.0 + gate * (1.0 - opened))
    tl.store(d_gate_ptr + projected, d_gate.to(d_gate_ptr.dtype.element_ty), mask=valid)
    silu = gate * opened
    part = batch * tl.num_programs(1) + tl.program_id(1)
    tl.store(d_weight_ptr + (part * heads + head) * K + feature, tl.sum(along * silu, 0), mask=feature < K)
    d_normed = d_out * silu * weight
    d_y = scale * (d_normed - normed * (tl.sum(d_normed * normed, 1, keep_dims=True) / K))
    rows = (tl.program_id(0).to(tl.int64) * tokens + token) * K + feature[None, :]
    tl.store(d_y_ptr + rows, d_y.to(d_y_ptr.dtype.element_ty), mask=valid)


def warps_of(kernel: str, width: int) -> int:
    """Warps of a kernel at a head width."""
    entry = tuning(width=width, hidden=width)
    return DEFAULT_WARPS if entry is None else entry.warps_of(kernel)


def rows_of(width: int, *, warps: int, elements: int) -> int:
    """Rows of a block of `elements` elements a thread."""
    return max(1, warps * 32 * elements // padded(width))


@operator("conv_silu")
def _conv_silu(x: torch.Tensor, weight: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    batch, tokens, heads, features = x.shape
    width, warps = features // 3, warps_of("conv_silu_forward", features // 3)
    rows = rows_of(width, warps=warps, elements=CONV_ELEMENTS)
    q, k, v = (torch.empty(batch, heads, tokens, width, dtype=dtype, device=x.device) for _ in range(3))
    _conv_forward[(batch * heads, triton.cdiv(tokens, rows * RUN), 3)](
        x, weight.contiguous(), q, k, v, tokens, heads, *x.stride(),
        K=width, BLOCK_K=padded(width), ROWS=rows, RUN=RUN, num_warps=warps,
    )  # fmt: skip
    return q, k, v


@_conv_silu.register_fake
def _(x, weight, dtype):
    batch, tokens, heads, features = x.shape
    q, k, v = (x.new_empty(batch, heads, tokens, features // 3, dtype=dtype) for _ in range(3))
    return q, k, v


@operator("conv_silu_backward")
def _conv_silu_backward(
    x: torch.Tensor, weight: torch.Tensor, d_q: torch.Tensor, d_k: torch.Tensor, d_v: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    batch, tokens, heads, features = x.shape
    width, warps = features // 3, warps_of("conv_silu_backward", features // 3)
    rows = rows_of(width, warps=warps, elements=CONV_ELEMENTS)
    blocks = triton.cdiv(tokens, rows * RUN)
    d_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    d_weight = torch.empty(batch * blocks, *weight.shape, dtype=torch.float32, device=x.device)
    _conv_backward[(batch * heads, blocks, 3)](
        x, weight.contiguous(), d_q.contiguous(), d_k.contiguous(), d_v.contiguous(), d_x, d_weight, tokens, heads, *x.stride(),
        K=width, BLOCK_K=padded(width), ROWS=rows, RUN=RUN, num_warps=warps,
    )  # fmt: skip
    return d_x, d_weight.sum(0).to(weight.dtype)


@_conv_silu_backward.register_fake
def _(x, weight, d_q, d_k, d_v):
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


def _conv_silu_context(ctx, inputs, output):
    ctx.save_for_backward(inputs[0], inputs[1])


def _conv_silu_gradient(ctx, d_q, d_k, d_v):
    return *_conv_silu_backward(*ctx.saved_tensors, d_q, d_k, d_v), None


_conv_silu.register_autograd(_conv_silu_gradient, setup_context=_conv_silu_context)


def conv_silu(x_BTHX: torch.Tensor, weight_HXW: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See `hope_kernels.pointwise.conv_silu`: the operator `hope_kernels::conv_silu`, which keeps its inputs for the backward."""
    return _conv_silu(x_BTHX, weight_HXW, dtype)


@operator("norm_gate")
def _norm_gate(y: torch.Tensor, weight: torch.Tensor, gate: torch.Tensor, eps: float) -> torch.Tensor:
    batch, heads, tokens, width = y.shape
    warps = warps_of("norm_gate_forward", width)
    rows = rows_of(width, warps=warps, elements=NORM_ELEMENTS)
    out = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    _norm_forward[(batch * heads, triton.cdiv(tokens, rows))](
        y, weight.contiguous(), gate, out, tokens, heads, eps, *y.stride(), *gate.stride(),
        K=width, BLOCK_K=padded(width), ROWS=rows, num_warps=warps,
    )  # fmt: skip
    return out


@_norm_gate.register_fake
def _(y, weight, gate, eps):
    return gate.new_empty(gate.shape)


@operator("norm_gate_backward")
def _norm_gate_backward(
    d_out: torch.Tensor, y: torch.Tensor, weight: torch.Tensor, gate: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    batch, heads, tokens, width = y.shape
    warps = warps_of("norm_gate_backward", width)
    rows = rows_of(width, warps=warps, elements=NORM_ELEMENTS)
    blocks = triton.cdiv(tokens, rows)
    d_y, d_gate = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (y, gate))
    d_weight = torch.empty(batch * blocks, heads, width, dtype=torch.float32, device=y.device)
    _norm_backward[(batch * heads, blocks)](
        d_out.contiguous(), y, weight.contiguous(), gate, d_y, d_weight, d_gate, tokens, heads, eps, *y.stride(), *gate.stride(),
        K=width, BLOCK_K=padded(width), ROWS=rows, num_warps=warps,
    )  # fmt: skip
    return d_y, d_weight.sum(0).to(weight.dtype), d_gate


@_norm_gate_backward.register_fake
def _(d_out, y, weight, gate, eps):
    return y.new_empty(y.shape), weight.new_empty(weight.shape), gate.new_empty(gate.shape)


def _norm_gate_context(ctx, inputs, output):
    *tensors, ctx.eps = inputs
    ctx.save_for_backward(*tensors)


def _norm_gate_gradient(ctx, d_out):
    return *_norm_gate_backward(d_out, *ctx.saved_tensors, ctx.eps), None


_norm_gate.register_autograd(_norm_gate_gradient, setup_context=_norm_gate_context)


def norm_gate(y_BHTK: torch.Tensor, weight_HK: torch.Tensor, gate_BTHK: torch.Tensor, eps: float) -> torch.Tensor:
    """See `hope_kernels.pointwise.norm_gate`: the operator `hope_kernels::norm_gate`, which keeps its inputs for the backward."""
    return _norm_gate(y_BHTK, weight_HK, gate_BTHK, eps)
