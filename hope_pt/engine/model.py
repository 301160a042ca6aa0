"""hope_pt.nn's blocks inside megatron-core's GPTModel.

    VocabParallelEmbedding -> TransformerBlock[ HopeLayer(HopeBlock) x L, norm ] -> VocabularyHead (tied): head and cross-entropy

megatron's part is the embedding, the pipeline plumbing and the parallel linear layers; the mathematics is the same
`HopeBlock` that `HopeLM` runs, built with `Parts` that inject those linear layers. Activations are [T, B, D] here: T is this rank's share
of the sequence, divided over context-parallel ranks and, between the linear layers, over tensor-parallel ranks (sequence parallelism).
There is no position embedding, no dropout and no bias. Initial values come from `hope_pt.nn.init` by canonical name (engine.state), so
they equal HopeLM's.

A rank holds one model, or with virtual pipeline stages several pieces of it: `build_model` gives a list.

In bf16 the matrices (embedding, head, linear layers) are bf16; everything held per head or per channel (initial memory states, gates,
readouts, norms) stays fp32.
"""

import contextlib
import functools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import BaseTransformerLayer, get_transformer_layer_offset
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from hope_pt.config.schema import EngineConfig, ModelConfig, RunConfig
from hope_pt.engine.context import run_core
from hope_pt.engine.head import VocabularyHead
from hope_pt.engine.plan import Plan
from hope_pt.engine.provider import Provider
from hope_pt.engine.sharding import shard_axis
from hope_pt.nn import HopeBlock, Parts
from hope_pt.nn.layout import Layout
from hope_pt.nn.state import LayerState

_LAYER = re.compile(r"^decoder\.layers\.(\d+)\.block\.")
_RENAMED = {
    "embedding.word_embeddings.weight": "embedding.weight",
    "decoder.final_layernorm.weight": "final_norm.weight",
    "output_layer.weight": "head.weight",
}


@dataclass(frozen=True)
class Passage:
    """What a layer has to know of a micro-batch beside its activations.

    layout: of the tokens that the core of a mixer sees here. continues: the rows go on from where the previous micro-batch ended. keeps:
    the next micro-batch goes on from where this one ends.
    """

    layout: Layout | None = None
    continues: bool = False
    keeps: bool = False


class HopeLayer(MegatronModule, BaseTransformerLayer):
    """One `HopeBlock` with the interface of a megatron transformer layer.

    It holds the memory's state between the segments of a long sequence. The state is read before the block and stored after it, so that a
    block that is computed again in the backward pass starts where it started and stores nothing.
    """

    def __init__(
        self,
        config: TransformerConfig,
        *,
        model: ModelConfig,
        engine: EngineConfig,
        provider: Provider,
        layer_number: int,
        pg_collection: Any,
        vp_stage=None,
        **unused,
    ):
        super().__init__(config=config)
        # megatron counts layers from 1, over all pipeline stages.
        self.layer_number = layer_number + get_transformer_layer_offset(config, vp_stage, pg_collection.pp.rank())
        self.block = HopeBlock(model, parts=_parts(config, model, engine, provider, pg_collection))
        self._recomputes = engine.recompute == "block"
        # Messages between context-parallel ranks are repeated too, so none of them may stop early.
        self._stops_early = not (engine.context_mode == "state" and engine.context_parallel > 1)
        self._overlaps = engine.overlap_grad_reduce
        self._carried: LayerState | None = None

    def forward(self, hidden_states: Tensor, attention_mask=None, *, packed_seq_params: Passage, **unused):
        """Block output [T, B, D] and None. The `Passage` travels in megatron's argument for packed sequences."""
        passage = packed_seq_params
        if self._overlaps:
            hidden_states = _Uses.apply(hidden_states, *self.block.mixer.core.parameters())
        state = self._carried if passage.continues else None
        run = functools.partial(self.block, state=state, layout=passage.layout, keep_state=passage.keeps)
        if self._recomputes and torch.is_grad_enabled():
            with set_checkpoint_early_stop(self._stops_early):
                x, state = checkpoint(run, hidden_states, use_reentrant=False, preserve_rng_state=False)
        else:
            x, state = run(hidden_states)
        self._carried = {name: tensor.detach() for name, tensor in state.items()} if passage.keeps else None
        return x, None


class _Uses(torch.autograd.Function):
    """x, with a gradient of zero for parameters that the rest of the graph may not use (a memory that never writes has no learning rate).

    A reduction that overlaps the backward pass starts when every parameter has reported its gradient.
    """

    @staticmethod
    def forward(ctx, x, *parameters):
        ctx.parameters = parameters
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return grad, *(parameter.new_zeros(()).expand_as(parameter) for parameter in ctx.parameters)


def _parts(config: TransformerConfig, model: ModelConfig, engine: EngineConfig, provider: Provider, groups: Any) -> Parts:
    return Parts(
        column=lambda width_in, width_out: provider.column(config, width_in, width_out, tp_group=groups.tp),
        row=lambda width_in, width_out: provider.row(config, width_in, width_out, tp_group=groups.tp),
        norm=lambda width, eps: provider.norm(config, width, eps),
        num_heads=model.num_heads // groups.tp.size(),
        time_first=True,
        run_core=run_core(engine.context_mode, groups.cp),
    )


