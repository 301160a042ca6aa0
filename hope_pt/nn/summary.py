"""What a model costs, from its configuration alone: parameters by class, FLOPs per token, bytes of state.

FLOPs count a multiply-add as two and matrix products only; the memory's inner loop is counted as the chunked form computes it.
"""

from collections import Counter

import torch

from hope_pt.config.schema import ModelConfig
from hope_pt.nn.lm import HopeLM
from hope_pt.nn.titans import adaptive_streams


def parameter_class(name: str) -> str:
    """The class of a HopeLM parameter: embedding, head, projections, memories, gates, norms, or cms.level<l>."""
    if name.startswith("embedding."):
        return "embedding"
    if name.startswith("head."):
        return "head"
    if name.endswith("norm.weight") or name.endswith("out_norm"):
        return "norms"
    if ".cms.levels." in name:
        return f"cms.level{name.split('.cms.levels.')[1].split('.')[0]}"
    if "mem_weights" in name or "proj_weights" in name:
        return "memories"
    return "gates" if ".core." in name else "projections"


def count_parameters(config: ModelConfig) -> dict[str, int]:
    """Parameters by class, and "total"; the model is built on the meta device."""
    counts: Counter[str] = Counter()
    for name, parameter in HopeLM(config, device=torch.device("meta")).named_parameters():
        counts[parameter_class(name)] += parameter.numel()
    return {**counts, "total": sum(counts.values())}


def state_bytes(config: ModelConfig) -> int:
    """Bytes of the inference state of one sequence (for attention: of an empty cache, which grows with the context)."""
    return HopeLM(config, device=torch.device("meta")).init_state(1).bytes()


def flops_per_token(config: ModelConfig, *, seq_len: int) -> dict[str, float]:
    """FLOPs per token by part, "forward" and "training" (forward, backward, and the replay of the memory scans)."""
    width, layers, heads, k = config.width, config.num_layers, config.num_heads, config.head_width
    streams = 4 if config.mixer == "titans" else 3
    parts = {
        "projections": 2.0 * layers * width * (streams * heads * k + width),
        "cms": 6.0 * layers * width * config.cms.hidden * len(config.cms.periods),
        "head": 2.0 * width * config.vocab_size,
    }
    if config.mixer == "attention":
        parts["attention"] = 4.0 * layers * heads * k * (seq_len + 1) / 2  # causal: half of the score matrix
    else:
        parts["memory"] = layers * heads * _memory_flops(config)
    forward = sum(parts.values())
    return {**parts, "forward": forward, "training": 3 * forward + parts.get("memory", 0.0)}


def _memory_flops(config: ModelConfig) -> float:
    """Forward FLOPs per token and head of both scans (SPEC 2.1)."""
    titans, k, f = config.titans, config.head_width, config.memory_hidden
    matrices = 2 if titans.memory == "mlp" else 1
    product = 2.0 * k * (f if titans.memory == "mlp" else k)  # one token through one weight matrix
    signals = product * (matrices * (2 if titans.self_target else 1) + (matrices - 1))  # keys (and targets), error to the first layer
    writes = product * matrices
    stack = adaptive_streams(titans)
    # eta and alpha are scalars: their second matrix meets the readout vector once, not every token
    reads = product * sum(1 if name in ("eta", "alpha") else matrices for name in stack)
    generating = reads + len(stack) * (signals + writes) + (4.0 * titans.chunk_proj * k if stack else 0)
    size = titans.chunk_mem
    inside = product * matrices + 2.0 * size * (k + 3 * f) if titans.read == "causal" else product * matrices
    return generating + signals + writes + inside + 4.0 * size * k
