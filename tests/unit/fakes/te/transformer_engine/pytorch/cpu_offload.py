import contextlib


def get_cpu_offload_context(enabled=False, *args, **kwargs):
    assert not enabled
    return contextlib.nullcontext(), lambda tensor: tensor
