"""What an optimizer costs beside AdamW at the size of configs/hope_170m.toml, on a CPU and by the planner's count.

Measured: one update of the real parameters in fp32, group by group, without a model: a group with period n counts 1/n, M3's slow momentum
as often as it moves. And the tokens a second of forward and backward pass of the whole model on the same threads, from which follows the
share of a step of 524,288 tokens. Counted: FLOPs of the updates, divided over 8 layer-wise ranks as the engine divides them (the fullest
rank counts), over those of forward and backward pass of a rank's tokens; and the seconds of the update, memory traffic included, on 8 H100
by the planner's guesses, which no GPU has confirmed. Writes step_time.json. `python -m tools.optimizers.step_time [--layers N]`: blocks are
equal, so some of them are measured and scaled up to all.
"""

import argparse
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hope_pt.config import RunConfig, load
from hope_pt.engine.mesh import check_mesh
from hope_pt.launch.gpus import gpu_of
from hope_pt.launch.speed import optimizer_s
from hope_pt.launch.speed import step_time as planned_step_time
from hope_pt.launch.weights import owned
from hope_pt.nn import HopeLM, flops_per_token
from hope_pt.optim import Group, group_parameters
from hope_pt.optim.deep import DeepOptimizer
from hope_pt.optim.matrices import Matrices
from hope_pt.optim.rules import make_rule
from tools.bench.common import ROOT, environment
from tools.optimizers import common
from tools.optimizers.common import OPTIMIZERS, RESULTS

RANKS = 8
GPU = "h100"
Shapes = dict[str, tuple[int, ...]]


def config_of(name: str, *, layers: int = 0) -> RunConfig:
    """hope_170m with the matrices' rule `name`, and with fewer layers where `layers` says so."""
    shorter = [f"model.num_layers={layers}"] if layers else []
    # Whole parameters on their owners are not gathered while the next step already runs.
    gathered = ["engine.overlap_param_gather=false"] if name != "adamw" else []
    return load(ROOT / "configs" / "hope_170m.toml", [*common.overrides(name), *gathered, *shorter])


def shapes_of(config: RunConfig) -> Shapes:
    """Of all parameters, by name."""
    return {name: tuple(param.shape) for name, param in HopeLM(config.model, device=torch.device("meta")).named_parameters()}


def groups_of(shapes: Shapes, config: RunConfig) -> list[Group]:
    """The groups of the outer optimizer."""
    return group_parameters(shapes, config=config.model, optim=config.optim)


def parameters(group: Group, shapes: Shapes) -> list[Tensor]:
    """Random parameters of a group with random gradients."""
    generator = torch.Generator().manual_seed(0)
    params = [torch.randn(shapes[name], generator=generator) for name in group.names]
    for param in params:
        param.grad = torch.randn(param.shape, generator=generator)
    return params


def update_s(group: Group, shapes: Shapes, config: RunConfig, *, repeats: int) -> float:
    """Seconds of one update of a group: the median of `repeats`, and for M3 the mean over the updates of which one is slow."""
    params, optim, name = parameters(group, shapes), config.optim, group.rule.optimizer
    if group.view is None:
        adamw = torch.optim.AdamW(params, lr=1e-3, betas=optim.betas, eps=optim.eps, fused=True)
        return _median_s(adamw, repeats=repeats)
    rule = make_rule(name, optim=optim)
    groups = [{"params": params, "rule": name, "weight_decay": optim.weight_decay}]
    deep = DeepOptimizer(groups, rules={name: rule}, matrices=[Matrices(group.view)])
    usual = _median_s(deep, repeats=repeats)
    if name != "m3" or not optim.m3.slow_weight:
        return usual
    every, slow = optim.m3.slow_every, []
    for _ in range(repeats):
        for param in params:
            deep.state[param]["step"].fill_(every - 1)
        slow.append(_seconds(deep))
    return ((every - 1) * usual + statistics.median(slow)) / every


def _median_s(optimizer: torch.optim.Optimizer, *, repeats: int) -> float:
    """Of an update that is not the first, which makes the state."""
    optimizer.step()
    return statistics.median(_seconds(optimizer) for _ in range(repeats))


def _seconds(optimizer: torch.optim.Optimizer) -> float:
    began = time.perf_counter()
    optimizer.step()
    return time.perf_counter() - began


def mean_update_s(name: str, *, layers: int, repeats: int) -> float:
    """Seconds of the optimizer in a step, mean over the clocks; groups of the blocks scaled up to all layers."""
    config, whole = config_of(name, layers=layers), config_of(name)
    shapes, factor = shapes_of(config), whole.model.num_layers / config.model.num_layers
    total = 0.0
    for group in groups_of(shapes, config):
        in_blocks = group.names[0].startswith("blocks.")
        total += (factor if in_blocks else 1.0) * update_s(group, shapes, config, repeats=repeats) / group.rule.period
    return total


