"""Bytes that one rank sends in an optimizer step, by mesh axis, as formulas of the layout.

What a collective of n ranks sends is counted as ring algorithms do it: an all-reduce 2 (n - 1) / n of its tensor, an all-gather and a
reduce-scatter (n - 1) / n of the whole one, an all-to-all (n - 1) / n of its input, a message all of it. Norms of gradients, losses and
counts of tokens (a few numbers a step) are left out, and so are the measurements of the levels every eval.levels_every steps.
`hope_pt.testing.communication` counts the same in a real run.
Legend: S bytes of the residual stream of one micro-batch on a context-parallel rank (rows * tokens * width), L blocks of the stage,
m micro-batches, n ranks of the axis.
"""

from dataclasses import dataclass

from hope_pt.config.schema import RunConfig
from hope_pt.engine.mesh import Mesh, sharding
from hope_pt.engine.sharding import shard_axis
from hope_pt.launch.activations import META, Share
from hope_pt.launch.memory import core_heads, mixer_core, share_of
from hope_pt.launch.weights import FP32, held


@dataclass(frozen=True)
class Sent:
    """Bytes of one step. embedding: the gradient of a tied embedding between the first and the last stage."""

    tensor: float
    context: float
    pipeline: float
    embedding: float
    gradients: float
    parameters: float

    @property
    def total(self) -> float:
        """All of it."""
        return sum(vars(self).values())


def sent(config: RunConfig, mesh: Mesh, *, stage: int) -> Sent:
    """What a rank of pipeline stage `stage` sends; over context-parallel ranks that hand states on, the mean."""
    share = share_of(config, mesh)
    gradients, parameters = data_parallel(config, mesh, stage=stage)
    return Sent(
        tensor=tensor_parallel(config, mesh, share, stage=stage),
        context=context_parallel(config, mesh, share, stage=stage),
        pipeline=pipeline_parallel(config, mesh, share, stage=stage),
        embedding=tied_embedding(config, mesh, stage=stage),
        gradients=gradients,
        parameters=parameters,
    )


def tensor_parallel(config: RunConfig, mesh: Mesh, share: Share, *, stage: int) -> float:
    """Column-parallel layers c = 1 + 2 levels, row-parallel layers r = 1 + levels of a block.

    Sequence parallel: m (n - 1) / n S (L (3 c + 2 r) + [first stage] 2 + [last stage] 2): a column layer gathers its input forward, and
    backward gathers it again and scatters its gradient; a row layer scatters forward and gathers backward, and so does the embedding; the
    head gathers forward and scatters backward. Else m 2 (n - 1) / n S (L (c + r) + [first] + [last]): one all-reduce each, backward of a
    column layer and of the head, forward of a row layer and of the embedding.
    Recomputation repeats the forward part of the blocks, but for the scatter that ends a block (where it may stop early). The loss
    all-reduces three fp32 numbers a token; with sequence parallelism the gradients of all norms are all-reduced once a step. `deep_rules`
    is on this axis too.
    """
    n, levels = mesh.tensor, len(config.model.cms.periods)
    columns, rows = 1 + 2 * levels, 1 + levels
    stream = _stream_bytes(config, mesh, share)
    first, last = stage == 0, stage == mesh.pipeline - 1
    ends = 0 if share.by_state else 1
    if mesh.sequence_parallel:
        block, repeated = 3 * columns + 2 * rows, columns + rows - ends
    else:
        block, repeated = 2 * (columns + rows), 2 * (rows - ends)
    edges = 2 * first + 2 * last
    block += repeated if config.engine.recompute == "block" else 0
    losses = 3 * 2 * FP32 * share.rows * mesh.tokens_per_rank if last else 0
    norms = sum(2 * FP32 * p.numel for p in held(config, mesh, stage=stage) if p.is_replicated) if mesh.sequence_parallel else 0
    activations = mesh.num_microbatches * (stream * (mesh.stage_layers[stage] * block + edges) + losses)
    return (n - 1) / n * (activations + norms) + deep_rules(config, mesh, share, stage=stage)


