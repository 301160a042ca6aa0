"""The projection scan: its stacked memories and static streams, forward and backward, and the sum over memories."""

from itertools import product
from typing import Any

import torch

from hope_kernels.projection_scan import generate_triton as generate
from hope_kernels.projection_scan import triton_ as scan
from hope_kernels.tuning import padded
from tools.aot.case import Case
from tools.aot.memories import OPERANDS, entry

FP32 = torch.float32
STACK = ("k", "eta", "alpha", "v")
VECTORS = ("xk", "xv", "xq", "k", "v", "q")
GATES = ("eta", "log_alpha", "scale_k", "scale_v", "scale_q")


def _arguments(width: int, *, memory: str, masks: bool) -> dict[str, Any]:
    """Arguments that both kernels share. memory: "mlp", "linear" or "static"."""
    names = ("q",) if memory == "static" else STACK
    tile, block = entry(width).tile, padded(width)
    weights = {"mlp": ("w2", "w1"), "linear": ("w2",), "static": ()}[memory]
    found: dict[str, Any] = dict.fromkeys(VECTORS, OPERANDS) | dict.fromkeys(GATES, FP32) | dict.fromkeys(("r_eta", "r_alpha"), FP32)
    found |= {w: OPERANDS if w in weights else None for w in ("w2", "w1")}
    found |= {w.replace("w", "start"): OPERANDS if masks and w in weights else None for w in ("w2", "w1")}
    places = {f"PLACE_{name.upper()}": names.index(name) if name in names else -1 for name in generate.STREAMS}
    return found | places | {
        "reset": torch.uint8 if masks else None, "eta_max": 1.0, "tokens": 2048, "row": 4096, "heads": 16, "num_chunks": 8,
        "num_tiles": 8 * 256 // tile, "first_tile": 256 // tile, "K": width, "F": width, "BLOCK_K": block, "BLOCK_F": block, "CHUNK": 256,
        "TILE": tile, "MEMORY": memory != "static", "LINEAR": memory == "linear", "NORMALIZE_V": False, "PRECISION": "tf32",
    }  # fmt: skip


def _forward(width: int, *, memory: str, masks: bool = False) -> dict[str, Any]:
    extra = dict.fromkeys(("b_eta", "b_alpha"), FP32) | {"live": FP32 if masks else None, "WRITES": True, "RETENTION": True}
    tiles = {"slots_per_chunk": 256 // entry(width).tile, "first_tile": 256 // generate.READ_TILE, "TILE": generate.READ_TILE}
    return _arguments(width, memory=memory, masks=masks) | extra | tiles


def _backward(width: int, *, memory: str, masks: bool = False) -> dict[str, Any]:
    found = _arguments(width, memory=memory, masks=masks)
    extra: dict[str, Any] = dict.fromkeys(("d_k", "d_v", "d_q"), OPERANDS)
    inner = ("d_eta", "d_log_alpha", "in_k", "in_v", "in_terms_k", "in_eta", "in_log_alpha", "d_x", "d_readout", "d_bias")
    extra |= dict.fromkeys(inner, FP32) | {f"d_{name}": found[name] and FP32 for name in ("w2", "w1", "start2", "start1")}
    return found | extra | {"stop_tile": 2 * found["first_tile"], "run": found["first_tile"], "PARTS": len(STACK)}


def _sum(width: int) -> Case:
    parts = ("y", "w", "g_prev", "g_end")
    tile = entry(width).tile
    sizes = {"tokens": 2048, "num_tiles": 2048 // tile, "first_tile": 0, "S": len(STACK), "K": width, "BLOCK_K": padded(width)}
    arguments = dict.fromkeys([*parts, *(f"sum_{part}" for part in parts)], FP32) | sizes | {"CHUNK": 256, "TILE": tile}
    return Case(f"sum_memories_{width}", scan._sum_memories, arguments, num_warps=4, min_mma=0)


def cases() -> list[Case]:
    """Both memories at every width of the tuning table, the default one also with padding and masks; a launch of static streams."""
    found = []
    launches = [(width, memory, False) for width, memory in product((64, 128), ("mlp", "linear"))]
    for width, memory, masks in [*launches, (48, "mlp", True), (128, "static", False)]:
        settings: dict[str, Any] = {"memory": memory, "masks": masks}
        name, static = f"{memory}_{width}{'_masks' if masks else ''}", memory == "static"
        for kernel, build, label in (
            (generate._generate_forward, _forward, "generate_forward"),
            (generate._generate_backward, _backward, "generate_backward"),
        ):
            arguments = build(width, **settings)
            found.append(Case(f"{label}_{name}", kernel, arguments, entry(width).warps_of(label), min_mma=0 if static else 4))
    return [*found, *(_sum(width) for width in (48, 128))]
