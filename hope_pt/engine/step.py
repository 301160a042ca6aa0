"""`TrainEngine`: one optimizer step on megatron-core's schedule, with results that do not depend on the layout.

    batch (this rank's rows) -> micro-batches (engine.micro) -> forward_backward_func -> sum of nll * mask, number of counted tokens
      -> finalize_model_grads (sum over data-parallel ranks, / global number) -> skip rule -> clip -> optimizer with its clocks

The loss is the local sum over the global count: neither the number of ranks nor the micro-batch size enters it.
"""

import contextlib
import functools
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from hope_kernels.linear_cross_entropy import head_backend
from hope_pt.config.schema import RunConfig
from hope_pt.engine.collectives import is_broken
from hope_pt.engine.compat import quiet
from hope_pt.engine.mesh import sharding
from hope_pt.engine.meta import MetaLosses
from hope_pt.engine.micro import BatchLike, MicroBatch, join_losses, micro_batches, own_rows
from hope_pt.engine.model import build_model, named_parameters
from hope_pt.engine.optimizer import OuterOptimizer
from hope_pt.engine.plan import Plan
from hope_pt.engine.sharding import Shard
from hope_pt.engine.state import EngineState
from hope_pt.engine.stopwatch import Stopwatch
from hope_pt.errors import ConfigError, DataError, ParallelError
from hope_pt.nn import HopeLM
from hope_pt.nn.titans import TitansCore
from hope_pt.optim import learning_rate
from hope_pt.optim.spikes import SkipRule

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class StepResult:
    """What one step reports.

    loss: nats per counted token over the global batch, the same number on every rank. grad_norm: before clipping. lr: of this step.
    skipped: its gradients were dropped (hope_pt.optim.spikes). spike: they were although loss and norm are finite. skips: steps dropped
    since the run began. diverged: why the run should end here, "" while it should not.
    """

    loss: float
    grad_norm: float
    lr: float
    skipped: bool
    spike: bool = False
    skips: int = 0
    diverged: str = ""


def _log_backend(core: TitansCore, plan: Plan) -> None:
    """Say what the scans run on. ConfigError where a forced backend cannot run here."""
    try:
        backend, obstacle = core.backend(plan.device)
    except ValueError as error:
        raise ConfigError(f"model.titans.backend: {error}") from None
    if plan.rank == 0:
        _LOG.info("memory scans: backend %s%s", backend, f" (no fused kernels: {obstacle})" if obstacle else "")


def _log_head(config: RunConfig, plan: Plan) -> None:
    """Say what head and loss run on. ConfigError where a forced backend cannot run here."""
    try:
        backend = head_backend(config.model.head_backend, device=plan.device)
    except ValueError as error:
        raise ConfigError(f"model.head_backend: {error}") from None
    if plan.rank == 0:
        _LOG.info("head and loss: backend %s", backend)


