"""The projection scan in chunks, plain torch: every stacked memory of a chunk in batched products (SPEC 2.1).

A rule that `fused` supports runs as one autograd function with its backward pass by hand, as in `memory_scan.chunked`.
Legend: B batch, H heads, L = B * H, S stacked memories, R = S * L rows memory by memory, C chunk length, K head width; leading dimensions
in the general form are B, H, S.
"""

from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from hope_kernels import fused
from hope_kernels.chunk import chunk_terms, decay, end_weight
from hope_kernels.memory import read_memory, surprise
from hope_kernels.projection_scan.generate import SOURCE, Generated, Inputs, Readout, gates, gates_backward, generate
from hope_kernels.replay import Tensors, in_segments, take
from hope_kernels.rule import ChunkMasks, MemoryRule, MemoryState


def projection_scan(
    inputs: Inputs,
    readout: Readout,
    state: MemoryState | None,
    *,
    rule: MemoryRule,
    stack: tuple[str, ...],
    chunk: int,
    start: MemoryState | None,
    masks: ChunkMasks,
    save_every: int,
    keep_state: bool,
) -> tuple[Generated, MemoryState | None]:
    """See `hope_kernels.projection_scan.projection_scan`."""
    streams = {"k": inputs.k, "v": inputs.v, "q": inputs.q}
    if not stack:
        reads = {name: streams[source] for name, source in SOURCE.items()}
        return generate(reads, readout, live=inputs.live, normalize_v=rule.normalize_v), None
    tokens = tuple(t for t in (inputs.k, inputs.v, inputs.q, inputs.live, inputs.log_mu) if t is not None)
    shared = (*readout.parameters(), *(() if masks.reset_BN is None else start.tensors()))
    num_tokens = inputs.k.shape[2]
    recompute = torch.is_grad_enabled() and not fused.supports(rule)
    if fused.supports(rule):
        keep = num_tokens <= save_every
        segment = partial(_fused_segment, readout=readout, has_live=inputs.live is not None, rule=rule, stack=stack, keep=keep)
        save_every = num_tokens
    else:
        segment = partial(_segment, which=inputs, readout=readout, rule=rule, stack=stack)
    outputs, end = in_segments(
        segment, tokens, state.tensors(), shared,
        chunk=chunk, save_every=save_every, masks=masks, keep_state=keep_state, recompute=recompute,
    )  # fmt: skip
    return Generated(*outputs), state.like(end) if keep_state else None


def _segment(
    tokens: Tensors,
    carried: Tensors,
    shared: Tensors,
    *,
    size: int,
    masks: ChunkMasks,
    writes_last: bool,
    which: Inputs,
    readout: Readout,
    rule: MemoryRule,
    stack: tuple[str, ...],
) -> tuple[Tensors, Tensors]:
    """One segment, any rule: (generated tensors, state tensors); `tokens` are what `which` has. See `replay.Segment`."""
    rest = iter(tokens)
    streams = [None if t is None else next(rest) for t in (which.k, which.v, which.q, which.live, which.log_mu)]
    readout = readout.like(shared[:4])
    form = MemoryState(carried[: rule.num_layers], carried[rule.num_layers :])
    state, start = form, form.like(shared[4:]) if shared[4:] else None
    num_chunks = streams[0].shape[2] // size
    cut = [[None] * num_chunks if t is None else t.unflatten(2, (num_chunks, size)).unbind(2) for t in streams]
    outputs = []
    for index, (k, v, q, live, log_mu) in enumerate(zip(*cut, strict=True)):
        if start is not None:
            state = state.where(masks.reset_BN[:, index], start)
        generated = generate_chunk(state, {"k": k, "v": v, "q": q}, readout, live=live, stack=stack, rule=rule)
        after = write_chunk(state, generated, log_mu, rule=rule)
        state = after if masks.commit_BN is None else state.where(masks.commit_BN[:, index], after)
        outputs.append(generated.tensors())
    joined = [torch.stack(parts, 2).flatten(2, 3) if num_chunks > 1 else parts[0] for parts in zip(*outputs, strict=True)]
    return tuple(joined), state.tensors()


def generate_chunk(
    state: MemoryState,
    streams: dict[str, torch.Tensor],
    readout: Readout,
    *,
    live: torch.Tensor | None,
    stack: tuple[str, ...],
    rule: MemoryRule,
) -> Generated:
    """Read every stacked memory at its anchor: streams [B, H, C, K] -> the generated ones."""
    stacked = torch.stack([streams[SOURCE[name]] for name in stack], 2)
    answers = dict(zip(stack, read_memory(state.weights, stacked).unbind(2), strict=True))
    reads = {name: answers.get(name, streams[source]) for name, source in SOURCE.items()}
    return generate(reads, readout, live=live, normalize_v=rule.normalize_v)


