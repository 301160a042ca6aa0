"""The token clock against plain autograd on a copy of the model whose weights really change, and against itself in other splits."""

import copy
import itertools
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from hope_pt.config import load
from hope_pt.config.schema import CMSConfig, ModelConfig, TokenClockConfig
from hope_pt.errors import CheckpointError, ConfigError
from hope_pt.nn import HopeLM
from hope_pt.nn.fast_levels import FastLevels
from hope_pt.nn.names import level_of
from hope_pt.nn.token_clock import ClockedLM, ClockState, meta_loss
from hope_pt.testing.models import random_tokens, small_config, small_lm

CONFIG = Path(__file__).resolve().parents[3] / "configs" / "hope_tiny.toml"
CLOCK = TokenClockConfig(periods=(6, 12), lr=(0.02, 0.01))
FLOAT64 = {"rtol": 1e-10, "atol": 1e-10}
"""Another order of the same float64 sums, through the updates of a few intervals."""


def slow_twin(lm: HopeLM, tokens_T, clock: TokenClockConfig):
    """(logits [T, V], trained model with the weights changed) of one document: the definition, one plain model call an interval."""
    lm = copy.deepcopy(lm)
    state = lm.init_state(1)
    layers = {n: m for n, m in lm.named_modules() if isinstance(m, torch.nn.Linear) and ".cms." in n and level_of(n)[0] in clock.active}
    sums = {name: torch.zeros_like(m.weight) for name, m in layers.items()}
    logits = []
    for first in range(0, len(tokens_T), clock.fastest):
        window = tokens_T[first : first + clock.fastest]
        targets = tokens_T[first + 1 : first + 1 + len(window)]
        state = type(state)(state.seen_B, tuple({n: t.detach() for n, t in layer.items()} for layer in state.layers))
        out, state = lm(window.unsqueeze(0), state=state)
        logits.append(out[0].detach())
        if len(targets) < clock.fastest:
            break
        gradients = torch.autograd.grad(F.cross_entropy(out[0], targets, reduction="sum"), [m.weight for m in layers.values()])
        for (name, layer), gradient in zip(layers.items(), gradients, strict=True):
            sums[name] += gradient
            if (first + clock.fastest) % clock.periods[level_of(name)[0]] == 0:
                layer.weight.data -= clock.lr[level_of(name)[0]] * sums[name]
                sums[name].zero_()
    return torch.cat(logits), layers


@pytest.mark.parametrize(
    ("preset", "periods", "lr"),
    [
        ("fast", (6, 12), (0.02, 0.01)),
        ("paper", (12, 4), (0.02, 0.01)),
        ("momentum", (0, 8), (0.0, 0.02)),
        ("layerwise", (5, 5), (0.02, 0.02)),
        ("gated-delta", (8, 0), (0.02, 0.5)),
        ("attention", (6, 12), (0.02, 0.01)),
    ],
)
def test_every_row_follows_its_own_gradient_steps(preset, periods, lr):
    clock = TokenClockConfig(periods=periods, lr=lr)
    lm = small_lm(preset)
    tokens = random_tokens(2, 41)
    with torch.no_grad():
        logits, state = ClockedLM(lm, clock)(tokens, return_state=True)
    for row in range(2):
        expected, layers = slow_twin(lm, tokens[row], clock)
        torch.testing.assert_close(logits[row], expected, **FLOAT64)
        for name, moved in state.levels.moved.items():
            change = layers[name].weight - lm.get_submodule(name).weight
            assert change.norm() > 1e-3
            torch.testing.assert_close(moved[row], change, **FLOAT64)
    assert set(state.levels.moved) == set(layers)


def test_no_learning_rate_or_period_is_the_model_itself_bit_for_bit():
    lm = HopeLM(small_config())
    tokens = random_tokens(2, 40)
    plain, _ = lm(tokens)
    for clock in (TokenClockConfig(), TokenClockConfig(periods=(6, 12), lr=(0.0, 0.0)), TokenClockConfig(periods=(0, 0), lr=(1.0, 1.0))):
        model = ClockedLM(lm, clock)
        assert torch.equal(model(tokens)[0], plain)
        assert torch.equal(model(tokens, return_state=True)[0], lm(tokens, return_state=True)[0])


@pytest.mark.parametrize("preset", ["fast", "attention"])
def test_the_machinery_at_a_vanishing_rate_is_the_model_in_the_same_pieces_bit_for_bit(preset):
    """With changes of 1e-30 every update and every added product runs, and nothing may differ."""
    lm = HopeLM(small_config(preset))
    tokens = random_tokens(2, 40)
    state, pieces = lm.init_state(2), []
    for piece in tokens.split(6, 1):
        out, state = lm(piece, state=state)
        pieces.append(out)
    logits, end = ClockedLM(lm, TokenClockConfig(periods=(6, 12), lr=(1e-30, 1e-30)))(tokens, return_state=True)
    assert torch.equal(logits, torch.cat(pieces, 1))
    assert all(0 < moved.abs().max() < 1e-25 for moved in end.levels.moved.values())


