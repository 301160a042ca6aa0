"""The outer optimizer inside megatron-core's wrappers.

    AdamW, DeepOptimizer <- Clocked (per-group clocks) <- Watched <- FP32Optimizer | Float16OptimizerWithFloat16Params (fp32 masters)
    AdamW alone          <- Clocked                    <- Watched <- DistributedOptimizer (a slice of everything on each data-parallel rank)

The wrappers do what depends on the layout: gradients from the reduction buffers, which of them a rank counts in the norm, master
weights. With `engine.distributed_optimizer` AdamW's state is cut anywhere; with a rule that needs whole matrices the ranks divide the
parameters instead (hope_pt.engine.layerwise). Gradients are clipped by the global norm of every step, over all parameters, before a slow
group accumulates them: an interval is a sum of clipped gradients.
"""

import contextlib
from collections.abc import Mapping, Sequence
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
from torch.optim import Optimizer

from hope_pt.config.optim import OptimConfig
from hope_pt.config.schema import RunConfig
from hope_pt.engine.costs import update_costs
from hope_pt.engine.cpu import cuda_type_names
from hope_pt.engine.inputs import SharedInputs
from hope_pt.engine.layerwise import Exchange, groups_of, owners
from hope_pt.engine.matrices import matrices_of
from hope_pt.engine.mesh import sharding
from hope_pt.engine.plan import Plan
from hope_pt.engine.sharding import Shard, shard_axis
from hope_pt.engine.watching import Piece, watch
from hope_pt.optim.clocks import Clocked
from hope_pt.optim.deep import DeepOptimizer
from hope_pt.optim.groups import Group, group_parameters
from hope_pt.optim.guards import START
from hope_pt.optim.nested import INITIAL_STATE, RESTART, Nested
from hope_pt.optim.rules import UpdateRule, make_rule


