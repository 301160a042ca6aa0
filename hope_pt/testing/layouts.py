"""Parallel layouts for tests: what an engine computed under any of them as whole tensors, and the same by a plain single-process loop."""

import contextlib
import dataclasses
import gc
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hope_pt.config.schema import RunConfig
from hope_pt.engine import Launch, TrainEngine, start, stop
from hope_pt.engine.sharding import shard_axis
from hope_pt.nn import HopeLM
from hope_pt.nn.state import LMState
from hope_pt.optim import Clocked, DeepOptimizer, Matrices, group_parameters, learning_rate, make_rule
from hope_pt.optim.nested import Nested
from hope_pt.optim.rules import UpdateRule
from hope_pt.testing.batches import RandomBatch, random_batch


@dataclass(frozen=True)
class Trained:
    """A few steps of a run: losses, gradient norms before clipping, clipped gradients of the first step, final weights; whole tensors."""

    losses: tuple[float, ...]
    grad_norms: tuple[float, ...]
    gradients: dict[str, Tensor]
    weights: dict[str, Tensor]


def with_engine(config: RunConfig, *, segments: int = 1, **engine: Any) -> RunConfig:
    """The same run under another layout."""
    return config.model_copy(
        update={
            "engine": config.engine.model_copy(update=engine),
            "train": config.train.model_copy(update={"segments": segments}),
        }
    )


def batch_at(config: RunConfig, step: int) -> RandomBatch:
    """The global batch of a step."""
    return random_batch(
        batch=config.train.global_batch_size, length=config.data.seq_len, vocab_size=config.model.vocab_size, seed=100 + step
    )


def train_plainly(config: RunConfig, *, steps: int, dtype: torch.dtype = torch.float32) -> Trained:
    """HopeLM, autograd, the optimizers and the clocks: no engine, no megatron. The oracle of every layout, but for DGD's inputs."""
    lm = HopeLM(config.model, seed=config.train.seed).to(dtype)
    parameters = dict(lm.named_parameters())
    clocked = _plain_optimizer(parameters, config)
    losses, norms = [], []
    gradients: dict[str, Tensor] = {}
    for step in range(steps):
        batch = batch_at(config, step)
        clocked.zero_grad()
        losses.append(_backward(lm, batch, segments=config.train.segments))
        norms.append(float(torch.nn.utils.clip_grad_norm_(lm.parameters(), config.optim.clip)))
        gradients = gradients or {name: p.grad.clone() for name, p in parameters.items()}
        for group in clocked.param_groups:
            rate = learning_rate(step, optim=config.optim, num_steps=config.train.steps)
            group["lr"] = rate if "rule" in group else rate * group["lr_scale"]
        clocked.step()
    return Trained(tuple(losses), tuple(norms), gradients, {name: p.detach().clone() for name, p in parameters.items()})


def _plain_optimizer(parameters: Mapping[str, nn.Parameter], config: RunConfig) -> Clocked:
    """AdamW of torch and the deep rules under one clock."""
    optim = config.optim
    groups = group_parameters({name: tuple(p.shape) for name, p in parameters.items()}, config=config.model, optim=optim)
    plain, deep, matrices = [], [], []
    rules: dict[str, UpdateRule] = {}
    for group in groups:
        rule = group.rule
        settings: dict[str, Any] = {
            "params": [parameters[name] for name in group.names],
            "weight_decay": optim.weight_decay * rule.decay,
            "period": rule.period,
            "lr_scale": rule.lr_scale,
            "restart": rule.restart,
        }
        if group.view is None:
            plain.append(settings)
        else:
            deep.append({**settings, "rule": rule.optimizer})
            matrices.append(Matrices(group.view))
            rules[rule.optimizer] = make_rule(rule.optimizer, optim=optim)
    adamw = torch.optim.AdamW(plain, lr=optim.lr, betas=optim.betas, eps=optim.eps)
    # Without a restart `Nested` does nothing.
    return Clocked(Nested(adamw), *([Nested(DeepOptimizer(deep, rules=rules, matrices=matrices))] if deep else []))


