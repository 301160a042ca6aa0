"""Which parameters a rank holds, and what it keeps for each: weights, gradients, masters, moments, accumulated gradients."""

import functools
from dataclasses import dataclass

from hope_pt.config.schema import ModelConfig, RunConfig
from hope_pt.engine.mesh import Mesh
from hope_pt.engine.sharding import shard_axis
from hope_pt.launch.activations import META
from hope_pt.nn import HopeLM
from hope_pt.optim.groups import rule_of

FP32 = 4


@dataclass(frozen=True)
class Held:
    """One parameter as one rank holds it. width: bytes of a weight. period: of its clock."""

    name: str
    numel: int
    width: int
    period: int

    @property
    def is_replicated(self) -> bool:
        """Not divided over tensor-parallel ranks."""
        return shard_axis(self.name) is None


@dataclass(frozen=True)
class WeightBytes:
    """Bytes of one rank that do not depend on the batch.

    gradients: megatron's fp32 buffer. optimizer: two fp32 moments, and an fp32 master of every bf16 weight. accumulated: what slow CMS
    levels have summed within an interval; it is freed at its end and counted as if it were always there.
    """

    weights: int
    gradients: int
    optimizer: int
    accumulated: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.gradients + self.optimizer + self.accumulated


@functools.cache
def _shapes(model: ModelConfig) -> dict[str, tuple[int, int]]:
    """HopeLM name -> (elements, dimensions)."""
    return {name: (value.numel(), value.ndim) for name, value in HopeLM(model, device=META).named_parameters()}


def held(config: RunConfig, mesh: Mesh, *, stage: int) -> list[Held]:
    """The parameters on a rank of pipeline stage `stage`; a tied embedding is on the first and on the last."""
    return _held(config.model, config.engine.precision, mesh, stage)


@functools.cache
def _held(model: ModelConfig, precision: str, mesh: Mesh, stage: int) -> list[Held]:
    blocks = {f"blocks.{index}." for piece in range(mesh.virtual) for index in mesh.layers(stage, piece)}
    first, last = stage == 0, stage == mesh.pipeline - 1
    found = []
    for name, (numel, dims) in _shapes(model).items():
        if name == "embedding.weight":
            here = first or (last and model.tie_embeddings)
        else:
            here = name[: name.index(".", 7) + 1] in blocks if name.startswith("blocks.") else last
        if here:
            matrix = dims == 2 and ".core." not in name
            ranks = 1 if shard_axis(name) is None else mesh.tensor
            period = rule_of(name, ndim=dims, config=model).period
            found.append(Held(name, numel // ranks, 2 if precision == "bf16" and matrix else FP32, period))
    return found


def weight_bytes(config: RunConfig, mesh: Mesh, *, stage: int) -> WeightBytes:
    """What a rank of `stage` keeps of its parameters. The distributed optimizer divides masters, moments and accumulated gradients."""
    parameters = held(config, mesh, stage=stage)
    ranks = mesh.data * mesh.context if config.engine.distributed_optimizer else 1
    masters = sum(FP32 * p.numel for p in parameters if p.width < FP32)
    numel = sum(p.numel for p in parameters)
    slow = sum(p.numel for p in parameters if p.period > 1)
    return WeightBytes(
        weights=sum(p.numel * p.width for p in parameters),
        gradients=FP32 * numel,
        optimizer=-(-(masters + 2 * FP32 * numel) // ranks),
        accumulated=-(-FP32 * slow // ranks),
    )


def checkpoint_bytes(config: RunConfig) -> int:
    """Bytes of a checkpoint's tensors, whatever the layout: fp32 masters, two moments, accumulated gradients of slow levels."""
    return sum(
        numel * FP32 * (3 + (rule_of(name, ndim=dims, config=config.model).period > 1))
        for name, (numel, dims) in _shapes(config.model).items()
    )
