"""The outer optimizer inside megatron-core's wrappers.

    AdamW (torch) <- Clocked (per-group clocks) <- FP32Optimizer | Float16OptimizerWithFloat16Params (fp32 masters)

The wrappers do what depends on the layout: gradients from the reduction buffers, which of them a rank counts in the norm, master
weights. Gradients are clipped by the global norm of every step, over all parameters, before a slow group accumulates them: an interval
is a sum of clipped gradients.
"""

import math
from collections.abc import Mapping

import torch
import torch.distributed as dist
from megatron.core.optimizer import OptimizerConfig
from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params, FP32Optimizer, MegatronOptimizer
from megatron.core.tensor_parallel import param_is_not_tensor_parallel_duplicate
from megatron.core.transformer.module import param_is_not_shared
from torch import nn

from hope_pt.config.schema import RunConfig
from hope_pt.engine.cpu import cuda_type_names
from hope_pt.engine.plan import Plan
from hope_pt.optim import Clocked, group_parameters


def build_optimizer(parameters: Mapping[str, nn.Parameter], *, config: RunConfig, plan: Plan) -> MegatronOptimizer:
    """The optimizer of the parameters with the given canonical names. Its `.optimizer` is the `Clocked` one."""
    shapes = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
    groups = [
        {
            "params": [parameters[name] for name in group.names],
            "names": group.names,
            "weight_decay": config.optim.weight_decay if group.rule.decay else 0.0,
            "period": group.rule.period,
        }
        for group in group_parameters(shapes, config=config.model)
    ]
    inner = torch.optim.AdamW(groups, lr=config.optim.lr, betas=config.optim.betas, eps=config.optim.eps, fused=True)
    bf16 = plan.dtype == torch.bfloat16
    settings = OptimizerConfig(
        optimizer="adam",
        lr=config.optim.lr,
        clip_grad=config.optim.clip,
        bf16=bf16,
        params_dtype=plan.dtype,
    )
    with cuda_type_names(plan.device):
        if bf16:
            optimizer = Float16OptimizerWithFloat16Params(Clocked(inner), settings, None, _no_lazy_state)
        else:
            optimizer = FP32Optimizer(Clocked(inner), settings, _no_lazy_state)
    optimizer.grad_stats_parallel_group = plan.groups.model
    optimizer.tp_group = plan.groups.tensor
    return optimizer


def master(parameter: nn.Parameter) -> torch.Tensor:
    """The tensor that the optimizer updates: the fp32 master of a bf16 parameter, or the parameter itself."""
    return getattr(parameter, "main_param", parameter)


@torch.no_grad()
def assign(parameter: nn.Parameter, value: torch.Tensor) -> None:
    """Set a parameter and its master to `value`."""
    master(parameter).data.copy_(value)
    parameter.data.copy_(value)


@torch.no_grad()
def step_optimizer(optimizer: MegatronOptimizer, *, lr: float, clip: float) -> tuple[float, bool]:
    """One step with the reduced gradients; returns the gradient norm before clipping and whether the gradients were dropped.

    Gradients with a non-finite norm are dropped: no parameter and no accumulator sees them, but all clocks advance.
    """
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.prepare_grads()
    grad_norm = clip_gradients(optimizer, clip=clip)
    skipped = not math.isfinite(grad_norm)
    if skipped:
        optimizer.zero_grad(set_to_none=True)
    optimizer.step_with_ready_grads()
    return grad_norm, skipped


def clip_gradients(optimizer: MegatronOptimizer, *, clip: float) -> float:
    """Scale all gradients so that their global norm is at most `clip`; returns the norm before.

    A rank counts its shards, and replicated parameters on the first tensor-parallel rank only. megatron's own clipping waits for the
    device once for every parameter where neither Transformer Engine nor apex is installed; this waits once.
    """
    parameters = [parameter for parameter in optimizer.get_parameters() if parameter.grad is not None]
    counted = [
        parameter.grad
        for parameter in parameters
        if param_is_not_shared(parameter) and param_is_not_tensor_parallel_duplicate(parameter, optimizer.tp_group)
    ]
    squares = torch.stack(torch._foreach_norm(counted)).square().sum()
    dist.all_reduce(squares, group=optimizer.grad_stats_parallel_group)
    norm = math.sqrt(float(squares))
    if math.isfinite(norm) and norm > clip:
        torch._foreach_mul_([parameter.grad for parameter in parameters], clip / norm)
    return norm


def _no_lazy_state(optimizer: Clocked, config: OptimizerConfig) -> None:
    """Nothing: megatron creates empty moments before it loads one of its own checkpoints; hope_pt.engine.state does not load through it."""
