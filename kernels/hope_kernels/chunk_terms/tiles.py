"""From tokens to tiles and back, plain torch: [L, T, ...] <-> [L, NT, TILE, ...]; places without a token are zero."""

import torch

from hope_kernels.tiling import Tiling


def live_places(tiling: Tiling, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """(token of every place of every tile, whether there is one), both [NT, TILE]; a place without a token names token 0."""
    tile = torch.arange(tiling.num_tiles, device=device).unsqueeze(1)
    chunk = tile // tiling.per_chunk
    token = chunk * tiling.chunk + tile % tiling.per_chunk * tiling.tile + torch.arange(tiling.tile, device=device)
    live = token < ((chunk + 1) * tiling.chunk).clamp_max(tiling.tokens)
    return token.where(live, 0), live


def split_tiles(x: torch.Tensor, tiling: Tiling) -> torch.Tensor:
    """From x [L, T, ...] to [L, NT, TILE, ...]."""
    token, live = live_places(tiling, x.device)
    return x[:, token].where(live.view(*live.shape, *(1,) * (x.dim() - 2)), 0)


def join_tiles(x: torch.Tensor, tiling: Tiling) -> torch.Tensor:
    """From x [L, NT, TILE, ...] to [L, T, ...]; what stands at places without a token is dropped."""
    token = torch.arange(tiling.tokens, device=x.device)
    inside = token % tiling.chunk
    tile = token // tiling.chunk * tiling.per_chunk + inside // tiling.tile
    return x[:, tile, inside % tiling.tile]
