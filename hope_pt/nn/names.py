"""Where in the model a parameter or layer stands, read off its canonical name: "blocks.{block}.cms.levels.{level}.w_up.weight"."""

import re

_LEVEL = re.compile(r"^blocks\.(\d+)\.cms\.levels\.(\d+)\.")


def level_of(name: str) -> tuple[int, int] | None:
    """(level, block) of a parameter or layer of a CMS level by its canonical name, None for any other."""
    found = _LEVEL.match(name)
    return (int(found.group(2)), int(found.group(1))) if found else None
