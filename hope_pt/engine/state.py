"""What a checkpoint stores of the engine, under names that no layout and no megatron version changes.

Tensors: `model.<name>` are the weights in fp32 under HopeLM's names (the masters where the model is bf16, of which the bf16 values are
the rounding). `optim.<name>.<key>` are the optimizer's tensors of the same parameter: those that its rule names (exp_avg and exp_avg_sq
of AdamW), and `accumulated` for a parameter whose CMS level is within an interval. Scalars: the number of calls of the clock, the updates
that each parameter has had and other counters, which parameters have which tensor, and the rules of those that do not have AdamW.

Ranks that hold the same part of a parameter (data and context parallel) share the work: tensor number i of a rank belongs to the rank
i modulo their number, which alone writes it, and reads it to broadcast it to the others. megatron's distributed optimizer holds a part of
each such tensor on every rank; it is put together on that rank. Layer-wise, a tensor belongs to the rank that owns the parameter, and
state stays there. State with a shape of its own is the same on all tensor-parallel ranks, and the first of them writes it.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hope_pt.config.schema import ModelConfig
from hope_pt.engine.optimizer import OuterOptimizer
from hope_pt.engine.plan import Plan
from hope_pt.engine.sharding import Shard, shard_axis, slice_of
from hope_pt.errors import CheckpointError
from hope_pt.nn.init import init_tensor
from hope_pt.optim.clocks import ACCUMULATED

# torch's name for the number of updates of one parameter.
_UPDATES = "step"
# Before the names of what guard rails and measurements keep.
_WATCH = "watch."

Read = Callable[[list[Shard]], None]


@dataclass(frozen=True)
class _Entry:
    """One stored tensor of one parameter of this rank: `key` is empty for the weight itself."""

    parameter: str
    key: str

    @property
    def name(self) -> str:
        return f"optim.{self.parameter}.{self.key}" if self.key else f"model.{self.parameter}"


class EngineState:
    """The stored state of this rank's parameters and their optimizer. All methods are collectives of the whole job."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], *, optimizer: OuterOptimizer, plan: Plan):
        self.parameters, self.optimizer, self.plan = parameters, optimizer, plan
        self._replicas = plan.groups.data_context

    def initialize(self, *, model: ModelConfig, seed: int) -> None:
        """Set every parameter to its initial value of `seed`, which is HopeLM's."""
        for name, parameter in self.parameters.items():
            full = init_tensor(name, self._part(_Entry(name, ""), parameter).full_shape, config=model, seed=seed)
            self._assign(name, self._slice(name, full))

    def weights(self) -> list[Shard]:
        """What this rank contributes of the weights."""
        return self._owned([_Entry(name, "") for name in self.parameters], stored={})

    def shards(self) -> tuple[list[Shard], dict[str, Any]]:
        """What this rank writes, and the scalars, which are the same on every rank."""
        stored = self.optimizer.entries()
        scalars = self._scalars(stored)
        tensors, scalars["watch"] = self.optimizer.watched.keeps()
        watch = [Shard(_WATCH + name, data) for name, data in tensors.items() if self.plan.rank == 0]
        return self._owned(self._entries(scalars), stored=stored) + watch, scalars

    def _owned(self, entries: Sequence[_Entry], *, stored: Mapping[str, Mapping[str, Tensor]]) -> list[Shard]:
        found: list[Shard] = []
        for index, entry in enumerate(entries):
            data = self._collect(entry, stored=stored, owner=self._owner(entry, index))
            if data is not None and self._writes(entry):
                found.append(self._part(entry, data))
        return found

    @torch.no_grad()
    def load(self, read: Read, scalars: Mapping[str, Any]) -> None:
        """Take over stored values. `read` fills the data of the given shards in place; several ranks may ask for the same part.

        CheckpointError if a parameter had another rule than it has here.
        """
        self._check_rules(scalars["rules"])
        entries = self._entries(scalars)
        mine = {
            entry: torch.empty(self._shape(entry))
            for index, entry in enumerate(entries)
            if self._owner(entry, index) == self._replicas.rank()
        }
        # The weights alone, with which another run starts, come without.
        watch = self.optimizer.watched.empty(scalars["watch"]) if "watch" in scalars else {}
        read([self._part(entry, data) for entry, data in mine.items()] + [Shard(_WATCH + name, data) for name, data in watch.items()])
        if "watch" in scalars:
            self.optimizer.watched.take_over(watch, scalars["watch"])
        stored: dict[str, dict[str, Tensor]] = {name: {} for name in self.optimizer.pieces}
        for index, entry in enumerate(entries):
            if entry.key and self.optimizer.sharding == "layers":
                if entry in mine:
                    stored[entry.parameter][entry.key] = mine.pop(entry).to(self.plan.device)
                continue
            data = self._spread(entry, mine.pop(entry, None), owner=self._owner(entry, index))
            if not entry.key:
                self._assign(entry.parameter, data)
            elif entry.parameter in stored:
                piece = self.optimizer.pieces[entry.parameter]
                # Only this rank's part stays; with the distributed optimizer the whole would not fit.
                has_own_shape = self.optimizer.own_shape(entry.parameter, entry.key)
                stored[entry.parameter][entry.key] = data if has_own_shape else piece.cut(data).clone()
        for key, counts in {_UPDATES: scalars["updates"], **scalars["counts"]}.items():
            for name in counts.keys() & stored.keys():
                stored[name][key] = torch.tensor(float(counts[name]))
        self.optimizer.restore(stored, num_calls=scalars["clock"])

    def gather(self, shards: Iterable[Shard], *, on_all: bool = True) -> dict[str, Tensor]:
        """Whole tensors on the CPU of every rank, or of the first one, from the shards of all ranks."""
        own = {shard.name: shard for shard in shards}
        if self.plan.world_size == 1:
            return {name: shard.data.cpu() for name, shard in own.items()}
        listed: list[dict[str, tuple[int, ...]]] = [{}] * self.plan.world_size
        dist.all_gather_object(listed, {name: shard.full_shape for name, shard in own.items()})
        shapes = {name: shape for found in listed for name, shape in found.items()}
        whole = {}
        for name in sorted(shapes):
            # One tensor at a time on the device, filled by the ranks that hold a part of it.
            data = torch.zeros(shapes[name], device=self.plan.device)
            if name in own:
                shard = own[name]
                slice_of(data, axis=shard.axis, index=shard.index, count=shard.count).copy_(shard.data)
            if on_all:
                dist.all_reduce(data)
            else:
                dist.reduce(data, dst=0)
            if on_all or self.plan.rank == 0:
                whole[name] = data.cpu()
        return whole

    def reader(self, tensors: Mapping[str, Tensor]) -> Read:
        """A `read` for `load` that takes its shards from whole tensors. CheckpointError if they are not those of this model."""

        def read(shards: Sequence[Shard]) -> None:
            for shard in shards:
                full = tensors.get(shard.name)
                if full is None:
                    raise CheckpointError(
                        f"the checkpoint is of another model: {shard.name} is missing; resume with the configuration that wrote it"
                    )
                if tuple(full.shape) != shard.full_shape:
                    raise CheckpointError(
                        f"{shard.name} is {tuple(full.shape)} in the checkpoint and {shard.full_shape} in this model; "
                        "resume with the configuration that wrote it"
                    )
                shard.data.copy_(slice_of(full, axis=shard.axis, index=shard.index, count=shard.count))

        return read

    def _entries(self, scalars: Mapping[str, Any]) -> list[_Entry]:
        """The stored tensors of this rank's parameters, in the order that decides their owners."""
        entries = [_Entry(name, "") for name in self.parameters]
        for key, names in scalars["tensors"].items():
            having = set(names)
            entries += [_Entry(name, key) for name in self.parameters if name in having]
        return entries

    def _check_rules(self, stored: Mapping[str, str]) -> None:
        for name in self.parameters:
            before, now = stored.get(name, "adamw"), self.optimizer.rules[name]
            if before != now:
                raise CheckpointError(
                    f'the checkpoint is of another optimizer: {name} has the state of "{before}" there and optim.name, optim.levels and '
                    f'optim.memory give it "{now}" here; resume with the configuration that wrote it'
                )

    def _scalars(self, stored: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Any]:
        """Clock, counters, names of tensors and rules of all parameters of the job."""
        own = {
            name: ({key: int(value) for key, value in entry.items() if not value.dim()}, [key for key in entry if entry[key].dim()])
            for name, entry in stored.items()
        }
        everyone = [(own, self.optimizer.rules)] * self.plan.world_size
        if self.plan.world_size > 1:
            dist.all_gather_object(everyone, (own, self.optimizer.rules))
        counts: dict[str, dict[str, int]] = {_UPDATES: {}}
        tensors: dict[str, set[str]] = {ACCUMULATED: set()}
        for found, _ in everyone:
            for name, (counters, keys) in found.items():
                for key, count in counters.items():
                    counts.setdefault(key, {})[name] = count
                for key in keys:
                    tensors.setdefault(key, set()).add(name)
        return {
            "clock": self.optimizer.num_calls,
            "updates": dict(sorted(counts.pop(_UPDATES).items())),
            "counts": {key: dict(sorted(counts[key].items())) for key in sorted(counts)},
            "tensors": {key: sorted(tensors[key]) for key in sorted(tensors)},
            "rules": dict(sorted((name, rule) for _, rules in everyone for name, rule in rules.items() if rule != "adamw")),
        }

    def _owner(self, entry: _Entry, index: int) -> int:
        """The rank, of those that hold the same part, which writes the entry and reads it."""
        if self.optimizer.sharding == "layers":
            return self.optimizer.owner_of[entry.parameter]
        return index % self._replicas.size()

    def _shape(self, entry: _Entry) -> torch.Size | tuple[int, ...]:
        """Of this rank's part."""
        return self.optimizer.own_shape(entry.parameter, entry.key) or self.parameters[entry.parameter].shape

    def _axis(self, entry: _Entry) -> int | None:
        """Along which tensor-parallel ranks divide the entry: a shape of its own begins with the heads where the parameter does."""
        is_stack = self.parameters[entry.parameter].dim() > 2
        return shard_axis(entry.parameter) if is_stack or not self.optimizer.own_shape(entry.parameter, entry.key) else None

    def _writes(self, entry: _Entry) -> bool:
        """Whether this tensor-parallel rank and stage write the entry: one of those that hold the same values."""
        parameter = self.parameters[entry.parameter]
        return not getattr(parameter, "shared", False) and (self._axis(entry) is not None or self.plan.groups.tensor.rank() == 0)

    def _part(self, entry: _Entry, data: Tensor) -> Shard:
        axis, group = self._axis(entry), self.plan.groups.tensor
        return Shard(entry.name, data, axis) if axis is None else Shard(entry.name, data, axis, group.rank(), group.size())

    def _slice(self, name: str, full: Tensor) -> Tensor:
        group = self.plan.groups.tensor
        return slice_of(full, axis=shard_axis(name), index=group.rank(), count=group.size())

    def _assign(self, name: str, value: Tensor) -> None:
        self.parameters[name].data.copy_(value)
        piece = self.optimizer.pieces.get(name)
        if piece:
            piece.main.data.copy_(piece.cut(value))

    def _collect(self, entry: _Entry, *, stored: Mapping[str, Mapping[str, Tensor]], owner: int) -> Tensor | None:
        """The tensor on its owner, fp32 on the CPU, None on the others."""
        piece = self.optimizer.pieces.get(entry.parameter)
        is_owner = self._replicas.rank() == owner
        if piece is not None:
            value = stored[entry.parameter][entry.key] if entry.key else piece.main
            if self.optimizer.sharding != "elements":
                return _cpu(value) if is_owner else None
        elif self.optimizer.sharding == "layers":
            return None
        whole = torch.zeros(self.parameters[entry.parameter].shape, device=self.plan.device)
        if piece is not None:
            whole.view(-1)[piece.first : piece.end] = value.detach().float()
        dist.reduce(whole, group_dst=owner, group=self._replicas)
        return whole.cpu() if is_owner else None

    def _spread(self, entry: _Entry, data: Tensor | None, *, owner: int) -> Tensor:
        """The owner's tensor on every rank, on its device."""
        if data is None:
            data = torch.empty(self._shape(entry))
        data = data.to(self.plan.device)
        if self._replicas.size() > 1:
            dist.broadcast(data, group_src=owner, group=self._replicas)
        return data


def _cpu(tensor: Tensor) -> Tensor:
    return tensor.detach().to(device="cpu", dtype=torch.float32, copy=True).contiguous()