class TrainEngine:
    """A model, its optimizer and their clocks on one rank."""

    def __init__(self, config: RunConfig, plan: Plan):
        self.config = config
        self.plan = plan
        self.num_steps_done = 0
        self._stopwatch = Stopwatch(plan.device)
        with quiet():
            self.models = _wrap(build_model(config, plan=plan), config=config, plan=plan, stopwatch=self._stopwatch)
            self.parameters = named_parameters(self.models, config=config.model, plan=plan)
            self.optimizer = OuterOptimizer(self.parameters, models=self.models, config=config, plan=plan)
        self._state = EngineState(self.parameters, optimizer=self.optimizer, plan=plan)
        self._state.initialize(model=config.model, seed=config.train.seed)
        self._skips = SkipRule(config.train.skip)
        meta = config.token_clock.meta_train
        self._meta = MetaLosses(config, mesh=plan.mesh, parameters=self.parameters) if meta else None
        cores = [core for model in self.models for core in model.modules() if isinstance(core, TitansCore)]
        if cores:
            _log_backend(cores[0], plan)
        _log_head(config, plan)

    def step(self, batch: BatchLike) -> StepResult:
        """Train on this rank's rows of the global batch: [global_batch_size / dp_size, seq_len].

        Every rank calls it with its own rows; the ranks of one model have the same. DataError if the rows do not match the plan or no token
        of the global batch is counted, ParallelError with this rank's number if a collective fails.
        """
        rows = self.config.train.global_batch_size // self.plan.dp_size
        if len(batch.tokens_BT) != rows:
            raise DataError(
                f"rank {self.plan.rank} was given {len(batch.tokens_BT)} rows; its part of train.global_batch_size = "
                f"{self.config.train.global_batch_size} is {rows}"
            )
        lr = learning_rate(self.num_steps_done, optim=self.config.optim, num_steps=self.config.train.steps)
        with _named_rank(self.plan):
            for model in self.models:
                model.zero_grad_buffer()
            self.optimizer.zero_grad()
            self._stopwatch.start()
            reports = self._run(micro_batches(batch, config=self.config, plan=self.plan), forward_only=False)
            loss, grad_norm = self._agree(self._loss_sums(reports), self.optimizer.prepare())
            verdict = self._skips.judge(loss=loss, norm=grad_norm)
            self.optimizer.step(lr=lr, grad_norm=grad_norm, drop=verdict.dropped)
        self.num_steps_done += 1
        if verdict.dropped and self.plan.rank == 0:
            _LOG.warning("step %d: its update was dropped: %s", self.num_steps_done, verdict.reason)
        return StepResult(
            loss=loss,
            grad_norm=grad_norm,
            lr=lr,
            skipped=verdict.dropped,
            spike=verdict.spike,
            skips=self._skips.skips,
            diverged=verdict.diverged,
        )

    @property
    def own_s(self) -> float:
        """Seconds that this rank needed for its part of the last step, before it waited for other data-parallel ranks."""
        return self._stopwatch.seconds

    @torch.no_grad()
    def token_losses(self, batch: BatchLike) -> Tensor:
        """Loss of every token in nats, [B, T] fp32, for any number of rows; the loss mask is ignored and nothing changes.

        A collective of the job: every rank gives the same rows and gets the losses of all of them; data-parallel ranks divide the work.
        """
        own = own_rows(batch, plan=self.plan)
        micros = micro_batches(own, config=self.config, plan=self.plan, whole=self.plan.mesh.pipeline > 1)
        with _named_rank(self.plan), self.optimizer.unwatched():
            return join_losses(self._run(micros, forward_only=True), rows=len(batch.tokens_BT), config=self.config, plan=self.plan)

    def export(self, *, on_all: bool = True) -> dict[str, Tensor]:
        """All weights in fp32 on the CPU under HopeLM's names (the masters where the model is bf16); a collective.

        on_all: false gives them to the first rank only, and the others {}.
        """
        gathered = self._state.gather(self._state.weights(), on_all=on_all)
        return {name.removeprefix("model."): tensor for name, tensor in gathered.items()}

    def to_lm(self) -> HopeLM | None:
        """A plain HopeLM with the weights of `export` on the CPU of the first rank, None on the others; a collective."""
        weights = self.export(on_all=False)
        if self.plan.rank != 0:
            return None
        lm = HopeLM(self.config.model, device=torch.device("meta"))
        lm.load_state_dict(weights, assign=True)
        return lm

    def shards(self) -> tuple[list[Shard], dict[str, Any]]:
        """Everything that the next step depends on: what this rank has to write, and JSON-able scalars, the same on every rank.

        A collective. Over all ranks each part of each tensor is listed once.
        """
        shards, scalars = self._state.shards()
        return shards, {"step": self.num_steps_done, "skips": self._skips.state_dict(), **scalars}

    def load(self, read: Callable[[list[Shard]], None], scalars: Mapping[str, Any]) -> None:
        """Take over what `shards` gave, under any layout; with the same one, later losses are equal bit for bit.

        A collective. `read` is called once on every rank, with a list that may be empty and may ask for parts that others ask for too; it
        fills the data of each shard in place, and raises CheckpointError for names or shapes that it does not have.
        """
        self._state.load(read, scalars)
        self.num_steps_done = int(scalars["step"])
        self._skips = SkipRule(self.config.train.skip)
        # Checkpoints from before the rule, and the weights alone with which another run starts, come without.
        if "skips" in scalars:
            self._skips.load_state_dict(scalars["skips"])

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """As `shards`, but whole tensors on every rank, for models that fit one process; a collective."""
        shards, scalars = self.shards()
        return self._state.gather(shards), scalars

    def load_state(self, tensors: Mapping[str, Tensor], scalars: Mapping[str, Any]) -> None:
        """Take over what `state` gave. CheckpointError if names or shapes do not match."""
        self.load(self._state.reader(tensors), scalars)

    def _run(self, micros: list[MicroBatch], *, forward_only: bool) -> list[Tensor]:
        """The schedule over the micro-batches; what the loss function reports of each, on the last pipeline stage."""
        groups, mesh = self.plan.groups, self.plan.mesh
        pipelined = {} if mesh.pipeline == 1 else {"p2p_communicator": P2PCommunicator(groups.pipeline, self.models[0].config)}
        schedule = get_forward_backward_func(pp_size=mesh.pipeline, vp_size=mesh.virtual if mesh.virtual > 1 else None)
        iterators = [iter(micros) for _ in self.models]
        return schedule(
            forward_step_func=functools.partial(_forward, report_tokens=forward_only, meta=self._meta),
            data_iterator=iterators if mesh.virtual > 1 else iterators[0],
            model=self.models,
            num_microbatches=len(micros),
            seq_length=mesh.tokens_per_rank * mesh.context,
            micro_batch_size=self.config.engine.micro_batch_size,
            forward_only=forward_only,
            pg_collection=groups.megatron,
            **pipelined,
        )

    def _loss_sums(self, reports: list[Tensor]) -> Tensor:
        """[sum of the loss in nats, counted tokens] of the global batch, fp64 on the device; only the last pipeline stage has reports."""
        total = torch.stack(reports).sum(0) if reports else torch.zeros(2, dtype=torch.float64, device=self.plan.device)
        dist.all_reduce(total, group=self.plan.groups.data_context)
        if self.plan.mesh.pipeline > 1:
            dist.all_reduce(total, group=self.plan.groups.pipeline)
        return total

    def _agree(self, loss_sums: Tensor, squares: Tensor) -> tuple[float, float]:
        """Loss in nats per counted token and norm of the gradient: the first rank's, so that no rank decides otherwise by a last bit."""
        values = torch.cat([loss_sums, squares.double().view(1)])
        if self.plan.world_size > 1:
            dist.broadcast(values, src=0)
        loss_sum, count, square = values.tolist()
        if count == 0:
            raise DataError(f"no token of the global batch of step {self.num_steps_done} is counted: its loss mask is zero everywhere")
        return loss_sum / count, math.sqrt(square)


