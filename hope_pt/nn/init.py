"""Initial values: each parameter is a pure function of its canonical name, the model and the seed, whatever layout holds it.

Scales (SPEC 2 and the project's choices): projections 1/sqrt(fan in), residual outputs divided by sqrt(number of residual branches),
embeddings 0.3/sqrt(D) so that the first loss is ln V within 2 %, both matrices of a memory 1/sqrt(fan in): with the smaller W1_0 of
SPEC 2 the error that reaches W2 cannot replace what DGD erases, and the memory fades over a long document (docs/log.md). eta, alpha and
mu start where the configuration says. The weights of independent CMS levels start at one: with them the sum of the levels' outputs has the
scale that a chain of the same levels adds.
"""

import hashlib
import math

import torch
from torch import nn

from hope_pt.config.schema import ModelConfig


def init_tensor(name: str, shape: tuple[int, ...], *, config: ModelConfig, seed: int) -> torch.Tensor:
    """The full (unsharded) fp32 initial value of parameter `name`, a HopeLM state-dict name.

    Raises ValueError for a name that no rule covers.
    """
    kind = ".".join(name.split(".")[-2:])
    if kind.endswith(("norm.weight", "out_norm", ".scale")):
        return torch.ones(shape)
    constant = _constant(kind, config)
    if constant is not None:
        return torch.full(shape, constant)
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    return torch.randn(shape, generator=generator) * _std(kind, shape, config) + _identity(kind, shape, config)


def init_norm(name: str, shape: tuple[int, ...], *, config: ModelConfig) -> float:
    """The expected norm of the full initial value of a matrix of a mixer or CMS level."""
    return _std(".".join(name.split(".")[-2:]), shape, config) * math.sqrt(math.prod(shape))


def _constant(kind: str, config: ModelConfig) -> float | None:
    titans = config.titans
    if kind == "core.eta_bias":
        share = titans.eta_init / titans.eta_max
        return math.log(share / (1 - share))
    if kind == "core.alpha_bias":
        return math.log(math.expm1(-math.log1p(-titans.forget_init)))
    if kind == "core.mu_bias":
        return math.log(titans.momentum_init / (1 - titans.momentum_init))
    return None


def _std(kind: str, shape: tuple[int, ...], config: ModelConfig) -> float:
    branches = config.num_layers * (1 + len(config.cms.periods))
    if kind in ("embedding.weight", "head.weight"):
        return 0.3 / math.sqrt(config.width)
    if kind in ("in_proj.weight", "w_gate.weight", "w_up.weight"):
        return 1 / math.sqrt(shape[-1])
    if kind in ("out_proj.weight", "w_down.weight"):
        return 1 / math.sqrt(shape[-1] * branches)
    if kind == "core.conv_weight":
        return 1 / math.sqrt(shape[-1])
    if kind in ("core.eta_weight", "core.alpha_weight"):
        return 0.5 / math.sqrt(shape[-1])
    if kind.startswith(("mem_weights.", "proj_weights.")):
        return (1 if config.titans.memory == "mlp" else 0.02) / math.sqrt(shape[-1])
    raise ValueError(f'no initialisation rule for parameter "{kind}"; add one to hope_pt/nn/init.py')


def _identity(kind: str, shape: tuple[int, ...], config: ModelConfig) -> torch.Tensor | float:
    """A linear generating memory W z starts near the identity, as the residual one does by its form."""
    if kind == "proj_weights.0" and config.titans.memory == "linear":
        return torch.eye(shape[-1])
    return 0.0


@torch.no_grad()
def init_parameters(model: nn.Module, *, config: ModelConfig, seed: int) -> None:
    """Fill every parameter of a HopeLM in place."""
    for name, parameter in model.named_parameters():
        parameter.copy_(init_tensor(name, tuple(parameter.shape), config=config, seed=seed))
