"""What a run is: frozen pydantic models, one per TOML section; unknown keys are errors.

`RunConfig` is the whole contract of a run: it is resolved once (`hope_pt.config.load`), stored in every checkpoint, and compared on
resume. `ModelConfig` alone defines the network; `hope_pt.nn` reads nothing else but `TokenClockConfig`. SPEC section numbers are given
where a field is a choice the paper leaves open.
"""

import itertools
from typing import Annotated, Literal

from pydantic import Field, model_validator

from hope_pt.config.optim import OptimConfig
from hope_pt.config.section import NonNegativeInt, OpenFraction, PositiveFloat, PositiveInt, Section


class TitansConfig(Section):
    """The memory mixer (SPEC 2). The defaults are HOPE's self-modifying Titans; the baselines are other settings of the same scan."""

    memory: Literal["mlp", "linear"] = "mlp"
    """Form of every memory: residual two-layer MLP (NL eq. 89) or one matrix."""
    memory_hidden: NonNegativeInt = 0
    """Hidden width F of an MLP memory; 0 means the head width K."""
    chunk_mem: PositiveInt = 64
    """Chunk length of M_mem in tokens (SPEC 2); a model only works with the chunk lengths it was trained with."""
    chunk_proj: PositiveInt = 256
    """Chunk length of the generating memories in tokens; a multiple of chunk_mem."""
    static_k: bool = False
    """Take k from the static projection instead of M_k (ablation row)."""
    static_v: bool = False
    """Take v from the static projection instead of M_v (ablation row)."""
    static_eta: bool = False
    """Take the learning rate from the static projection instead of M_eta."""
    static_alpha: bool = False
    """Take the retention from the static projection instead of M_alpha."""
    adaptive_q: bool = False
    """Generate q by a memory M_q too (off in the paper's text)."""
    self_target: bool = True
    """Each memory generates its own target M_s(v) (NL eq. 84); false: the target is v, as in Titans."""
    objective: Literal["huber", "l2", "dot"] = "huber"
    """Inner objective: bounded error (SPEC 2 "Bounded surprise"), the literal half-squared loss, or the dot product (linear attention)."""
    huber_delta: PositiveFloat = 1.0
    """Norm at which the pseudo-Huber error saturates."""
    update: Literal["dgd", "gd"] = "dgd"
    """Delta gradient descent (NL eq. 88) or plain gradient descent."""
    dgd_scope: Literal["first", "layerwise"] = "first"
    """DGD on the first layer only, or on both layers with the l2-normalised hidden activation as the second layer's input."""
    momentum: Literal["none", "titans"] = "none"
    """Momentum of the memory's gradient (Titans eq. 13-14)."""
    retention: bool = True
    """Forgetting through alpha; false: alpha = 1 (the "no weight decay" ablation row)."""
    read: Literal["causal", "anchor"] = "causal"
    """M_mem is read with the state after the token, or with the chunk-start state (NL eq. 90 to the letter)."""
    normalize_v: bool = True
    """l2-normalise v and the generated targets. Without it the targets feed on themselves at long T (docs/log.md)."""
    memory_off: bool = False
    """Control: eta = 0 and alpha = 1, so nothing is ever written; the same parameters as a static network."""
    eta_max: PositiveFloat = 1.0
    """Upper bound of the inner learning rate."""
    eta_init: OpenFraction = 0.05
    """Inner learning rate at the start of training; below eta_max."""
    forget_init: Annotated[float, Field(gt=0, lt=0.5)] = 1e-4
    """1 - alpha at the start of training; alpha stays at 0.5 or above."""
    momentum_init: OpenFraction = 0.5
    """mu at the start of training."""
    conv_width: PositiveInt = 4
    """Width of the causal depthwise convolution on q, k, v (NL 8.3)."""
    save_every: PositiveInt = 2048
    """Tokens that one piece of the scans has. Backward computes a sequence longer than this again, piece by piece: the fused kernels keep
    the state at the start of every piece (and compute a single piece again too), plain torch keeps it at every chunk for the default rule.
    In plain torch a sequence up to this length keeps everything and computes nothing twice."""
    backend: Literal["auto", "reference", "chunked", "triton"] = "auto"
    """Implementation of the scans; "auto" picks the fused kernels on a GPU where they compute this rule at these widths, else plain torch
    ("chunked"), and the engine logs which one runs."""

    @model_validator(mode="after")
    def _check(self):
        if self.eta_init >= self.eta_max:
            raise ValueError(f"eta_init = {self.eta_init} is not below eta_max = {self.eta_max}")
        if self.chunk_proj % self.chunk_mem:
            raise ValueError(f"chunk_proj = {self.chunk_proj} is not a multiple of chunk_mem = {self.chunk_mem}")
        if self.memory == "linear" and self.dgd_scope == "layerwise":
            raise ValueError('dgd_scope = "layerwise" has no second layer with memory = "linear"; use dgd_scope = "first"')
        if self.objective == "dot" and self.self_target:
            raise ValueError('objective = "dot" has no error to bound a self-generated target; set self_target = false')
        return self