def _forward(micros: Iterator[MicroBatch], model: torch.nn.Module, *, report_tokens: bool, meta: MetaLosses | None):
    micro = next(micros)
    if meta is None:
        losses_BT = model(micro.tokens_BT, None, None, labels=micro.targets_BT, packed_seq_params=micro.passage)
    else:
        losses_BT = meta.losses(micro)
    return losses_BT, functools.partial(_sum_loss, mask_BT=micro.mask_BT, report_tokens=report_tokens)


def _sum_loss(losses_BT: Tensor, *, mask_BT: Tensor, report_tokens: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Loss in megatron's per-token convention: (sum of the loss, number of tokens, what the schedule returns of this micro-batch)."""
    loss = (losses_BT * mask_BT).sum()
    count = mask_BT.sum()
    # In float64 the reported sum is the same in any order of ranks and micro-batches to the last printed digit.
    report = losses_BT if report_tokens else torch.stack([(losses_BT.detach().double() * mask_BT).sum(), count.double()])
    return loss, count.int(), report


def _wrap(pieces: Sequence[GPTModel], *, config: RunConfig, plan: Plan, stopwatch: Stopwatch) -> list[DistributedDataParallel]:
    """The pieces in megatron's data-parallel wrapper: fp32 gradient buffers, one reduction a step, during the backward pass or after it."""
    engine = config.engine
    settings = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=engine.overlap_grad_reduce,
        overlap_param_gather=engine.overlap_param_gather,
        use_distributed_optimizer=sharding(config) == "elements",
    )
    models = [
        # Later pieces are not on the critical path of the communication and are not cut into buckets.
        DistributedDataParallel(piece.config, settings, piece, disable_bucketing=index > 0, pg_collection=plan.groups.megatron)
        for index, piece in enumerate(pieces)
    ]
    if engine.overlap_param_gather:
        stopwatch.leave_out_gathers(models)
    megatron: TransformerConfig = pieces[0].config
    megatron.finalize_model_grads_func = stopwatch.before(finalize_model_grads)
    megatron.no_sync_func = _one_or_list([model.no_sync for model in models])
    if plan.mesh.pipeline > 1 and engine.overlap_grad_reduce:
        megatron.grad_sync_func = _one_or_list([model.start_grad_sync for model in models])
    if plan.mesh.pipeline > 1 and engine.overlap_param_gather:
        megatron.param_sync_func = _one_or_list([model.start_param_sync for model in models])
    return models


def _one_or_list(functions: list[Callable]) -> Callable | list[Callable]:
    """Megatron's schedules take one function, or with virtual stages a list."""
    return functions if len(functions) > 1 else functions[0]


@contextlib.contextmanager
def _named_rank(plan: Plan) -> Iterator[None]:
    """A collective that fails is reported with the rank it failed on."""
    try:
        yield
    except RuntimeError as error:
        if is_broken(error):
            raise ParallelError(f"rank {plan.rank} of {plan.world_size}: a collective failed: {error}") from error
        raise