@pytest.mark.parametrize("preset", ["fast", "momentum", "attention"])
@pytest.mark.parametrize("sizes", [(1,) * 40, (1, 3, 4, 8, 5, 7, 2, 10), (39, 1)])
def test_any_split_gives_the_same_weights_bit_for_bit(preset, sizes):
    lm = small_lm(preset)
    model = ClockedLM(lm, CLOCK).requires_grad_(False)
    tokens = random_tokens(2, 40)
    whole, reference = model(tokens, return_state=True)
    state, logits = None, []
    for piece in tokens.split(sizes, 1):
        out, state = model(piece, state=state, return_state=True)
        logits.append(out)
    torch.testing.assert_close(torch.cat(logits, 1), whole, **FLOAT64)
    for name, moved in reference.levels.moved.items():
        assert torch.equal(state.levels.moved[name], moved), name
    for name, total in reference.levels.sums.items():
        assert torch.equal(state.levels.sums[name], total), name
    assert reference.levels.sums and reference.open_B.tolist() == state.open_B.tolist() == [4, 4]


def packed():
    """Three rows of ragged documents: (tokens, mask, starts, [(row, positions of one document), ...])."""
    mask = torch.ones(3, 45, dtype=torch.bool)
    starts = torch.zeros(3, 45, dtype=torch.bool)
    starts[0, [0, 13, 19, 20]] = True
    starts[1, [25]] = True
    mask[1, [3, 4, 5, 30]] = False
    mask[2, 31:] = False
    documents = []
    for row in range(3):
        real = mask[row].nonzero().squeeze(1)
        cuts = [0, *(i for i, p in enumerate(real.tolist()) if starts[row, p] and i), len(real)]
        documents += [(row, real[a:b]) for a, b in itertools.pairwise(cuts)]
    return random_tokens(3, 45, seed=3), mask, starts, documents


@pytest.mark.parametrize(("preset", "sizes"), [("fast", (45,)), ("fast", (7, 13, 1, 24)), ("attention", (7, 13, 1, 24))])
def test_ragged_rows_are_their_documents_alone(preset, sizes):
    tokens, mask, starts, documents = packed()
    model = ClockedLM(small_lm(preset), CLOCK).requires_grad_(False)
    state, logits = None, []
    for piece in zip(tokens.split(sizes, 1), mask.split(sizes, 1), starts.split(sizes, 1), strict=True):
        out, state = model(piece[0], mask_BT=piece[1], doc_start_BT=piece[2], state=state, return_state=True)
        logits.append(out)
    logits = torch.cat(logits, 1)
    last = {}
    for row, places in documents:
        alone, last[row] = model(tokens[row, places].unsqueeze(0), return_state=True)
        torch.testing.assert_close(logits[row, places], alone[0], **FLOAT64)
    for row, alone in last.items():
        for name, moved in alone.levels.moved.items():
            torch.testing.assert_close(state.levels.moved[name][row], moved[0], **FLOAT64)
        assert state.seen_B[row] == alone.seen_B[0] and state.open_B[row] == alone.open_B[0]


def test_the_future_does_not_reach_back():
    model = ClockedLM(small_lm(), CLOCK).requires_grad_(False)
    tokens = random_tokens(1, 30)
    logits, _ = model(tokens)
    for place in (6, 12, 17):
        changed = tokens.clone()
        changed[:, place] = (changed[:, place] + 1) % 50
        again, _ = model(changed)
        torch.testing.assert_close(again[:, :place], logits[:, :place], **FLOAT64)
        assert not torch.allclose(again[:, place], logits[:, place])


