"""Where each token of a ragged batch lies on the chunk grid (SPEC 2.2): padding, packed documents and continued sequences.

Rows may contain padding (skipped as if absent), several documents (each starts at a chunk boundary, from the learned start), and a
continued first document (its position inside the chunk is part of the state). A `Layout` maps tokens to slots of a common grid on which
every row's chunks line up; slots without a token are exact no-ops. Fresh full rows need none of this: `build_layout` gives None.
Legend: B batch, T tokens of this call, G grid slots, N chunks, D documents of a row (0 is the continued one), W convolution width.
"""

import dataclasses
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Layout:
    """Index tables of one call, shared by all layers.

    mask_BT: real tokens. document_BT: 0 for the continued document. position_BT: position in the document.
    seen_B: tokens of the last document after this call. slot_BT: grid slot (0 at padding). source_BG: 0 = empty slot, 1..chunk = place in
    the open part of the state, then 1 + chunk + token. tail_BW, taps_BTW: convolution sources, 0 = zero, 1..W-1 = the state's tail, then
    W + token.
    open_BC: slots of the last document's open chunk (0 where there is none) and open_count_B their number. commit, reset: per chunk of
    length chunk_proj and chunk_mem, and whether any row commits it.
    """

    chunk_proj: int
    chunk_mem: int
    first_mem: int
    mask_BT: torch.Tensor
    document_BT: torch.Tensor
    position_BT: torch.Tensor
    seen_B: torch.Tensor
    slot_BT: torch.Tensor
    source_BG: torch.Tensor
    taps_BTW: torch.Tensor
    tail_BW: torch.Tensor
    open_BC: torch.Tensor
    open_count_B: torch.Tensor
    commit_proj_BN: torch.Tensor
    reset_proj_BN: torch.Tensor
    commit_mem_BN: torch.Tensor
    reset_mem_BN: torch.Tensor

    def split(self, size: int) -> list["Layout"]:
        """The layouts of runs of `size` rows, the last one maybe shorter."""
        fields = {name: value.split(size) for name, value in vars(self).items() if isinstance(value, torch.Tensor)}
        count = len(self.mask_BT[::size])
        return [dataclasses.replace(self, **{name: parts[index] for name, parts in fields.items()}) for index in range(count)]

    def to_grid(self, x_BTHX: torch.Tensor, open_BCHX: torch.Tensor | None) -> torch.Tensor:
        """Tokens [B, T, ...] and the open part of the state [B, chunk, ...] (None: nothing is open) -> grid slots [B, G, ...]."""
        padding = x_BTHX.new_zeros(x_BTHX.shape[0], 1 if open_BCHX is not None else 1 + self.chunk_proj, *x_BTHX.shape[2:])
        pool = torch.cat([padding, x_BTHX] if open_BCHX is None else [padding, open_BCHX, x_BTHX], 1)
        return take(pool, self.source_BG)

    def from_grid(self, y_BGHX: torch.Tensor) -> torch.Tensor:
        """Grid slots [B, G, ...] -> tokens [B, T, ...], zero at padding."""
        y = take(y_BGHX, self.slot_BT)
        return y * self.mask_BT.view(*self.mask_BT.shape, *(1,) * (y.dim() - 2)).to(y.dtype)

    def open_part(self, x_BGHX: torch.Tensor) -> torch.Tensor:
        """The open chunk's slots [B, chunk, ...], zero beyond its end."""
        live = torch.arange(self.chunk_proj, device=x_BGHX.device) < self.open_count_B.unsqueeze(1)
        x = take(x_BGHX, self.open_BC)
        return x * live.view(*live.shape, *(1,) * (x.dim() - 2)).to(x.dtype)


def tokens_seen(doc_start_BT: torch.Tensor, position: int) -> torch.Tensor:
    """How many tokens before `position` belong to the document that is open there [B]; every row begins a document."""
    index = torch.arange(position, device=doc_start_BT.device)
    starts = torch.where(doc_start_BT[:, :position], index, 0)
    return position - (starts.amax(1) if position else starts.sum(1))


def take(x_BNX: torch.Tensor, index_BM: torch.Tensor) -> torch.Tensor:
    """x[b, index[b, m]]: [B, N, ...] and [B, M...] -> [B, M..., ...]."""
    rows = torch.arange(x_BNX.shape[0], device=x_BNX.device).view(-1, *(1,) * (index_BM.dim() - 1))
    flat = x_BNX.flatten(0, 1).index_select(0, (index_BM + rows * x_BNX.shape[1]).flatten())  # its backward adds whole rows
    return flat.view(*index_BM.shape, *x_BNX.shape[2:])