def write_chunk(state: MemoryState, generated: Generated, log_mu: torch.Tensor | None, *, rule: MemoryRule) -> MemoryState:
    """The stacked memories after the chunk: one Gram matrix and one solve for all of them."""
    decays = decay(generated.eta, generated.log_alpha, log_mu, reads=False)
    terms = chunk_terms(generated.k, decays, erase=rule.erases(0)).unsqueeze(2)
    signals = surprise(state.weights, generated.k.unsqueeze(2), generated.v.unsqueeze(2), rule)
    slow = state.momentum or (None,) * rule.num_layers
    layer_terms = [terms]
    if rule.memory == "mlp":
        layer_terms.append(chunk_terms(signals[1].x, terms.decay, erase=rule.erases(1)))
    ends = [end_weight(t, s, w, m) for t, s, w, m in zip(layer_terms, signals, state.weights, slow, strict=True)]
    return MemoryState(tuple(w for w, _ in ends), tuple(m for _, m in ends) if rule.momentum else ())


def _fused_segment(
    tokens: Tensors,
    carried: Tensors,
    shared: Tensors,
    *,
    size: int,
    masks: ChunkMasks,
    writes_last: bool,
    readout: Readout,
    has_live: bool,
    rule: MemoryRule,
    stack: tuple[str, ...],
    keep: bool,
) -> tuple[Tensors, Tensors]:
    """The same for a rule that `fused` supports: heads are folded into the batch, memories into the rows of every product."""
    batch, heads = tokens[0].shape[:2]
    plan = _Plan(rule, stack, size, masks.repeat(heads), writes_last, keep, readout.like((None,) * 4), heads)
    k, v, q = (t.flatten(0, 1) for t in tokens[:3])
    live = tokens[3].expand(-1, heads, -1).flatten(0, 1) if has_live else None
    rows = [w.flatten(0, 1).transpose(0, 1).flatten(0, 1) for w in (*carried, *shared[4:])]
    results = _Scan.apply(plan, k, v, q, live, *shared[:4], *rows)
    ends = tuple(w.unflatten(0, (-1, batch * heads)).transpose(0, 1).unflatten(0, (batch, heads)) for w in results[5:])
    return tuple(t.unflatten(0, (batch, heads)) for t in results[:5]), ends or carried