def test_a_frozen_state_reads_without_learning_and_a_reset_row_is_as_trained():
    lm = small_lm()
    model = ClockedLM(lm, CLOCK).requires_grad_(False)
    _, state = model(random_tokens(2, 26), return_state=True)
    frozen = state.freeze()
    more, starts = random_tokens(2, 20, seed=1), torch.zeros(2, 20, dtype=torch.bool)
    starts[:, 9] = True
    _, after = model(more, state=frozen, doc_start_BT=starts)
    assert all(torch.equal(after.levels.moved[name], t) for name, t in state.levels.moved.items())
    assert any(not torch.equal(model(more, state=after.freeze(False))[1].levels.moved[name], t) for name, t in state.levels.moved.items())
    # What was open when it was frozen, from a document's start on, does not come back and begins no document again.
    _, opened = model(more[:, :4], return_state=True)
    assert opened.begins_B.tolist() == [False, False] and opened.open_B.tolist() == [4, 4]
    _, opened = model(more[:, :4], doc_start_BT=torch.eye(1, 4).expand(2, -1) > 0, return_state=True)
    assert opened.begins_B.tolist() == [True, True]
    thawed = opened.freeze().freeze(False)
    assert not thawed.begins_B.any() and not thawed.open_B.any() and not thawed.levels.frozen
    fresh = frozen.reset(torch.tensor([True, False]))
    logits, _ = model(more, state=fresh)
    assert torch.equal(logits[0], lm(more, state=state.now)[0][0])
    assert not torch.allclose(logits[1], lm(more, state=state.now)[0][1])


def test_a_stored_state_goes_on_and_a_damaged_one_is_refused():
    model = ClockedLM(small_lm(), CLOCK).requires_grad_(False)
    tokens = random_tokens(2, 33)
    _, state = model(tokens[:, :15], return_state=True)
    stored = state.to_tensors()
    loaded = ClockState.from_tensors(stored)
    assert loaded.bytes() == state.bytes() > 0
    logits, end = model(tokens[:, 15:], state=state)
    again, _ = model(tokens[:, 15:], state=loaded)
    assert torch.equal(logits, again)
    swapped, _ = model(tokens[[1, 0, 1], 15:], state=loaded.rows(torch.tensor([1, 0, 1])))
    torch.testing.assert_close(swapped, logits[[1, 0, 1]], **FLOAT64)
    del stored["clock.open"]
    with pytest.raises(CheckpointError, match="instead of begins, open and tokens"):
        ClockState.from_tensors(stored)
    levels = end.levels.to_tensors()
    assert FastLevels.from_tensors(levels).moved.keys() == end.levels.moved.keys()
    with pytest.raises(CheckpointError, match="not a tensor of per-sequence levels"):
        FastLevels.from_tensors({**levels, "moved.head": levels["frozen"]})
    with pytest.raises(CheckpointError, match="missing or incomplete"):
        FastLevels.from_tensors({})


def test_a_memory_without_a_clock_is_taken_over_at_its_place_in_the_document():
    lm = small_lm()
    model = ClockedLM(lm, CLOCK).requires_grad_(False)
    tokens = random_tokens(1, 30)
    _, memory = lm(tokens[:, :8], return_state=True)
    logits, state = model(tokens[:, 8:], state=memory)
    assert state.open_B.tolist() == [30 % 6 or 6]
    plain, _ = lm(tokens[:, 8:], state=memory)
    # its first interval ends at token 12 of the document, that is 4 tokens on
    torch.testing.assert_close(logits[:, :4], plain[:, :4], **FLOAT64)
    assert not torch.allclose(logits[:, 4], plain[:, 4])


@pytest.mark.parametrize(("step_cap", "total_cap"), [(0.01, 0.0), (0.0, 0.03), (0.01, 0.015)])
def test_caps_bound_a_step_and_the_whole_way(step_cap, total_cap):
    clock = TokenClockConfig(periods=(6, 12), lr=(0.5, 0.5), step_cap=step_cap, total_cap=total_cap)
    model = ClockedLM(small_lm(), clock).requires_grad_(False)
    _, state = model(random_tokens(2, 25), return_state=True)
    for name, drift in state.levels.drift(model.matrices).items():
        steps = 24 // clock.periods[level_of(name)[0]]
        highest = min(total_cap or 1, (step_cap or 1) * steps)
        assert drift.max() <= highest * (1 + 1e-9) and drift.max() > highest / 4


def test_a_matrix_of_zeros_is_not_capped_and_its_drift_is_a_number():
    lm = small_lm("attention")
    zero = "blocks.0.cms.levels.0.w_down"
    lm.get_submodule(zero).weight.data.zero_()
    clock = TokenClockConfig(periods=(6, 12), lr=(0.5, 0.0), step_cap=0.01, total_cap=0.01)
    model = ClockedLM(lm, clock).requires_grad_(False)
    assert model.init_state(1).levels.drift(model.matrices)[zero].tolist() == [0]
    tokens = random_tokens(1, 26)
    _, state = model(tokens[:, :-1], return_state=True)
    drift = state.levels.drift(model.matrices)
    assert drift.pop(zero).tolist() == [float("inf")]
    assert max(float(value.max()) for value in drift.values()) <= 0.01 * (1 + 1e-9)
    losses = meta_loss(ClockedLM(lm.requires_grad_(), clock, differentiable=True), tokens[:, :-1], tokens[:, 1:])
    assert all(bool(gradient.isfinite().all()) for gradient in torch.autograd.grad(losses.mean(), list(lm.parameters())))