class OuterOptimizer:
    """The optimizer of the parameters with the given canonical names, which `models` in their wrappers hold.

    sharding: "none", every rank keeps everything; "elements", slices; "layers", whole parameters. rules: the optimizer of every parameter,
    by name. owner_of: with "layers", the rank of the data and context axes that updates a parameter. pieces: what this rank updates.
    watched: guard rails and measurements.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], *, models: Sequence[DistributedDataParallel], config: RunConfig, plan: Plan):
        self._plan, self._clip = plan, config.optim.clip
        self.sharding = sharding(config)
        shapes = whole_shapes(parameters, ranks=plan.groups.tensor.size())
        groups = group_parameters(shapes, config=config.model, optim=config.optim)
        self.rules = {name: group.rule.optimizer for group in groups for name in group.names}
        self._watched_inputs = _read_inputs(groups, optim=config.optim)
        inputs = {name: parameters[name] for name in self._watched_inputs}
        self._inputs = SharedInputs(inputs, models=models, plan=plan) if inputs else None
        self._exchange: Exchange | None = None
        self.owner_of: dict[str, int] = {}
        if self.sharding == "layers":
            replicas = plan.groups.data_context
            periods = {name: group.rule.period for group in groups for name in group.names}
            self.owner_of = owners(update_costs(shapes, model=config.model, optim=config.optim), periods=periods, ranks=replicas.size())
            self._exchange = Exchange(parameters, owner_of=self.owner_of, periods=periods, group=replicas)
            groups = groups_of(groups, owner_of=self.owner_of, rank=replicas.rank())
        inner = _inner(groups, parameters, config=config, plan=plan)
        self._deep = next((optimizer for optimizer in inner if isinstance(optimizer, DeepOptimizer)), None)
        self._deep_group = {name: number for number, group in enumerate(_deep_groups(groups)) for name in group.names}
        restarts = any(group.rule.restart for group in groups)
        self._clocked = Clocked(*(Nested(optimizer) if restarts else optimizer for optimizer in inner))
        self._megatron = _wrap(inner[0] if self.sharding == "elements" else self._clocked, models=models, config=config, plan=plan)
        owned = {name: parameters[name] for group in groups for name in group.names}
        self.pieces = _distributed_pieces(self._megatron, owned) if self.sharding == "elements" else _whole_pieces(owned)
        name_of = {id(piece.main): name for name, piece in self.pieces.items()}
        self._names = [name_of[id(param)] for param in self._clocked.params()]
        shared = self.sharding == "none"
        self.watched, self._frozen = watch(
            self._clocked, pieces=self.pieces, parameters=parameters, groups=groups, shared=shared, config=config, plan=plan
        )
        # After the wrappers: megatron's distributed optimizer looks for the type of its inner one, and all replace parameters.
        self._megatron.optimizer = self.watched

    @property
    def num_calls(self) -> int:
        """Steps that the clocks have counted."""
        return self._clocked.num_calls

    def zero_grad(self) -> None:
        """Clear the gradients of all parameters and masters."""
        self._megatron.zero_grad()

    @torch.no_grad()
    def prepare(self) -> Tensor:
        """Take the reduced gradients over from the models; returns the square of their global norm, a scalar on the device.

        A rank counts its pieces; parameters that all tensor-parallel ranks hold count on the first of them, a tied embedding on the first
        stage.
        """
        self._megatron.prepare_grads()
        for main in self._frozen:
            main.grad = None
        groups = self._plan.groups
        counted = [
            gradient
            for parameter, gradient in self._gradients()
            if param_is_not_shared(parameter) and param_is_not_tensor_parallel_duplicate(parameter, groups.tensor)
        ]
        norms = torch._foreach_norm(counted) if counted else [torch.zeros((), device=self._plan.device)]
        squares = torch.stack(norms).square().sum()
        dist.all_reduce(squares, group=dist.group.WORLD if self.sharding != "none" else groups.model)
        return squares

    @torch.no_grad()
    def step(self, *, lr: float, grad_norm: float, drop: bool) -> None:
        """One step with the gradients that `prepare` took over, clipped by their global norm. The same arguments on every rank.

        drop: no parameter and no accumulator sees them, but all clocks advance.
        """
        for group in self._clocked.param_groups:
            # DeepOptimizer applies the scales of its groups itself.
            group["lr"] = lr if "rule" in group else lr * group["lr_scale"]
        if drop:
            self._megatron.zero_grad(set_to_none=True)
        else:
            self._clip_gradients(grad_norm)
        if self._inputs:
            self._keep_inputs(self._inputs.take())
        self.watched.skipped = drop
        # What `self._megatron.optimizer` is: its step, then masters to bf16 weights.
        self._megatron.step_with_ready_grads()
        if self._exchange:
            self._exchange.run(num_calls=self.num_calls)

    def unwatched(self) -> contextlib.AbstractContextManager[None]:
        """Within it forward passes are no part of training: no rule takes note of what the layers see."""
        return self._inputs.collected.paused() if self._inputs else contextlib.nullcontext()

    def _keep_inputs(self, grams: Mapping[str, Tensor]) -> None:
        """Add what the layers saw to the state of their weights; without a gradient (a dropped step, a frozen level) it is forgotten.

        KeyError for weights with a gradient whose layers no hook has seen: their rule would become plain gradient descent.
        """
        for name in self._watched_inputs & self.pieces.keys():
            main = self.pieces[name].main
            if self._deep is not None and main.grad is not None:
                self._deep.state_of(main, group=self._deep_group[name])["gram"].add_(grams[name])

    def own_shape(self, name: str, key: str) -> tuple[int, ...]:
        """Shape of this rank's tensor `key` of the parameter `name` where it is not the parameter's, else ()."""
        if self._deep is None or name not in self._deep_group:
            return ()
        return self._deep.own_shapes(self._deep_group[name]).get(key.removeprefix(INITIAL_STATE), ())

    def entries(self) -> dict[str, dict[str, Tensor]]:
        """The optimizer's tensors of every piece that has any, by parameter: references, shaped like the piece."""
        state = self._clocked.state_dict()["state"]
        found = {name: dict(state[index]) for index, name in enumerate(self._names) if index in state}
        for name, start in self.watched.guards.starts.items():
            found.setdefault(name, {})[START] = start
        return found

    def restore(self, entries: Mapping[str, dict[str, Tensor]], *, num_calls: int) -> None:
        """The inverse of `entries`, and of `num_calls`."""
        self.watched.guards.starts = {name: entry[START] for name, entry in entries.items() if START in entry}
        inner = {name: {key: value for key, value in entry.items() if key != START} for name, entry in entries.items()}
        state = {index: inner[name] for index, name in enumerate(self._names) if inner.get(name)}
        self._clocked.load_state_dict({**self._clocked.state_dict(), "state": state, "num_calls": num_calls})

    def _clip_gradients(self, norm: float) -> None:
        """Scale all gradients, of the global norm `norm`, so that it is at most `clip`.

        megatron's own clipping waits for the device once for every parameter where neither Transformer Engine nor apex is installed.
        """
        gradients = [gradient for _, gradient in self._gradients()]
        if norm > self._clip and gradients:
            torch._foreach_mul_(gradients, self._clip / norm)

    def _gradients(self) -> list[tuple[Tensor, Tensor]]:
        """What has a gradient, with it."""
        return [(parameter, parameter.grad) for parameter in self._megatron.get_parameters() if parameter.grad is not None]