def tokens_per_s(*, layers: int, tokens: int) -> float:
    """Of forward and backward pass of one sequence; the time of the blocks is scaled up to all layers by their FLOPs."""
    config, whole = config_of("adamw", layers=layers), config_of("adamw")
    lm = HopeLM(config.model)
    tokens_BT = torch.randint(config.model.vocab_size, (1, tokens), generator=torch.Generator().manual_seed(0))
    seconds = []
    for _ in range(2):  # the first allocates
        began = time.perf_counter()
        lm.token_losses(tokens_BT, tokens_BT.roll(-1, 1)).mean().backward()
        seconds.append(time.perf_counter() - began)
    flops = [flops_per_token(one.model, seq_len=tokens)["training"] for one in (config, whole)]
    return tokens / (seconds[-1] * flops[1] / flops[0])


def counted(name: str) -> dict[str, float]:
    """FLOPs of the matrix products of the updates on the fullest of 8 ranks, mean over the clocks, and what they are of a step."""
    config, gpu = config_of(name), gpu_of(GPU)
    mesh = check_mesh(config, world_size=RANKS)
    ranks = [sum(parameter.flops / parameter.period for parameter in own) for own in owned(config, mesh, stage=0)]
    tokens = config.train.global_batch_size * config.data.seq_len
    training = flops_per_token(config.model, seq_len=config.data.seq_len)["training"] * tokens / RANKS
    seconds = optimizer_s(config, mesh, gpu)
    return {
        "update_flops": sum(ranks),
        "fullest_rank_flops": max(ranks),
        "share_of_training_flops": max(ranks) / training,
        "planned_update_s": seconds,
        "planned_share_of_step": seconds / planned_step_time(config, mesh, gpu).total,
    }


def results(names: Sequence[str], *, layers: int, repeats: int, tokens: int) -> dict[str, Any]:
    """All measurements and counts."""
    config = config_of("adamw")
    batch = config.train.global_batch_size * config.data.seq_len
    speed = tokens_per_s(layers=layers, tokens=tokens)
    seconds = {name: mean_update_s(name, layers=layers, repeats=repeats) for name in names}
    rows = {
        name: {
            "update_s": spent,
            "of_adamw": spent / seconds["adamw"],
            "share_of_step": spent / (batch / speed + spent),
            "more_than_with_adamw": (spent - seconds["adamw"]) / (batch / speed + seconds["adamw"]),
            **counted(name),
        }
        for name, spent in seconds.items()
    }
    setting = {"config": "hope_170m", "layers_measured": layers or config.model.num_layers, "tokens_per_step": batch}
    return {**setting, "threads": torch.get_num_threads(), "measured_tokens_per_s": speed, "ranks": RANKS, "gpu": GPU, "optimizers": rows}


def table(found: Mapping[str, Any]) -> str:
    """Markdown."""
    columns = [
        "optimizer",
        "s an update (CPU)",
        "of AdamW's",
        "of a step (CPU)",
        f"of the FLOPs, {RANKS} ranks",
        f"of a step, {RANKS} {GPU} (planned)",
    ]
    lines = [
        [
            name,
            f"{row['update_s']:.2f}",
            f"{row['of_adamw']:.1f}",
            f"{100 * row['share_of_step']:.3f} %",
            f"{100 * row['share_of_training_flops']:.3f} %",
            f"{100 * row['planned_share_of_step']:.3f} %",
        ]
        for name, row in found["optimizers"].items()
    ]
    return common.markdown(columns, lines)


def main() -> int:
    """Measure, count, print the table and write JSON."""
    parser = argparse.ArgumentParser(description="Cost of the optimizers at hope_170m.")
    parser.add_argument("--optimizers", type=common.optimizers, default=OPTIMIZERS, help="AdamW is always measured")
    parser.add_argument("--layers", type=int, default=4, help="blocks that are measured, and scaled up to all; 0: all")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=1024, help="of the sequence that is timed")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    names = ["adamw", *(name for name in arguments.optimizers if name != "adamw")]
    found = results(names, layers=arguments.layers, repeats=arguments.repeats, tokens=arguments.tokens)
    print(f"{found['measured_tokens_per_s']:.0f} tokens/s, {found['threads']} threads\n\n{table(found)}")
    common.write("step_time", {"environment": environment(), **found}, folder=arguments.out)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