def deep_rules(config: RunConfig, mesh: Mesh, share: Share, *, stage: int) -> float:
    """What the optimizers of whole matrices send on the tensor axis, on the mean over steps and, layer-wise, over ranks.

    An update of a matrix sends (n - 1) / n of this rank's fp32 part for every tensor that goes to the rank which does the work, or comes
    back. Deep momentum gathers the new values of its hidden layer. DGD adds up the inputs of column-parallel layers with sequence
    parallelism, and gathers those of row-parallel ones in every forward pass but repeated ones.
    """
    n, parameters = mesh.tensor, held(config, mesh, stage=stage)
    owners = mesh.data * mesh.context if sharding(config) == "layers" else 1
    matrices = sum(FP32 * p.numel * p.exchanged / p.period + p.gathered / p.period for p in parameters) / owners
    rows = [p for p in parameters if p.inputs and shard_axis(p.name) == 1]
    inputs = share.rows * mesh.tokens_per_rank * share.dtype.itemsize * sum(p.columns for p in rows)
    columns = 2 * sum(p.inputs for p in parameters if shard_axis(p.name) == 0) if mesh.sequence_parallel else 0
    return (n - 1) / n * (matrices + columns + mesh.num_microbatches * inputs)


def context_parallel(config: RunConfig, mesh: Mesh, share: Share, *, stage: int) -> float:
    """Heads: m L (n - 1) / n (projected + output), forward and backward, of this rank's tokens and all its tensor-parallel heads.

    States: rank r hands on the state after its tokens and gets its gradient back: m L / n sum over r < n - 1 of both. An attention's state
    is its cache, which grows with r. Recomputation repeats the forward part.
    """
    n, model = mesh.context, config.model
    if n == 1:
        return 0.0
    forwards = 2 if config.engine.recompute == "block" else 1
    heads = model.num_heads // mesh.tensor
    core = mixer_core(model, core_heads(config, share))
    if not share.by_state:
        features = heads * (core.features_per_head + core.head_width)
        passed = share.rows * mesh.tokens_per_rank * features * share.dtype.itemsize * (n - 1) / n
        return mesh.num_microbatches * mesh.stage_layers[stage] * (forwards + 1) * passed
    total = 0
    for rank in range(n - 1):
        state = core.init_state(share.rows, dtype=share.dtype, device=META, past=(rank + 1) * mesh.tokens_per_rank).values()
        total += sum(t.nbytes * (forwards + t.is_floating_point()) for t in state)
    return mesh.num_microbatches * mesh.stage_layers[stage] * total / n


def pipeline_parallel(config: RunConfig, mesh: Mesh, share: Share, *, stage: int) -> float:
    """One message for every micro-batch and boundary of a piece, forward and backward: S / tensor with sequence parallelism, else S."""
    if mesh.pipeline == 1:
        return 0.0
    forward = mesh.virtual - (stage == mesh.pipeline - 1)
    backward = mesh.virtual - (stage == 0)
    message = _stream_bytes(config, mesh, share) / (mesh.tensor if mesh.sequence_parallel else 1)
    return mesh.num_microbatches * (forward + backward) * message


def tied_embedding(config: RunConfig, mesh: Mesh, *, stage: int) -> float:
    """An all-reduce of two ranks: the fp32 gradient once."""
    if not config.model.tie_embeddings or mesh.pipeline == 1 or stage not in (0, mesh.pipeline - 1):
        return 0.0
    return FP32 * config.model.vocab_size * config.model.width / mesh.tensor


def data_parallel(config: RunConfig, mesh: Mesh, *, stage: int) -> tuple[float, float]:
    """(gradients, parameters) over n = data * context ranks.

    fp32 gradients are all-reduced, 2 (n - 1) / n, and so are DGD's sums of layer inputs. With the distributed optimizer gradients are
    reduce-scattered, (n - 1) / n, and the weights gathered, (n - 1) / n; megatron's padding of its buffers is left out. Layer-wise,
    gradients are all-reduced and the weights that an update has changed are broadcast: (n - 1) / n on the mean over ranks and steps.
    """
    n = mesh.data * mesh.context
    parameters, how = held(config, mesh, stage=stage), sharding(config)
    gradients = sum(FP32 * p.numel + p.inputs for p in parameters) * (n - 1) / n
    if how == "none":
        return 2 * gradients, 0.0
    if how == "layers":
        return 2 * gradients, sum(p.numel * p.width / p.period for p in parameters) * (n - 1) / n
    return gradients, sum(p.numel * p.width for p in parameters) * (n - 1) / n


def _stream_bytes(config: RunConfig, mesh: Mesh, share: Share) -> int:
    """S."""
    return share.rows * mesh.tokens_per_rank * config.model.width * share.dtype.itemsize
