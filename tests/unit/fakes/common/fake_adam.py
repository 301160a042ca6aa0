"""The arithmetic and the bookkeeping that transformer-engine's and apex's FusedAdam share: one `step` a group, raised by every call."""

import torch


class FusedAdam(torch.optim.Optimizer):
    eager_state = False

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, *, bias_correction=True, adam_w_mode=True):
        super().__init__(params, {"lr": lr, "bias_correction": bias_correction, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        assert adam_w_mode

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            group["params"][0].device  # an empty group is an error  # noqa: B018
            group["step"] = group.get("step", 0) + 1
            beta1, beta2 = group["betas"]
            for param in group["params"]:
                state = self.state[param]
                if not state and (self.eager_state or param.grad is not None):
                    state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(param), torch.zeros_like(param)
                if param.grad is None:
                    continue
                state["exp_avg"].lerp_(param.grad, 1 - beta1)
                state["exp_avg_sq"].mul_(beta2).addcmul_(param.grad, param.grad, value=1 - beta2)
                mean = state["exp_avg"] / (1 - beta1 ** group["step"])
                spread = (state["exp_avg_sq"] / (1 - beta2 ** group["step"])).sqrt() + group["eps"]
                param.sub_(group["lr"] * (mean / spread + group["weight_decay"] * param))