def _backward(lm: HopeLM, batch: RandomBatch, *, segments: int) -> float:
    """Loss of a batch, with its gradient added; the state goes from segment to segment, the gradient does not."""
    state = lm.init_state(len(batch.tokens_BT)) if segments > 1 else None
    count, total = batch.loss_mask_BT.sum(), 0.0
    for tokens, targets, mask, starts in zip(*(field.chunk(segments, 1) for field in vars(batch).values()), strict=True):
        logits, state = lm(tokens, doc_start_BT=starts, state=state)
        nll = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view_as(targets)
        loss = (nll * mask).sum() / count
        loss.backward()
        total += loss.item()
        if state is not None:
            state = LMState(state.seen_B, tuple({name: t.detach() for name, t in layer.items()} for layer in state.layers))
    return total


@contextlib.contextmanager
def running(config: RunConfig, *, launch: Launch, key: str = "") -> Iterator[TrainEngine]:
    """A TrainEngine, stopped at the end whatever happens. key: tells apart the jobs that the same workers run one after the other."""
    # The groups of an earlier job are in cycles with its model, and have threads that would slow down this one. Collected here and not at
    # the end, where the caller still holds the engine.
    gc.collect()
    own = dataclasses.replace(launch, master_addr=f"{launch.master_addr}-{key}") if key else launch
    plan = start(config, launch=own)
    try:
        yield TrainEngine(config, plan)
    finally:
        stop(plan)


def part_at(trainer: TrainEngine, step: int) -> RandomBatch:
    """This rank's rows of the global batch of a step."""
    return batch_at(trainer.config, step).part(dp_rank=trainer.plan.dp_rank, dp_size=trainer.plan.dp_size)


def train_on_engine(launch: Launch, config: RunConfig, *, steps: int, key: str = "") -> Trained:
    """The same steps by `TrainEngine`; every rank returns the same whole tensors. key: as of `running`."""
    with running(config, launch=launch, key=key) as trainer:
        results = []
        gradients: dict[str, Tensor] = {}
        for step in range(steps):
            results.append(trainer.step(part_at(trainer, step)))
            gradients = gradients or whole_gradients(trainer)
        losses, norms = (tuple(getattr(result, name) for result in results) for name in ("loss", "grad_norm"))
        return Trained(losses, norms, gradients, trainer.export())


def whole_gradients(trainer: TrainEngine) -> dict[str, Tensor]:
    """Gradients of the last step after clipping, put together from the pieces that the ranks' optimizers step with; a collective."""
    tensor = trainer.plan.groups.tensor
    gradients = {name: vars(parameter)["main_grad"].reshape(-1) for name, parameter in trainer.parameters.items()}
    own = [
        (name, tensor.rank(), piece.first, gradients[name][piece.first : piece.end].clone())
        for name, piece in trainer.optimizer.pieces.items()
    ]
    everyone: list[Any] = [None] * trainer.plan.world_size
    dist.all_gather_object(everyone, (own, {name: tuple(p.shape) for name, p in trainer.parameters.items()}))
    shapes = {name: shape for _, found in everyone for name, shape in found.items()}
    whole = {}
    for name, shape in shapes.items():
        axis = shard_axis(name)
        parts = [torch.full(shape, torch.nan) for _ in range(1 if axis is None else tensor.size())]
        for pieces, _ in everyone:
            for found, rank, first, values in pieces:
                if found == name:
                    parts[0 if axis is None else rank].view(-1)[first : first + len(values)] = values
        whole[name] = parts[0] if axis is None else torch.cat(parts, axis)
    return whole


def train_all(launch: Launch, configs: Sequence[RunConfig], *, steps: int) -> list[Trained | str]:
    """`train_on_engine` for many layouts of one number of processes, one after the other in the same workers; a failed one gives its text.

    Every case has an address of its own. A failure is reported by the rank that has it; the others then fail too, by their collectives.
    """
    results: list[Trained | str] = []
    for index, config in enumerate(configs):
        try:
            results.append(train_on_engine(launch, config, steps=steps, key=f"{index}"))
        except Exception as error:
            results.append(f"rank {launch.rank}: {type(error).__name__}: {error}")
    return results
