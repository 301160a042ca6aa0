"""Seconds of a training step by a roofline: an estimate to rank layouts by, not a measurement. Nothing of it has been timed on a GPU.

A pass of one micro-batch through one pipeline stage takes

    blocks * (dense FLOPs / reached bf16 rate + core) + head + bytes sent on the tensor and context axes / link rate + messages

    core = max(FLOPs / reached rate, bytes read and written / reached memory rate, kernels * seconds a kernel, chain)
    chain = sum over walks of tiles * seconds a tile * ceil(programs / streaming multiprocessors)

where the core is what `activations.core` traced. The chunked scans run in fp32, kernel by kernel, without a chain. In the fused kernels
every memory is written by one program, tile after tile: forward, again in the replay, and backward. The step takes
(m + (p - 1) / v) passes of the slowest stage (m micro-batches, p stages, v pieces a stage: the bubble), plus what of the gradient
reduction and the parameter gather is not hidden behind one backward and one forward pass, plus the optimizer: its memory traffic, and the
matrix products of its rules. With context_mode = "state" the cores of a layer run one rank after the other.
"""

import functools
import math
from dataclasses import dataclass

from hope_pt.config.schema import ModelConfig, RunConfig
from hope_pt.engine.mesh import Mesh
from hope_pt.engine.sharding import shard_axis
from hope_pt.launch import activations
from hope_pt.launch.allocations import Walk
from hope_pt.launch.communication import sent
from hope_pt.launch.gpus import GPU
from hope_pt.launch.kernels import planned_model, scans
from hope_pt.launch.memory import share_of
from hope_pt.launch.weights import held, owned, weight_bytes
from hope_pt.nn import flops_per_token


@dataclass(frozen=True)
class Assumptions:
    """Shares of the data sheet's figures that are reached, and seconds. All are guesses that no GPU has confirmed."""

    products: float = 0.5
    """Of the bf16 rate, by large matrix products: a guess."""
    attention: float = 0.35
    """Of the bf16 rate, by attention kernels: a guess."""
    fp32_products: float = 0.5
    """Of the fp32 rate, by the products of the scans in fp32: a guess."""
    fused_products: float = 0.1
    """Of the bf16 rate, by the fused scans: a guess after flash-linear-attention's published rates that no GPU has confirmed."""
    memory: float = 0.7
    """Of the bandwidth: a guess."""
    links: float = 0.75
    """Of NVLink and the network: a guess."""
    kernel_s: float = 6e-6
    """That one kernel of eager PyTorch or one launch of Triton's costs its CPU: a guess."""
    write_s: float = 5e-6
    """That a program of the fused kernels takes to write one tile, also in the replay: a guess that no GPU has confirmed."""
    write_backward_s: float = 12e-6
    """The same backward: a guess that no GPU has confirmed."""


@dataclass(frozen=True)
class StepTime:
    """Seconds of one step and what they are made of.

    communication: on the tensor, context and pipeline axes. exposed: on the data axis. model_flops_share: FLOPs of forward and backward
    pass, replay and recomputation left out, over what the GPUs could do in bf16.
    """

    total: float
    compute: float
    communication: float
    bubble: float
    exposed: float
    optimizer: float
    tokens_per_s: float
    model_flops_share: float


ASSUMED = Assumptions()


