"""States of the random generators of torch, numpy and Python as tensors and JSON, without pickle.

No step draws random numbers by itself; starting them from the run's seed and saving them keeps a resume exact for whatever does.
"""

import random

import numpy as np
import torch
from torch import Tensor


def seed(value: int) -> None:
    """Starts all generators of this process from one number."""
    torch.manual_seed(value)
    np.random.seed(value % 2**32)
    random.seed(value)


def capture() -> tuple[dict[str, Tensor], dict]:
    """States of this process: tensors `rng.*` (uint8, int64) and JSON scalars."""
    name, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    version, python_keys, python_gauss = random.getstate()
    tensors = {
        "rng.torch": torch.get_rng_state(),
        "rng.numpy": torch.from_numpy(np.asarray(keys, dtype=np.int64).copy()),
        "rng.python": torch.tensor(python_keys, dtype=torch.int64),
    }
    if torch.cuda.is_available():
        tensors["rng.cuda"] = torch.cuda.get_rng_state()
    scalars = {"numpy": [name, position, has_gauss, gauss], "python": [version, python_gauss]}
    return tensors, scalars


def restore(tensors: dict[str, Tensor], *, scalars: dict) -> None:
    """Sets the generators to what `capture` returned; the GPU's only where both processes have one."""
    name, position, has_gauss, gauss = scalars["numpy"]
    version, python_gauss = scalars["python"]
    torch.set_rng_state(tensors["rng.torch"])
    np.random.set_state((name, tensors["rng.numpy"].numpy().astype(np.uint32), position, has_gauss, gauss))
    random.setstate((version, tuple(tensors["rng.python"].tolist()), python_gauss))
    if "rng.cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["rng.cuda"])
