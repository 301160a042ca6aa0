"""States of the random generators of torch, numpy and Python as JSON, without pickle.

No step draws random numbers by itself; starting them from the run's seed and saving them keeps a resume exact for whatever does.
"""

import random

import numpy as np
import torch


def seed(value: int) -> None:
    """Starts all generators of this process from one number."""
    torch.manual_seed(value)
    np.random.seed(value % 2**32)
    random.seed(value)


def capture() -> dict:
    """States of this process as JSON values; long ones are the hexadecimal digits of their bytes."""
    name, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    version, python_keys, python_gauss = random.getstate()
    states = {
        "torch": _to_hex(torch.get_rng_state()),
        "numpy": [name, np.asarray(keys, dtype=np.uint32).tobytes().hex(), position, has_gauss, gauss],
        "python": [version, np.asarray(python_keys, dtype=np.uint32).tobytes().hex(), python_gauss],
    }
    if torch.cuda.is_available():
        states["cuda"] = _to_hex(torch.cuda.get_rng_state())
    return states


def restore(states: dict) -> None:
    """Sets the generators to what `capture` returned; the GPU's only where both processes have one."""
    torch.set_rng_state(_from_hex(states["torch"]))
    name, keys, position, has_gauss, gauss = states["numpy"]
    np.random.set_state((name, np.frombuffer(bytes.fromhex(keys), dtype=np.uint32), position, has_gauss, gauss))
    version, keys, python_gauss = states["python"]
    random.setstate((version, tuple(np.frombuffer(bytes.fromhex(keys), dtype=np.uint32).tolist()), python_gauss))
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(_from_hex(states["cuda"]))


def _to_hex(state_B: torch.Tensor) -> str:
    return state_B.numpy().tobytes().hex()


def _from_hex(digits: str) -> torch.Tensor:
    return torch.frombuffer(bytearray.fromhex(digits), dtype=torch.uint8)
