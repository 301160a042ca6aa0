"""What the hooks of delta gradient descent collect, and that an update with them is DGD of a model."""

import pytest
import torch

from hope_pt.optim import DeepOptimizer, Matrices, View
from hope_pt.optim.inputs import LayerInputs, normalised_gram
from hope_pt.optim.rules import DGD
from hope_pt.optim.rules.dgd import reference


def by_hand(x):
    """Sum of outer products, one token after the other."""
    total = torch.zeros(x.shape[-1], x.shape[-1], dtype=torch.float64)
    for row in x.reshape(-1, x.shape[-1]).double():
        total += torch.outer(row, row) / max(row.dot(row), 1e-300)
    return total


def batches(count, shape=(2, 3, 4)):
    return [torch.randn(shape, generator=torch.Generator().manual_seed(n)) for n in range(count)]


def test_micro_batches_add_up_and_taking_empties():
    layer = torch.nn.Linear(4, 5, bias=False)
    inputs = LayerInputs({"w": layer})
    data = batches(3)
    data[1][0, 0] = 0.0  # padding: no token
    for x in data:
        layer(x)
    (gram,) = inputs.take().values()
    torch.testing.assert_close(gram.double(), by_hand(torch.stack(data)), rtol=1e-5, atol=1e-6)
    assert gram.trace().item() == pytest.approx(3 * 6 - 1, rel=1e-6)
    assert inputs.take() == {}


def test_paused_and_closed_hooks_see_nothing():
    layer = torch.nn.Linear(4, 5, bias=False)
    inputs = LayerInputs({"w": layer})
    with inputs.paused():
        layer(batches(1)[0])
        with inputs.paused():
            pass
        layer(batches(1)[0])
    assert inputs.take() == {}
    layer(batches(1)[0])
    assert set(inputs.take()) == {"w"}
    inputs.close()
    layer(batches(1)[0])
    assert inputs.take() == {}


def test_divided_inputs_are_made_whole_and_ranks_are_added():
    """Two ranks with half of the features each: the hook gets the whole, and normalises it as a whole."""
    layer = torch.nn.Linear(2, 5, bias=False)
    x = batches(1)[0]
    inputs = LayerInputs({"w": layer}, whole=lambda name, part: x if name == "w" and part.shape[-1] == 2 else part)
    layer(x[..., :2])
    seen = []
    sums = inputs.take(lambda name, gram: (seen.append(name), gram.mul_(2)))
    torch.testing.assert_close(sums["w"].double(), 2 * by_hand(x), rtol=1e-5, atol=1e-6)
    assert seen == ["w"]


def test_sums_are_fp32_of_bf16_inputs_and_carry_no_graph():
    x = batches(1)[0].bfloat16().requires_grad_()
    gram = normalised_gram(x.detach())
    assert gram.dtype == torch.float32
    layer = torch.nn.Linear(4, 5, bias=False).bfloat16()
    inputs = LayerInputs({"w": layer})
    layer(x)
    assert not inputs.take()["w"].requires_grad


def test_an_update_with_hooks_is_dgd_of_the_layer():
    """Two micro-batches through a linear layer; the update is that of the reference with all tokens."""
    layer = torch.nn.Linear(4, 5, bias=False).double()
    inputs = LayerInputs({"w": layer})
    optimizer = DeepOptimizer([{"params": [layer.weight], "rule": "dgd", "lr": 0.3}], rules={"dgd": DGD()}, matrices=[Matrices(View(0))])
    data = [x.double() for x in batches(2)]
    for x in data:
        (layer(x).square().sum() / 12).backward()
    tokens = torch.nn.functional.normalize(torch.stack(data).reshape(-1, 4), dim=-1)
    wanted = reference(layer.weight.grad, layer.weight.detach(), tokens, lr=0.3)
    for gram in inputs.take().values():
        optimizer.state_of(layer.weight, group=0)["gram"].add_(gram)
    optimizer.step()
    torch.testing.assert_close(layer.weight.detach(), wanted)
