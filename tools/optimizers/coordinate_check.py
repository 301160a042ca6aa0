"""Does what a step changes stay the same at every width, and does the best rate (`make coordinate-check`; docs/optimizers.md)?

Coordinates: hope_tiny's model at fixed depth and head width, 64 to 256 wide; after some of the first steps on the corpus, the root mean
square of what has changed in the output of every block and in the logits on held-out text. A good parametrisation keeps it flat: the
slope of log(change) over log(width) is 0. The change is also split: with the new values of the matrices only (projections and CMS levels,
which have the optimizer's rule and its scale by width), and with those of all other parameters only. All CMS levels have the period 1.

Transfer: the training loss after a short run over a grid of `optim.lr`, at the base width and at the widest. Where the rate transfers, both
have the same best one.

Both with `optim.base_width` on (the narrowest width) and off. Writes coordinate_check.json and .png.
"""

import argparse
import multiprocessing
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from matplotlib.axes import Axes

from hope_pt import engine
from hope_pt.config import RunConfig, load
from hope_pt.data import Batch, Source, open_source
from hope_pt.nn import HopeLM
from hope_pt.optim import rule_of
from tools.bench.common import ROOT, environment
from tools.optimizers import common
from tools.optimizers.common import RESULTS

OPTIMIZERS = ("adamw", "muon", "m3")
HEAD_WIDTH = 32
SEQ_LEN = 128
BATCH = 4
COORDINATE_RATE = 1e-3
TRANSFER_RATES = (5e-4, 1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2)
MEASURED_STEPS = (1, 2, 3, 4, 5, 20)
SHOWN_STEPS = (5, 20)
"""Updates and inputs align while the model trains: what is flat after five steps need not be later."""
FLAT = 0.2
"""A slope up to this is called flat: the change differs by less than a third between 64 and 256."""


class Case(NamedTuple):
    """One run."""

    optimizer: str
    width: int
    base_width: int
    rate: float
    steps: int
    probe: bool


def case_config(case: Case) -> RunConfig:
    """hope_tiny at the case's width, rate constant from the first step."""
    overrides = [
        f"model.width={case.width}",
        f"model.num_heads={case.width // HEAD_WIDTH}",
        f"model.cms.hidden={case.width}",
        "model.cms.periods=[1, 1, 1]",
        *common.overrides(case.optimizer),
        f"optim.lr={case.rate!r}",
        f"optim.base_width={case.base_width}",
        "optim.warmup_steps=0",
        "optim.min_lr_ratio=1.0",
        f"train.steps={case.steps}",
        f"train.global_batch_size={BATCH}",
        f"engine.micro_batch_size={BATCH}",
        f'data.path="{ROOT / "data" / "tiny"}"',
    ]
    return load(ROOT / "configs" / "hope_tiny.toml", overrides)


def rows_of(source: Source, first: int, count: int) -> Batch:
    """`count` sequences of the corpus, cut to SEQ_LEN."""
    batch = source.read(np.arange(first, first + count))
    return Batch(*(part[:, :SEQ_LEN] for part in (batch.tokens_BT, batch.targets_BT, batch.loss_mask_BT, batch.doc_start_BT)))


def is_matrix(name: str, parameter: torch.Tensor, config: RunConfig) -> bool:
    """Whether a parameter has the rule `optim.name`."""
    return rule_of(name, ndim=parameter.ndim, config=config.model, optim=config.optim).kind in ("matrix", "cms")


PARTS: dict[str, Callable[[bool], bool]] = {
    "all": lambda matrix: True,
    "matrices": lambda matrix: matrix,
    "others": lambda matrix: not matrix,
}
"""Which parameters have their new values, the others keeping the first ones: a function of whether they are matrices."""


def changes_of(lm: HopeLM, first: Mapping[str, torch.Tensor], tokens_BT: torch.Tensor, config: RunConfig) -> dict[str, dict[str, float]]:
    """Root mean square of what the weights of `lm` change beside the weights `first`, by part and place; `lm` ends with `first`."""
    after = {name: value.clone() for name, value in lm.state_dict().items()}
    new = {name: is_matrix(name, value, config) for name, value in after.items()}
    lm.load_state_dict(first)
    before, found = activations(lm, tokens_BT), {}
    for part, is_new in PARTS.items():
        lm.load_state_dict({name: after[name] if is_new(new[name]) else first[name] for name in after})
        now = activations(lm, tokens_BT)
        found[part] = {place: float((now[place] - before[place]).square().mean().sqrt()) for place in before}
    lm.load_state_dict(first)
    return found