class AttentionConfig(Section):
    """The attention mixer of HOPE-Attention and Transformer++."""

    rope_theta: PositiveFloat = 10000.0
    """Base of the rotary position embedding."""


class CMSConfig(Section):
    """The continuum memory system (SPEC 3): SwiGLU levels, highest update frequency first."""

    hidden: PositiveInt = 576
    """Hidden width of every level."""
    periods: tuple[PositiveInt, ...] = (1, 4, 16)
    """Stream clock: level l takes one optimizer step every periods[l] steps, with the gradients of those steps summed."""
    depth_periods: tuple[PositiveInt, ...] = ()
    """Period of every block's only level, first block first, in place of `periods`, which then has one entry (docs/cms.md, stacking)."""
    variant: Literal["sequential", "independent", "nested"] = "sequential"
    """"sequential": a chain. "independent": all levels on the same input, their outputs added with learned weights (NL eq. 74). "nested": a
    chain in which every level starts again, at each step of the next slower level, from an initial state that learns with the slower
    level's clock (NL eq. 72); every period is a multiple of the one before."""

    def period(self, level: int, *, block: int) -> int:
        """Optimizer steps between two steps of level `level` of block `block`."""
        return self.depth_periods[block] if self.depth_periods else self.periods[level]

    def restart(self, level: int) -> int:
        """Optimizer steps after which a nested level starts again: the period of the next slower level. 0: never."""
        return self.periods[level + 1] if self.variant == "nested" and level + 1 < len(self.periods) else 0

    @model_validator(mode="after")
    def _check(self):
        if not self.periods:
            raise ValueError("periods is empty; a CMS has at least one level")
        if self.depth_periods and len(self.periods) > 1:
            raise ValueError(f"depth_periods goes with one level in every block, periods has {len(self.periods)}; set periods = [1]")
        if self.variant == "nested":
            if len(self.periods) == 1:
                raise ValueError('variant = "nested" needs two levels or more; give periods more entries')
            if any(slow <= fast or slow % fast for fast, slow in itertools.pairwise(self.periods)):
                raise ValueError(f'variant = "nested" needs periods that are multiples of those before, got {list(self.periods)}')
        return self


