"""Bytes per rank at the highest point of a training step: what does not depend on the batch, and what micro-batches in flight keep.

    peak = weights + gradients + optimizer + accumulated + in flight * (stage input + blocks * kept) + the highest moment above that

The highest moment is that of a block's backward pass, or on the last stage of the head and the loss. Recomputation keeps a block's output
alone, and has the inside of one block alive while it runs backward.
"""

import functools
from dataclasses import dataclass

import torch

from hope_kernels import fused
from hope_pt.config.schema import ModelConfig, RunConfig
from hope_pt.engine.mesh import Mesh
from hope_pt.launch import activations
from hope_pt.launch.activations import META, Share
from hope_pt.launch.kernels import planned_model, scans
from hope_pt.launch.weights import FP32, WeightBytes, weight_bytes
from hope_pt.nn.attention import AttentionCore
from hope_pt.nn.mixer import CORES
from hope_pt.nn.titans import TitansCore, adaptive_streams, memory_rule

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class RankBytes:
    """Bytes of one rank.

    activations: kept by all micro-batches in flight. states: the part of them that is memory states at boundaries of chunks or pieces.
    working: the highest moment above what is kept. buffers: gathered inputs of linear layers, and memory states carried between segments.
    """

    stage: int
    weights: WeightBytes
    activations: int
    states: int
    working: int
    buffers: int

    @property
    def total(self) -> int:
        """The peak."""
        return self.weights.total + self.activations + self.working + self.buffers


def share_of(config: RunConfig, mesh: Mesh, *, documents: int = 1) -> Share:
    """What a rank holds of a micro-batch."""
    engine = config.engine
    return Share(
        rows=engine.micro_batch_size,
        tokens=mesh.tokens_per_rank * mesh.context,
        documents=documents,
        tensor=mesh.tensor,
        context=mesh.context,
        sequence_parallel=mesh.sequence_parallel,
        by_state=engine.context_mode == "state" and mesh.context > 1,
        carried=config.train.segments > 1,
        dtype=DTYPES[engine.precision],
    )


def rank_bytes(config: RunConfig, mesh: Mesh, *, stage: int, documents: int = 1) -> RankBytes:
    """The peak of a rank of `stage` when every row of data is `documents` documents."""
    share = share_of(config, mesh, documents=documents)
    model = planned_model(config)
    block = activations.block(model, share)
    stream = share.rows * share.stream_tokens * config.model.width * share.dtype.itemsize
    recomputed = config.engine.recompute == "block"
    kept = stream if recomputed else block.kept
    inside = block.kept - stream if recomputed else 0
    layers = mesh.stage_layers[stage] / mesh.virtual
    passes = in_flight(mesh, stage=stage)
    in_all = round(passes * (stream + layers * kept))
    working = inside + max(block.forward, block.backward) + _tied_gradient(config, mesh)
    if stage == mesh.pipeline - 1:
        head = activations.head(model, share)
        working = max(working, head.kept + max(head.forward, head.backward))
    states = 0 if recomputed else round(passes * layers * boundary_bytes(config, share))
    weights, buffers = weight_bytes(config, mesh, stage=stage), _buffers(config, mesh, share, stage)
    return RankBytes(stage, weights, in_all, states, working, buffers)


def in_flight(mesh: Mesh, *, stage: int) -> int:
    """Most forward passes of one piece whose backward pass is still to come, in megatron's schedules (1F1B, interleaved)."""
    total = mesh.num_microbatches * mesh.virtual
    if mesh.virtual == 1:
        return min(mesh.pipeline - stage, total)
    return min(2 * (mesh.pipeline - stage - 1) + (mesh.virtual - 1) * mesh.pipeline + 1, total)


def boundary_bytes(config: RunConfig, share: Share) -> int:
    """Memory states that one block keeps for one micro-batch: at every chunk, or with replay at every titans.save_every tokens.

    Kernels always replay, plain torch does beyond that length where `fused` has no form of the rule.
    """
    model, titans, tokens = config.model, config.model.titans, share.core_tokens
    if model.mixer != "titans":
        return 0
    rule = memory_rule(titans)
    hidden = model.memory_hidden if titans.memory == "mlp" else model.head_width
    memory = FP32 * rule.num_layers * (2 if rule.momentum else 1) * model.head_width * hidden
    replayed = scans(config).backend == "triton" or (tokens > titans.save_every and not fused.supports(rule))
    mem, proj = (-(-tokens // (titans.save_every if replayed else chunk)) for chunk in (titans.chunk_mem, titans.chunk_proj))
    return memory * share.rows * core_heads(config, share) * (mem + proj * len(adaptive_streams(titans)))


def state_bytes(config: RunConfig, share: Share, *, past: int) -> int:
    """The state of one block's mixer that a rank holds or hands on for one micro-batch, after `past` tokens."""
    core = mixer_core(config.model, core_heads(config, share))
    return sum(t.nbytes for t in core.init_state(share.rows, dtype=share.dtype, device=META, past=past).values())


def core_heads(config: RunConfig, share: Share) -> int:
    """Heads that a mixer's core runs on a rank."""
    return config.model.num_heads // share.tensor // (1 if share.by_state else share.context)


def _tied_gradient(config: RunConfig, mesh: Mesh) -> int:
    """The head's gradient of a tied embedding waits for the embedding's, through the whole backward pass."""
    model = config.model
    return _embedding_bytes(config, mesh) if model.tie_embeddings and mesh.pipeline == 1 else 0


def _embedding_bytes(config: RunConfig, mesh: Mesh) -> int:
    return config.model.vocab_size // mesh.tensor * config.model.width * DTYPES[config.engine.precision].itemsize


def _buffers(config: RunConfig, mesh: Mesh, share: Share, stage: int) -> int:
    gathered = share.rows * mesh.tokens_per_rank * config.model.width * share.dtype.itemsize if mesh.sequence_parallel else 0
    carried = mesh.stage_layers[stage] * state_bytes(config, share, past=config.data.seq_len) if share.carried else 0
    return gathered + carried


@functools.cache
def mixer_core(model: ModelConfig, heads: int) -> TitansCore | AttentionCore:
    """The core of a mixer with `heads` heads, on the meta device."""
    with META:
        return CORES[model.mixer](model, num_heads=heads)
