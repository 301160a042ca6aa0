"""What the GPU benchmark measures on sequences: the scans of HOPE's memories, attention, fla's gated delta rule, called in one way.

`make` gives leaves by name, `call` the outputs; timing and gradients are the same for every operation. Legend: B batch, H heads, T
tokens, K head width (also the memory's hidden width), S stacked memories.
"""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from hope_kernels.backend import scan_obstacle
from hope_kernels.memory_scan import memory_scan
from hope_kernels.projection_scan import Inputs, Readout, projection_scan
from hope_kernels.rule import MemoryRule, MemoryState

Leaves = dict[str, torch.Tensor]
CHUNK_MEM, CHUNK_PROJ = 64, 256
STACK = ("k", "eta", "alpha", "v")
LINEAR = MemoryRule(memory="linear", objective="l2", self_target=False)
"""The gated delta rule: what fla computes, with beta = eta / alpha."""
RULES = {"linear": LINEAR, "mlp": MemoryRule(), "momentum": MemoryRule(momentum=True)}


@dataclass(frozen=True)
class Shape:
    """Sizes of a call."""

    batch: int
    heads: int
    tokens: int
    width: int

    def __str__(self) -> str:
        return f"{self.batch}x{self.tokens}, {self.heads} heads of {self.width}"


@dataclass(frozen=True)
class Op:
    """make(shape, dtype, device, seed) -> leaves; call(leaves, shape) -> outputs; dtype: of q, k and v."""

    make: Callable[[Shape, torch.dtype, torch.device, int], Leaves]
    call: Callable[[Leaves, Shape], tuple[torch.Tensor, ...]]
    dtype: torch.dtype = torch.bfloat16

    def inputs(self, shape: Shape, device: torch.device, seed: int) -> tuple[Leaves, list[torch.Tensor]]:
        """Leaves that want gradients, and a random gradient for every output."""
        leaves = self.make(shape, self.dtype, device, seed)
        with torch.no_grad():
            outputs = self.call(leaves, shape)
        upstream = [torch.randn_like(t) for t in outputs]
        return {name: t.requires_grad_() for name, t in leaves.items()}, upstream

    def forward(self, leaves: Leaves, shape: Shape) -> None:
        """Outputs alone."""
        with torch.no_grad():
            self.call(leaves, shape)

    def both(self, leaves: Leaves, upstream: list[torch.Tensor], shape: Shape) -> None:
        """Outputs and the gradient of every leaf."""
        torch.autograd.grad(self.call(leaves, shape), list(leaves.values()), upstream, allow_unused=True)


def token_leaves(shape: Shape, dtype: torch.dtype, device: torch.device, seed: int) -> Leaves:
    """q, k of unit length and v, [B, H, T, K]; eta to 0.3 and log_alpha near 0, [B, H, T] fp32."""
    generator = torch.Generator(device).manual_seed(seed)
    size = (shape.batch, shape.heads, shape.tokens, shape.width)

    def normal() -> torch.Tensor:
        return torch.randn(size, generator=generator, device=device, dtype=torch.float32)

    leaves = {name: torch.nn.functional.normalize(normal(), dim=-1).to(dtype) for name in ("q", "k")}
    leaves["v"] = normal().to(dtype)
    leaves["eta"] = 0.3 * torch.rand(size[:3], generator=generator, device=device)
    leaves["log_alpha"] = -0.02 * torch.rand(size[:3], generator=generator, device=device)
    return leaves


def _weights(rule: MemoryRule, lead: tuple[int, ...], width: int, device: torch.device) -> list[torch.Tensor]:
    layers = 1 if rule.memory == "linear" else 2
    return [torch.randn(*lead, width, width, device=device) / width**0.5 for _ in range(layers)]


def _scan(rule: MemoryRule, backend: str) -> Op:
    """M_mem alone: static k, v, q."""

    def make(shape: Shape, dtype: torch.dtype, device: torch.device, seed: int) -> Leaves:
        leaves = token_leaves(shape, dtype, device, seed)
        if rule.momentum:
            leaves["log_mu"] = -torch.rand(leaves["eta"].shape, device=device)
        return leaves | {f"mem.{i}": w for i, w in enumerate(_weights(rule, (shape.heads,), shape.width, device))}

    def call(leaves: Leaves, shape: Shape) -> tuple[torch.Tensor, ...]:
        return (_remember(rule, backend, leaves, (leaves["q"], leaves["k"], leaves["v"], leaves["eta"], leaves["log_alpha"])),)

    return Op(make, call, torch.bfloat16 if backend == "triton" else torch.float32)


def _remember(rule: MemoryRule, backend: str, leaves: Leaves, streams: tuple[torch.Tensor, ...]) -> torch.Tensor:
    weights = tuple(t for name, t in leaves.items() if name.startswith("mem."))
    state = MemoryState.start(weights, batch=streams[0].shape[0], momentum=rule.momentum)
    q, k, v, eta, log_alpha = streams
    y, _ = memory_scan(
        q, k, v, eta, log_alpha, state,
        rule=rule, chunk=CHUNK_MEM, log_mu_BHT=leaves.get("log_mu"), keep_state=False, backend=backend,
    )  # fmt: skip
    return y


