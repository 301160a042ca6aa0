"""Where this process stands in its job, from the variables that torchrun or srun set; the only reader of the environment."""

import os
from collections.abc import Mapping

from hope_pt.engine.launch import Launch
from hope_pt.errors import ConfigError, ParallelError

JOIN_S_PER_RANK = 0.1
"""Launchers start the processes of one machine one after another."""
JOIN_S_OF_MACHINES = 300.0
"""Several machines read Python's packages over a network, the first time for minutes."""
JOIN_S_MAX = 86400


def launch_from_environment(environment: Mapping[str, str] | None = None) -> Launch:
    """`Launch` from RANK, WORLD_SIZE, LOCAL_RANK (torchrun) or SLURM_PROCID, SLURM_STEP_NUM_TASKS, SLURM_LOCALID (inside srun).

    With several processes MASTER_ADDR and MASTER_PORT must be set: there is no fallback, because a wrong guess hangs. A shell that
    merely belongs to a Slurm job is one process. `join_s` is HOPE_JOIN_S; without it short if LOCAL_WORLD_SIZE (torchrun) or
    SLURM_STEP_NUM_NODES (srun) says that one machine has all processes, else long. Raises ConfigError or ParallelError naming the variable.
    """
    environment = os.environ if environment is None else environment
    if "RANK" in environment or "WORLD_SIZE" in environment:
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    elif "SLURM_STEP_ID" in environment:
        names = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID")
    else:
        return Launch(attempt=_attempt(environment))
    rank, world_size, local_rank = (_number(environment, name) for name in names)
    if not 0 <= rank < world_size:
        raise ParallelError(f"{names[0]} = {rank} is not below {names[1]} = {world_size}; start every process with the same launcher")
    if world_size == 1:
        return Launch(attempt=_attempt(environment))
    if not environment.get("MASTER_ADDR"):
        raise ConfigError(f"{names[1]} = {world_size} but MASTER_ADDR is not set; set it to the host name of the first process")
    return Launch(
        rank=rank,
        world_size=world_size,
        local_rank=local_rank,
        master_addr=environment["MASTER_ADDR"],
        master_port=_number(environment, "MASTER_PORT"),
        join_s=_join_s(environment, world_size=world_size),
        attempt=_attempt(environment),
    )


def _join_s(environment: Mapping[str, str], *, world_size: int) -> float:
    if "HOPE_JOIN_S" in environment:
        text = environment["HOPE_JOIN_S"]
        if not text.isdecimal() or not 1 <= int(text) <= JOIN_S_MAX:
            raise ConfigError(f"HOPE_JOIN_S = {text!r}: expected whole seconds from 1 to {JOIN_S_MAX}, or unset it")
        return float(text)
    if "RANK" in environment:
        one_machine = environment.get("LOCAL_WORLD_SIZE") == str(world_size)
    else:
        one_machine = environment.get("SLURM_STEP_NUM_NODES", environment.get("SLURM_NNODES")) == "1"
    return Launch.join_s + JOIN_S_PER_RANK * world_size if one_machine else JOIN_S_OF_MACHINES


def _attempt(environment: Mapping[str, str]) -> int:
    """HOPE_ATTEMPT, which the batch scripts count."""
    return _number(environment, "HOPE_ATTEMPT") if "HOPE_ATTEMPT" in environment else 1


def _number(environment: Mapping[str, str], name: str) -> int:
    text = environment.get(name, "")
    if not text.isdigit():
        raise ConfigError(f"{name} = {text!r}: expected a number; start with torchrun or srun, or unset RANK and WORLD_SIZE")
    return int(text)
