"""What may and what may not influence what: the past reaches on through the memory, the future, other rows and other heads do not."""

import pytest
import torch

from hope_pt.config.schema import CMSConfig, ModelConfig, TitansConfig
from hope_pt.nn import HopeBlock, HopeLM, Parts, diagnostics
from hope_pt.nn.titans import TitansCore
from hope_pt.testing.models import PRESETS, random_tokens, small_config, small_lm
from hope_pt.testing.scans import REPEAT

ALL_PRESETS = [*PRESETS, "attention"]
LENGTH = 27
CONV_REACH = 2 * 3
"""Two blocks with a convolution of width 4 each reach 6 tokens back."""


@torch.no_grad()
def changed(model: HopeLM, tokens: torch.Tensor, position: int) -> torch.Tensor:
    """Largest change of the logits per position, [T], over all other tokens at `position`, as noise in the embedding would be."""
    others = torch.arange(5)
    variants = tokens.expand(len(others), -1).clone()
    variants[:, position] = (tokens[0, position] + others) % model.config.vocab_size
    base, _ = model(tokens.expand(len(others), -1))  # the same shape, so that equal inputs give equal bits
    return (model(variants)[0] - base).abs().amax((0, 2))


@pytest.mark.parametrize("preset", ALL_PRESETS)
@pytest.mark.parametrize("position", [0, 3, 8, 13, LENGTH - 1])
def test_the_future_never_changes_the_past(preset, position):
    """Exactly: not one bit before the token that changed, in whatever chunk it lies; and the token itself does change."""
    change = changed(small_lm(preset), random_tokens(1, LENGTH), position)
    assert (change[:position] == 0).all()
    assert change[position] > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("preset", ALL_PRESETS)
def test_noise_in_the_future_never_changes_the_past(preset):
    """Noise of size one on the embedded future (a constant would be hidden by the norms): every other split point, to rounding."""
    block = small_lm(preset).blocks[0]
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, LENGTH, 24, generator=generator, dtype=torch.float64)
    base, _ = block(x)
    for split in range(1, LENGTH, 2):
        noisy = x.clone()
        noisy[:, split:] += torch.randn(2, LENGTH - split, 24, generator=generator, dtype=torch.float64)
        y, _ = block(noisy)
        torch.testing.assert_close(y[:, :split], base[:, :split], rtol=0, atol=1e-14)
        assert (y[:, split:] - base[:, split:]).abs().amax() > 1e-2


@pytest.mark.parametrize("preset", list(PRESETS))
def test_the_first_token_reaches_the_last_through_the_memory(preset):
    """Beyond the reach of the convolutions, and in another chunk; with the memory off nothing arrives there, exactly."""
    tokens = random_tokens(1, LENGTH)
    on = changed(small_lm(preset), tokens, 0)
    off = changed(small_lm(preset, memory_off=True), tokens, 0)
    assert on[-1] > 1e-6
    assert (off[: CONV_REACH + 1] > 0).any() and (off[CONV_REACH + 1 :] == 0).all()


def test_the_first_token_reaches_the_last_of_1024_at_the_default_settings():
    """At the initial values, in fp32, four default chunks later: more than rounding (1e-7 of logits of order one)."""
    model = HopeLM(ModelConfig(vocab_size=50, num_layers=2, width=64, num_heads=2, cms=CMSConfig(hidden=48)))
    assert changed(model, random_tokens(1, 1024), 0)[-1] > 1e-6


@pytest.mark.parametrize("preset", ALL_PRESETS)
def test_train_and_eval_compute_the_same(preset):
    model, tokens = small_lm(preset), random_tokens(2, LENGTH)
    trained = model.train()(tokens)[0]
    evaluated = model.eval()(tokens)[0]
    with torch.no_grad():
        silent = model(tokens)[0]
    assert torch.equal(trained, evaluated) and torch.equal(trained, silent)


@torch.no_grad()
@pytest.mark.parametrize("preset", ALL_PRESETS)
def test_rows_are_independent_and_follow_a_permutation(preset):
    model, tokens = small_lm(preset), random_tokens(5, LENGTH)
    y, _ = model(tokens)
    order = torch.tensor([3, 0, 4, 2, 1])
    torch.testing.assert_close(model(tokens[order])[0], y[order], rtol=REPEAT, atol=REPEAT)
    for row in range(5):
        torch.testing.assert_close(model(tokens[row : row + 1])[0], y[row : row + 1], rtol=REPEAT, atol=REPEAT)


