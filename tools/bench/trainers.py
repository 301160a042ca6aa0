"""A training step of one model on one device, for benchmarks: the engine's where megatron-core is installed, else a plain loop.

Both keep matrices in bf16 with fp32 masters and everything per head or channel in fp32, clip the gradient and run AdamW. The plain loop
steps every CMS level in every step; the engine follows the levels' clocks.
"""

import functools
import gc
import importlib.util
from typing import Any, Protocol

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from hope_pt.config.schema import ModelConfig, RunConfig
from hope_pt.nn import HopeBlock, HopeLM

Batch = tuple[torch.Tensor, torch.Tensor]
"""Tokens and targets [B, T] int64."""


class Trainer(Protocol):
    """step(batch) trains on all rows of a batch and gives the mean loss in nats; close() gives the memory back."""

    def step(self, batch: Batch) -> float: ...

    def close(self) -> None: ...


class PlainTrainer:
    """HopeLM, torch's fused AdamW, rows divided into micro-batches."""

    def __init__(self, config: RunConfig, *, device: torch.device, lr: float):
        self.rows, self.clip = config.engine.micro_batch_size, config.optim.clip
        self.model = HopeLM(config.model, device=device)
        for module in self.model.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                module.to(torch.bfloat16)
        if config.engine.recompute == "block":
            for block in self.model.blocks:
                block.forward = _recomputed(block)  # type: ignore[method-assign]
        parameters = list(self.model.parameters())
        self.narrow = [p for p in parameters if p.dtype == torch.bfloat16]
        self.masters = [p.detach().float() for p in self.narrow]
        self.trained = [*self.masters, *(p for p in parameters if p.dtype != torch.bfloat16)]
        optim = config.optim
        self.optimizer = torch.optim.AdamW(
            self.trained, lr=lr, betas=optim.betas, eps=optim.eps, weight_decay=optim.weight_decay, fused=True
        )

    def step(self, batch: Batch) -> float:
        parts = list(zip(*(t.split(self.rows) for t in batch), strict=True))
        total = torch.zeros((), device=batch[0].device)
        for tokens, targets in parts:
            loss = self.model.token_losses(tokens, targets).mean() / len(parts)
            loss.backward()
            total += loss.detach()
        for master, parameter in zip(self.masters, self.narrow, strict=True):
            assert parameter.grad is not None  # every matrix takes part in every step
            master.grad, parameter.grad = parameter.grad.float(), None
        torch.nn.utils.clip_grad_norm_(self.trained, self.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        with torch.no_grad():
            for parameter, master in zip(self.narrow, self.masters, strict=True):
                parameter.copy_(master)
        return total.item()

    def close(self) -> None:
        self.__dict__.clear()
        _collect()


def _recomputed(block: HopeBlock) -> Any:
    return functools.partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)


class EngineTrainer:
    """hope_pt.engine on one process."""

    def __init__(self, config: RunConfig, *, device: torch.device, lr: float):
        from hope_pt.engine import TrainEngine, start

        values = {"device": device.type, "precision": "bf16", "distributed_optimizer": False, "overlap_grad_reduce": False}
        engine = config.engine.model_copy(update={**values, "overlap_param_gather": False})
        optim = config.optim.model_copy(update={"lr": lr, "warmup_steps": 0})
        config = config.model_copy(update={"engine": engine, "optim": optim})
        self.plan = start(config)
        self.engine = TrainEngine(config, self.plan)

    def step(self, batch: Batch) -> float:
        from hope_pt.testing import RandomBatch

        tokens, targets = batch
        starts = torch.zeros_like(tokens, dtype=torch.bool)
        starts[:, 0] = True
        return self.engine.step(RandomBatch(tokens, targets, torch.ones_like(tokens, dtype=torch.float32), starts)).loss

    def close(self) -> None:
        from hope_pt.engine import stop

        stop(self.plan)
        self.__dict__.clear()
        _collect()


def _collect() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def kind() -> str:
    """The engine where megatron-core is installed, else the plain loop."""
    return "engine" if importlib.util.find_spec("megatron") else "plain"


def build(config: RunConfig, *, which: str, device: torch.device, lr: float) -> Trainer:
    """A trainer of a run configuration: its model, optimizer settings, micro-batch size and recomputation."""
    return PlainTrainer(config, device=device, lr=lr) if which == "plain" else EngineTrainer(config, device=device, lr=lr)


def with_backend(model: ModelConfig, backend: str) -> ModelConfig:
    """The model with its scans and its head on a backend: "triton" or "chunked"."""
    titans = model.titans.model_copy(update={"backend": backend})
    return model.model_copy(update={"titans": titans, "head_backend": backend})