@torch.no_grad()
def activations(lm: HopeLM, tokens_BT: torch.Tensor) -> dict[str, torch.Tensor]:
    """Outputs of the blocks and the logits."""
    found: dict[str, torch.Tensor] = {}
    hooks = [
        block.register_forward_hook(lambda module, inputs, output, index=index: found.__setitem__(f"block {index}", output[0]))
        for index, block in enumerate(lm.blocks)
    ]
    found["logits"] = lm(tokens_BT)[0]
    for hook in hooks:
        hook.remove()
    return found


def run(case: Case) -> dict[str, Any]:
    """The losses of all steps, and with `probe` the root mean square of every change after each of them."""
    config = case_config(case)
    train, heldout = (open_source(config.data, split=split, vocab_size=config.model.vocab_size) for split in ("train", "heldout"))
    probe_BT = rows_of(heldout, 0, BATCH).tokens_BT
    config = config.model_copy(update={"data": config.data.model_copy(update={"seq_len": SEQ_LEN})})
    plan = engine.start(config, launch=engine.Launch())
    trainer = engine.TrainEngine(config, plan)
    first = {name: value.clone() for name, value in _model(trainer).state_dict().items()}
    losses: list[float] = []
    changes: dict[int, dict[str, dict[str, float]]] = {}
    for step in range(case.steps):
        losses.append(trainer.step(rows_of(train, step * BATCH, BATCH)).loss)
        if case.probe and step + 1 in MEASURED_STEPS:
            changes[step + 1] = changes_of(_model(trainer), first, probe_BT, config)
    engine.stop(plan)
    return {**case._asdict(), "losses": losses, "changes": changes}


def _model(trainer: engine.TrainEngine) -> HopeLM:
    lm = trainer.to_lm()
    assert lm is not None
    return lm


def slope(widths: Sequence[int], values: Sequence[float]) -> float:
    """Of log(value) over log(width), by least squares."""
    return float(np.polyfit(np.log(widths), np.log(values), 1)[0])


def coordinate_cases(names: Sequence[str], widths: Sequence[int], *, steps: int) -> Iterator[Case]:
    """Every optimizer and width, scaled and not; at the base width both are the same run."""
    for name in names:
        for width in widths:
            for base in (0,) if width == widths[0] else (0, widths[0]):
                yield Case(name, width, base, COORDINATE_RATE, steps, True)


def transfer_cases(names: Sequence[str], widths: Sequence[int], *, steps: int, rates: Sequence[float]) -> Iterator[Case]:
    """The grid at the base width and at the widest, there scaled and not."""
    for name in names:
        for width, base in ((widths[0], 0), (widths[-1], 0), (widths[-1], widths[0])):
            for rate in rates:
                yield Case(name, width, base, rate, steps, False)


def coordinates(rows: Sequence[Mapping[str, Any]], widths: Sequence[int]) -> list[dict[str, Any]]:
    """For every optimizer, scaled and not, measured step and part: the changes by width, their slopes, and whether all are flat."""
    found = []
    for name in dict.fromkeys(row["optimizer"] for row in rows):
        base = next(row for row in rows if row["optimizer"] == name and row["width"] == widths[0])
        for scaled in (False, True):
            mine = {row["width"]: row for row in rows if row["optimizer"] == name and bool(row["base_width"]) is scaled}
            by_width = [(mine | {widths[0]: base})[width]["changes"] for width in widths]
            for step, part in ((step, part) for step, parts in base["changes"].items() for part in parts):
                changes = [one[step][part] for one in by_width]
                slopes = {place: slope(widths, [change[place] for change in changes]) for place in changes[0]}
                flat = all(abs(value) <= FLAT for value in slopes.values())
                where = {"optimizer": name, "scaled": scaled, "step": step, "part": part}
                found.append({**where, "changes": changes, "slopes": slopes, "flat": flat})
    return found


def coordinate_table(found: Sequence[Mapping[str, Any]]) -> str:
    """Markdown: slopes by place."""
    places = list(found[0]["slopes"])
    lines = [
        [
            row["optimizer"],
            str(row["step"]),
            row["part"],
            "on" if row["scaled"] else "off",
            *(f"{row['slopes'][place]:+.2f}" for place in places),
            "yes" if row["flat"] else "no",
        ]
        for row in found
        if row["step"] in SHOWN_STEPS
    ]
    return common.markdown(
        ["optimizer", "step", "moved", "base_width", *(f"slope, {place}" for place in places), f"all within {FLAT}"], lines
    )


