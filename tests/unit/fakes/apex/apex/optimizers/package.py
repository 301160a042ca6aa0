import fake_adam


class FusedAdam(fake_adam.FusedAdam):
    def zero_grad(self):
        for group in self.param_groups:
            for param in group["params"]:
                param.grad = None


class FusedSGD: ...
