"""What a model costs, from its configuration alone: parameters by class, FLOPs per token, bytes of state."""

from collections import Counter

import torch

from hope_pt.config.schema import ModelConfig
from hope_pt.nn import flops
from hope_pt.nn.lm import HopeLM
from hope_pt.nn.mixer import CORES


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
    """FLOPs per token of a sequence of `seq_len` tokens, one document.

    By part, forward: projections, cms, head, and attention or memory. Then the sums: "forward", "backward", "replay" (what a sequence
    longer than titans.save_every runs twice), "head_replay" (logits that the backward pass computes again), "solves" (triangular solves of
    all passes) and "training", the sum of these five.
    """
    layers, levels = config.num_layers, len(config.cms.periods)
    with torch.device("meta"):
        core = CORES[config.mixer](config, num_heads=config.num_heads)
    projections = flops.linear(config.width, config.num_heads * core.features_per_head) + flops.linear(config.width, config.width)
    work = {
        "projections": projections.times(layers),
        "cms": flops.linear(config.width, 3 * config.cms.hidden).times(layers * levels),
        "head": flops.linear(config.width, config.vocab_size),
    }
    replay = 0.0
    if config.mixer == "attention":
        work["attention"] = flops.attention(config, seq_len=seq_len).times(layers)
    else:
        scans, replay = flops.memory(config, seq_len=seq_len)
        work["memory"], replay = scans.times(layers), replay * layers
    sums = {
        "forward": sum(part.forward for part in work.values()),
        "backward": sum(part.backward for part in work.values()),
        "replay": replay,
        "head_replay": 0.0 if config.head_backend == "reference" else work["head"].forward,
        "solves": sum(part.solves for part in work.values()),
    }
    return {**{name: part.forward for name, part in work.items()}, **sums, "training": sum(sums.values())}