def transfers(rows: Sequence[Mapping[str, Any]], widths: Sequence[int]) -> list[dict[str, Any]]:
    """Loss by rate at the base width, and at the widest scaled and not, with the best rate of each."""
    found = []
    for name in dict.fromkeys(row["optimizer"] for row in rows):
        for width, base in ((widths[0], 0), (widths[-1], 0), (widths[-1], widths[0])):
            mine = [row for row in rows if (row["optimizer"], row["width"], row["base_width"]) == (name, width, base)]
            scores = {row["rate"]: float(np.mean(row["losses"][-max(1, row["steps"] // 8) :])) for row in mine}
            best = {"best_rate": common.best_rate(scores), "at_edge": common.at_edge(scores)}
            found.append({"optimizer": name, "width": width, "base_width": base, "scores": scores, **best})
    return found


def transfer_table(found: Sequence[Mapping[str, Any]]) -> str:
    """Markdown: loss by rate."""
    rates = sorted(found[0]["scores"])
    lines = [
        [
            row["optimizer"],
            str(row["width"]),
            "on" if row["base_width"] else "off",
            *(f"{row['scores'][rate]:.3f}" for rate in rates),
            common.rate_text(row["scores"]),
        ]
        for row in found
    ]
    return common.markdown(["optimizer", "width", "base_width", *(f"{rate:g}" for rate in rates), "best"], lines)


def draw(axes: Sequence[Axes], found: Sequence[Mapping[str, Any]], tuned: Sequence[Mapping[str, Any]], widths: Sequence[int]) -> None:
    """Changes of the logits over width, by all parameters and by the matrices, and loss over rate; dashed without scaling."""
    last = max(row["step"] for row in found)
    for panel, part in zip(axes, ("all", "matrices")):
        for row in (row for row in found if (row["step"], row["part"]) == (last, part)):
            values = [change["logits"] for change in row["changes"]]
            style, label = ("-", f"{row['optimizer']}, scaled") if row["scaled"] else ("--", f"{row['optimizer']}, not scaled")
            panel.loglog(widths, values, style, color=common.COLOURS[row["optimizer"]], marker="o", markersize=3, label=label)
        panel.set(xlabel="width", ylabel="root mean square change of the logits", title=f"moved: {part}; after {last} steps")
        panel.set_xticks(widths, [str(width) for width in widths])
        panel.minorticks_off()
    axes[0].legend(fontsize=7)
    for row in tuned:
        style = ":" if row["width"] == widths[0] else "-" if row["base_width"] else "--"
        axes[2].semilogx(list(row["scores"]), list(row["scores"].values()), style, color=common.COLOURS[row["optimizer"]])
    axes[2].set(xlabel="optim.lr", ylabel="training loss", title=f"dotted {widths[0]}, dashed {widths[-1]}, solid {widths[-1]} scaled")


def run_all(cases: Sequence[Case], *, workers: int) -> list[dict[str, Any]]:
    """Every case in one of `workers` fresh processes."""
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        return list(pool.map(run, cases))


def main() -> int:
    """Both checks, their tables, JSON and figure."""
    parser = argparse.ArgumentParser(description="Coordinate check and transfer of the learning rate over widths.")
    parser.add_argument("--widths", default="64,128,256", help="the first is the base width")
    parser.add_argument("--optimizers", type=common.optimizers, default=OPTIMIZERS)
    parser.add_argument("--steps", type=int, default=MEASURED_STEPS[-1], help="of the coordinate check")
    parser.add_argument("--transfer-steps", type=int, default=60)
    parser.add_argument("--rates", default=",".join(map(str, TRANSFER_RATES)))
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    names, widths = arguments.optimizers, [int(width) for width in arguments.widths.split(",")]
    rates = [float(rate) for rate in arguments.rates.split(",")]
    checks = list(coordinate_cases(names, widths, steps=arguments.steps))
    grid = list(transfer_cases(names, widths, steps=arguments.transfer_steps, rates=rates))
    rows = run_all([*checks, *grid], workers=arguments.workers)
    found, tuned = coordinates(rows[: len(checks)], widths), transfers(rows[len(checks) :], widths)
    print(f"{coordinate_table(found)}\n\n{transfer_table(tuned)}")
    setting = {"widths": widths, "coordinate_rate": COORDINATE_RATE, "steps": arguments.steps, "transfer_steps": arguments.transfer_steps}
    results = {"environment": environment(), **setting, "coordinates": found, "transfer": tuned}
    common.write("coordinate_check", results, folder=arguments.out)
    path = arguments.out / "coordinate_check.png"
    common.save_figure(lambda axes: draw(axes, found, tuned, widths), path=path, panels=3, size=(14, 4.2))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
