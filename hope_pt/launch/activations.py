"""What a forward pass keeps for its backward pass, and what either needs beside it: found by running the real block on the meta device.

Nothing is computed, launched or allocated: `AllocationCounter` follows the storages that the operations would make, so saved chunk
boundaries, replay, workspaces and hand-written backward passes count as they are in the code, and the figures follow it when it changes.
Where titans.backend is "triton" that is the code around the kernels. The core of a mixer is linear in rows and heads and costs many
operations, so it is traced once with few of them and stands in the block as a block of bytes. megatron's linear layers and the messages of
the head are imitated, because they need process groups: each function here says what of theirs it repeats.
Legend: B rows of a micro-batch, T tokens a rank holds of the residual stream, D width, V vocabulary of this rank.
"""

import contextlib
import dataclasses
import functools
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from hope_kernels.linear_cross_entropy import linear_cross_entropy
from hope_pt.config.schema import ModelConfig
from hope_pt.launch.allocations import AllocationCounter, Walk
from hope_pt.launch.kernels import following
from hope_pt.nn import HopeBlock, Parts, model_layout
from hope_pt.nn.layout import Layout
from hope_pt.nn.mixer import CORES
from hope_pt.nn.parts import RMSNorm

META = torch.device("meta")


@dataclass(frozen=True)
class Passing:
    """One micro-batch through one part of the model and back, in bytes.

    kept: alive between forward and backward, the part's output included. forward: the most above that during the forward pass.
    backward: the most above it during the backward pass, gradients of activations and of single weights included. kernels, traffic, walks:
    of both passes, see `AllocationCounter`; walks with the tiles of each.
    """

    kept: int
    forward: int
    backward: int
    kernels: int = 0
    traffic: int = 0
    walks: tuple[tuple[Walk, int], ...] = ()

    def times(self, factor: float) -> "Passing":
        """The same kernels on `factor` times the bytes, by as many more programs."""
        sizes = {name: round(value * factor) for name, value in vars(self).items() if name not in ("kernels", "walks")}
        walks = tuple((walk._replace(programs=round(walk.programs * factor)), tiles) for walk, tiles in self.walks)
        return dataclasses.replace(self, **sizes, walks=walks)


@dataclass(frozen=True)
class Share:
    """What a rank holds of one micro-batch.

    rows: B. tokens: of a sequence in one pass, over all context-parallel ranks. documents: in them, equally long. tensor, context: degrees.
    sequence_parallel: the residual stream is divided over tensor-parallel ranks. by_state: context parallelism hands states on (else it
    divides heads). carried: segments hand states on. dtype: of the residual stream.
    """

    rows: int
    tokens: int
    documents: int = 1
    tensor: int = 1
    context: int = 1
    sequence_parallel: bool = False
    by_state: bool = False
    carried: bool = False
    dtype: torch.dtype = torch.float32

    @property
    def continues(self) -> bool:
        """A core begins with the state of the tokens before its own."""
        return self.carried or (self.by_state and self.context > 1)

    @property
    def core_tokens(self) -> int:
        """Tokens that a core sees."""
        return self.tokens // self.context if self.by_state else self.tokens

    @property
    def stream_tokens(self) -> int:
        """T."""
        return self.tokens // self.context // (self.tensor if self.sequence_parallel else 1)


