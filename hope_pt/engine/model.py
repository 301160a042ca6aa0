"""hope_pt.nn's blocks inside megatron-core's GPTModel.

    VocabParallelEmbedding -> TransformerBlock[ HopeLayer(HopeBlock) x L, HopeNorm ] -> ColumnParallelLinear (tied) -> cross-entropy

megatron's part is the embedding, the head, the loss, the pipeline plumbing and the parallel linear layers; the mathematics is the same
`HopeBlock` that `HopeLM` runs, built with `Parts` that inject those linear layers. Activations are [T, B, D] here. There is no position
embedding, no dropout and no bias. Initial values come from `hope_pt.nn.init` by canonical name (engine.state), so they equal HopeLM's.

In bf16 the matrices (embedding, head, linear layers) are bf16; everything held per head or per channel (initial memory states, gates,
readouts, norms) stays fp32.
"""

import re
from typing import Any

import torch
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import BaseTransformerLayer, get_transformer_layer_offset
from torch import Tensor, nn

from hope_pt.config.schema import ModelConfig
from hope_pt.engine.plan import Plan
from hope_pt.nn import HopeBlock, Parts
from hope_pt.nn.layout import Layout
from hope_pt.nn.parts import RMSNorm

_LAYER = re.compile(r"^decoder\.layers\.(\d+)\.block\.")
_RENAMED = {
    "embedding.word_embeddings.weight": "embedding.weight",
    "decoder.final_layernorm.weight": "final_norm.weight",
    "output_layer.weight": "head.weight",
}


class HopeNorm(RMSNorm):
    """RMSNorm whose weight is marked for megatron's sequence parallelism: its gradient is summed over tensor-parallel ranks."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float, **unused: Any):
        super().__init__(hidden_size, eps)
        vars(self.weight)["sequence_parallel"] = config.sequence_parallel


class Column(ColumnParallelLinear):
    """Column-parallel linear layer x [T, B, in] -> y [T, B, out / tensor-parallel degree]."""

    def forward(self, x: Tensor) -> Tensor:
        """y; megatron's own forward also returns a bias, which is None here."""
        return super().forward(x)[0]


class Row(RowParallelLinear):
    """Row-parallel linear layer x [T, B, in / tensor-parallel degree] -> y [T, B, out]."""

    def forward(self, x: Tensor) -> Tensor:
        """y; megatron's own forward also returns a bias, which is None here."""
        return super().forward(x)[0]


class HopeLayer(MegatronModule, BaseTransformerLayer):
    """One `HopeBlock` with the interface of a megatron transformer layer."""

    def __init__(self, config: TransformerConfig, *, model: ModelConfig, layer_number: int, pg_collection: Any, vp_stage=None, **unused):
        super().__init__(config=config)
        # megatron counts layers from 1, over all pipeline stages.
        self.layer_number = layer_number + get_transformer_layer_offset(config, vp_stage, pg_collection.pp.rank())
        self.block = HopeBlock(model, parts=_parts(config, model, pg_collection.tp))

    def forward(self, hidden_states: Tensor, attention_mask=None, *, packed_seq_params: Layout | None = None, **unused):
        """Block output [T, B, D] and None. The token layout travels in megatron's argument for packed sequences."""
        x, _ = self.block(hidden_states, layout=packed_seq_params)
        return x, None


def _parts(config: TransformerConfig, model: ModelConfig, tp_group: torch.distributed.ProcessGroup) -> Parts:
    common = {"config": config, "init_method": None, "bias": False, "tp_group": tp_group}

    def row(width_in: int, width_out: int) -> nn.Module:
        layer = Row(width_in, width_out, input_is_parallel=True, skip_bias_add=False, **common)
        _tag_shard(layer.weight, dim=1)
        return layer

    def column(width_in: int, width_out: int) -> nn.Module:
        layer = Column(width_in, width_out, gather_output=False, **common)
        _tag_shard(layer.weight, dim=0)
        return layer

    return Parts(
        column=column,
        row=row,
        norm=lambda width, eps: HopeNorm(config, width, eps),
        num_heads=model.num_heads // tp_group.size(),
        time_first=True,
    )


def _tag_shard(weight: Tensor, *, dim: int) -> None:
    """Mark `weight` as one shard of a tensor-parallel matrix; 0.16 does so only where it draws initial values itself."""
    if not hasattr(weight, "tensor_model_parallel"):
        set_tensor_model_parallel_attributes(weight, True, dim, 1)


def transformer_config(model: ModelConfig, *, plan: Plan) -> TransformerConfig:
    """megatron-core's description of the model and the layout. Fields that only its own layers read keep their defaults."""
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
        tensor_model_parallel_size=plan.tensor_parallel,
        pipeline_model_parallel_size=plan.pipeline_parallel,
        context_parallel_size=plan.context_parallel,
        sequence_parallel=plan.tensor_parallel > 1,
        params_dtype=plan.dtype,
        pipeline_dtype=plan.dtype,
        bf16=plan.dtype == torch.bfloat16,
        use_cpu_initialization=plan.device.type == "cpu",
        perform_initialization=False,
        # The loss is a sum over counted tokens; gradients are divided by their global number after the reduction.
        calculate_per_token_loss=True,
    )


def build_model(model: ModelConfig, *, plan: Plan, seq_len: int) -> GPTModel:
    """The model of this rank on its device; its parameters are not initialised."""
    config = transformer_config(model, plan=plan)
    layer = ModuleSpec(module=HopeLayer, params={"model": model})
    gpt = GPTModel(
        config=config,
        transformer_layer_spec=TransformerBlockSubmodules(
            layer_specs=[layer] * (model.num_layers // plan.pipeline_parallel), layer_norm=HopeNorm
        ),
        vocab_size=model.vocab_size,
        max_sequence_length=seq_len,
        position_embedding_type="none",
        share_embeddings_and_output_weights=model.tie_embeddings,
        pg_collection=plan.groups.megatron,
    )
    _tag_shard(gpt.embedding.word_embeddings.weight, dim=0)
    if not model.tie_embeddings:
        _tag_shard(gpt.output_layer.weight, dim=0)
    for layer in gpt.decoder.layers:
        for parameter in layer.block.mixer.core.parameters():
            _tag_shard(parameter, dim=0)
    return gpt.to(plan.device)


def canonical_name(name: str) -> str:
    """HopeLM's name of the megatron parameter `name`."""
    return _RENAMED.get(name) or _LAYER.sub(lambda match: f"blocks.{match.group(1)}.", name)


def named_parameters(gpt: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters of a model, wrapped or not, by canonical name."""
    return {canonical_name(name.removeprefix("module.")): parameter for name, parameter in gpt.named_parameters()}