def build_layout(
    shape: tuple[int, int],
    *,
    chunk_proj: int,
    chunk_mem: int,
    conv_width: int,
    mask_BT: torch.Tensor | None = None,
    doc_start_BT: torch.Tensor | None = None,
    seen_B: torch.Tensor | None = None,
    device: torch.device | None = None,
) -> Layout | None:
    """The layout of a call with B, T = shape; None where every row is one fresh full document.

    mask_BT, doc_start_BT: bool or None. seen_B: tokens that the state has already seen of each row's document, None for fresh rows.
    """
    batch, length = shape
    inner_start = doc_start_BT is not None and bool(doc_start_BT[:, 1:].any())
    padded = mask_BT is not None and not bool(mask_BT.all())
    if seen_B is None and not inner_start and not padded:
        return None
    mask = torch.ones(batch, length, dtype=torch.bool, device=device) if mask_BT is None else mask_BT
    starts = torch.zeros_like(mask) if doc_start_BT is None else doc_start_BT & mask
    seen = torch.zeros(batch, dtype=torch.long, device=mask.device) if seen_B is None else seen_B
    docs = _documents(mask, starts, seen, chunk_proj)
    return Layout(
        chunk_proj=chunk_proj,
        chunk_mem=chunk_mem,
        first_mem=int((seen % chunk_proj // chunk_mem).min()),
        mask_BT=mask,
        document_BT=docs.document,
        position_BT=docs.position,
        seen_B=docs.seen,
        slot_BT=docs.slot,
        **_grid(docs, mask, seen % chunk_proj, chunk_proj, chunk_mem),
        **_taps(docs, mask, conv_width),
    )


@dataclass(frozen=True)
class _Documents:
    """Documents of every row: per token its document, position, slot and rank among real tokens; per document size and base slot."""

    document: torch.Tensor
    position: torch.Tensor
    slot: torch.Tensor
    rank: torch.Tensor
    first_rank: torch.Tensor
    size: torch.Tensor
    base: torch.Tensor
    last: torch.Tensor
    seen: torch.Tensor


def _documents(mask: torch.Tensor, starts: torch.Tensor, seen: torch.Tensor, chunk: int) -> _Documents:
    open_count = seen % chunk
    document = starts.long().cumsum(1)
    count = int(document.max()) + 1
    rank = mask.long().cumsum(1) - 1
    size = torch.zeros(mask.shape[0], count, dtype=torch.long, device=mask.device).scatter_add_(1, document, mask.long())
    first_rank = size.cumsum(1) - size
    on_grid = size.clone()
    on_grid[:, 0] += open_count
    allotted = (on_grid + chunk - 1) // chunk * chunk
    base = allotted.cumsum(1) - allotted
    in_document = rank - first_rank.gather(1, document)
    continued = document == 0
    slot = base.gather(1, document) + in_document + torch.where(continued, open_count.unsqueeze(1), 0)
    position = in_document + torch.where(continued, seen.unsqueeze(1), 0)
    last = document[:, -1]
    ended = size.gather(1, last.unsqueeze(1)).squeeze(1) + torch.where(last == 0, seen, 0)
    return _Documents(document, position, slot * mask, rank, first_rank, on_grid, base, last, ended)


def _grid(docs: _Documents, mask: torch.Tensor, open_count: torch.Tensor, chunk: int, chunk_mem: int) -> dict:
    batch, length = mask.shape
    device = mask.device
    end = docs.base.gather(1, docs.last.unsqueeze(1)).squeeze(1) + docs.size.gather(1, docs.last.unsqueeze(1)).squeeze(1)
    slots = max(int(end.max()), 1)
    trash = torch.where(mask, docs.slot, slots)  # padding writes to a slot that is cut off
    source = torch.zeros(batch, slots + 1, dtype=torch.long, device=device)
    source.scatter_(1, trash, (1 + chunk + torch.arange(length, device=device)).expand(batch, -1))
    source = source[:, :slots]
    grid = torch.arange(slots, device=device)
    source = torch.where((grid < open_count.unsqueeze(1)), grid + 1, source)
    filled = source != 0
    reset = torch.zeros(batch, -(-slots // chunk) + 1, dtype=torch.bool, device=device)
    begins = docs.base // chunk
    nonempty = docs.size > 0
    nonempty[:, 0] = False
    reset.scatter_(1, torch.where(nonempty, begins, reset.shape[1] - 1), torch.ones_like(nonempty))
    reset = reset[:, :-1]
    commit_mem = _full(filled, chunk_mem)
    already = torch.arange(commit_mem.shape[1], device=device) < (open_count // chunk_mem).unsqueeze(1)
    reset_mem = torch.zeros_like(commit_mem)
    reset_mem[:, :: chunk // chunk_mem] = reset
    count = docs.seen % chunk
    open_slots = (end - count).unsqueeze(1) + torch.arange(chunk, device=device)
    return {
        "source_BG": source,
        "open_BC": torch.where(open_slots < end.unsqueeze(1), open_slots, 0),
        "open_count_B": count,
        "commit_proj_BN": _full(filled, chunk),
        "reset_proj_BN": reset,
        "commit_mem_BN": commit_mem & ~already,
        "reset_mem_BN": reset_mem,
    }


def _full(filled: torch.Tensor, chunk: int) -> torch.Tensor:
    """Whether every slot of a chunk holds a token: [B, G] -> [B, N]."""
    missing = -filled.shape[1] % chunk
    return torch.nn.functional.pad(filled, (0, missing)).unflatten(1, (-1, chunk)).all(-1)


def _taps(docs: _Documents, mask: torch.Tensor, width: int) -> dict:
    batch, length = mask.shape
    device = mask.device
    token_of_rank = torch.zeros(batch, length + 1, dtype=torch.long, device=device)
    token_of_rank.scatter_(1, torch.where(mask, docs.rank, length), torch.arange(length, device=device).expand(batch, -1))

    def sources(rank: torch.Tensor, document: torch.Tensor, back: torch.Tensor) -> torch.Tensor:
        wanted = rank.unsqueeze(-1) - back
        inside = wanted >= docs.first_rank.gather(1, document).unsqueeze(-1)
        from_tail = (document == 0).unsqueeze(-1) & (wanted < 0) & (wanted >= 1 - width)
        token = token_of_rank.gather(1, wanted.clamp(0, length - 1).flatten(1)).view_as(wanted)
        return torch.where(inside, width + token, torch.where(from_tail, width + wanted, 0))

    back = torch.arange(width - 1, -1, -1, device=device)
    next_rank = mask.long().sum(1, keepdim=True)
    tail = sources(next_rank, docs.last.unsqueeze(1), back[:-1]).squeeze(1)
    return {"taps_BTW": sources(docs.rank, docs.document, back), "tail_BW": tail}
