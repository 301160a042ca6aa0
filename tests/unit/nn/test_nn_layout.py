"""The chunk grid of ragged batches: properties of `build_layout` for random padding, documents and continued rows."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hope_pt.nn.layout import build_layout, take, tokens_seen


@st.composite
def calls(draw):
    """Arguments of build_layout: [B, T], chunk lengths, mask, document starts, tokens seen."""
    batch, length = draw(st.integers(1, 3)), draw(st.integers(1, 14))
    chunk_mem = draw(st.sampled_from([1, 2, 3]))
    bits = st.lists(st.booleans(), min_size=batch * length, max_size=batch * length)
    rare = st.lists(st.integers(0, 4).map(lambda x: x == 0), min_size=batch * length, max_size=batch * length)
    mask = torch.tensor(draw(st.one_of(bits, st.just([True] * (batch * length))))).view(batch, length)
    starts = torch.tensor(draw(rare)).view(batch, length)
    seen = torch.tensor(draw(st.lists(st.integers(0, 20), min_size=batch, max_size=batch)))
    return {
        "shape": (batch, length),
        "chunk_mem": chunk_mem,
        "chunk_proj": chunk_mem * draw(st.sampled_from([1, 2, 4])),
        "conv_width": draw(st.sampled_from([1, 2, 4])),
        "mask_BT": mask,
        "doc_start_BT": starts,
        "seen_B": seen,
    }


def layout_of(call):
    """The layout of drawn arguments."""
    return build_layout(call["shape"], **{name: value for name, value in call.items() if name != "shape"})


def documents(call, row: int) -> list[list[int]]:
    """Token positions of every document of a row, the continued one first (it may be empty)."""
    found: list[list[int]] = [[]]
    for t in range(call["shape"][1]):
        if not call["mask_BT"][row, t]:
            continue
        if call["doc_start_BT"][row, t]:
            found.append([])
        found[-1].append(t)
    return found


@settings(max_examples=150, deadline=None, derandomize=True)
@given(calls())
def test_every_token_has_its_own_slot_in_order_and_documents_are_aligned(call):
    layout = layout_of(call)
    chunk = call["chunk_proj"]
    for row in range(call["shape"][0]):
        previous_end = 0
        for number, tokens in enumerate(documents(call, row)):
            seen = int(call["seen_B"][row]) if number == 0 else 0
            slots = layout.slot_BT[row, tokens].tolist()
            if not tokens:
                previous_end = -(-(seen % chunk) // chunk) * chunk
                continue
            base = slots[0] - seen % chunk
            assert base % chunk == 0 and base >= previous_end
            assert slots == list(range(slots[0], slots[0] + len(tokens)))
            assert layout.position_BT[row, tokens].tolist() == list(range(seen, seen + len(tokens)))
            assert layout.document_BT[row, tokens].unique().tolist() == [number]
            previous_end = -(-(slots[-1] + 1) // chunk) * chunk


@settings(max_examples=150, deadline=None, derandomize=True)
@given(calls())
def test_the_grid_holds_open_tokens_and_real_tokens_and_nothing_else(call):
    """Slots are filled from the open part of the state, then by the tokens whose slot they are; all others are empty."""
    layout = layout_of(call)
    batch, length = call["shape"]
    chunk = call["chunk_proj"]
    for row in range(batch):
        opened = int(call["seen_B"][row]) % chunk
        wanted = {slot: slot + 1 for slot in range(opened)}
        wanted |= {int(layout.slot_BT[row, t]): 1 + chunk + t for t in range(length) if call["mask_BT"][row, t]}
        assert {slot: value for slot, value in enumerate(layout.source_BG[row].tolist()) if value} == wanted
    x = torch.randn(batch, length, 2, generator=torch.Generator().manual_seed(0))
    state = torch.randn(batch, chunk, 2, generator=torch.Generator().manual_seed(1))
    back = layout.from_grid(layout.to_grid(x, state))
    assert torch.equal(back, x * call["mask_BT"].unsqueeze(-1))


@settings(max_examples=150, deadline=None, derandomize=True)
@given(calls())
def test_full_chunks_commit_and_documents_return_to_the_start(call):
    layout = layout_of(call)
    chunk, small = call["chunk_proj"], call["chunk_mem"]
    for row in range(call["shape"][0]):
        filled = layout.source_BG[row] != 0
        already = int(call["seen_B"][row]) % chunk // small
        for size, commit in ((chunk, layout.commit_proj_BN[row]), (small, layout.commit_mem_BN[row])):
            for index, commits in enumerate(commit.tolist()):
                part = filled[index * size : (index + 1) * size]
                full = len(part) == size and bool(part.all())
                assert commits == (full and (size == chunk or index >= already or chunk == small and index >= already))
        starts = {int(layout.slot_BT[row, tokens[0]]) // chunk for tokens in documents(call, row)[1:]}
        assert set(layout.reset_proj_BN[row].nonzero().flatten().tolist()) == starts
        assert set(layout.reset_mem_BN[row].nonzero().flatten().tolist()) == {s * chunk // small for s in starts}


@settings(max_examples=150, deadline=None, derandomize=True)
@given(calls())
def test_the_state_after_the_call(call):
    """Tokens seen, the open chunk and the convolution tail belong to the last document of each row."""
    layout = layout_of(call)
    chunk, width = call["chunk_proj"], call["conv_width"]
    batch, length = call["shape"]
    x = torch.arange(1, batch * length + 1).view(batch, length).float()
    opened = -torch.arange(1, batch * chunk + 1).view(batch, chunk).float()
    tail = -100 - torch.arange(1, batch * (width - 1) + 1).view(batch, width - 1).float()
    pool = torch.cat([torch.zeros(batch, 1), tail, x], 1)
    for row in range(batch):
        found = documents(call, row)
        tokens, continued = found[-1], len(found) == 1
        seen = int(call["seen_B"][row]) if continued else 0
        assert int(layout.seen_B[row]) == seen + len(tokens)
        values = x[row, tokens].tolist()
        before = opened[row, : seen % chunk].tolist()
        count = (seen + len(tokens)) % chunk
        wanted = ((before + values)[len(before) + len(values) - count :] + [0.0] * chunk)[:chunk]
        assert layout.open_part(layout.to_grid(x, opened))[row].tolist() == wanted
        history = (tail[row].tolist() if continued else [0.0] * (width - 1)) + values
        assert take(pool, layout.tail_BW)[row].tolist() == history[len(history) - (width - 1) :]


@settings(max_examples=150, deadline=None, derandomize=True)
@given(calls())
def test_convolution_taps_stay_in_the_document(call):
    layout = layout_of(call)
    width = call["conv_width"]
    for row in range(call["shape"][0]):
        for number, tokens in enumerate(documents(call, row)):
            history = [*range(1, width)] if number == 0 else [0] * (width - 1)
            sources = history + [width + t for t in tokens]
            for index, t in enumerate(tokens):
                assert layout.taps_BTW[row, t].tolist() == sources[index : index + width]


def test_fresh_full_rows_need_no_layout():
    options = {"chunk_proj": 4, "chunk_mem": 2, "conv_width": 4}
    start = torch.zeros(2, 5, dtype=torch.bool)
    start[:, 0] = True
    assert build_layout((2, 5), **options) is None
    assert build_layout((2, 5), **options, doc_start_BT=start, mask_BT=torch.ones(2, 5, dtype=torch.bool)) is None
    start[1, 3] = True
    assert build_layout((2, 5), **options, doc_start_BT=start) is not None


@settings(max_examples=100, deadline=None, derandomize=True)
@given(calls(), st.integers(1, 3))
def test_runs_of_rows_have_the_rows_of_the_layout(call, size):
    layout = layout_of(call)
    x = torch.randn(*call["shape"], 2, generator=torch.Generator().manual_seed(0))
    opened = torch.randn(call["shape"][0], call["chunk_proj"], 2, generator=torch.Generator().manual_seed(1))
    grid = layout.to_grid(x, opened)
    parts = layout.split(size)
    assert [len(part.mask_BT) for part in parts] == [len(rows) for rows in x.split(size)]
    for part, rows, before, wanted in zip(parts, x.split(size), opened.split(size), grid.split(size), strict=True):
        assert torch.equal(part.to_grid(rows, before), wanted)
    assert torch.equal(torch.cat([part.commit_mem_BN for part in parts]), layout.commit_mem_BN)
    assert torch.equal(
        torch.cat([part.open_part(rows) for part, rows in zip(parts, grid.split(size), strict=True)]), layout.open_part(grid)
    )


@settings(max_examples=100, deadline=None, derandomize=True)
@given(calls(), st.integers(0, 14))
def test_tokens_seen_is_what_a_call_up_to_there_has_seen(call, position):
    """A row without padding, cut at `position`: the second part continues where the first one ends."""
    position = min(position, call["shape"][1])
    starts = call["doc_start_BT"]
    fresh = torch.zeros(len(starts), dtype=torch.long)
    options = {name: call[name] for name in ("chunk_mem", "chunk_proj", "conv_width")}
    wanted = fresh
    if position:
        wanted = build_layout((len(starts), position), doc_start_BT=starts[:, :position], seen_B=fresh, **options).seen_B
    assert tokens_seen(starts, position).tolist() == wanted.tolist()
