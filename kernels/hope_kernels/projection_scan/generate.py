"""From static streams to k, v, q, eta, alpha (SPEC 2): what both implementations of the projection scan share as data types.

Legend: B batch, H heads, T tokens, K head width.
"""

import math
from dataclasses import KW_ONLY, dataclass

import torch
import torch.nn.functional as F

from hope_kernels.memory import l2norm

MAX_FORGET = math.log(2.0)  # alpha >= 0.5


@dataclass(frozen=True)
class Inputs:
    """Static streams after convolution and activation: k, v, q [B, H, T, K]; live [B, 1, T] is 0 at no-op positions (or None).

    log_mu [B, H, T]: momentum decay from the static projection, or None.
    """

    k: torch.Tensor
    v: torch.Tensor
    q: torch.Tensor
    live: torch.Tensor | None = None
    log_mu: torch.Tensor | None = None

    def window(self, window: slice) -> "Inputs":
        """The tokens of a slice."""
        return Inputs(*(None if t is None else t[:, :, window] for t in (self.k, self.v, self.q, self.live, self.log_mu)))


@dataclass(frozen=True)
class Readout:
    """Parameters of eta and alpha: weight_eta, weight_alpha [H, K], bias_eta, bias_alpha [H]; eta_max; the two control switches.

    writes = False: eta = 0 and alpha = 1 everywhere. retention = False: alpha = 1.
    """

    weight_eta: torch.Tensor
    bias_eta: torch.Tensor
    weight_alpha: torch.Tensor
    bias_alpha: torch.Tensor
    _: KW_ONLY
    eta_max: float = 1.0
    retention: bool = True
    writes: bool = True

    def parameters(self) -> tuple[torch.Tensor, ...]:
        """The four parameter tensors."""
        return self.weight_eta, self.bias_eta, self.weight_alpha, self.bias_alpha

    def like(self, parameters: tuple[torch.Tensor, ...]) -> "Readout":
        """The same switches with other parameters."""
        return Readout(*parameters, eta_max=self.eta_max, retention=self.retention, writes=self.writes)


@dataclass(frozen=True)
class Generated:
    """k, v, q [B, H, T, K] (k and q of unit length), eta and log_alpha [B, H, T]."""

    k: torch.Tensor
    v: torch.Tensor
    q: torch.Tensor
    eta: torch.Tensor
    log_alpha: torch.Tensor

    def tensors(self) -> tuple[torch.Tensor, ...]:
        """All tensors in the order of the fields."""
        return self.k, self.v, self.q, self.eta, self.log_alpha


def generate(reads: dict[str, torch.Tensor], readout: Readout, *, live: torch.Tensor | None, normalize_v: bool) -> Generated:
    """The streams from what each of k, v, q, eta, alpha read, [B, H, T, K] each."""
    rate = torch.einsum("bhtk,hk->bht", reads["eta"], readout.weight_eta)
    forget = torch.einsum("bhtk,hk->bht", reads["alpha"], readout.weight_alpha)
    value = l2norm(reads["v"]) if normalize_v else reads["v"]
    return Generated(l2norm(reads["k"]), value, l2norm(reads["q"]), *gates(rate, forget, readout, live=live))


def gates(rate: torch.Tensor, forget: torch.Tensor, readout: Readout, *, live: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Learning rate eta and log alpha from their logits before the bias, [B, H, T]."""
    eta = readout.eta_max * torch.sigmoid(rate + readout.bias_eta.unsqueeze(-1))
    log_alpha = -F.softplus(forget + readout.bias_alpha.unsqueeze(-1)).clamp(max=MAX_FORGET)
    eta = eta if readout.writes else torch.zeros_like(eta)
    log_alpha = log_alpha if readout.writes and readout.retention else torch.zeros_like(log_alpha)
    return (eta, log_alpha) if live is None else (eta * live, log_alpha * live)


def gates_backward(
    d_eta: torch.Tensor,
    d_log_alpha: torch.Tensor,
    rate: torch.Tensor,
    forget: torch.Tensor,
    readout: Readout,
    *,
    live: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of both logits, and so of both biases, from those of the results of `gates`, [B, H, T]."""
    if live is not None:
        d_eta, d_log_alpha = d_eta * live, d_log_alpha * live
    open_eta, forget = torch.sigmoid(rate + readout.bias_eta.unsqueeze(-1)), forget + readout.bias_alpha.unsqueeze(-1)
    d_rate = (1 - open_eta).mul_(open_eta).mul_(d_eta).mul_(readout.eta_max if readout.writes else 0)
    within = (F.softplus(forget) <= MAX_FORGET) & (readout.writes and readout.retention)
    return d_rate, torch.sigmoid(forget).mul_(d_log_alpha).mul_(within).neg_()


SOURCE = {"k": "k", "eta": "k", "alpha": "k", "v": "v", "q": "q"}
"""Static stream that each generated stream is read from."""