class ModelConfig(Section):
    """The network (SPEC 1). Every block is x + mixer(norm(x)), then the CMS chain; the final norm and the tied head close it."""

    vocab_size: PositiveInt
    """Number of token ids; must cover the tokenizer's."""
    num_layers: PositiveInt
    """Number of blocks."""
    width: PositiveInt
    """Model width D."""
    num_heads: PositiveInt
    """Heads H; the head width is K = width / num_heads."""
    mixer: Literal["titans", "attention"] = "titans"
    """Sequence mixer of every block."""
    titans: TitansConfig = TitansConfig()
    """Settings of the memory mixer."""
    attention: AttentionConfig = AttentionConfig()
    """Settings of the attention mixer."""
    cms: CMSConfig = CMSConfig()
    """Settings of the feed-forward chain; a transformer's MLP is the case of one level with period 1."""
    tie_embeddings: bool = True
    """Share the embedding matrix with the output head."""
    head_backend: Literal["auto", "reference", "chunked", "triton"] = "auto"
    """Implementation of head and loss in training and evaluation; "auto" picks the fused kernels on a GPU, else plain torch
    ("chunked"). Both hold the logits of a block of the vocabulary at a time, "reference" all of them."""
    norm_eps: PositiveFloat = 1e-6
    """Epsilon of every RMSNorm."""

    @property
    def head_width(self) -> int:
        """K, the width of one head."""
        return self.width // self.num_heads

    @property
    def memory_hidden(self) -> int:
        """F, the hidden width of an MLP memory."""
        return self.titans.memory_hidden or self.head_width

    @model_validator(mode="after")
    def _check(self):
        if self.width % self.num_heads:
            raise ValueError(f"num_heads = {self.num_heads} does not divide width = {self.width}")
        if self.mixer == "attention" and self.head_width % 2:
            raise ValueError(f"rotary embedding needs an even head width, got width / num_heads = {self.head_width}")
        if self.cms.depth_periods and len(self.cms.depth_periods) != self.num_layers:
            raise ValueError(f"cms.depth_periods has {len(self.cms.depth_periods)} entries for num_layers = {self.num_layers} blocks")
        return self


class MQARConfig(Section):
    """Synthetic multi-query associative recall (after Zoology): key-value pairs, then queries for their keys."""

    num_pairs: PositiveInt = 8
    """Key-value pairs in a sequence."""
    num_queries: NonNegativeInt = 0
    """Queries in a sequence, their keys drawn with repetition; 0 means as many as pairs."""
    gap: NonNegativeInt = 8
    """Filler tokens between the pairs and the queries; longer than the convolutions reach, (conv_width - 1) * num_layers."""
    train_samples: PositiveInt = 100_000
    """Distinct training sequences."""
    heldout_samples: PositiveInt = 512
    """Held-out sequences."""


class DataConfig(Section):
    """Where samples come from. Their order is a pure function of (fingerprint, seed, epoch, sample index)."""

    source: Literal["shards", "mqar"] = "shards"
    """Tokenised shards on disk or in an object store, or a generated task."""
    path: str = ""
    """Directory that `hope-data tokenize` wrote (manifest.json, train/, heldout/)."""
    backend: Literal["mds", "streaming"] = "mds"
    """Reader of the shards: memory-mapped local files, or mosaicml-streaming with a cache in `path`."""
    remote: str = ""
    """Object-store address of the same directory (streaming backend only), for example s3://bucket/corpus."""
    seq_len: PositiveInt = 1024
    """Tokens in a training sequence; must equal the manifest's."""
    seed: NonNegativeInt = 0
    """Seed of the sample order, and of the samples of a generated task."""
    shuffle_block: PositiveInt = 8192
    """Samples that are shuffled together; blocks are shuffled too."""
    num_workers: NonNegativeInt = 0
    """Reader processes; the batches are the same for any number."""
    document_reset: bool = True
    """Return the memory to its learned start at every document start."""
    mqar: MQARConfig = MQARConfig()
    """The generated task, where source = "mqar"."""

    @model_validator(mode="after")
    def _check(self):
        if self.source == "shards" and not self.path:
            raise ValueError("path is empty; name the directory that `hope-data tokenize` wrote")
        if self.remote and self.backend != "streaming":
            raise ValueError('remote is set but backend = "mds" reads local files only; set backend = "streaming"')
        return self


