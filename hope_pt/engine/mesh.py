"""The parallel layout of a job as arithmetic: degrees, coordinates of a rank, which blocks a pipeline stage holds, what is impossible.

Nothing here starts or imports anything, so the same checks serve a training run, a dry run and an estimate for a thousand GPUs. The order
of ranks is megatron's: tensor fastest, then context, data, pipeline.
"""

import math
from dataclasses import dataclass
from typing import Literal

from hope_pt.config.optim import OptimConfig
from hope_pt.config.schema import EngineConfig, RunConfig
from hope_pt.errors import ConfigError, ParallelError


@dataclass(frozen=True)
class Mesh:
    """A validated layout.

    stage_layers: blocks on every pipeline stage, over all its pieces. num_microbatches: forward passes of one data-parallel rank in an
    optimizer step, segments counted. tokens_per_rank: tokens of one sequence in one forward pass that a context-parallel rank holds.
    """

    tensor: int
    context: int
    data: int
    pipeline: int
    virtual: int
    sequence_parallel: bool
    stage_layers: tuple[int, ...]
    num_microbatches: int
    tokens_per_rank: int

    @property
    def world_size(self) -> int:
        """Processes of the job."""
        return self.tensor * self.context * self.data * self.pipeline

    def describe(self) -> str:
        """The degrees as words: "tensor 2, context 1, data 4, pipeline 2 x 1", the last factor being the pieces of a stage."""
        return f"tensor {self.tensor}, context {self.context}, data {self.data}, pipeline {self.pipeline} x {self.virtual}"

    def coordinates(self, rank: int) -> dict[str, int]:
        """Position of a rank on every axis: tensor, context, data, pipeline."""
        tensor, rest = rank % self.tensor, rank // self.tensor
        context, rest = rest % self.context, rest // self.context
        return {"tensor": tensor, "context": context, "data": rest % self.data, "pipeline": rest // self.data}

    def layers(self, stage: int, piece: int = 0) -> range:
        """Global indices of the blocks in a piece of a pipeline stage; with one piece a stage, stages hold consecutive blocks."""
        if self.virtual == 1:
            first = sum(self.stage_layers[:stage])
            return range(first, first + self.stage_layers[stage])
        size = self.stage_layers[stage] // self.virtual
        first = (piece * self.pipeline + stage) * size
        return range(first, first + size)


def sharding(config: RunConfig) -> Literal["none", "elements", "layers"]:
    """How data-parallel (and context-parallel) ranks divide the optimizer.

    "none": each has all of it. "elements": `engine.distributed_optimizer` with AdamW alone, a slice of everything, cut anywhere. "layers":
    the same with a rule for whole matrices among the optimizers, whole parameters.
    """
    if not config.engine.distributed_optimizer:
        return "none"
    return "layers" if has_matrix_rule(config.optim) else "elements"


def has_matrix_rule(optim: OptimConfig) -> bool:
    """Whether any parameter has another optimizer than AdamW."""
    return {optim.name, optim.memory, *optim.levels} != {"adamw"}


def check_mesh(config: RunConfig, *, world_size: int) -> Mesh:
    """The layout of `world_size` processes; ParallelError or ConfigError with the key that does not fit and what would."""
    engine = config.engine
    _check_heads(config)
    _check_data_parallel(config)
    model_size = engine.tensor_parallel * engine.pipeline_parallel * engine.context_parallel
    if world_size % model_size:
        processes = "1 process" if world_size == 1 else f"{world_size} processes"
        raise ParallelError(
            f"{processes} cannot be divided into groups of engine.tensor_parallel * engine.pipeline_parallel * engine.context_parallel = "
            f"{engine.tensor_parallel} * {engine.pipeline_parallel} * {engine.context_parallel} = {model_size}; start a multiple of "
            f"{model_size}, for example torchrun --nproc-per-node {model_size} --no-python hope train ..., or change a degree"
        )
    data = world_size // model_size
    num_microbatches = _microbatches(config, data=data)
    stage_layers = _stage_layers(config)
    _check_virtual(engine, stage_layers=stage_layers, num_microbatches=num_microbatches)
    return Mesh(
        tensor=engine.tensor_parallel,
        context=engine.context_parallel,
        data=data,
        pipeline=engine.pipeline_parallel,
        virtual=engine.virtual_stages,
        sequence_parallel=engine.sequence_parallel and engine.tensor_parallel > 1,
        stage_layers=stage_layers,
        num_microbatches=num_microbatches,
        tokens_per_rank=_tokens_per_rank(config),
    )


def _check_heads(config: RunConfig) -> None:
    model, engine = config.model, config.engine
    tensor, context = engine.tensor_parallel, engine.context_parallel
    for what, size in (("num_heads", model.num_heads), ("cms.hidden", model.cms.hidden), ("vocab_size", model.vocab_size)):
        if size % tensor:
            raise ParallelError(
                f"model.{what} = {size} is not a multiple of engine.tensor_parallel = {tensor}; set engine.tensor_parallel to "
                f"{_divisors(math.gcd(model.num_heads, model.cms.hidden, model.vocab_size))}"
            )
    if engine.context_mode == "heads" and model.num_heads % (tensor * context):
        raise ParallelError(
            f"model.num_heads = {model.num_heads} is not a multiple of engine.tensor_parallel * engine.context_parallel = {tensor} * "
            f'{context}: with engine.context_mode = "heads" every rank takes whole heads; lower one of the two, or set '
            'engine.context_mode = "state"'
        )
    if engine.context_mode == "state" and context > 1 and config.train.segments > 1:
        raise ParallelError(
            f'train.segments = {config.train.segments} does not go with engine.context_mode = "state", whose last shard would have to '
            'hand its state back to the first; set engine.context_mode = "heads" or train.segments = 1'
        )


def _check_data_parallel(config: RunConfig) -> None:
    engine, optim = config.engine, config.optim
    if engine.overlap_param_gather and sharding(config) == "layers":
        rules = " and ".join(f'"{name}"' for name in sorted({optim.name, optim.memory, *optim.levels} - {"adamw"}))
        raise ConfigError(
            f"engine.overlap_param_gather = true does not go with {rules}: engine.distributed_optimizer then divides whole parameters "
            "over the ranks, which broadcast them before the step ends; set engine.overlap_param_gather = false"
        )
    if engine.overlap_param_gather and not (engine.distributed_optimizer and engine.overlap_grad_reduce):
        raise ParallelError(
            "engine.overlap_param_gather = true needs engine.distributed_optimizer = true and engine.overlap_grad_reduce = true; "
            "set both, or engine.overlap_param_gather = false"
        )


def _microbatches(config: RunConfig, *, data: int) -> int:
    rows = data * config.engine.micro_batch_size
    if config.train.global_batch_size % rows:
        raise ConfigError(
            f"train.global_batch_size = {config.train.global_batch_size} is not a multiple of {rows} = {data} data-parallel ranks * "
            f"engine.micro_batch_size = {config.engine.micro_batch_size}; change one of the three"
        )
    return config.train.global_batch_size // rows * config.train.segments


def _tokens_per_rank(config: RunConfig) -> int:
    engine, length, segments = config.engine, config.data.seq_len, config.train.segments
    share = segments * engine.context_parallel
    if length % share:
        raise ConfigError(
            f"data.seq_len = {length} is not a multiple of {share} = train.segments * engine.context_parallel = {segments} * "
            f"{engine.context_parallel}; change one of the three"
        )
    tokens = length // share
    if engine.sequence_parallel and tokens % engine.tensor_parallel:
        raise ConfigError(
            f"{tokens} tokens (data.seq_len / train.segments / engine.context_parallel) cannot be divided over engine.tensor_parallel = "
            f"{engine.tensor_parallel}; change data.seq_len, or set engine.sequence_parallel = false"
        )
    return tokens


def _stage_layers(config: RunConfig) -> tuple[int, ...]:
    engine, layers = config.engine, config.model.num_layers
    stages, first, last = engine.pipeline_parallel, engine.first_stage_layers, engine.last_stage_layers
    if stages == 1:
        if first or last:
            raise ParallelError(
                f"engine.first_stage_layers = {first}, engine.last_stage_layers = {last} with one pipeline stage; set both to 0"
            )
        return (layers,)
    between, left = stages - bool(first) - bool(last), layers - first - last
    if left < between or left % max(between, 1) or (between == 0 and left):
        fixed = f" less {first} on the first and {last} on the last stage" if first or last else ""
        raise ParallelError(
            f"model.num_layers = {layers}{fixed} cannot be divided over {between} of engine.pipeline_parallel = {stages} stages; change "
            "engine.pipeline_parallel, engine.first_stage_layers or engine.last_stage_layers"
        )
    inner = [left // between] * between if between else []
    return tuple([first] * bool(first) + inner + [last] * bool(last))


def _check_virtual(engine: EngineConfig, *, stage_layers: tuple[int, ...], num_microbatches: int) -> None:
    pieces, stages = engine.virtual_stages, engine.pipeline_parallel
    if pieces == 1:
        return
    if stages == 1:
        raise ParallelError(f"engine.virtual_stages = {pieces} needs engine.pipeline_parallel > 1; set engine.virtual_stages = 1")
    if engine.first_stage_layers or engine.last_stage_layers:
        raise ParallelError(
            f"engine.virtual_stages = {pieces} divides every stage evenly; set engine.first_stage_layers = engine.last_stage_layers = 0"
        )
    if stages == 2 and not engine.overlap_p2p:
        raise ParallelError(
            f"engine.virtual_stages = {pieces} with engine.pipeline_parallel = 2 and engine.overlap_p2p = false mixes up the messages to "
            "the previous and the next stage, which are the same rank: losses are silently wrong; set engine.overlap_p2p = true"
        )
    if stage_layers[0] % pieces:
        raise ParallelError(
            f"{stage_layers[0]} blocks a stage cannot be divided into engine.virtual_stages = {pieces} pieces; set it to "
            f"{_divisors(stage_layers[0])}"
        )
    if num_microbatches % stages:
        raise ParallelError(
            f"{num_microbatches} micro-batches a step are not a multiple of engine.pipeline_parallel = {stages}, which the interleaved "
            "schedule needs; change train.global_batch_size or engine.micro_batch_size"
        )


def _divisors(number: int) -> str:
    """The divisors of a number as words: 1, 2 or 4."""
    found = [str(d) for d in range(1, number + 1) if number % d == 0]
    return found[0] if len(found) == 1 else f"{', '.join(found[:-1])} or {found[-1]}"
