"""Tables of the command line, and numbers as people read them."""

from collections.abc import Iterable

from rich.table import Table
from rich.text import Text


def table(title: str, *columns: str, rows: Iterable[Iterable[str]] = ()) -> Table:
    """A table without frame; every column but the first is aligned to the right."""
    made = Table(title=Text(title, no_wrap=True, overflow="ignore"), title_justify="left", show_edge=False, pad_edge=False)
    made.add_column(columns[0])
    for column in columns[1:]:
        made.add_column(column, justify="right")
    for row in rows:
        made.add_row(*row)
    return made


def size(count: float) -> str:
    """Bytes, in the largest binary unit that leaves a number above 1."""
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= scale:
            return f"{count / scale:,.2f} {unit}"
    return f"{count:,.0f} B"