class EngineConfig(Section):
    """How megatron-core runs the model. The data-parallel degree is world size / (tensor * context * pipeline)."""

    tensor_parallel: PositiveInt = 1
    """Tensor-parallel degree: memory heads, CMS hidden units and the vocabulary are divided."""
    sequence_parallel: bool = True
    """With tensor_parallel > 1: norms and residuals hold their share of the sequence only."""
    pipeline_parallel: PositiveInt = 1
    """Pipeline-parallel degree: blocks are divided by depth."""
    virtual_stages: PositiveInt = 1
    """Pieces of the model on every pipeline stage: above 1 the interleaved schedule, with a smaller bubble and more messages."""
    first_stage_layers: NonNegativeInt = 0
    """Blocks on the first pipeline stage; 0 divides evenly. The embedding is there too."""
    last_stage_layers: NonNegativeInt = 0
    """Blocks on the last pipeline stage; 0 divides evenly. The head and the loss are there too."""
    overlap_p2p: bool = True
    """With virtual_stages > 1: send and receive between stages while computing."""
    context_parallel: PositiveInt = 1
    """Context-parallel degree: the sequence is divided into contiguous shards."""
    context_mode: Literal["heads", "state"] = "heads"
    """"heads": an all-to-all gives every rank the whole sequence of its share of the heads. "state": every rank keeps its shard of all
    heads and hands the memory's state to the next."""
    distributed_optimizer: bool = False
    """Divide optimizer states and master weights over the data-parallel (and context-parallel) ranks."""
    overlap_grad_reduce: bool = False
    """Reduce gradients while the backward pass still runs."""
    overlap_param_gather: bool = False
    """Gather updated parameters while the next forward pass already runs; needs distributed_optimizer and overlap_grad_reduce."""
    recompute: Literal["none", "block"] = "none"
    """What the backward pass computes again instead of keeping: nothing, or the inside of every block."""
    provider: Literal["local", "te", "apex"] = "local"
    """Linear layers, norms and Adam: megatron's and torch's own, transformer-engine's, or NVIDIA apex's norm and Adam."""
    fp8: bool = False
    """fp8 matrix products in the linear layers; needs provider = "te" and a GPU that has them."""
    micro_batch_size: PositiveInt = 8
    """Sequences in one forward pass of one data-parallel rank."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16 keeps fp32 master weights and fp32 memory states."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """"auto" takes the GPU where there is one."""
    threads: NonNegativeInt = 0
    """CPU threads of one rank; 0 leaves torch's default."""
    timeout_s: PositiveInt = 7200
    """A collective that waits longer than this fails, and names the rank that waited. So it is above the limits of [watchdog]: one that is
    not below it, or 0, has no effect where ranks wait for each other (a job of several ranks warns)."""


class SkipConfig(Section):
    """Which updates are dropped, by all ranks alike: of steps whose loss or gradient is not finite, and optionally of spikes."""

    sigmas: Annotated[float, Field(ge=0)] = 0.0
    """A spike is a loss or gradient norm this many standard deviations above the mean of the last `window` steps taken; 0: no step is."""
    window: Annotated[int, Field(ge=8)] = 128
    """Steps taken that a new one is compared with; before there are that many, no step is a spike."""
    in_a_row: PositiveInt = 3
    """The run has diverged when this many steps in a row are dropped."""
    in_window: PositiveInt = 16
    """The run has diverged when this many of the last `window` steps were dropped."""


class TrainConfig(Section):
    """Length of the run."""

    steps: PositiveInt
    """Optimizer steps."""
    global_batch_size: PositiveInt = 32
    """Sequences in one optimizer step, over all ranks."""
    segments: PositiveInt = 1
    """Pieces in which every sequence is read, one forward and backward pass each. The memory carries over from piece to piece; the gradient
    does not, so activations are those of one piece."""
    seed: NonNegativeInt = 0
    """Seed of the initial parameters."""
    skip: SkipConfig = SkipConfig()
    """The rule for steps that are dropped."""
    start_from: str = ""
    """Begin with the weights of this run (its newest checkpoint), of a step-... directory, or of what `hope stack` wrote, and with nothing
    else of it; empty: with the initial parameters. A run that has checkpoints of its own continues from those."""


