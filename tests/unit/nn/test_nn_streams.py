"""One pass, any split into segments, token by token, padded and packed are the same computation, for every mixer setting."""

import pytest
import torch

from hope_pt.errors import CheckpointError
from hope_pt.nn import HopeLM, LMState
from hope_pt.testing.models import PRESETS, random_tokens, small_config, small_lm
from hope_pt.testing.scans import REPEAT, SCAN

ALL_PRESETS = [*PRESETS, "attention"]
LENGTH = 21


@pytest.fixture(params=ALL_PRESETS)
def model(request) -> HopeLM:
    """A float64 model of every preset."""
    return small_lm(request.param)


def close(got: torch.Tensor, wanted: torch.Tensor) -> None:
    torch.testing.assert_close(got, wanted, rtol=REPEAT, atol=REPEAT)


def same_state(got: LMState, wanted: LMState) -> None:
    """Equal states; of attention caches the valid entries."""
    assert torch.equal(got.seen_B, wanted.seen_B)
    for a, b in zip(got.layers, wanted.layers, strict=True):
        assert a.keys() == b.keys()
        if "valid" in a:
            for row in range(len(got.seen_B)):
                for name in ("k", "v"):
                    close(a[name][row][:, a["valid"][row]], b[name][row][:, b["valid"][row]])
        else:
            for name in a:
                close(a[name], b[name])


@torch.no_grad()
def test_one_pass_equals_every_split(model):
    tokens = random_tokens(3, LENGTH)
    whole, end = model(tokens, return_state=True)
    close(whole, model(tokens)[0])
    for split in range(1, LENGTH):
        first, state = model(tokens[:, :split], return_state=True)
        second, state = model(tokens[:, split:], state=state)
        close(torch.cat([first, second], 1), whole)
        same_state(state, end)


@torch.no_grad()
def test_one_pass_equals_token_by_token_and_ragged_parts(model):
    tokens = random_tokens(3, LENGTH)
    whole, end = model(tokens, return_state=True)
    for cuts in (range(LENGTH + 1), (0, 1, 4, 5, 12, 13, 20, LENGTH)):
        state, outputs = model.init_state(3), []
        for first, last in zip(cuts[:-1], cuts[1:], strict=True):
            y, state = model(tokens[:, first:last], state=state)
            outputs.append(y)
        close(torch.cat(outputs, 1), whole)
        same_state(state, end)


@torch.no_grad()
def test_rows_of_different_position_continue_together(model):
    """A batch whose rows have seen different numbers of tokens, as in serving: each row goes on as if alone."""
    tokens = random_tokens(1, LENGTH)
    whole, _ = model(tokens)
    mask = torch.zeros(4, 11, dtype=torch.bool)
    lengths = (2, 5, 8, 11)
    for row, length in enumerate(lengths):
        mask[row, -length:] = True
    padded = torch.zeros(4, 11, dtype=torch.long)
    padded[mask] = torch.cat([tokens[0, :length] for length in lengths])
    _, state = model(padded, mask_BT=mask, return_state=True)
    assert state.seen_B.tolist() == list(lengths)
    following = torch.stack([tokens[0, length : length + 10] for length in lengths])
    y, state = model(following, state=state)
    for row, length in enumerate(lengths):
        close(y[row], whole[0, length : length + 10])
    kept = state.rows(torch.tensor([3, 0, 3]))
    more, _ = model(tokens[:, :3].expand(3, -1), state=kept)
    close(more[0], more[2])
    assert not torch.allclose(more[0], more[1])


