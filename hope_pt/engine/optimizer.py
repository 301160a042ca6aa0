"""The outer optimizer inside megatron-core's wrappers.

    AdamW <- Clocked (per-group clocks) <- FP32Optimizer | Float16OptimizerWithFloat16Params (fp32 masters) | DistributedOptimizer (shards)

The wrappers do what depends on the layout: gradients from the reduction buffers, which of them a rank counts in the norm, master
weights, and with `engine.distributed_optimizer` the share of every parameter that a data-parallel rank keeps. Gradients are clipped by the
global norm of every step, over all parameters, before a slow group accumulates them: an interval is a sum of clipped gradients.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import OptimizerConfig
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params, FP32Optimizer, MegatronOptimizer
from megatron.core.tensor_parallel import param_is_not_tensor_parallel_duplicate
from megatron.core.transformer.module import param_is_not_shared
from torch import Tensor, nn

from hope_pt.config.schema import RunConfig
from hope_pt.engine.cpu import cuda_type_names
from hope_pt.engine.plan import Plan
from hope_pt.optim import Clocked, group_parameters


@dataclass(frozen=True)
class Piece:
    """What this rank's optimizer updates of one parameter: the fp32 tensor `main`, elements first to end of the flattened parameter.

    Without the distributed optimizer that is all of it, in its own shape.
    """

    main: Tensor
    first: int
    end: int

    def cut(self, value: Tensor) -> Tensor:
        """This piece of a tensor of the parameter's shape."""
        return value.reshape(-1)[self.first : self.end].view(self.main.shape)


class OuterOptimizer:
    """The optimizer of the parameters with the given canonical names, which `pieces` (models in their wrappers) hold."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], *, models: Sequence[DistributedDataParallel], config: RunConfig, plan: Plan):
        self._plan, self._clip = plan, config.optim.clip
        self.is_distributed = config.engine.distributed_optimizer
        groups = _groups(parameters, config=config)
        inner = plan.provider.adam(groups, lr=config.optim.lr, betas=config.optim.betas, eps=config.optim.eps)
        self._megatron = _wrap(inner, models=models, config=config, plan=plan)
        # After the wrappers, which look for the type of the optimizer and replace its parameters.
        self._clocked = self._megatron.optimizer = Clocked(inner)
        self.pieces = _distributed_pieces(self._megatron, parameters) if self.is_distributed else _whole_pieces(parameters)
        name_of = {id(piece.main): name for name, piece in self.pieces.items()}
        self._names = [name_of[id(param)] for param in self._clocked.params()]

    @property
    def num_calls(self) -> int:
        """Steps that the clocks have counted."""
        return self._clocked.num_calls

    def zero_grad(self) -> None:
        """Clear the gradients of all parameters and masters."""
        self._megatron.zero_grad()

    @torch.no_grad()
    def step(self, *, lr: float) -> tuple[float, bool]:
        """One step with the reduced gradients; returns the gradient norm before clipping and whether the gradients were dropped.

        Gradients with a non-finite norm are dropped: no parameter and no accumulator sees them, but all clocks advance.
        """
        for group in self._megatron.param_groups:
            group["lr"] = lr
        self._megatron.prepare_grads()
        grad_norm = self._clip_gradients()
        skipped = not math.isfinite(grad_norm)
        if skipped:
            self._megatron.zero_grad(set_to_none=True)
        self._megatron.step_with_ready_grads()
        return grad_norm, skipped

    def entries(self) -> dict[str, dict[str, Tensor]]:
        """The optimizer's tensors of every piece that has any, by parameter: references, shaped like the piece."""
        state = self._clocked.state_dict()["state"]
        return {name: state[index] for index, name in enumerate(self._names) if index in state}

    def restore(self, entries: Mapping[str, dict[str, Tensor]], *, num_calls: int) -> None:
        """The inverse of `entries`, and of `num_calls`."""
        state = {index: entries[name] for index, name in enumerate(self._names) if entries.get(name)}
        self._clocked.load_state_dict({**self._clocked.state_dict(), "state": state, "num_calls": num_calls})

    def _clip_gradients(self) -> float:
        """Scale all gradients so that their global norm is at most `clip`; returns the norm before.

        A rank counts its pieces; parameters that all tensor-parallel ranks hold count on the first of them, a tied embedding on the first
        stage. megatron's own clipping waits for the device once for every parameter where neither Transformer Engine nor apex is installed;
        this waits once.
        """
        groups = self._plan.groups
        parameters = [parameter for parameter in self._megatron.get_parameters() if parameter.grad is not None]
        counted = [
            parameter.grad
            for parameter in parameters
            if param_is_not_shared(parameter) and param_is_not_tensor_parallel_duplicate(parameter, groups.tensor)
        ]
        norms = torch._foreach_norm(counted) if counted else [torch.zeros((), device=self._plan.device)]
        squares = torch.stack(norms).square().sum()
        dist.all_reduce(squares, group=dist.group.WORLD if self.is_distributed else groups.model)
        norm = math.sqrt(float(squares))
        if math.isfinite(norm) and norm > self._clip and parameters:
            torch._foreach_mul_([parameter.grad for parameter in parameters], self._clip / norm)
        return norm