class WatchdogConfig(Section):
    """Seconds after which a rank that does not get on ends the job, with the stacks of all ranks (docs/failures.md); 0: no limit."""

    setup_s: NonNegativeInt = 1800
    """From the start of a process to its first step: imports, data, model, checkpoint."""
    first_step_s: NonNegativeInt = 1800
    """The first step of a session, which compiles kernels."""
    step_s: NonNegativeInt = 300
    """Any other step, the wait for its data included."""
    step_factor: NonNegativeInt = 20
    """The limit of a step is at least this many times the median of the last ones."""
    checkpoint_s: NonNegativeInt = 1800
    """What a checkpoint holds up training; the end of a run has the same limit."""
    evaluation_s: NonNegativeInt = 3600
    """One measurement."""


class CheckpointConfig(Section):
    """When checkpoints are written and which are kept."""

    every: NonNegativeInt = 500
    """Steps between checkpoints; 0 writes the last step, and where somebody asks for it (SAVE, a stop)."""
    keep: PositiveInt = 3
    """Newest checkpoints kept; an older one goes only after a newer one has been verified."""
    keep_every: NonNegativeInt = 0
    """Steps whose checkpoints are never removed (multiples of this); 0 means none."""
    asynchronous: bool = False
    """Write while training goes on; a checkpoint counts from the step at which all ranks have finished it."""


class EvalConfig(Section):
    """What is measured while training."""

    every: NonNegativeInt = 200
    """Steps between evaluations; 0 evaluates at the end only."""
    at_start: bool = True
    """Evaluate before the first step too."""
    sequences: PositiveInt = 64
    """Held-out sequences of one evaluation."""
    passkey: bool = True
    """Run the passkey probe at every evaluation (text data only)."""
    diagnostics_every: NonNegativeInt = 50
    """Steps between memory diagnostics lines; 0 switches them off."""
    levels_every: NonNegativeInt = 50
    """Steps between lines about the updates of CMS levels and other parameters (docs/memory_audit.md); 0 switches them off."""
    stragglers_every: NonNegativeInt = 100
    """Steps between comparisons of the ranks' own time in a step; 0 switches them off."""


class TokenClockConfig(Section):
    """The token clock (SPEC 3; docs/token_clock.md): CMS levels that change within a sequence, by its own next-token loss.

    For `hope eval`, `hope generate` and meta-training; it has no effect elsewhere.
    """

    periods: tuple[NonNegativeInt, ...] = ()
    """Tokens between two updates of every CMS level, highest frequency first; 0: the level stays as trained. Empty: no clock."""
    lr: tuple[Annotated[float, Field(ge=0)], ...] = ()
    """Learning rate of every level, for the gradient summed over its tokens; 0: the level stays as trained."""
    step_cap: Annotated[float, Field(ge=0)] = 0.0
    """Most that one update may move a matrix, relative to the norm of the trained one; 0 means no limit."""
    total_cap: Annotated[float, Field(ge=0)] = 0.0
    """Most that a matrix may be away from the trained one, relative to its norm; 0 means no limit."""
    meta_train: bool = False
    """Train through the updates: the training loss is that of a sequence read with the clock on, with second-order gradients. For short
    sequences on one device or data-parallel ones, with model.titans.backend = "reference"."""

    @property
    def active(self) -> tuple[int, ...]:
        """The levels that change."""
        return tuple(level for level, (period, lr) in enumerate(zip(self.periods, self.lr, strict=True)) if period and lr)

    @property
    def fastest(self) -> int:
        """The shortest period of a level that changes: every call is cut there. ValueError where no level changes."""
        return min(self.periods[level] for level in self.active)

    @model_validator(mode="after")
    def _check(self):
        if len(self.lr) != len(self.periods):
            raise ValueError(f"lr = {list(self.lr)} has not one learning rate for each of periods = {list(self.periods)}")
        for level in self.active:
            if self.periods[level] % self.fastest:
                raise ValueError(f"the shortest period, {self.fastest}, does not divide all of periods = {list(self.periods)}")
        if self.meta_train and not self.active:
            raise ValueError("meta_train = true without a level that changes; give a level a period and a learning rate above 0")
        return self


