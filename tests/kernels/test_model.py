"""A whole model on the fused kernels is the model on plain torch: loss, state and every gradient."""

import pytest
import torch

from hope_pt.testing.models import random_tokens, small_lm
from hope_pt.testing.scans import SCAN_FP32, mismatches

LENGTH = 5


def run(preset: str, backend: str, dtype: torch.dtype, **inputs) -> dict[str, torch.Tensor]:
    """Loss, end state (where one was asked for) and all gradients of a small model."""
    lm = small_lm(preset, backend=backend).to(dtype)
    tokens = random_tokens(1, LENGTH)
    logits, state = lm(tokens, **inputs)
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    found = {"loss": loss.detach()}
    for index, layer in enumerate(state.layers if state is not None else ()):
        found |= {f"{index}.{name}": t.detach() for name, t in layer.items()}
        loss = loss + sum(t.square().mean() for t in layer.values())
    names, parameters = zip(*lm.named_parameters(), strict=True)
    gradients = torch.autograd.grad(loss, parameters)
    return found | dict(zip(names, gradients, strict=True))


@pytest.mark.timeout(300)
@pytest.mark.parametrize(("preset", "packed"), [("paper", True), ("fast", False)])
def test_model_on_kernels(preset, packed):
    inputs = {}
    if packed:
        starts = torch.zeros(1, LENGTH, dtype=torch.bool)
        starts[0, 3] = True
        inputs = {"doc_start_BT": starts, "return_state": True}
    got = run(preset, "triton", torch.float32, **inputs)
    wanted = run(preset, "chunked", torch.float64, **inputs)
    assert mismatches(got, wanted, tolerance=2 * SCAN_FP32) == {}
