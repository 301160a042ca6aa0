"""`hope estimate CONFIG [key=value ...] [--gpus N] [--gpu NAME] [--search] [--json]`: what a run would cost, without a GPU."""

import argparse
import json
from dataclasses import asdict

from rich.console import Console

from hope_pt import config
from hope_pt.cli.tables import size, table
from hope_pt.config.schema import RunConfig
from hope_pt.errors import ConfigError
from hope_pt.launch.estimate import Estimate, estimate
from hope_pt.launch.gpus import GPU, RESERVED, USABLE, gpu_of
from hope_pt.launch.search import Candidate, search
from hope_pt.launch.speed import ASSUMED

SHOWN = 12


def run(arguments: argparse.Namespace) -> None:
    """Prints the estimate; with --search the layouts that fit, and the estimate of the fastest of them."""
    settings = config.load(arguments.config, arguments.overrides)
    if arguments.gpus < 1 or arguments.documents < 1:
        raise ConfigError(f"--gpus {arguments.gpus} --documents {arguments.documents}: both must be 1 or more")
    gpu = gpu_of(arguments.gpu)
    layouts = search(settings, world_size=arguments.gpus, gpu=gpu, documents=arguments.documents) if arguments.search else []
    if arguments.search and not layouts:
        raise ConfigError(f"no layout of {settings.name} fits {arguments.gpus} x {gpu.name}; give more GPUs, or larger ones")
    configured = settings
    if layouts:
        settings = settings.model_copy(update={"engine": layouts[0].engine})
    found = estimate(settings, world_size=arguments.gpus, gpu=gpu, documents=arguments.documents)
    if arguments.json:
        shown = found.as_dict() | {"assumed": asdict(ASSUMED) | {"reserved_bytes": RESERVED, "usable": USABLE}}
        print(json.dumps(shown | ({"layouts": [_as_dict(one) for one in layouts]} if arguments.search else {}), indent=1))
        return
    console = Console()
    for part in (_model(found), _memory(found), _sent(found), _time(found)):
        console.print(part, "")
    print(_scans(found))
    if arguments.search:
        console.print(_layouts(layouts, gpu=gpu, settings=settings))
        print(f"the tables above are of the fastest: {_overrides(configured, settings) or 'the layout as configured'}")


def _model(found: Estimate):
    rows = [(f"parameters, {name}", f"{count:,}") for name, count in found.parameters.items()]
    rows += [(f"FLOPs per token, {name}", f"{count:,.0f}") for name, count in found.flops.items()]
    rows += [("checkpoint", size(found.checkpoint_bytes)), ("pipeline bubble", f"{found.bubble:.1%}")]
    return table(f"{found.name}: model", "quantity", "value", rows=rows)


def _memory(found: Estimate):
    verdict = "fits" if found.fits else "does not fit"
    title = f"bytes per rank: {found.mesh.describe()}; {verdict} on {found.gpu.name} ({found.gpu.memory / 1e9:.0f} GB)"
    rows = [(name, *(size(getattr(rank.weights, name)) for rank in found.ranks)) for name in vars(found.ranks[0].weights)]
    for name in ("activations", "states", "working", "buffers", "total"):
        label = "  of these, memory states at boundaries" if name == "states" else name
        rows.append((label, *(size(getattr(rank, name)) for rank in found.ranks)))
    return table(title, "what", *(f"stage {rank.stage}" for rank in found.ranks), rows=rows)


def _sent(found: Estimate):
    kinds = vars(next(iter(found.sent.values())))
    rows = [(kind, *(size(getattr(one, kind)) for one in found.sent.values())) for kind in kinds]
    return table("bytes sent by a rank in one step", "axis", *(f"stage {stage}" for stage in found.sent), rows=rows)


def _time(found: Estimate):
    time = found.time
    rows = [(name, f"{getattr(time, name):.3f} s") for name in ("compute", "communication", "bubble", "exposed", "optimizer", "total")]
    rows += [("tokens per second", f"{time.tokens_per_s:,.0f}"), ("share of bf16 peak", f"{time.model_flops_share:.1%}")]
    return table(
        f"one step on {found.mesh.world_size} x {found.gpu.name}, by a model that no GPU has confirmed", "what", "value", rows=rows
    )


def _scans(found: Estimate) -> str:
    """What memory and time were planned for."""
    if found.scans.note:
        return found.scans.note
    return f"the scans are planned {'with the fused Triton kernels' if found.scans.backend == 'triton' else 'in plain torch'}"


def _layouts(layouts: list[Candidate], *, gpu: GPU, settings: RunConfig):
    rows = []
    for one in layouts[:SHOWN]:
        degrees = f"{one.mesh.tensor} {one.mesh.context} {one.mesh.data} {one.mesh.pipeline}"
        optimizer = "distributed" if one.engine.distributed_optimizer else "whole"
        fullest, time = size(one.fullest.total), one.time
        rows.append((degrees, f"{one.engine.micro_batch_size}", one.engine.recompute, optimizer, fullest, f"{time.total:.2f} s"))
    title = f"{settings.name}: {len(layouts)} layouts fit {gpu.name}; the {len(rows)} fastest"
    return table(title, "tensor context data pipeline", "rows", "recompute", "optimizer", "fullest rank", "step", rows=rows)


def _overrides(configured: RunConfig, chosen: RunConfig) -> str:
    """What makes `chosen` of `configured` on a command line."""
    lines = [line.partition(": ") for line in config.diff(configured, chosen)]
    return " ".join(f"{key}={change.rpartition(' -> ')[2].strip(chr(34))}" for key, _, change in lines)


def _as_dict(one: Candidate) -> dict:
    return {
        "tensor_parallel": one.mesh.tensor,
        "context_parallel": one.mesh.context,
        "data_parallel": one.mesh.data,
        "pipeline_parallel": one.mesh.pipeline,
        "micro_batch_size": one.engine.micro_batch_size,
        "recompute": one.engine.recompute,
        "distributed_optimizer": one.engine.distributed_optimizer,
        "fullest_rank_bytes": one.fullest.total,
        "time": asdict(one.time),
    }