@dataclass(frozen=True)
class _Plan:
    """What `_Scan` does: rule, stack, chunk length, masks [L, N], whether the last chunk writes, whether all is kept, switches, heads."""

    rule: MemoryRule
    stack: tuple[str, ...]
    size: int
    masks: ChunkMasks
    writes_last: bool
    keep: bool
    switches: Readout
    heads: int

    def rows(self, mask: torch.Tensor, index: int) -> torch.Tensor:
        """A mask of a chunk for all memories, [R]."""
        return mask[:, index].repeat(len(self.stack))

    def by_head(self, live: torch.Tensor | None) -> torch.Tensor | None:
        """[L, C] -> [B, H, C]."""
        return None if live is None else live.unflatten(0, (-1, self.heads))

    def columns(self, weight: torch.Tensor, rows: int) -> torch.Tensor:
        """A readout weight [H, K] for every row: [L, K, 1]."""
        return weight.unsqueeze(-1).repeat(rows // self.heads, 1, 1)

    def inner(self, streams: dict[str, torch.Tensor], w2: torch.Tensor) -> torch.Tensor:
        """The products with W2 of all memories, [R, C, F]: one product is cheaper to run twice than to keep."""
        tokens, rows = streams["k"], len(streams["k"])
        out = torch.empty(len(w2), tokens.shape[1], w2.shape[1], dtype=tokens.dtype, device=tokens.device)
        for name, w, part in zip(self.stack, w2.split(rows), out.split(rows), strict=True):
            torch.bmm(streams[SOURCE[name]], w.mT, out=part)
        return out

    def generate(self, streams: dict[str, torch.Tensor], live: torch.Tensor | None, parameters: Tensors, weights: fused.Weights):
        """(k, v, q, eta, log_alpha) of a chunk [L, C, ...] from streams [L, C, K], and what backward needs besides them.

        The readout r . M(z) is z r + silu(z W2^T) (W1^T r): the product with W1 never runs over tokens.
        """
        rows, readout = len(streams["k"]), self.switches.like(parameters)
        hidden = dict(zip(self.stack, F.silu(self.inner(streams, weights[0]), inplace=True).split(rows), strict=True))
        w1 = dict(zip(self.stack, weights[1].split(rows), strict=True))
        answers, scales, logits = [], [], []
        for name in ("k", "v", "q"):
            z = streams[name]
            answer = torch.baddbmm(z, hidden[name], w1[name].mT) if name in w1 else z
            unit = name != "v" or self.rule.normalize_v
            answer = answer.clone() if unit and name not in w1 else answer
            scales.append(fused.unit_length(answer) if unit else None)
            answers.append(answer)
        for name, weight in (("eta", readout.weight_eta), ("alpha", readout.weight_alpha)):
            column = self.columns(weight, rows)
            logit = torch.bmm(streams["k"], column)
            if name in w1:
                logit.baddbmm_(hidden[name], torch.bmm(w1[name].mT, column))
            logits.append(logit.squeeze(-1).unflatten(0, (-1, self.heads)))
        rate, forget = logits
        eta, log_alpha = (t.flatten(0, 1) for t in gates(rate, forget, readout, live=self.by_head(live)))
        return (*answers, eta, log_alpha), (*scales, *logits)

    def generate_backward(self, grads, streams, live, parameters, weights, generated, saved):
        """Gradients of the three streams, the four parameters and the weights from those of `generate`'s results."""
        rows, readout = len(streams["k"]), self.switches.like(parameters)
        pre, scales, logits = self.inner(streams, weights[0]), saved[:3], saved[3:5]
        d_eta, d_log_alpha = (t.unflatten(0, (-1, self.heads)) for t in grads[3:])
        rate, forget = logits
        d_logits = gates_backward(d_eta, d_log_alpha, rate, forget, readout, live=self.by_head(live))
        d_biases = [t.sum((0, 2)) for t in d_logits]
        hidden_rows, d_pre, d_w1 = F.silu(pre), torch.empty_like(pre), torch.empty_like(weights[1])
        split = [dict(zip(self.stack, t.split(rows), strict=True)) for t in (hidden_rows, d_pre, *weights, d_w1)]
        hidden, d_hidden, w2, w1, d_w1_of = split
        d_streams = {}
        for name, grad, y, scale in zip(("k", "v", "q"), grads, generated, scales, strict=False):
            d_streams[name] = grad = grad.clone() if scale is None else fused.unit_length_backward(grad, y, scale)
            if name in w1:
                torch.bmm(grad, w1[name], out=d_hidden[name])
                torch.bmm(grad.mT, hidden[name], out=d_w1_of[name])
        d_readouts = []
        for name, weight, d_logit in zip(("eta", "alpha"), parameters[::2], d_logits, strict=True):
            column, d_logit = self.columns(weight, rows), d_logit.flatten(0, 1).unsqueeze(-1)
            d_column = torch.bmm(streams["k"].mT, d_logit)
            d_streams["k"].addcmul_(d_logit, column.mT)
            if name in w1:
                d_inner = torch.bmm(hidden[name].mT, d_logit)
                torch.mul(d_logit, torch.bmm(column.mT, w1[name]), out=d_hidden[name])
                torch.mul(column, d_inner.mT, out=d_w1_of[name])
                d_column.baddbmm_(w1[name], d_inner)
            d_readouts.append(d_column.squeeze(-1).unflatten(0, (-1, self.heads)).sum(0))
        fused.silu_backward_into(d_pre, pre, grad_input=d_pre)
        d_w2 = torch.empty_like(weights[0])
        for name, part in zip(self.stack, d_w2.split(rows), strict=True):
            source = SOURCE[name]
            torch.bmm(d_hidden[name].mT, streams[source], out=part)
            d_streams[source].baddbmm_(d_hidden[name], w2[name])
        d_parameters = d_readouts[0], d_biases[0], d_readouts[1], d_biases[1]
        return tuple(d_streams[name] for name in ("k", "v", "q")), d_parameters, (d_w2, d_w1)

    def write(self, generated: Tensors, weights: fused.Weights, *, again: bool = False):
        """(weights after a chunk or, when it runs again, None; decays, what their backward needs, and signals)."""
        k, v, _, eta, log_alpha = generated
        decays, of_terms = fused.written_forward(k, eta, log_alpha, erase=self.rule.erases(0))
        _, after, signals = fused.chunk_forward(k, v, None, weights, decays, rule=self.rule, writes=not again)
        return after, (*decays, *of_terms, *signals)

    def write_backward(self, d_after: fused.Weights, generated: Tensors, weights: fused.Weights, saved: list[torch.Tensor]):
        """(gradients of k, v, eta and log_alpha, gradients of the weights); d_after is overwritten."""
        k, v, _, eta, log_alpha = generated
        decays, of_terms, signals = fused.ChunkDecays(*saved[:7]), tuple(saved[7:11]), fused.Signals(*saved[11:])
        (d_k, d_v, _), d_weights, d_decays = fused.chunk_backward(None, d_after, k, v, None, weights, decays, signals, rule=self.rule)
        more, d_eta, d_log_alpha = fused.written_backward(d_decays, k, eta, log_alpha, decays, of_terms)
        return (d_k.add_(more), d_v, d_eta, d_log_alpha), d_weights


class _Scan(torch.autograd.Function):
    """(k, v, q, eta, log_alpha, W2, W1) of a run of chunks, from streams [L, T, K] and weights [R, ...]."""

    @staticmethod
    def forward(ctx, plan, k, v, q, live, *rest):
        parameters, weights, start = rest[:4], rest[4:6], rest[6:]
        length = k.shape[1]
        kept: list[torch.Tensor | None] = []
        outputs = [torch.empty(k.shape, dtype=k.dtype, device=k.device) for _ in range(3)]
        outputs += [torch.empty(k.shape[:2], dtype=k.dtype, device=k.device) for _ in range(2)]
        for index, first in enumerate(range(0, length, plan.size)):
            window = slice(first, first + plan.size)
            if start:
                weights = fused.choose(plan.rows(plan.masks.reset_BN, index), start, weights)
            streams = {name: t[:, window].contiguous() for name, t in (("k", k), ("v", v), ("q", q))}
            generated, read = plan.generate(streams, None if live is None else live[:, window], parameters, weights)
            for output, part in zip(outputs, generated, strict=True):
                output[:, window] = part
            kept.extend((*weights, *read) if plan.keep else weights)
            if plan.writes_last or window.stop < length:
                after, written = plan.write(generated, weights)
                kept.extend(written if plan.keep else ())
                weights = after if plan.masks.commit_BN is None else fused.choose(plan.rows(plan.masks.commit_BN, index), after, weights)
        ctx.plan, ctx.has_start = plan, bool(start)
        ctx.save_for_backward(k, v, q, live, *parameters, *outputs, *kept)
        return *outputs, *(weights if plan.writes_last else ())

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        plan, saved = ctx.plan, ctx.saved_tensors
        (k, v, q, live), parameters, outputs, kept = saved[:4], saved[4:8], saved[8:13], list(saved[13:])
        length = k.shape[1]
        d_inputs = [torch.empty(k.shape, dtype=k.dtype, device=k.device) for _ in range(3)]
        d_parameters = [torch.zeros_like(t) for t in parameters]
        d_weights = tuple(t.clone() for t in grads[5:]) or None
        d_start = tuple(torch.zeros_like(t) for t in saved[13:15]) if ctx.has_start else ()
        for index, first in reversed(list(enumerate(range(0, length, plan.size)))):
            window = slice(first, first + plan.size)
            streams = {name: t[:, window].contiguous() for name, t in (("k", k), ("v", v), ("q", q))}
            live_c = None if live is None else live[:, window]
            generated = [t[:, window].contiguous() for t in outputs]
            d_generated = [t[:, window] for t in grads[:5]]
            writes = d_weights is not None
            written = take(kept, 11 + len(fused.NO_SIGNALS)) if writes and plan.keep else None
            read = take(kept, 5) if plan.keep else None
            weights = tuple(take(kept, 2))
            if not plan.keep:
                _, read = plan.generate(streams, live_c, parameters, weights)
                _, written = plan.write(generated, weights, again=True) if writes else (None, None)
            d_same = None
            if writes:
                if plan.masks.commit_BN is not None:
                    rows = plan.rows(plan.masks.commit_BN, index)
                    d_same, d_weights = fused.only(~rows, d_weights), fused.only(rows, d_weights)
                of_write, d_weights = plan.write_backward(d_weights, generated, weights, written)
                d_weights = d_weights if d_same is None else fused.plus(d_weights, d_same)
                for place, part in zip((0, 1, 3, 4), of_write, strict=True):
                    d_generated[place] = part.add_(d_generated[place])
            found, of_parameters, of_read = plan.generate_backward(d_generated, streams, live_c, parameters, weights, generated, read)
            d_weights = of_read if d_weights is None else fused.plus(d_weights, of_read)
            for total, part in zip(d_inputs, found, strict=True):
                total[:, window] = part
            for total, part in zip(d_parameters, of_parameters, strict=True):
                total.add_(part)
            if ctx.has_start:
                rows = plan.rows(plan.masks.reset_BN, index)
                d_start, d_weights = fused.plus(d_start, fused.only(rows, d_weights)), fused.only(~rows, d_weights)
        return None, *d_inputs, None, *d_parameters, *d_weights, *d_start
