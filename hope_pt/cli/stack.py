"""`hope stack RUN --how METHOD --periods 1,4,16 --out DIR`: a trained model with one level becomes the start of one with several."""

import argparse
from pathlib import Path

from hope_pt.errors import ConfigError


def run(arguments: argparse.Namespace) -> None:
    """Writes DIR/start.toml and the weights beside it, and says how to train them."""
    periods, out = _periods(arguments.periods), Path(arguments.out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"--out {out} exists already; name a directory that does not")
    # After what can be wrong with the arguments: torch takes seconds to import.
    from hope_pt.nn.stacking import METHODS
    from hope_pt.train.start import write_start
    from hope_pt.train.trained import load_trained

    trained = load_trained(arguments.run, step=arguments.step)
    model, weights = METHODS[arguments.how](trained.config.model, trained.lm.state_dict(), periods=periods)
    path, reset = write_start(out, trained=trained, model=model, weights=weights)
    levels = list(model.cms.depth_periods or model.cms.periods)
    what = "periods of the blocks" if model.cms.depth_periods else "periods of the levels"
    print(f"{out}: step {trained.step} of {arguments.run} stacked by {arguments.how}, {what} {levels}; next: hope train {path}")
    if reset:
        print(f"back at their defaults, because they are about single levels: {', '.join(reset)}")


def _periods(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ConfigError(f"--periods {text}: expected whole numbers of steps, fastest first, for example 1,4,16") from None