def _self_modifying(rule: MemoryRule, backend: str, *, whole: bool) -> Op:
    """The projection scan; whole: and the memory scan on what it generates, which is the core of the mixer."""

    def make(shape: Shape, dtype: torch.dtype, device: torch.device, seed: int) -> Leaves:
        leaves = {name: t for name, t in token_leaves(shape, dtype, device, seed).items() if t.dim() == 4}
        for name in ("eta", "alpha"):
            leaves |= {f"readout.{name}": torch.randn(shape.heads, shape.width, device=device) / shape.width**0.5}
            leaves |= {f"bias.{name}": torch.full((shape.heads,), -3.0 if name == "eta" else -7.0, device=device)}
        leaves |= {f"proj.{i}": w for i, w in enumerate(_weights(rule, (shape.heads, len(STACK)), shape.width, device))}
        return leaves | ({f"mem.{i}": w for i, w in enumerate(_weights(rule, (shape.heads,), shape.width, device))} if whole else {})

    def call(leaves: Leaves, shape: Shape) -> tuple[torch.Tensor, ...]:
        weights = tuple(t for name, t in leaves.items() if name.startswith("proj."))
        readout = Readout(leaves["readout.eta"], leaves["bias.eta"], leaves["readout.alpha"], leaves["bias.alpha"])
        generated, _ = projection_scan(
            Inputs(leaves["k"], leaves["v"], leaves["q"]), readout, MemoryState.start(weights, batch=shape.batch, momentum=False),
            rule=rule, stack=STACK, chunk=CHUNK_PROJ, keep_state=False, backend=backend,
        )  # fmt: skip
        if not whole:
            return generated.tensors()
        return (_remember(rule, backend, leaves, (generated.q, generated.k, generated.v, generated.eta, generated.log_alpha)),)

    return Op(make, call, torch.bfloat16 if backend == "triton" else torch.float32)


def _attention(kernel: SDPBackend) -> Op:
    """Causal softmax attention."""

    def make(shape: Shape, dtype: torch.dtype, device: torch.device, seed: int) -> Leaves:
        return {name: t for name, t in token_leaves(shape, dtype, device, seed).items() if t.dim() == 4}

    def call(leaves: Leaves, shape: Shape) -> tuple[torch.Tensor, ...]:
        with sdpa_kernel(kernel):
            return (torch.nn.functional.scaled_dot_product_attention(leaves["q"], leaves["k"], leaves["v"], is_causal=True),)

    return Op(make, call)


def _gated_delta_rule() -> Op:
    """The kernels of fla for what `LINEAR` computes, in their layout [B, T, H, K]."""

    def make(shape: Shape, dtype: torch.dtype, device: torch.device, seed: int) -> Leaves:
        leaves = {name: t.transpose(1, 2).contiguous() for name, t in token_leaves(shape, dtype, device, seed).items()}
        leaves["beta"] = leaves.pop("eta").to(dtype)
        return leaves

    def call(leaves: Leaves, shape: Shape) -> tuple[torch.Tensor, ...]:
        from fla.ops.gated_delta_rule import chunk_gated_delta_rule

        streams = (leaves["q"], leaves["k"], leaves["v"])
        return (chunk_gated_delta_rule(*streams, g=leaves["log_alpha"], beta=leaves["beta"], scale=1.0)[0],)

    return Op(make, call)


def operations(*, is_gpu: bool) -> dict[str, Op]:
    """All that have kernels, by name; without a GPU attention is torch's plain one and fla is left out."""
    rules = {name: rule for name, rule in RULES.items() if not scan_obstacle(rule, width=64, hidden=64)}
    scans = {f"{name}{suffix}": _scan(rule, backend) for name, rule in rules.items() for suffix, backend in BACKENDS.items()}
    for suffix, backend in BACKENDS.items():
        scans[f"projection{suffix}"] = _self_modifying(RULES["mlp"], backend, whole=False)
        scans[f"self-modifying{suffix}"] = _self_modifying(RULES["mlp"], backend, whole=True)
        scans[f"self-modifying linear{suffix}"] = _self_modifying(replace(RULES["mlp"], memory="linear"), backend, whole=True)
    if not is_gpu:
        return {**scans, "sdpa": _attention(SDPBackend.MATH)}
    fla = {"fla": _gated_delta_rule()} if importlib.util.find_spec("fla") else {}
    flash, cudnn = _attention(SDPBackend.FLASH_ATTENTION), _attention(SDPBackend.CUDNN_ATTENTION)
    return {**scans, "sdpa flash": flash, "sdpa cudnn": cudnn, **fla}


BACKENDS = {"": "triton", " chunked": "chunked"}
"""Suffix of an operation's name -> implementation."""


def floor_bytes(shape: Shape) -> int:
    """Bytes that the linear memory's forward pass must move: q, k, v, y in bf16, and an fp32 state every chunk."""
    vectors = 4 * 2 * shape.batch * shape.heads * shape.tokens * shape.width
    return vectors + shape.batch * shape.heads * (shape.tokens // CHUNK_MEM) * shape.width**2 * 4