class TrackConfig(Section):
    """Optional copies of metrics.jsonl."""

    wandb: bool = False
    """Send metrics to Weights & Biases."""
    wandb_project: str = "hope-pt"
    """Project name there."""
    wandb_mode: Literal["offline", "online"] = "offline"
    """Offline writes to the run directory and needs neither network nor key."""


class RunConfig(Section):
    """One run, whole."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    """Identity of the run; started again with the same name it continues."""
    out: str = "runs"
    """Directory in which the run directory `name` lies."""
    model: ModelConfig
    """The network."""
    data: DataConfig = Field(default_factory=lambda: DataConfig())
    """The samples."""
    optim: OptimConfig = OptimConfig()
    """The optimizer."""
    engine: EngineConfig = EngineConfig()
    """The parallel layout."""
    train: TrainConfig
    """The length."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """The checkpoints."""
    eval: EvalConfig = EvalConfig()
    """The evaluations."""
    watchdog: WatchdogConfig = WatchdogConfig()
    """The limits of a hang."""
    token_clock: TokenClockConfig = TokenClockConfig()
    """The levels that change within a sequence."""
    track: TrackConfig = TrackConfig()
    """The trackers."""

    @model_validator(mode="after")
    def _check_optim(self):
        cms, levels = self.model.cms, len(self.model.cms.periods)
        if self.optim.levels and len(self.optim.levels) != levels:
            raise ValueError(f"optim.levels has {len(self.optim.levels)} entries, model.cms.periods {levels}; give every level a rule")
        if cms.variant == "nested" and "dgd" in (self.optim.levels or (self.optim.name,)):
            raise ValueError(
                'optim: rule "dgd" keeps the inputs of one set of weights, a level of model.cms.variant = "nested" has two; choose another'
            )
        caps = {"optim.level_step_cap": self.optim.level_step_cap, "optim.level_total_cap": self.optim.level_total_cap}
        key = "model.cms.depth_periods" if cms.depth_periods else "model.cms.periods"
        periods = cms.depth_periods or cms.periods
        if max(periods) == 1 and any(caps.values()):
            cap = next(cap for cap, value in caps.items() if value)
            raise ValueError(
                f"{cap} = {caps[cap]} is for levels with a period above 1, and {key} = {list(periods)}; set the cap to 0, or longer periods"
            )
        if self.optim.matrix_lr and {self.optim.name, self.optim.memory, *self.optim.levels} == {"adamw"}:
            raise ValueError(
                f"optim.matrix_lr = {self.optim.matrix_lr} is for matrices that do not have AdamW, and all have it; set optim.lr, or give "
                "optim.name, optim.levels or optim.memory another rule"
            )
        return self

    @model_validator(mode="after")
    def _check(self):
        levels = len(self.model.cms.periods)
        absent = [level for level in self.optim.freeze_levels if level >= levels]
        if absent:
            raise ValueError(
                f"optim.freeze_levels = {list(self.optim.freeze_levels)}: the model has {levels} CMS levels, 0 to {levels - 1}"
            )
        if self.token_clock.periods and len(self.token_clock.periods) != levels:
            raise ValueError(f"token_clock.periods has {len(self.token_clock.periods)} entries, the model has {levels} CMS levels")
        reach = (self.model.titans.conv_width - 1) * self.model.num_layers
        if self.data.source == "mqar" and self.data.mqar.gap <= reach:
            raise ValueError(
                f"data.mqar.gap = {self.data.mqar.gap} is within the reach of the convolutions, (conv_width - 1) * num_layers = {reach}; "
                f"set data.mqar.gap to at least {reach + 1}"
            )
        if self.train.global_batch_size % self.engine.micro_batch_size:
            raise ValueError(
                f"train.global_batch_size = {self.train.global_batch_size} is not a multiple of "
                f"engine.micro_batch_size = {self.engine.micro_batch_size}"
            )
        if self.model.cms.variant == "nested" and self.engine.provider != "local":
            raise ValueError(
                f'model.cms.variant = "nested" needs engine.provider = "local": Adam of "{self.engine.provider}" counts updates by group, '
                "and the parameters of a nested level have two counts"
            )
        return self
