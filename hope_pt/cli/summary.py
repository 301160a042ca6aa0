"""`hope summary CONFIG [key=value ...]`: what a configuration costs, before anything is trained."""

import argparse

import torch
from rich.console import Console
from rich.table import Table

from hope_pt import config, nn, optim
from hope_pt.config.schema import RunConfig


def run(arguments: argparse.Namespace) -> None:
    """Prints parameters by class, FLOPs per token, state bytes per sequence and the optimizer's groups."""
    settings = config.load(arguments.config, arguments.overrides)
    console = Console()
    for table in (_parameters(settings), _costs(settings)):
        console.print(table, "")
    shapes = {name: tuple(value.shape) for name, value in nn.HopeLM(settings.model, device=torch.device("meta")).named_parameters()}
    console.print("optimizer groups", style="italic")
    console.print(optim.table(shapes, config=settings.model), highlight=False, soft_wrap=True)


def _parameters(settings: RunConfig) -> Table:
    counts = nn.count_parameters(settings.model)
    table = _table(f"{settings.name}: parameters", "class", "number")
    for name, count in counts.items():
        table.add_row(name, f"{count:,}")
    return table


def _costs(settings: RunConfig) -> Table:
    seq_len = settings.data.seq_len
    table = _table(f"cost at {seq_len:,} tokens", "quantity", "value")
    for name, flops in nn.flops_per_token(settings.model, seq_len=seq_len).items():
        table.add_row(f"{name}, FLOPs per token", f"{flops:,.0f}")
    table.add_row("state of one sequence, bytes", f"{nn.state_bytes(settings.model):,}")
    tokens = settings.train.steps * settings.train.global_batch_size * seq_len
    table.add_row("tokens of the run", f"{tokens:,}")
    return table


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", show_edge=False, pad_edge=False)
    table.add_column(columns[0])
    for column in columns[1:]:
        table.add_column(column, justify="right")
    return table
