"""From the parallel degrees of a configuration to a validated plan and its process groups.

`start` is the one place where torch.distributed and megatron's `parallel_state` are initialised, `stop` where they are destroyed. What
the rest of the engine needs is in the frozen `Plan`: ranks, device, dtype and an explicit `ProcessGroups`; nothing reads
`parallel_state` later. The order of ranks is megatron's (tensor, context, data, pipeline; tensor fastest).
"""

import datetime
import logging
import warnings
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.random import initialize_rng_tracker

from hope_pt.config.schema import RunConfig
from hope_pt.engine import cpu
from hope_pt.engine.compat import capabilities
from hope_pt.engine.launch import Launch
from hope_pt.engine.mesh import Mesh, check_mesh
from hope_pt.engine.phases import limits_beyond
from hope_pt.engine.provider import Provider, choose
from hope_pt.errors import ConfigError, ParallelError

_LOG = logging.getLogger(__name__)
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class ProcessGroups:
    """The groups of this rank, by mesh axis, and the same groups as the object that megatron-core's constructors take."""

    tensor: dist.ProcessGroup
    pipeline: dist.ProcessGroup
    context: dist.ProcessGroup
    data: dist.ProcessGroup
    data_context: dist.ProcessGroup
    model: dist.ProcessGroup
    megatron: ProcessGroupCollection


@dataclass(frozen=True)
class Plan:
    """The validated layout of a run, seen from one rank. A rehearsal has device "meta": it builds everything and computes nothing."""

    rank: int
    world_size: int
    mesh: Mesh
    device: torch.device
    dtype: torch.dtype
    groups: ProcessGroups
    provider: Provider

    @property
    def dp_rank(self) -> int:
        """Which rows of a global batch this rank reads; all ranks of a model share them."""
        return self.groups.data.rank()

    @property
    def dp_size(self) -> int:
        """Data-parallel degree."""
        return self.mesh.data

    @property
    def stage(self) -> int:
        """Pipeline stage."""
        return self.groups.pipeline.rank()


def start(config: RunConfig, *, launch: Launch | None = None) -> Plan:
    """Join the job: process groups, device, threads; without `launch` as its only process. Call `stop` at the end.

    ConfigError if the configuration does not fit the machine, ParallelError if the layout is impossible or this process has already
    started an engine.
    """
    launch = launch or Launch()
    mesh, device, provider = check(config, launch=launch)
    _check_not_started(launch)
    if config.engine.threads:
        torch.set_num_threads(config.engine.threads)
    _ignore_warnings(device)
    if device.type == "cpu":
        cpu.redirect()
    _join(config, device, launch)
    plan = _plan(config, launch=launch, mesh=mesh, device=device, provider=provider)
    if launch.rank == 0:
        _LOG.info("engine: %d x %s, %s, parts: %s", launch.world_size, device.type, capabilities(), provider.name)
        timeout_s = config.engine.timeout_s
        beyond = ", ".join(limits_beyond(timeout_s, limits=config.watchdog))
        if beyond and launch.world_size > 1:
            _LOG.warning("watchdog: %s: no effect in a collective, which fails after engine.timeout_s = %d seconds", beyond, timeout_s)
    return plan


def check(config: RunConfig, *, launch: Launch) -> tuple[Mesh, torch.device, Provider]:
    """What `start` would take for this process; its ConfigError or ParallelError, before anything is started or written."""
    mesh = check_mesh(config, world_size=launch.world_size)
    device = _device(config, local_rank=launch.local_rank)
    return mesh, device, choose(config.engine, device=device)


def rehearse(config: RunConfig, *, world_size: int, rank: int) -> Plan:
    """The plan of one rank of a job that does not exist: real groups of `world_size` ranks that reach nobody, and the meta device.

    A model built on it has the shapes of that rank and no memory. Call `stop` at the end. Errors as in `start`.
    """
    launch = Launch(rank=rank, world_size=world_size)
    mesh = check_mesh(config, world_size=world_size)
    _check_not_started(launch)
    if not torch.cuda.is_available():
        cpu.redirect()
    # Registers the backend; a module of torch's tests, which no training run should need.
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group(backend="fake", store=FakeStore(), rank=rank, world_size=world_size)
    device = torch.device("meta")
    return _plan(config, launch=launch, mesh=mesh, device=device, provider=choose(config.engine, device=device))


