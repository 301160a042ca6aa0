import fake_adam


class FusedAdam(fake_adam.FusedAdam):
    """Initialises the state of every parameter of a group, also of those without a gradient; refuses state names that it does not know."""

    eager_state = True

    def zero_grad(self, set_to_none=None):
        for group in self.param_groups:
            for param in group["params"]:
                param.grad = None

    def load_state_dict(self, state_dict):
        names = {name for entry in state_dict["state"].values() for name in entry}
        if not names <= {"exp_avg", "exp_avg_sq"}:
            raise KeyError(names)
        super().load_state_dict(state_dict)


class FusedSGD: ...


def multi_tensor_applier(op, noop_flag_buffer, tensor_lists, *args):
    return op(2048 * 32, noop_flag_buffer, tensor_lists, *args)


def multi_tensor_scale(chunk_size, noop_flag_buffer, tensor_lists, scale):
    for source, target in zip(*tensor_lists, strict=True):
        target.copy_(source * scale)


def multi_tensor_l2norm(chunk_size, noop_flag_buffer, tensor_lists, per_tensor):
    raise NotImplementedError("the engine has its own")


multi_tensor_unscale_l2norm = multi_tensor_l2norm