def _groups(parameters: Mapping[str, nn.Parameter], *, config: RunConfig) -> list[dict[str, Any]]:
    shapes = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
    return [
        {
            "params": [parameters[name] for name in group.names],
            "weight_decay": config.optim.weight_decay if group.rule.decay else 0.0,
            "period": group.rule.period,
        }
        for group in group_parameters(shapes, config=config.model)
    ]


def _wrap(inner: torch.optim.Optimizer, *, models: Sequence[DistributedDataParallel], config: RunConfig, plan: Plan) -> MegatronOptimizer:
    bf16 = plan.dtype == torch.bfloat16
    settings = OptimizerConfig(
        optimizer="adam",
        lr=config.optim.lr,
        clip_grad=config.optim.clip,
        bf16=bf16,
        params_dtype=plan.dtype,
        use_distributed_optimizer=config.engine.distributed_optimizer,
        overlap_param_gather=config.engine.overlap_param_gather,
    )
    with cuda_type_names(plan.device):
        if config.engine.distributed_optimizer:
            with torch.no_grad():  # its shards of fp32 parameters are views, which must not belong to a graph
                return DistributedOptimizer(
                    inner,
                    settings,
                    None,
                    _no_lazy_state,
                    model_chunks=list(models),
                    per_model_buffers={index: model.buffers for index, model in enumerate(models)},
                    data_parallel_group=plan.groups.data_context,
                    data_parallel_group_gloo=None,
                    data_parallel_group_idx=0,
                    distributed_optimizer_instance_id=0,
                )
        if bf16:
            return Float16OptimizerWithFloat16Params(inner, settings, None, _no_lazy_state)
        return FP32Optimizer(inner, settings, _no_lazy_state)


def _whole_pieces(parameters: Mapping[str, nn.Parameter]) -> dict[str, Piece]:
    mains = {name: getattr(parameter, "main_param", parameter) for name, parameter in parameters.items()}
    return {name: Piece(main, 0, main.numel()) for name, main in mains.items()}


def _distributed_pieces(optimizer: DistributedOptimizer, parameters: Mapping[str, nn.Parameter]) -> dict[str, Piece]:
    """The pieces of the parameters of which this data-parallel rank has any."""
    pieces = {}
    for name, parameter in parameters.items():
        place = optimizer.model_param_group_index_map.get(parameter)
        if place is not None:
            group, order = place
            span = optimizer._get_model_param_range_map(parameter)["param"]
            pieces[name] = Piece(optimizer.optimizer.param_groups[group]["params"][order], span.start, span.end)
    return pieces


def _no_lazy_state(optimizer: Clocked, config: OptimizerConfig) -> None:
    """Nothing: megatron creates empty moments before it loads one of its own checkpoints; hope_pt.engine.state does not load through it."""