def _check_not_started(launch: Launch) -> None:
    if dist.is_initialized():
        raise ParallelError(f"rank {launch.rank}: torch.distributed is already initialised in this process; call engine.stop first")


def _plan(config: RunConfig, *, launch: Launch, mesh: Mesh, device: torch.device, provider: Provider) -> Plan:
    _initialize_model_parallel(config)
    return Plan(
        rank=launch.rank,
        world_size=launch.world_size,
        mesh=mesh,
        device=device,
        dtype=_DTYPES[config.engine.precision],
        groups=_groups(),
        provider=provider,
    )


def stop(plan: Plan) -> None:
    """Leave the job: destroy megatron's groups and torch.distributed. Nothing of `plan` may be used afterwards."""
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()
    # megatron forgets some of its globals. A group that lives on is destroyed when the next job overwrites it, and in a forked process
    # that waits for threads which only the parent has.
    for name in [name for name, value in vars(parallel_state).items() if isinstance(value, dist.ProcessGroup)]:
        vars(parallel_state)[name] = None


def _device(config: RunConfig, *, local_rank: int) -> torch.device:
    wanted, available = config.engine.device, torch.cuda.is_available()
    if wanted == "cpu" or (wanted == "auto" and not available):
        return torch.device("cpu")
    if not available:
        raise ConfigError('engine.device = "cuda" but torch sees no GPU; set engine.device = "cpu" or install a CUDA build of torch')
    if local_rank >= torch.cuda.device_count():
        raise ParallelError(f"local rank {local_rank} has no GPU: this node has {torch.cuda.device_count()}; start one process per GPU")
    if cpu.is_redirected():
        raise ParallelError("this process has already run an engine on the CPU, which lasts; start a new process for the GPU")
    return torch.device("cuda", local_rank)


def _ignore_warnings(device: torch.device) -> None:
    """Hides what a user can do nothing about: names that megatron still uses and torch has replaced, and advice for GPUs on a CPU."""
    warnings.filterwarnings("ignore", category=FutureWarning, message=r"`torch\.distributed\.\w+` is deprecated")
    if device.type == "cpu":
        warnings.filterwarnings("ignore", message=".*CUDA_DEVICE_MAX_CONNECTIONS")


def _join(config: RunConfig, device: torch.device, launch: Launch) -> None:
    address = launch.master_addr if "://" in launch.master_addr else f"tcp://{launch.master_addr}:{launch.master_port}"
    alone = launch.world_size == 1
    if device.type == "cuda":
        torch.cuda.set_device(device)
    try:
        dist.init_process_group(
            backend="nccl" if device.type == "cuda" else "gloo",
            # One process needs no port.
            store=dist.HashStore() if alone else None,
            init_method=None if alone else address,
            rank=launch.rank,
            world_size=launch.world_size,
            timeout=datetime.timedelta(seconds=config.engine.timeout_s),
            device_id=device if device.type == "cuda" else None,
        )
    except dist.DistError as error:
        raise ParallelError(f"rank {launch.rank} of {launch.world_size} could not join at {address}: {error}") from error


def _initialize_model_parallel(config: RunConfig) -> None:
    # The model draws no random numbers (no dropout, initial values by name): no generators to keep apart on tensor-parallel ranks.
    initialize_rng_tracker(inference_rng_tracker=True, force_reset=True)
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=config.engine.tensor_parallel,
        pipeline_model_parallel_size=config.engine.pipeline_parallel,
        context_parallel_size=config.engine.context_parallel,
        virtual_pipeline_model_parallel_size=config.engine.virtual_stages if config.engine.virtual_stages > 1 else None,
        distributed_timeout_minutes=config.engine.timeout_s / 60,  # annotated as whole minutes, and taken as any number
        create_gloo_process_groups=False,
    )


def _groups() -> ProcessGroups:
    megatron = ProcessGroupCollection.use_mpu_process_groups()
    return ProcessGroups(
        tensor=megatron.tp,
        pipeline=megatron.pp,
        context=megatron.cp,
        data=megatron.dp,
        data_context=megatron.dp_cp,
        model=megatron.mp,
        megatron=megatron,
    )