@torch.no_grad()
@pytest.mark.parametrize("preset", ALL_PRESETS)
def test_permuting_heads_permutes_the_core(preset):
    """Columns of the input and all head-first parameters permuted alike: the core's output follows; so it shards by head."""
    model = small_lm(preset)
    core, width = model.blocks[0].mixer.core, 8
    x = torch.randn(2, LENGTH, 3 * core.features_per_head, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    y = core(x)[0].unflatten(-1, (3, width))
    order = torch.tensor([2, 0, 1])
    for parameter in core.parameters():
        parameter.copy_(parameter[order].clone())
    moved = core(x.unflatten(-1, (3, -1))[:, :, order].flatten(2))[0].unflatten(-1, (3, width))
    torch.testing.assert_close(moved, y[:, :, order], rtol=REPEAT, atol=REPEAT)
    assert not torch.allclose(y, y[:, :, order])


@torch.no_grad()
def test_a_core_with_fewer_heads_is_a_part_of_the_whole():
    """A tensor-parallel rank with heads 1 and 2 computes the whole core's heads 1 and 2."""
    whole = small_lm("momentum").blocks[0].mixer.core
    part = TitansCore(small_config("momentum"), num_heads=2).double()
    for mine, theirs in zip(part.parameters(), whole.parameters(), strict=True):
        mine.copy_(theirs[1:])
    x = torch.randn(2, LENGTH, 3 * whole.features_per_head, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    y = whole(x)[0].unflatten(-1, (3, -1))[:, :, 1:].flatten(2)
    torch.testing.assert_close(part(x.unflatten(-1, (3, -1))[:, :, 1:].flatten(2))[0], y, rtol=REPEAT, atol=REPEAT)


@torch.no_grad()
@pytest.mark.parametrize("preset", ALL_PRESETS)
def test_time_first_is_the_same_block(preset):
    """As in megatron: activations [T, B, D]."""
    plain, config = small_lm(preset).blocks[0], small_config(preset)
    local = Parts.local(3)
    block = HopeBlock(config, parts=Parts(local.column, local.row, local.norm, 3, time_first=True)).double()
    block.load_state_dict(plain.state_dict())
    x = torch.randn(2, LENGTH, 24, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    torch.testing.assert_close(block(x.transpose(0, 1))[0].transpose(0, 1), plain(x)[0], rtol=REPEAT, atol=REPEAT)


@torch.no_grad()
def test_no_result_depends_on_uninitialised_memory():
    """torch.empty is filled with NaN for one forward pass with padding, documents and a state."""
    model, tokens = small_lm("momentum"), random_tokens(3, LENGTH)
    starts = torch.zeros(3, LENGTH, dtype=torch.bool)
    starts[1, 9] = True
    mask = torch.ones(3, LENGTH, dtype=torch.bool)
    mask[2, 4:7] = False
    torch.use_deterministic_algorithms(True)
    try:
        y, state = model(tokens, doc_start_BT=starts, mask_BT=mask, return_state=True)
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert y.isfinite().all() and all(t.isfinite().all() for t in state.to_tensors().values())


@pytest.mark.parametrize(("head_width", "chunks"), [(16, (16, 16)), (16, (64, 256)), (48, (64, 256)), (64, (64, 256))], ids=str)
def test_memory_norm_after_4096_tokens_is_within_a_factor_of_two(head_width, chunks):
    """At the default settings and initial values, uniform tokens, every layer: |W_T| / |W_0| of M_mem."""
    titans = TitansConfig(chunk_mem=chunks[0], chunk_proj=chunks[1])
    config = ModelConfig(vocab_size=256, num_layers=2, width=2 * head_width, num_heads=2, titans=titans, cms=CMSConfig(hidden=64))
    metrics = diagnostics(HopeLM(config), random_tokens(1, 4096, vocab=256))
    ratios = [metrics[f"memory/layer{i}/norm_ratio"] for i in range(2)]
    assert all(0.5 <= ratio <= 2 for ratio in ratios), ratios


@pytest.mark.parametrize("chunks", [(16, 16), (64, 256)], ids=str)
def test_a_long_text_of_one_token_stays_finite(chunks):
    """The worst text for a memory, identical keys 4,096 times: forward and backward are finite at the default objective."""
    titans = TitansConfig(chunk_mem=chunks[0], chunk_proj=chunks[1])
    model = HopeLM(ModelConfig(vocab_size=8, num_layers=1, width=32, num_heads=2, titans=titans, cms=CMSConfig(hidden=24)))
    tokens = torch.full((1, 4097), 3)
    loss = model.token_losses(tokens[:, :-1], tokens[:, 1:]).mean()
    loss.backward()
    assert loss.isfinite() and all(p.grad.isfinite().all() for p in model.parameters())
