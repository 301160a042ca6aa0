"""`TrainEngine`: one optimizer step on megatron-core's schedule, with results that do not depend on the layout.

    batch (this rank's rows) -> micro-batches -> forward_backward_func -> sum of nll * mask, number of counted tokens
      -> finalize_model_grads (sum over data-parallel ranks, / global number) -> clip -> optimizer with its clocks

The loss is the local sum over the global count: neither the number of ranks nor the micro-batch size enters it.
"""

import contextlib
import functools
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from hope_pt.config.schema import RunConfig
from hope_pt.engine import state
from hope_pt.engine.compat import quiet
from hope_pt.engine.model import build_model, named_parameters
from hope_pt.engine.optimizer import build_optimizer, step_optimizer
from hope_pt.engine.plan import Plan
from hope_pt.errors import DataError, ParallelError
from hope_pt.nn import HopeLM, model_layout
from hope_pt.nn.titans import TitansCore
from hope_pt.optim import learning_rate

_LOG = logging.getLogger(__name__)


class BatchLike(Protocol):
    """What the engine reads of a batch. tokens, targets int64; loss_mask float32, 1 = counted, 0 = not; doc_start bool: all [B, T]."""

    @property
    def tokens_BT(self) -> Tensor: ...
    @property
    def targets_BT(self) -> Tensor: ...
    @property
    def loss_mask_BT(self) -> Tensor: ...
    @property
    def doc_start_BT(self) -> Tensor: ...


@dataclass(frozen=True)
class StepResult:
    """What one step reports.

    loss: nats per counted token over the global batch, the same number on every rank. grad_norm: before clipping. lr: of this step.
    skipped: the gradient was not finite and was dropped.
    """

    loss: float
    grad_norm: float
    lr: float
    skipped: bool


@dataclass(frozen=True)
class _Micro:
    """One micro-batch on the device."""

    tokens_BT: Tensor
    targets_BT: Tensor
    mask_BT: Tensor
    doc_start_BT: Tensor