def whole_shapes(parameters: Mapping[str, Tensor], *, ranks: int) -> dict[str, tuple[int, ...]]:
    """Shapes of the whole parameters of which each of `ranks` tensor-parallel ranks has a part."""
    return {name: Shard(name, value, shard_axis(name), 0, ranks).full_shape for name, value in parameters.items()}


def _read_inputs(groups: Sequence[Group], *, optim: OptimConfig) -> set[str]:
    """Parameters whose rule needs the inputs of their layers."""
    deep = _deep_groups(groups)
    return {name for group in deep if make_rule(group.rule.optimizer, optim=optim).reads_inputs for name in group.names}


def _deep_groups(groups: Sequence[Group]) -> list[Group]:
    return [group for group in groups if group.rule.optimizer != "adamw"]


def _inner(
    groups: Sequence[Group], parameters: Mapping[str, nn.Parameter], *, config: RunConfig, plan: Plan
) -> list[torch.optim.Optimizer]:
    """AdamW of the provider for its groups, `DeepOptimizer` for the others; neither where a rank has none of its parameters."""
    optim, deep = config.optim, _deep_groups(groups)
    inner: list[Optimizer] = []
    plain = [_torch_group(group, parameters, optim=optim) for group in groups if group not in deep]
    if plain:
        inner.append(plan.provider.adam(plain, lr=optim.lr, betas=optim.betas, eps=optim.eps))
    if deep:
        rules: dict[str, UpdateRule] = {group.rule.optimizer: make_rule(group.rule.optimizer, optim=optim) for group in deep}
        matrices = [
            matrices_of(group.view, ndim=parameters[group.names[0]].dim(), group=plan.groups.tensor) for group in deep if group.view
        ]
        inner.append(DeepOptimizer([_torch_group(group, parameters, optim=optim) for group in deep], rules=rules, matrices=matrices))
    return inner


def _torch_group(group: Group, parameters: Mapping[str, nn.Parameter], *, optim: OptimConfig) -> dict[str, Any]:
    rule = group.rule
    settings = {"weight_decay": optim.weight_decay if rule.decay else 0.0, "period": rule.period, "lr_scale": rule.lr_scale}
    deep = {} if rule.optimizer == "adamw" else {"rule": rule.optimizer}
    return {"params": [parameters[name] for name in group.names], **settings, RESTART: rule.restart, **deep}


def _wrap(inner: Any, *, models: Sequence[DistributedDataParallel], config: RunConfig, plan: Plan) -> MegatronOptimizer:
    bf16, elements = plan.dtype == torch.bfloat16, sharding(config) == "elements"
    settings = OptimizerConfig(
        optimizer="adam",
        lr=config.optim.lr,
        clip_grad=config.optim.clip,
        bf16=bf16,
        params_dtype=plan.dtype,
        use_distributed_optimizer=elements,
        overlap_param_gather=config.engine.overlap_param_gather,
    )
    with cuda_type_names(plan.device):
        if elements:
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