class HopeGPT(GPTModel):
    """megatron's model with our head and loss, without its first message: both copies of a tied embedding get initial values by name."""

    def __init__(self, *, head_backend: str, **megatron: Any):
        super().__init__(**megatron)
        if self.post_process:
            self.output_layer: VocabularyHead = VocabularyHead(
                self.output_layer.weight,
                group=self.pg_collection.tp,
                sequence_parallel=self.config.sequence_parallel,
                backend=head_backend,
            )

    def _is_in_embd_group(self) -> bool:
        # Read by the constructor only, to copy the embedding to the last pipeline stage.
        return False

    def _postprocess(self, hidden_states: Tensor, *, labels: Tensor, **unused: Any) -> Tensor:
        """What the next stage reads, [T, B, D], or on the last one the loss of every token [B, T] fp32."""
        if not self.post_process:
            return hidden_states
        tied = self.shared_embedding_or_output_weight() if self.share_embeddings_and_output_weights else None
        return self.output_layer(hidden_states, labels, tied_weight=tied)


def transformer_config(config: RunConfig, *, plan: Plan) -> TransformerConfig:
    """megatron-core's description of the model and the layout. Fields that only its own layers read keep their defaults."""
    model, engine, mesh = config.model, config.engine, plan.mesh
    interleaved = mesh.virtual > 1
    return TransformerConfig(
        num_layers=model.num_layers,
        hidden_size=model.width,
        num_attention_heads=model.num_heads,
        ffn_hidden_size=model.cms.hidden,
        normalization="RMSNorm",
        layernorm_epsilon=model.norm_eps,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=mesh.tensor,
        pipeline_model_parallel_size=mesh.pipeline,
        virtual_pipeline_model_parallel_size=mesh.virtual if interleaved else None,
        num_layers_in_first_pipeline_stage=engine.first_stage_layers or None,
        num_layers_in_last_pipeline_stage=engine.last_stage_layers or None,
        overlap_p2p_comm=interleaved and engine.overlap_p2p,
        batch_p2p_comm=not (interleaved and engine.overlap_p2p),
        # On the CPU a sent tensor would be freed while the message is still on its way.
        deallocate_pipeline_outputs=plan.device.type == "cuda",
        context_parallel_size=mesh.context,
        sequence_parallel=mesh.sequence_parallel,
        params_dtype=plan.dtype,
        pipeline_dtype=plan.dtype,
        bf16=plan.dtype == torch.bfloat16,
        fp8="hybrid" if engine.fp8 and plan.provider.name == "te" else None,
        use_cpu_initialization=plan.device.type != "cuda",
        perform_initialization=False,
        # The loss is a sum over counted tokens; gradients are divided by their global number after the reduction.
        calculate_per_token_loss=True,
    )


def build_model(config: RunConfig, *, plan: Plan) -> list[GPTModel]:
    """The pieces of the model that this rank holds, on its device, in order of depth; their parameters are not initialised."""
    megatron = transformer_config(config, plan=plan)
    layer = ModuleSpec(module=HopeLayer, params={"model": config.model, "engine": config.engine, "provider": plan.provider})
    with _on(plan.device):
        return [_build_piece(config, megatron, layer, plan=plan, piece=piece) for piece in range(plan.mesh.virtual)]


def _build_piece(config: RunConfig, megatron: TransformerConfig, layer: ModuleSpec, *, plan: Plan, piece: int) -> GPTModel:
    model, mesh, norm = config.model, plan.mesh, plan.provider.norm
    gpt = HopeGPT(
        head_backend=model.head_backend,
        config=megatron,
        transformer_layer_spec=TransformerBlockSubmodules(layer_specs=[layer] * len(mesh.layers(plan.stage, piece)), layer_norm=norm),
        vocab_size=model.vocab_size,
        max_sequence_length=config.data.seq_len,
        pre_process=plan.stage == 0 and piece == 0,
        post_process=plan.stage == mesh.pipeline - 1 and piece == mesh.virtual - 1,
        position_embedding_type="none",
        share_embeddings_and_output_weights=model.tie_embeddings,
        pg_collection=plan.groups.megatron,
        vp_stage=piece if mesh.virtual > 1 else None,
    ).to(plan.device)
    for name, parameter in gpt.named_parameters():
        axis = shard_axis(canonical_name(name, tied=model.tie_embeddings))
        if axis is not None:
            _tag_shard(parameter, dim=axis)
    return gpt


def _tag_shard(weight: Tensor, *, dim: int) -> None:
    """Mark `weight` as one shard of a tensor-parallel matrix; 0.16 does so only where it draws initial values itself."""
    if not hasattr(weight, "tensor_model_parallel"):
        set_tensor_model_parallel_attributes(weight, True, dim, 1)


@contextlib.contextmanager
def _on(device: torch.device) -> Iterator[None]:
    """A rehearsal builds on the meta device from the start; elsewhere megatron places its own tensors."""
    if device.type != "meta":
        yield
        return
    with device:
        yield


def canonical_name(name: str, *, tied: bool, layers: Sequence[int] | None = None) -> str:
    """HopeLM's name of the parameter `name` of a piece that holds `layers` (None: keep its own count)."""
    if tied and name == "output_layer.weight":
        return "embedding.weight"

    def block(match: re.Match[str]) -> str:
        index = int(match.group(1))
        return f"blocks.{index if layers is None else layers[index]}."

    return _RENAMED.get(name) or _LAYER.sub(block, name)


def named_parameters(pieces: Sequence[nn.Module], *, config: ModelConfig, plan: Plan) -> dict[str, nn.Parameter]:
    """This rank's parameters by canonical name; the pieces may be wrapped. A last stage's copy of a tied one is `embedding.weight`."""
    return {
        canonical_name(name.removeprefix("module."), tied=config.tie_embeddings, layers=plan.mesh.layers(plan.stage, index)): parameter
        for index, piece in enumerate(pieces)
        for name, parameter in piece.named_parameters()
    }