class TrainEngine:
    """A model, its optimizer and their clocks on one rank."""

    def __init__(self, config: RunConfig, plan: Plan):
        self.config = config
        self.plan = plan
        self.num_steps_done = 0
        with quiet():
            self.model = _wrap(build_model(config.model, plan=plan, seq_len=config.data.seq_len), plan=plan)
            self.parameters = named_parameters(self.model)
            self.optimizer = build_optimizer(self.parameters, config=config, plan=plan)
        state.initialize(self.parameters, model=config.model, seed=config.train.seed)
        backends = {core.backend for core in self.model.modules() if isinstance(core, TitansCore)}
        if backends and plan.rank == 0:
            _LOG.info("memory scans: backend %s", ", ".join(backends))

    def step(self, batch: BatchLike) -> StepResult:
        """Train on this rank's rows of the global batch: [global_batch_size / dp_size, seq_len].

        Every rank calls it with its own rows. DataError if the rows do not match the plan or no token of the global batch is counted,
        ParallelError with this rank's number if a collective fails.
        """
        micros = list(self._micros(batch))
        if len(micros) != self.plan.num_microbatches or micros[-1].tokens_BT.shape != micros[0].tokens_BT.shape:
            raise DataError(
                f"rank {self.plan.rank} was given {len(batch.tokens_BT)} rows; its part of train.global_batch_size = "
                f"{self.config.train.global_batch_size} is {self.plan.num_microbatches * self.config.engine.micro_batch_size}"
            )
        lr = learning_rate(self.num_steps_done, optim=self.config.optim, num_steps=self.config.train.steps)
        with _named_rank(self.plan):
            self.model.zero_grad_buffer()
            self.optimizer.zero_grad()
            reports = self._run(micros, forward_only=False)
            loss = self._global_loss(reports)
            grad_norm, skipped = step_optimizer(self.optimizer, lr=lr, clip=self.config.optim.clip)
        self.num_steps_done += 1
        return StepResult(loss=loss, grad_norm=grad_norm, lr=lr, skipped=skipped)

    @torch.no_grad()
    def token_losses(self, batch: BatchLike) -> Tensor:
        """Loss of every token in nats, [B, T] fp32, for any number of rows; the loss mask is ignored and nothing changes."""
        return torch.cat(self._run(list(self._micros(batch)), forward_only=True))

    def export(self) -> dict[str, Tensor]:
        """All weights in fp32 on the CPU under HopeLM's names (the masters where the model is bf16)."""
        return state.export(self.parameters)

    def to_lm(self) -> HopeLM:
        """A plain HopeLM on the CPU with the weights of `export`."""
        lm = HopeLM(self.config.model)
        lm.load_state_dict(self.export())
        return lm

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Everything that the next step depends on: flat CPU tensors "model.*", "optim.*" and JSON-able scalars."""
        tensors, scalars = state.save(self.parameters, optimizer=self.optimizer.optimizer)
        return tensors, {"step": self.num_steps_done, **scalars}

    def load_state(self, tensors: dict[str, Tensor], scalars: dict[str, Any]) -> None:
        """Take over what `state` gave; later losses are equal bit for bit. CheckpointError if names or shapes do not match."""
        state.load(self.parameters, optimizer=self.optimizer.optimizer, tensors=tensors, scalars=scalars)
        self.num_steps_done = int(scalars["step"])

    def _micros(self, batch: BatchLike) -> Iterator[_Micro]:
        doc_start = batch.doc_start_BT if self.config.data.document_reset else torch.zeros_like(torch.as_tensor(batch.doc_start_BT))
        fields = (batch.tokens_BT, batch.targets_BT, batch.loss_mask_BT, doc_start)
        on_device = [torch.as_tensor(field).to(self.plan.device, non_blocking=True) for field in fields]
        size = self.config.engine.micro_batch_size
        for first in range(0, len(on_device[0]), size):
            yield _Micro(*(field[first : first + size] for field in on_device))

    def _run(self, micros: list[_Micro], *, forward_only: bool) -> list[Tensor]:
        """The schedule over the micro-batches; what the loss function reports of each."""
        groups = self.plan.groups
        schedule = get_forward_backward_func(pp_size=groups.pipeline.size(), vp_size=None)
        return schedule(
            forward_step_func=functools.partial(self._forward, report_tokens=forward_only),
            data_iterator=iter(micros),
            model=[self.model],
            num_microbatches=len(micros),
            seq_length=self.config.data.seq_len,
            micro_batch_size=self.config.engine.micro_batch_size,
            forward_only=forward_only,
            pg_collection=groups.megatron,
        )

    def _forward(self, micros: Iterator[_Micro], model: torch.nn.Module, *, report_tokens: bool):
        micro = next(micros)
        shape = (micro.tokens_BT.shape[0], micro.tokens_BT.shape[1])
        layout = model_layout(self.config.model, shape, doc_start_BT=micro.doc_start_BT, device=self.plan.device)
        losses_BT = model(micro.tokens_BT, None, None, labels=micro.targets_BT, packed_seq_params=layout)
        return losses_BT, functools.partial(_sum_loss, mask_BT=micro.mask_BT, report_tokens=report_tokens)

    def _global_loss(self, reports: list[Tensor]) -> float:
        total = torch.stack(reports).sum(0)
        dist.all_reduce(total, group=self.plan.groups.data_context)
        loss_sum, count = total.tolist()
        if count == 0:
            raise DataError(f"no token of the global batch of step {self.num_steps_done} is counted: its loss mask is zero everywhere")
        return loss_sum / count


def _sum_loss(losses_BT: Tensor, *, mask_BT: Tensor, report_tokens: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Loss in megatron's per-token convention: (sum of the loss, number of tokens, what the schedule returns of this micro-batch)."""
    loss = (losses_BT * mask_BT).sum()
    count = mask_BT.sum()
    # In float64 the reported sum is the same in any order of ranks and micro-batches to the last printed digit.
    report = losses_BT if report_tokens else torch.stack([(losses_BT.detach().double() * mask_BT).sum(), count.double()])
    return loss, count.int(), report


def _wrap(gpt: GPTModel, *, plan: Plan) -> DistributedDataParallel:
    """The model in megatron's data-parallel wrapper: fp32 gradient buffers, one reduction a step."""
    settings = DistributedDataParallelConfig(grad_reduce_in_fp32=True, overlap_grad_reduce=False, use_distributed_optimizer=False)
    model = DistributedDataParallel(gpt.config, settings, gpt, pg_collection=plan.groups.megatron)
    config: TransformerConfig = gpt.config
    config.no_sync_func = model.no_sync
    config.finalize_model_grads_func = finalize_model_grads
    return model


@contextlib.contextmanager
def _named_rank(plan: Plan) -> Iterator[None]:
    """A collective that fails is reported with the rank it failed on."""
    try:
        yield
    except RuntimeError as error:
        # gloo raises plain RuntimeError.
        if isinstance(error, dist.DistError) or "gloo" in str(error):
            raise ParallelError(f"rank {plan.rank} of {plan.world_size}: a collective failed: {error}") from error
        raise