@pytest.mark.parametrize("preset", ["fast", "attention"])
def test_meta_gradients_are_those_of_the_function_that_is_computed(preset):
    lm = small_lm(preset, backend="reference")
    clock = TokenClockConfig(periods=(4, 8), lr=(0.02, 0.02))
    model = ClockedLM(lm, clock, differentiable=True)
    data = random_tokens(2, 18)
    tokens, targets = data[:, :-1], data[:, 1:]
    losses = meta_loss(model, tokens, targets)
    with torch.no_grad():
        logits, _ = ClockedLM(lm, clock)(tokens)
    expected = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view_as(targets)
    torch.testing.assert_close(losses, expected, **FLOAT64)
    names = [
        "embedding.weight",
        "blocks.0.cms.levels.0.w_up.weight",
        "blocks.0.cms.levels.1.w_down.weight",
        "blocks.1.mixer.in_proj.weight",
    ]
    gradients = torch.autograd.grad(losses.mean(), [lm.get_parameter(name) for name in names])
    for name, gradient in zip(names, gradients, strict=True):
        parameter = lm.get_parameter(name)
        direction = F.normalize(gradient, dim=None) + 0.1 * torch.eye(*parameter.shape, dtype=parameter.dtype)
        values = []
        for shift in (1e-6, -2e-6):
            parameter.data.add_(shift * direction)
            values.append(float(meta_loss(model, tokens, targets).detach().mean()))
        parameter.data.add_(1e-6 * direction)
        assert (values[0] - values[1]) / 2e-6 == pytest.approx(float((gradient * direction).sum()), rel=1e-6)
    first_order = torch.autograd.grad(F.cross_entropy(lm(tokens)[0].flatten(0, 1), targets.flatten()), lm.get_parameter(names[1]))
    assert (first_order[0] - gradients[1]).norm() > 0.01 * gradients[1].norm()


def repeated(batch: int, *, seed: int):
    """Sequences in which each has its own 2 tokens over and over: what an interval teaches helps in the next."""
    generator = torch.Generator().manual_seed(seed)
    words = torch.randint(0, 32, (batch, 2), generator=generator)
    return words[:, torch.randint(0, 2, (13,), generator=generator)]


def test_meta_training_learns_to_learn():
    """Trained through the updates, the model does with them what it cannot do without: learn the words of a sequence as it reads it."""
    config = ModelConfig(vocab_size=32, num_layers=1, width=16, num_heads=1, mixer="attention", cms=CMSConfig(hidden=32, periods=(1,)))
    lm = HopeLM(config)
    model = ClockedLM(lm, TokenClockConfig(periods=(4,), lr=(0.1,)), differentiable=True)
    optimizer = torch.optim.Adam(lm.parameters(), lr=2e-2)
    found = []
    for step in range(15):
        data = repeated(16, seed=step)
        losses = meta_loss(model, data[:, :-1], data[:, 1:])
        optimizer.zero_grad()
        losses.mean().backward()
        torch.nn.utils.clip_grad_norm_(lm.parameters(), 1.0)
        optimizer.step()
        found.append(float(losses.detach()[:, 4:].mean()))
    data = repeated(64, seed=1000)
    with torch.no_grad():
        on = meta_loss(model, data[:, :-1], data[:, 1:])[:, 4:].mean()
        off = meta_loss(ClockedLM(lm, TokenClockConfig()), data[:, :-1], data[:, 1:])[:, 4:].mean()
    assert sum(found[-3:]) < 0.8 * sum(found[:3])
    assert on < off - 0.3


def test_mistakes_are_refused():
    lm = small_lm()
    with pytest.raises(ConfigError, match="has 2 CMS levels"):
        ClockedLM(lm, TokenClockConfig(periods=(4,), lr=(0.1,)))
    with pytest.raises(ConfigError, match='"auto" can be differentiated once only'):
        ClockedLM(lm, CLOCK, differentiable=True)
    for wrong, message in [
        ({"periods": (4, 6), "lr": (0.1, 0.1)}, "does not divide"),
        ({"periods": (4, 8), "lr": (0.1,)}, "one learning rate for each"),
        ({"meta_train": True}, "without a level that changes"),
    ]:
        with pytest.raises(ValueError, match=message):
            TokenClockConfig(**wrong)
    assert TokenClockConfig(periods=(4, 6), lr=(0.1, 0.0)).active == (0,)
    with pytest.raises(ConfigError, match="token_clock.periods has 1 entries, the model has 3"):
        load(CONFIG, ["token_clock.periods=[64]", "token_clock.lr=[0.1]"])
