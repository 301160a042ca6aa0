"""The choice of an implementation: made once per operation, logged, forceable."""

import logging

from hope_kernels.rule import MemoryRule

logger = logging.getLogger(__name__)


def choose(name: str, *, backend: str, available: tuple[str, ...], rule: MemoryRule | None = None) -> str:
    """The implementation of operation `name` for a requested backend ("auto" takes the first available).

    Raises ValueError naming what is available when a forced backend is not.
    """
    if backend == "auto":
        chosen = available[0]
        logger.info("%s: backend %s (of %s) for %s", name, chosen, ", ".join(available), rule)
        return chosen
    if backend not in available:
        raise ValueError(f'{name} has no backend "{backend}" here; available: {", ".join(available)}')
    return backend
