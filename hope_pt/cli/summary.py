"""`hope summary CONFIG [key=value ...]`: what a configuration costs, before anything is trained."""

import argparse

import torch
from rich.console import Console
from rich.table import Table

from hope_pt import config, nn, optim
from hope_pt.cli.tables import table
from hope_pt.config.schema import RunConfig


def run(arguments: argparse.Namespace) -> None:
    """Prints parameters by class, FLOPs per token, state bytes per sequence and the optimizer's groups."""
    settings = config.load(arguments.config, arguments.overrides)
    console = Console()
    for part in (_parameters(settings), _costs(settings)):
        console.print(part, "")
    shapes = {name: tuple(value.shape) for name, value in nn.HopeLM(settings.model, device=torch.device("meta")).named_parameters()}
    console.print("optimizer groups", style="italic")
    console.print(optim.table(shapes, config=settings.model, optim=settings.optim), highlight=False, soft_wrap=True)


def _parameters(settings: RunConfig) -> Table:
    counts = nn.count_parameters(settings.model)
    made = table(f"{settings.name}: parameters", "class", "number")
    for name, count in counts.items():
        made.add_row(name, f"{count:,}")
    return made


def _costs(settings: RunConfig) -> Table:
    seq_len = settings.data.seq_len
    made = table(f"cost at {seq_len:,} tokens", "quantity", "value")
    for name, flops in nn.flops_per_token(settings.model, seq_len=seq_len).items():
        made.add_row(f"{name}, FLOPs per token", f"{flops:,.0f}")
    made.add_row("state of one sequence, bytes", f"{nn.state_bytes(settings.model):,}")
    tokens = settings.train.steps * settings.train.global_batch_size * seq_len
    made.add_row("tokens of the run", f"{tokens:,}")
    return made
