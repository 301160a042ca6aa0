"""Parameters as matrices: the views of a model's parameters against how the layers read them."""

import pytest
import torch

from hope_pt.config.schema import ModelConfig, TitansConfig
from hope_pt.nn import HopeLM
from hope_pt.optim import Matrices, View, view_of

WIDTH, HEADS, HEAD = 24, 3, 8


def model_of(mixer="titans", **titans):
    return ModelConfig(
        vocab_size=20, num_layers=1, width=WIDTH, num_heads=HEADS, mixer=mixer, titans=TitansConfig(chunk_mem=2, chunk_proj=2, **titans)
    )


@pytest.mark.parametrize(
    ("mixer", "titans", "streams"),
    [("titans", {}, (8, 8, 8, 8)), ("titans", {"momentum": "titans"}, (8, 8, 8, 8, 1)), ("attention", {}, (8, 8, 8))],
)
def test_streams_of_the_input_projection_are_what_the_core_takes_apart(mixer, titans, streams):
    """Matrix i of the view computes stream i of all heads."""
    config = model_of(mixer, **titans)
    model = HopeLM(config)
    weight = model.blocks[0].mixer.in_proj.weight.detach()
    view = view_of("blocks.0.mixer.in_proj.weight", config=config)
    assert view == View(0, streams) and sum(streams) == model.blocks[0].mixer.core.features_per_head
    x = torch.randn(5, WIDTH, generator=torch.Generator().manual_seed(0))
    per_head = (x @ weight.T).unflatten(-1, (HEADS, -1)).split(streams, -1)
    matrices = view.to_matrices(weight.unsqueeze(0))
    rows = view.rows(weight.shape)
    assert rows == tuple(HEADS * size for size in streams) and view.lead(weight.shape) == (len(streams),)
    for matrix, stream, size in zip(matrices, per_head, streams, strict=True):
        got = (x @ matrix.T).unflatten(-1, (HEADS, -1))
        torch.testing.assert_close(got[..., :size], stream)
        assert not got[..., size:].any()


@pytest.mark.parametrize(
    ("view", "shape", "count", "size"),
    [
        (View(0), (6, 4), 1, (6, 4)),
        (View(1), (6, 4), 1, (6, 4)),
        (View(0), (3, 5, 4), 3, (5, 4)),
        (View(0), (3, 2, 5, 4), 6, (5, 4)),
        (View(0, (2, 2, 2)), (12, 5), 3, (4, 5)),
        (View(0, (2, 2, 1)), (10, 5), 3, (4, 5)),
    ],
)
def test_matrices_and_back(view, shape, count, size):
    x = torch.randn(2, *shape, generator=torch.Generator().manual_seed(1))
    matrices = view.to_matrices(x)
    assert matrices.shape == (2 * count, *size)
    assert torch.equal(view.from_matrices(matrices, x.shape), x)
    assert len(view.rows(shape)) == count
    lead = view.lead(shape)
    assert torch.tensor(lead).prod() == count if lead else count == 1


def test_rows_are_those_without_the_fill():
    x = torch.zeros(2, 10, 5)
    assert Matrices(View(0, (2, 2, 1))).rows(x).flatten().tolist() == [4, 4, 2] * 2
    assert Matrices(View(0)).rows(torch.zeros(2, 3, 5, 4)).flatten().tolist() == [5.0] * 6


def test_apply_hands_on_constants_and_returns_new_values_of_own():
    matrices = Matrices(View(0))
    x, factor, count = torch.ones(2, 3, 4), torch.tensor([2.0, 3.0]).view(2, 1, 1), torch.zeros(2, 1, 1)
    scaled, shifted, new = matrices.apply(lambda x, c, n: (x * c, x + 1, n + 1), x, constants=[factor], own=[count])
    assert torch.equal(scaled, x * factor) and torch.equal(shifted, x + 1) and torch.equal(new, torch.ones(2, 1, 1))
    (alone,) = matrices.apply(lambda x: (-x,), x)
    assert torch.equal(alone, -x)


def test_only_stacks_divided_by_head_are_whole_on_every_rank():
    assert View(0).is_local(3) and View(0).is_local(4)
    assert not View(0).is_local(2) and not View(1).is_local(2) and not View(0, (2, 2)).is_local(2)


def test_views_of_all_matrices_of_a_model():
    config = model_of()
    views = {name: view_of(name, config=config) for name, p in HopeLM(config).named_parameters() if p.ndim > 1 and "conv" not in name}
    assert views["blocks.0.mixer.out_proj.weight"] == View(1) == views["blocks.0.cms.levels.0.w_down.weight"]
    assert views["blocks.0.cms.levels.0.w_up.weight"] == View(0) == views["blocks.0.mixer.core.mem_weights.0"]
    assert view_of("blocks.0.mixer.in_proj.weight", config=config, split=False) == View(0)
