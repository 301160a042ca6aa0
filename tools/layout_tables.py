"""Rewrites the numbers in the tables of docs/layouts.md and docs/scaling.md from the planner (`make layouts`); prose stays as it is.

What a row of a table is, and its cells as the planner gives them, stand here; `tests/unit/launch/test_launch_layouts.py` compares the
pages with them. Run it after a change of the planner, of a configuration or of a kernel's tiles, and read the difference: sentences
around the tables quote their numbers.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from hope_pt.config import load
from hope_pt.config.schema import RunConfig
from hope_pt.engine.mesh import Mesh, check_mesh
from hope_pt.launch.communication import sent
from hope_pt.launch.estimate import stages_to_show
from hope_pt.launch.gpus import GPUS
from hope_pt.launch.search import fullest_rank
from hope_pt.launch.speed import step_time

ROOT = Path(__file__).resolve().parent.parent
LAYOUTS, SCALING = ROOT / "docs/layouts.md", ROOT / "docs/scaling.md"
H100 = GPUS["h100"]
DOCUMENTS = 4
"""Documents in a row of data, wherever a table does not say it."""
PAIR = r"[\d.]+, [\d.]+"
LAYOUT = re.compile(r"^\| (?P<name>\w+) \| (?P<gpus>\d+) \| (?P<changes>[^|]*) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|$", re.MULTILINE)
COMPARED = re.compile(
    rf"^\| (?P<name>\w+) \| (?P<gpus>\d+) \| (?P<changes>[^|]*) \| (?P<documents>\d) \| ({PAIR}) \| ({PAIR}) \| ([\d.]+) \|$", re.MULTILINE
)
SPEED = r"[\d.]+ s, [\d,]+"
SCALED = re.compile(rf"^\| (?P<gpus>[\d,]+) \| ({SPEED}) \| ({SPEED}) \| ({SPEED}) \|$", re.MULTILINE)
SCALED_COLUMNS = (("hope_1p3b", "triton"), ("hope_1p3b", "chunked"), ("transformer_1p3b", "auto"))
"""(configuration, model.titans.backend) of the columns of docs/scaling.md."""


@dataclass(frozen=True)
class Row:
    """A row of a table: what it is about, and the cells of numbers as they are written."""

    name: str
    gpus: int
    changes: tuple[str, ...]
    documents: int
    cells: tuple[str, ...]

    def planned(self, *, backend: str = "auto") -> tuple[RunConfig, Mesh]:
        """The layout with model.titans.backend = `backend`. Errors as in `load` and `check_mesh`."""
        config = load(ROOT / "configs" / f"{self.name}.toml", [*self.changes, f"model.titans.backend={backend}"])
        return config, check_mesh(config, world_size=self.gpus)


def rows(page: Path, pattern: re.Pattern[str]) -> list[Row]:
    """The rows of `page` that `pattern` finds, from the top."""
    return [_row(found) for found in pattern.finditer(page.read_text())]


def _row(found: re.Match[str]) -> Row:
    named = found.groupdict()
    return Row(
        name=named.get("name", ""),
        gpus=int(named["gpus"].replace(",", "")),
        changes=tuple(re.findall(r"[\w.]+=\w+", named.get("changes", ""))),
        documents=int(named.get("documents", DOCUMENTS)),
        cells=found.groups()[len(named) :],
    )


def gigabytes_sent(row: Row) -> str:
    """GB a step of the rank that sends most; takes no time."""
    config, mesh = row.planned()
    return f"{max(sent(config, mesh, stage=stage).total for stage in stages_to_show(mesh)) / 1e9:.2f}"


def planned_costs(row: Row, *, backend: str = "auto") -> tuple[float, float]:
    """(GB of the fullest rank, seconds of a step); takes seconds where the scans are plain torch."""
    config, mesh = row.planned(backend=backend)
    peak = fullest_rank(config, mesh, documents=row.documents).total
    return peak / 1e9, step_time(config, mesh, H100, documents=row.documents).total


def layout_cells(row: Row) -> tuple[str, ...]:
    """Peak, sent and step of a row of layouts."""
    peak, seconds = planned_costs(row)
    return f"{peak:.1f}", gigabytes_sent(row), f"{seconds:.2f}"


def pair_cell(costs: tuple[float, float]) -> str:
    """Peak and step as one cell."""
    peak, seconds = costs
    return f"{peak:.1f}, {seconds:.2f}"


def compared_cells(row: Row) -> tuple[str, ...]:
    """Plain torch, kernels and the ratio of their steps."""
    plain, kernels = (planned_costs(row, backend=backend) for backend in ("chunked", "triton"))
    return pair_cell(plain), pair_cell(kernels), f"{plain[1] / kernels[1]:.1f}"


def scaled_cell(gpus: int, *, name: str, backend: str) -> str:
    """Seconds of a step and tokens/s of a GPU, to three digits, with two rows of data for every GPU."""
    changes = ("engine.micro_batch_size=2", "engine.recompute=none", f"train.global_batch_size={2 * gpus}")
    config, mesh = Row(name, gpus, changes, DOCUMENTS, ()).planned(backend=backend)
    found = step_time(config, mesh, H100, documents=DOCUMENTS)
    return f"{found.total:.3f} s, {float(f'{found.tokens_per_s / gpus:.3g}'):,.0f}"


def scaled_cells(row: Row) -> tuple[str, ...]:
    """The columns of docs/scaling.md."""
    return tuple(scaled_cell(row.gpus, name=name, backend=backend) for name, backend in SCALED_COLUMNS)


def rewritten(text: str, pattern: re.Pattern[str], cells: Callable[[Row], tuple[str, ...]]) -> str:
    """`text` with the last cells of every row that `pattern` finds replaced by `cells(row)`."""

    def line(found: re.Match[str]) -> str:
        row = _row(found)
        new = cells(row)
        kept = found.group().split(" | ")[: -len(new)]
        return " | ".join([*kept, *new]) + " |"

    return pattern.sub(line, text)


def main() -> int:
    """Rewrite both pages and say how many lines changed in each."""
    for page, tables in ((LAYOUTS, ((LAYOUT, layout_cells), (COMPARED, compared_cells))), (SCALING, ((SCALED, scaled_cells),))):
        before = text = page.read_text()
        for pattern, cells in tables:
            text = rewritten(text, pattern, cells)
        page.write_text(text)
        changed = sum(old != new for old, new in zip(before.splitlines(), text.splitlines(), strict=True))
        print(f"{page.relative_to(ROOT)}: {changed} rows changed")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
