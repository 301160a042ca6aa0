"""`Launch`: where a process stands in its job. Apart from the rest of the engine so that reading it loads neither torch nor megatron."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Launch:
    """Rank and address of this process; the launcher or the command line reads them from the environment.

    `master_addr` is a host name, reached at `master_port`, or a whole address of torch.distributed such as file:///path/to/store.
    `join_s`: seconds that the processes of the job may start apart from each other; one that is later counts as dead.
    `attempt`: how often a batch job has started this run, counting this time.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    master_addr: str = "127.0.0.1"
    master_port: int = 29500
    join_s: float = 16.0
    attempt: int = 1
