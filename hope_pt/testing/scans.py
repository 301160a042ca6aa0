"""Cases for the tests of the memory scans: leaves in awkward regimes, one run with every gradient, and the comparison of two runs.

A case holds leaf tensors only; `run_memory` and `run_projection` return outputs, end states and the gradients of a fixed random
combination of them with respect to every leaf, by name. Legend: B batch, H heads, T tokens, K head width, F hidden width, S stack.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from hope_kernels.memory_scan import memory_scan
from hope_kernels.projection_scan import Inputs, Readout, projection_scan
from hope_kernels.rule import ChunkMasks, MemoryRule, MemoryState

KEYS = ("random", "correlated", "identical")
RETENTIONS = ("mixed", "zero", "one")
STACK = ("k", "eta", "alpha", "v")
SCAN = 1e-10
"""A chunked scan against the token recurrence in float64: other order of summation and a triangular solve, 1e-14 as measured; a slip in
a formula shows at 1e-3."""
SCAN_FP32 = 1e-5
"""The same in fp32: 2^-24 times the 10 to 100 roundings of a short sequence."""
REPEAT = 1e-12
"""Two orders of the same float64 operations: splits, replays, permutations, padding."""


@dataclass(frozen=True)
class Size:
    """Sizes of a case: odd batch, a hidden width that is not the head width, and a length that is no multiple of the chunk."""

    batch: int = 3
    heads: int = 2
    tokens: int = 11
    width: int = 6
    hidden: int = 5


def random_like_keys(kind: str, size: Size, generator: torch.Generator, dtype: torch.dtype) -> torch.Tensor:
    """Unit keys [B, H, T, K]: independent, of pairwise cosine near 0.97, or all the same."""
    shape = (size.batch, size.heads, size.tokens, size.width)
    own = torch.nn.functional.normalize(torch.randn(shape, generator=generator, dtype=dtype), dim=-1)
    if kind == "random":
        return own
    shared = torch.nn.functional.normalize(torch.randn(*shape[:2], 1, shape[3], generator=generator, dtype=dtype), dim=-1)
    if kind == "identical":
        return shared.expand(shape).clone()
    return torch.nn.functional.normalize(shared + 0.176 * own, dim=-1)  # 1 / (1 + 0.176^2) = 0.97


def gates(retention: str, eta_max: float, size: Size, generator: torch.Generator, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """eta, log_alpha [B, H, T]. Retention "zero" and "one" put log alpha = -20 and 0 among ordinary tokens; eta reaches eta_max."""
    shape = (size.batch, size.heads, size.tokens)
    eta = torch.rand(shape, generator=generator, dtype=dtype) * eta_max
    eta[:, :, ::3] = eta_max
    log_alpha = -torch.rand(shape, generator=generator, dtype=dtype)
    if retention != "mixed":
        log_alpha[:, :, ::2] = -20.0 if retention == "zero" else 0.0
    return eta, log_alpha


def memory_weights(
    rule: MemoryRule, lead: tuple[int, ...], size: Size, generator: torch.Generator, dtype: torch.dtype
) -> list[torch.Tensor]:
    """Weights of memories with leading dimensions `lead`."""
    shapes = [(size.hidden, size.width), (size.width, size.hidden)] if rule.memory == "mlp" else [(size.width, size.width)]
    return [0.4 * torch.randn(*lead, *shape, generator=generator, dtype=dtype) for shape in shapes]


def memory_leaves(
    rule: MemoryRule,
    *,
    size: Size | None = None,
    keys: str = "random",
    retention: str = "mixed",
    eta_max: float = 0.6,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
) -> dict[str, torch.Tensor]:
    """Leaves of a memory scan: q, k, v, eta, log_alpha, [log_mu], state.i (a carried state), start.i (the learned start)."""
    size = size or Size()
    generator = torch.Generator().manual_seed(seed)
    shape = (size.batch, size.heads, size.tokens, size.width)
    leaves = {"k": random_like_keys(keys, size, generator, dtype)}
    leaves |= {name: torch.randn(shape, generator=generator, dtype=dtype) for name in ("q", "v")}
    leaves["eta"], leaves["log_alpha"] = gates(retention, eta_max, size, generator, dtype)
    if rule.momentum:
        leaves["log_mu"] = -torch.rand(shape[:3], generator=generator, dtype=dtype)
    count = rule.num_layers * (2 if rule.momentum else 1)
    for name, lead in (("state", (size.batch, size.heads)), ("start", (size.heads,))):
        tensors = memory_weights(rule, lead, size, generator, dtype) + memory_weights(rule, lead, size, generator, dtype)
        leaves |= {f"{name}.{i}": t for i, t in enumerate(tensors[: count if name == "state" else rule.num_layers])}
    return leaves


def projection_leaves(
    rule: MemoryRule, *, stack: tuple[str, ...] = STACK, size: Size | None = None, seed: int = 0, dtype: torch.dtype = torch.float64
) -> dict[str, torch.Tensor]:
    """Leaves of a projection scan: k, v, q streams, readout.i, [log_mu], state.i and start.i: stacks in the order of `stack`."""
    size = size or Size()
    generator = torch.Generator().manual_seed(seed)
    shape = (size.batch, size.heads, size.tokens, size.width)
    leaves = {name: torch.randn(shape, generator=generator, dtype=dtype) for name in ("k", "v", "q")}
    for index, width in enumerate(((size.heads, size.width), (size.heads,)) * 2):
        leaves[f"readout.{index}"] = torch.randn(width, generator=generator, dtype=dtype)
    if rule.momentum:
        leaves["log_mu"] = -torch.rand(shape[:3], generator=generator, dtype=dtype)
    count = rule.num_layers * (2 if rule.momentum else 1)
    for name, lead in (("state", (size.batch, size.heads, len(stack))), ("start", (size.heads, len(stack)))):
        tensors = memory_weights(rule, lead, size, generator, dtype) + memory_weights(rule, lead, size, generator, dtype)
        leaves |= {f"{name}.{i}": t for i, t in enumerate(tensors[: count if name == "state" else rule.num_layers])}
    return leaves if stack else {name: t for name, t in leaves.items() if not name.startswith(("state", "start"))}


def random_masks(size: Size, chunk: int, *, seed: int = 0) -> ChunkMasks:
    """Some rows skip the commit of some chunks, some return to the start before some."""
    generator = torch.Generator().manual_seed(seed)
    shape = (size.batch, -(-size.tokens // chunk))
    return ChunkMasks(torch.rand(shape, generator=generator) > 0.3, torch.rand(shape, generator=generator) > 0.6)


def states(leaves: Mapping[str, torch.Tensor], rule: MemoryRule) -> tuple[MemoryState, MemoryState]:
    """(carried state, start expanded to the batch) from the leaves."""
    carried = [t for name, t in leaves.items() if name.startswith("state.")]
    start = tuple(t for name, t in leaves.items() if name.startswith("start."))
    state = MemoryState(tuple(carried[: rule.num_layers]), tuple(carried[rule.num_layers :]))
    return state, MemoryState.start(start, batch=carried[0].shape[0], momentum=rule.momentum)


def run_memory(
    leaves: Mapping[str, torch.Tensor],
    rule: MemoryRule,
    *,
    chunk: int,
    backend: str,
    read: str = "causal",
    masks: ChunkMasks | None = None,
    save_every: int = 8,
) -> dict[str, torch.Tensor]:
    """Outputs "y" and "end.i" of one memory scan and "d<leaf>" for every leaf."""
    leaves = {name: t.detach().clone().requires_grad_() for name, t in leaves.items()}
    state, start = states(leaves, rule)
    y, end = memory_scan(
        leaves["q"], leaves["k"], leaves["v"], leaves["eta"], leaves["log_alpha"], state,
        rule=rule, chunk=chunk, log_mu_BHT=leaves.get("log_mu"), start=start, masks=masks, read=read, save_every=save_every,
        backend=backend,
    )  # fmt: skip
    return with_gradients({"y": y, **{f"end.{i}": t for i, t in enumerate(end.tensors())}}, leaves)


def run_projection(
    leaves: Mapping[str, torch.Tensor],
    rule: MemoryRule,
    *,
    chunk: int,
    backend: str,
    stack: tuple[str, ...] = STACK,
    live: torch.Tensor | None = None,
    masks: ChunkMasks | None = None,
    save_every: int = 8,
    retention: bool = True,
    writes: bool = True,
) -> dict[str, torch.Tensor]:
    """Outputs "k", "v", "q", "eta", "log_alpha" and "end.i" of one projection scan and "d<leaf>" for every leaf."""
    leaves = {name: t.detach().clone().requires_grad_() for name, t in leaves.items()}
    state, start = states(leaves, rule) if stack else (None, None)
    readout = Readout(*(leaves[f"readout.{i}"] for i in range(4)), eta_max=0.8, retention=retention, writes=writes)
    generated, end = projection_scan(
        Inputs(leaves["k"], leaves["v"], leaves["q"], live, leaves.get("log_mu")), readout, state,
        rule=rule, stack=stack, chunk=chunk, start=start, masks=masks, save_every=save_every, backend=backend,
    )  # fmt: skip
    outputs = dict(zip(("k", "v", "q", "eta", "log_alpha"), generated.tensors(), strict=True))
    return with_gradients(outputs | {f"end.{i}": t for i, t in enumerate(end.tensors() if end else ())}, leaves)


def with_gradients(outputs: dict[str, torch.Tensor], leaves: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The outputs and, as "d<leaf>", the gradients of a fixed random combination of all of them (zero for a leaf that is not used)."""
    generator = torch.Generator().manual_seed(1)
    pairs = [(t, torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t.device, t.dtype)) for t in outputs.values()]
    pairs = [(t, cotangent) for t, cotangent in pairs if t.requires_grad]
    found = torch.autograd.grad([t for t, _ in pairs], list(leaves.values()), [g for _, g in pairs], allow_unused=True)
    gradients = {f"d{name}": torch.zeros_like(t) if g is None else g for (name, t), g in zip(leaves.items(), found, strict=True)}
    return {name: t.detach() for name, t in outputs.items()} | gradients


def mismatches(got: Mapping[str, torch.Tensor], wanted: Mapping[str, torch.Tensor], *, tolerance: float) -> dict[str, float]:
    """Tensors whose relative error |got - wanted| / max(|wanted|, 1e-3) is above the tolerance (or not a number), with that error.

    The floor makes the comparison absolute for what is nearly zero, such as the gradient of a state forgotten at alpha = 2e-9.
    """
    if got.keys() != wanted.keys():
        raise ValueError(f"two runs to compare have different tensors: {sorted(got.keys() ^ wanted.keys())}")
    errors = {}
    for name, reference in wanted.items():
        reference = reference.double()
        errors[name] = ((got[name].double() - reference).norm() / reference.norm().clamp_min(1e-3)).item()
    return {name: error for name, error in errors.items() if not error <= tolerance}