def step_time(config: RunConfig, mesh: Mesh, gpu: GPU, *, documents: int = 1, assumed: Assumptions = ASSUMED) -> StepTime:
    """The step on `mesh` of `gpu`s when every row of data is `documents` documents."""
    share = share_of(config, mesh, documents=documents)
    stages = sorted({0, mesh.pipeline // 2, mesh.pipeline - 1})
    passes = [_pass_s(config, mesh, share, gpu, assumed, stage=stage) for stage in stages]
    compute, communication = max(passes, key=sum)
    micro = mesh.num_microbatches
    bubble = (mesh.pipeline - 1) / mesh.virtual * (compute + communication)
    exposed = _exposed_s(config, mesh, gpu, assumed, one_pass=compute)
    optimizer = optimizer_s(config, mesh, gpu, assumed=assumed)
    total = micro * (compute + communication) + bubble + exposed + optimizer
    tokens = config.train.global_batch_size * config.data.seq_len
    flops = _flops(config.model, mesh.tokens_per_rank * mesh.context)
    useful = flops["forward"] + flops["backward"]
    return StepTime(
        total=total,
        compute=micro * compute,
        communication=micro * communication,
        bubble=bubble,
        exposed=exposed,
        optimizer=optimizer,
        tokens_per_s=tokens / total,
        model_flops_share=useful * tokens / total / mesh.world_size / gpu.bf16,
    )


def optimizer_s(config: RunConfig, mesh: Mesh, gpu: GPU, *, assumed: Assumptions = ASSUMED) -> float:
    """Seconds of the update itself: its memory traffic, and the matrix products of the rank with the most, divided over the tensor axis.

    On the mean over steps: a level of period n has its products in every n-th. DGD's sums of layer inputs, fp32 products of every forward
    pass, are here too.
    """
    weights = weight_bytes(config, mesh, stage=0)
    traffic = 2 * (weights.optimizer + weights.accumulated) + weights.gradients + weights.weights
    products = max(sum(p.flops / p.period for p in own) for own in owned(config, mesh, stage=0)) / mesh.tensor
    seconds = traffic / (gpu.bandwidth * assumed.memory) + products / (gpu.bf16 * assumed.products)
    tokens = mesh.num_microbatches * config.engine.micro_batch_size * mesh.tokens_per_rank
    by_sequence = mesh.tensor if mesh.sequence_parallel else 1
    watched = [(p.columns, by_sequence if shard_axis(p.name) == 0 else 1) for p in held(config, mesh, stage=0) if p.inputs]
    return seconds + sum(2 * tokens * columns**2 / ranks for columns, ranks in watched) / (gpu.fp32 * assumed.fp32_products)


@functools.cache
def _flops(model: ModelConfig, tokens: int) -> dict[str, float]:
    return flops_per_token(model, seq_len=tokens)


def bubble_fraction(mesh: Mesh) -> float:
    """Share of a step in which a pipeline stage waits: (p - 1) / (v m + p - 1)."""
    return (mesh.pipeline - 1) / (mesh.virtual * mesh.num_microbatches + mesh.pipeline - 1)


def _pass_s(config: RunConfig, mesh: Mesh, share: activations.Share, gpu: GPU, assumed: Assumptions, *, stage: int) -> tuple[float, float]:
    """(compute, communication) seconds of one micro-batch, forward and backward, on a rank of `stage`."""
    tokens = share.rows * mesh.tokens_per_rank / mesh.tensor
    flops = _flops(config.model, share.core_tokens)
    layers = config.model.num_layers
    bf16 = gpu.bf16 if config.engine.precision == "bf16" else gpu.fp32
    again = 4 if config.engine.recompute == "block" else 3
    block = again * (flops["projections"] + flops["cms"]) / layers * tokens / (bf16 * assumed.products)
    block += again * flops.get("attention", 0.0) / layers * tokens / (bf16 * assumed.attention)
    if config.model.mixer == "titans":
        block += _core_s(config, share, gpu, assumed, flops=flops) * (4 / 3 if again == 4 else 1)
    head = (3 * flops["head"] + flops["head_replay"]) * tokens / (bf16 * assumed.products) if stage == mesh.pipeline - 1 else 0.0
    found, micro = sent(config, mesh, stage=stage), mesh.num_microbatches
    links = [
        (found.tensor, mesh.tensor),
        (found.context, mesh.tensor * mesh.context),
        (found.pipeline, mesh.world_size),
    ]
    seconds = sum(size / micro / (_link(gpu, span) * assumed.links) for size, span in links)
    return mesh.stage_layers[stage] * block + head, seconds


def _core_s(config: RunConfig, share: activations.Share, gpu: GPU, assumed: Assumptions, *, flops: dict[str, float]) -> float:
    """Forward and backward pass of a memory mixer's core, and of all ranks before and after it where they wait for each other."""
    core, fused = activations.core(planned_model(config), share), scans(config).backend == "triton"
    rate = gpu.bf16 * assumed.fused_products if fused and config.engine.precision == "bf16" else gpu.fp32 * assumed.fp32_products
    divided = share.tensor * (1 if share.by_state else share.context)
    tokens = share.rows * share.core_tokens / divided
    work = flops["memory"] + flops["replay"] + flops["solves"] + (flops["backward"] - 2 * (flops["forward"] - flops["memory"]))
    seconds = max(
        work / config.model.num_layers * tokens / rate,
        core.traffic / (gpu.bandwidth * assumed.memory),
        core.kernels * assumed.kernel_s,
        sum(tiles * _tile_s(walk, assumed) * math.ceil(walk.programs / gpu.multiprocessors) for walk, tiles in core.walks),
    )
    return seconds * (share.context if share.by_state else 1)


def _tile_s(walk: Walk, assumed: Assumptions) -> float:
    """Seconds that a program takes from one tile to the next."""
    return assumed.write_backward_s if walk.kernel.endswith("_backward") else assumed.write_s


def _exposed_s(config: RunConfig, mesh: Mesh, gpu: GPU, assumed: Assumptions, *, one_pass: float) -> float:
    """Reduction and gather that wait for nothing: overlapped ones hide behind the last backward and the first forward pass."""
    found = sent(config, mesh, stage=0)
    rate = _link(gpu, mesh.tensor * mesh.context * mesh.data) * assumed.links
    gradients, parameters = (found.gradients + found.embedding) / rate, found.parameters / rate
    if config.engine.overlap_grad_reduce:
        gradients = max(0.0, gradients - 2 / 3 * one_pass)
    if config.engine.overlap_param_gather:
        parameters = max(0.0, parameters - 1 / 3 * one_pass)
    return gradients + parameters


def _link(gpu: GPU, span: int) -> float:
    """Bytes/s in one direction among `span` consecutive ranks: NVLink within a node, else the network."""
    return gpu.nvlink if span <= gpu.per_node else gpu.network