@functools.cache
def block(model: ModelConfig, share: Share) -> Passing:
    """One HopeBlock on this rank. The second of two blocks in a row is measured: its input is the first one's output."""
    parts = _parts(model.num_heads // share.tensor, share, bytes_of=core(model, share))
    with META:
        blocks = [HopeBlock(model, parts=parts) for _ in range(2)]
    _cast(blocks, share.dtype)
    parameters = [parameter for one in blocks for parameter in one.parameters()]
    with AllocationCounter(parameters) as counter:
        x, _ = blocks[0](_input(share.stream_tokens, share.rows, model.width, dtype=share.dtype))
        before = _begin(counter)
        x, _ = blocks[1](x)
        return _finish(counter, x, before=before)


@functools.cache
def head(model: ModelConfig, share: Share) -> Passing:
    """Final norm, head, loss. Its backward pass ends with the gradient of its weight, which a tied embedding holds to the end.

    Triton's kernels hold no more than plain torch, which is traced.
    """
    with META:
        norm = RMSNorm(model.width, model.norm_eps)
        weight = nn.Parameter(torch.empty(model.vocab_size // share.tensor, model.width, dtype=share.dtype))
        gathered = share.tensor if share.sequence_parallel else 1
        targets = torch.empty(share.stream_tokens * gathered * share.rows, dtype=torch.int64)
    _drop_gradients([weight, norm.weight])
    backend = "reference" if model.head_backend == "reference" else "chunked"
    with AllocationCounter([weight, norm.weight, targets]) as counter:
        x = _input(share.stream_tokens, share.rows, model.width, dtype=share.dtype)
        before = _begin(counter)
        hidden = norm(x)
        if gathered > 1:
            hidden = _Gather.apply(hidden, gathered)
        total = linear_cross_entropy(hidden.flatten(0, 1), weight, targets, backend=backend).sum()
        del hidden
        return _finish(counter, total, before=before)


def _begin(counter: AllocationCounter) -> int:
    """Start counting a part; what is alive before it."""
    counter.restart_peak()
    counter.kernels = counter.traffic = 0
    counter.walks.clear()
    return counter.live


def _finish(counter: AllocationCounter, output: Tensor, *, before: int) -> Passing:
    """Run the backward pass; `before` is what was alive before the part."""
    after, highest = counter.live, counter.peak
    counter.restart_peak()
    output.backward(torch.empty_like(output))
    walks = tuple(counter.walks.items())
    return Passing(after - before, highest - after, counter.peak - after, counter.kernels, counter.traffic, walks)


@functools.cache
def _traced_core(model: ModelConfig, share: Share, heads: int) -> Passing:
    """A mixer's core, from its input to its output, for share.rows rows and `heads` heads."""
    with META:
        traced = CORES[model.mixer](model, num_heads=heads)
    _drop_gradients(traced.parameters())
    state, layout = None, _layout(model, share)
    shared = [] if layout is None else [value for value in vars(layout).values() if isinstance(value, Tensor)]  # by all blocks
    counter = AllocationCounter([*traced.parameters(), *shared])
    with following(model, counter), _FusedAttention() if model.mixer == "attention" else contextlib.nullcontext():
        if share.continues:
            like = traced.init_state(share.rows, dtype=share.dtype, device=META, past=share.core_tokens)
            state = {name: _input(*t.shape, dtype=t.dtype) if t.is_floating_point() else t for name, t in like.items()}
        before = _begin(counter)
        projected = _input(share.rows, share.core_tokens, heads * traced.features_per_head, dtype=share.dtype)
        y, _ = traced(projected, state=state, layout=layout, keep_state=share.continues)
        del projected
        return _finish(counter, y, before=before)


def core(model: ModelConfig, share: Share) -> Passing:
    """The core of a mixer on this rank, scaled from two heads and at most two rows: one row alone takes views where two are copied."""
    heads = model.num_heads // share.tensor
    divided = heads if share.by_state else heads // share.context
    rows, few = min(share.rows, 2), 2
    small = dataclasses.replace(share, rows=rows, tensor=1, sequence_parallel=False)
    if not share.by_state:
        small = dataclasses.replace(small, context=1)
    return _traced_core(model, small, few).times(share.rows * divided / (rows * few))


def _layout(model: ModelConfig, share: Share) -> Layout | None:
    """The layout of equally long documents, on the meta device; None for one document that begins with the row."""
    starts = torch.zeros(share.rows, share.core_tokens, dtype=torch.bool)
    starts[:, :: -(-share.tokens // share.documents)] = share.documents > 1
    seen = torch.full((share.rows,), share.core_tokens) if share.continues else None
    layout = model_layout(model, (share.rows, share.core_tokens), doc_start_BT=starts, seen_B=seen)
    if layout is None:
        return None
    fields: dict[str, Any] = {name: value.to(META) if isinstance(value, Tensor) else value for name, value in vars(layout).items()}
    return Layout(**fields)


def _input(*shape: int, dtype: torch.dtype) -> Tensor:
    """A tensor in the middle of a graph, so that nothing but its users keeps it."""
    return torch.empty(1, device=META, dtype=dtype, requires_grad=True) + torch.empty(shape, device=META, dtype=dtype)


def _parts(heads: int, share: Share, *, bytes_of: Passing) -> Parts:
    gathered = share.tensor if share.sequence_parallel else 1
    return Parts(
        column=lambda width_in, width_out: _Projection(width_in, width_out // share.tensor, gathered=gathered, scattered=1),
        row=lambda width_in, width_out: _Projection(width_in // share.tensor, width_out, gathered=1, scattered=gathered),
        norm=RMSNorm,
        num_heads=heads,
        time_first=True,
        run_core=functools.partial(_stand_in, share=share, bytes_of=bytes_of),
    )


def _stand_in(core: Any, projected_BTP: Tensor, *, share: Share, bytes_of: Passing, **unused: Any) -> tuple[Tensor, Any]:
    """`Parts.run_core`: the core's bytes, and the copies of an all-to-all before and after it."""
    by_heads = share.context > 1 and not share.by_state
    x = _Exchange.apply(projected_BTP) if by_heads else projected_BTP
    y = _Core.apply(x, core.num_heads * core.head_width, bytes_of)
    return (_Exchange.apply(y) if by_heads else y), None


class _Core(torch.autograd.Function):
    """Keeps, and for a moment needs, as many bytes as a traced core does."""

    @staticmethod
    def forward(ctx, x, width, bytes_of):
        ctx.bytes_of, ctx.like = bytes_of, (x.shape, x.dtype)
        y = x.new_empty(*x.shape[:-1], width)
        rest = max(0, bytes_of.kept - y.nbytes)
        ctx.save_for_backward(_block_of(rest))
        _block_of(bytes_of.forward)
        return y

    @staticmethod
    def backward(ctx, upstream):
        (kept,) = ctx.saved_tensors
        _block_of(ctx.bytes_of.backward)
        shape, dtype = ctx.like
        del kept
        return torch.empty(shape, dtype=dtype, device=META), None, None


def _block_of(size: int) -> Tensor:
    return torch.empty(size, dtype=torch.uint8, device=META)


class _Exchange(torch.autograd.Function):
    """An all-to-all in either direction: its packed input, its output, and the output in the order that is used (engine.context)."""

    @staticmethod
    def forward(ctx, x):
        packed = torch.empty_like(x)
        received = torch.empty_like(packed)
        del packed
        return received.clone()

    @staticmethod
    def backward(ctx, upstream):
        packed = torch.empty_like(upstream)
        received = torch.empty_like(packed)
        del packed
        return received.clone()


class _Projection(nn.Module):
    """megatron's Column- or RowParallelLinear on one rank: gathers its input and scatters its output over that many ranks."""

    def __init__(self, width_in: int, width_out: int, *, gathered: int, scattered: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width_out, width_in))
        self.gathered, self.scattered = gathered, scattered

    def forward(self, x: Tensor) -> Tensor:
        y = _Linear.apply(x, self.weight, self.gathered)
        return _Scatter.apply(y, self.scattered) if self.scattered > 1 else y


class _Linear(torch.autograd.Function):
    """LinearWithGradAccumulationAndAsyncCommunication: keeps its share of the input. The gathered one lies in megatron's one buffer."""

    @staticmethod
    def forward(ctx, x, weight, gathered):
        ctx.save_for_backward(x, weight)
        return x.new_empty(x.shape[0] * gathered, *x.shape[1:-1], weight.shape[0])

    @staticmethod
    def backward(ctx, upstream):
        x, weight = ctx.saved_tensors
        d_x = upstream.new_empty(*upstream.shape[:-1], weight.shape[1])
        upstream = upstream.contiguous()
        share = d_x if d_x.shape == x.shape else torch.empty_like(x)
        return share, torch.empty_like(weight), None


class _Gather(torch.autograd.Function):
    """All-gather along the sequence."""

    @staticmethod
    def forward(ctx, x, ranks):
        ctx.ranks = ranks
        return x.new_empty(x.shape[0] * ranks, *x.shape[1:])

    @staticmethod
    def backward(ctx, upstream):
        return upstream.new_empty(upstream.shape[0] // ctx.ranks, *upstream.shape[1:]), None


class _Scatter(torch.autograd.Function):
    """Reduce-scatter along the sequence."""

    @staticmethod
    def forward(ctx, x, ranks):
        ctx.ranks = ranks
        return x.new_empty(x.shape[0] // ranks, *x.shape[1:])

    @staticmethod
    def backward(ctx, upstream):
        return upstream.new_empty(upstream.shape[0] * ctx.ranks, *upstream.shape[1:]), None


class _FusedAttention(TorchFunctionMode):
    """scaled_dot_product_attention as flash kernels run it; the meta device would take the form that keeps the score matrix."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.scaled_dot_product_attention:
            return _Attention.apply(*args[:3], (kwargs or {}).get("attn_mask"))
        return func(*args, **(kwargs or {}))


class _Attention(torch.autograd.Function):
    """Keeps q, k, v, the output, one fp32 number a query, and a mask as numbers."""

    @staticmethod
    def forward(ctx, q, k, v, mask):
        y = torch.empty_like(q)
        numbers = None if mask is None else mask.to(q.dtype)
        ctx.save_for_backward(q, k, v, y, q.new_empty(q.shape[:-1], dtype=torch.float32), numbers)
        return y

    @staticmethod
    def backward(ctx, upstream):
        return *(torch.empty_like(tensor) for tensor in ctx.saved_tensors[:3]), None


def _cast(blocks: list[HopeBlock], dtype: torch.dtype) -> None:
    """Matrices in `dtype`, the rest fp32, as the engine holds them; and no gradient outlives its use, as with megatron's buffers."""
    for one in blocks:
        for module in one.modules():
            if isinstance(module, _Projection):
                module.to(dtype)
        _drop_gradients(one.parameters())


def _drop_gradients(parameters: Any) -> None:
    for parameter in parameters:
        parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