@torch.no_grad()
@pytest.mark.parametrize("seed", range(3))
def test_padding_anywhere_is_a_no_op(model, seed):
    """The padded tokens are noise, the real ones and the state come out as without them; also when a row is all padding."""
    generator = torch.Generator().manual_seed(seed)
    tokens = random_tokens(4, LENGTH, seed=seed)
    mask = torch.rand(4, LENGTH, generator=generator) > (0.2, 0.5, 0.8)[seed]
    mask[3] = False
    y, state = model(tokens, mask_BT=mask, return_state=True)
    assert y.isfinite().all()
    other = torch.where(mask, tokens, random_tokens(4, LENGTH, seed=99))
    assert torch.equal(model(other, mask_BT=mask)[0][mask], y[mask])
    for row in range(3):
        if mask[row].any():
            alone, end = model(tokens[row : row + 1, mask[row]], return_state=True)
            close(y[row, mask[row]], alone[0])
            same_state(state.rows(torch.tensor([row])), end)
    same_state(state.rows(torch.tensor([3])), model.init_state(1))


@torch.no_grad()
def test_padding_in_the_middle_of_a_stream(model):
    tokens = random_tokens(2, LENGTH)
    whole, _ = model(tokens)
    _, state = model(tokens[:, :5], return_state=True)
    mask = torch.ones(2, LENGTH - 5 + 3, dtype=torch.bool)
    mask[0, [0, 4, 9]] = mask[1, [1, 2, 18]] = False
    spread = torch.full(mask.shape, 7)
    spread[mask] = tokens[:, 5:].flatten()
    y, _ = model(spread, mask_BT=mask, state=state)
    close(y[mask].view(2, LENGTH - 5, -1), whole[:, 5:])


def boundaries(length: int) -> torch.Tensor:
    """Document starts of three rows: in mid-chunk, on a chunk, at the first token, of one token, at the last."""
    starts = torch.zeros(3, length, dtype=torch.bool)
    starts[0, [7, 16]] = starts[1, [0, 8, 11]] = starts[2, [13, 14, length - 1]] = True
    return starts


@torch.no_grad()
def test_packed_documents_equal_documents_alone(model):
    tokens, starts = random_tokens(3, LENGTH), boundaries(LENGTH)
    y, state = model(tokens, doc_start_BT=starts, return_state=True)
    close(y, model(tokens, doc_start_BT=starts)[0])
    for row in range(3):
        cuts = sorted({0, LENGTH, *starts[row].nonzero().flatten().tolist()})
        for first, last in zip(cuts[:-1], cuts[1:], strict=True):
            alone, end = model(tokens[row : row + 1, first:last], return_state=True)
            close(y[row, first:last], alone[0])
        same_state(state.rows(torch.tensor([row])), end)


@torch.no_grad()
def test_packed_and_padded_documents_continue_a_state(model):
    """A continued first document, padding inside documents and at their starts, all at once."""
    tokens, starts = random_tokens(3, LENGTH), boundaries(LENGTH)
    starts[:, 0] = False
    mask = torch.rand(3, LENGTH, generator=torch.Generator().manual_seed(4)) > 0.3
    mask |= starts  # a document starts at a real token
    before = random_tokens(3, 6, seed=8)
    _, state = model(before, return_state=True)
    y, end = model(tokens, state=state, doc_start_BT=starts, mask_BT=mask)
    for row in range(3):
        cuts = sorted({0, LENGTH, *starts[row].nonzero().flatten().tolist()})
        for first, last in zip(cuts[:-1], cuts[1:], strict=True):
            real = mask[row, first:last]
            text = tokens[row, first:last][real]
            prefix = before[row] if first == 0 else before[row, :0]
            alone, after = model(torch.cat([prefix, text])[None], return_state=True)
            close(y[row, first:last][real], alone[0, len(prefix) :])
        same_state(end.rows(torch.tensor([row])), after)


@torch.no_grad()
def test_a_state_survives_as_tensors(model):
    tokens = random_tokens(2, LENGTH)
    whole, _ = model(tokens)
    _, state = model(tokens[:, :9], return_state=True)
    tensors = state.to_tensors()
    assert all(t.is_contiguous() for t in tensors.values())
    assert state.bytes() == sum(t.numel() * t.element_size() for t in tensors.values())
    restored = LMState.from_tensors({name: t.clone() for name, t in tensors.items()})
    same_state(restored, state)
    close(model(tokens[:, 9:], state=restored)[0], whole[:, 9:])


