"""The choice of an implementation: made once, forceable; whoever runs the model logs it."""


def choose(name: str, *, backend: str, available: tuple[str, ...]) -> str:
    """The implementation of operation `name` for a requested backend ("auto" takes the first available).

    Raises ValueError naming what is available when a forced backend is not.
    """
    if backend == "auto":
        return available[0]
    if backend not in available:
        raise ValueError(f'{name} has no backend "{backend}" here; available: {", ".join(available)}')
    return backend