@torch.no_grad()
def test_rows_select_repeat_and_reorder(model):
    tokens = random_tokens(3, LENGTH)
    _, state = model(tokens, return_state=True)
    chosen = state.rows(torch.tensor([2, 0, 2]))
    _, wanted = model(tokens[[2, 0, 2]], return_state=True)
    same_state(chosen, wanted)


@pytest.mark.parametrize("change", ["missing seen", "foreign name", "missing layer"])
def test_a_damaged_state_is_refused(change):
    tensors = small_lm().init_state(1).to_tensors()
    if change == "missing seen":
        del tensors["seen"]
    elif change == "foreign name":
        tensors["embedding.weight"] = torch.zeros(1)
    else:
        tensors = {name: t for name, t in tensors.items() if not name.startswith("layers.0")}
    with pytest.raises(CheckpointError):
        LMState.from_tensors(tensors)


@torch.no_grad()
def test_the_state_is_constant_in_context_length():
    model = small_lm()
    sizes = {model(random_tokens(1, length), return_state=True)[1].bytes() for length in (1, 7, 64)}
    assert sizes == {model.init_state(1).bytes()}


def test_training_on_packed_documents_has_the_gradients_of_documents_alone():
    """What the outer optimizer sees does not depend on the packing either."""
    model = small_lm("momentum")
    tokens, starts = random_tokens(3, LENGTH), boundaries(LENGTH)
    names = [name for name, _ in model.named_parameters()]
    weight = torch.randn(3, LENGTH, 50, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    packed = torch.autograd.grad((model(tokens, doc_start_BT=starts)[0] * weight).sum(), list(model.parameters()))
    loss = torch.zeros((), dtype=torch.float64)
    for row in range(3):
        cuts = sorted({0, LENGTH, *starts[row].nonzero().flatten().tolist()})
        for first, last in zip(cuts[:-1], cuts[1:], strict=True):
            loss = loss + (model(tokens[row : row + 1, first:last])[0] * weight[row : row + 1, first:last]).sum()
    alone = torch.autograd.grad(loss, list(model.parameters()))
    for name, a, b in zip(names, packed, alone, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9, msg=lambda text, name=name: f"{name}: {text}")


def test_the_default_presets_split_anywhere():
    """The chunk lengths of the real presets, in fp32, at a few splits: 1e-4 of logits of order one, rounding of 300 tokens."""
    for chunks in ({"chunk_mem": 16, "chunk_proj": 16}, {"chunk_mem": 64, "chunk_proj": 256}):
        model = HopeLM(small_config("fast", **chunks))
        tokens = random_tokens(1, 300)
        with torch.no_grad():
            whole, _ = model(tokens)
            for split in (1, 100, 256, 299):
                first, state = model(tokens[:, :split], return_state=True)
                second, _ = model(tokens[:, split:], state=state)
                torch.testing.assert_close(torch.cat([first, second], 1), whole, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("preset", list(PRESETS))
def test_training_pass_has_the_gradients_of_the_token_recurrence(preset):
    """The whole model as it trains (no state kept, replays between saved states) against itself on the reference scans."""
    tokens = random_tokens(2, LENGTH)
    weight = torch.randn(2, LENGTH, 50, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    gradients = []
    for backend in ("chunked", "reference"):
        model = small_lm(preset, backend=backend)
        y, _ = model(tokens)
        gradients.append((y, *torch.autograd.grad((y * weight).sum(), list(model.parameters()))))
    names = ["logits", *(name for name, _ in model.named_parameters())]
    for name, got, wanted in zip(names, *gradients, strict=True):
        error = (got - wanted).norm() / wanted.norm().clamp_min(1e-3)
        assert error <= SCAN, f"{name}: {error:.1e}"
