"""What a cluster's file says (`slurm/clusters/NAME.env`): options of sbatch and srun, GPUs of a node, container, network variables.

Lines `KEY=value`, taken literally. The batch scripts read the same files (slurm/lib/env.sh, `hope_cluster`): there, as here, a variable
that the environment already has wins.
"""

import difflib
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from hope_pt.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ROOT / "slurm"
KEYS = (
    "HOPE_SBATCH_OPTIONS",
    "HOPE_SRUN_OPTIONS",
    "HOPE_GPUS_PER_NODE",
    "HOPE_GPU",
    "HOPE_CONTAINER",
    "HOPE_IMAGE",
    "HOPE_MOUNTS",
    "HOPE_COMMAND",
    "HOPE_OUT",
    "HOPE_JOIN_S",
    "HOPE_PREFLIGHT",
    "HOPE_MAX_FRUITLESS",
    "HOPE_REQUEUE",
    "HOPE_CONTROLLER_S",
)
CONTAINERS = ("none", "pyxis", "apptainer")
_LINE = re.compile(r"[A-Z][A-Z0-9_]*=.*")


@dataclass(frozen=True)
class Cluster:
    """values: the file's variables under those of the environment. name: of the file, or empty where there is none."""

    name: str
    values: Mapping[str, str]

    @property
    def sbatch_options(self) -> list[str]:
        """Options for every job."""
        return shlex.split(self.values.get("HOPE_SBATCH_OPTIONS", ""))

    @property
    def gpus_per_node(self) -> int:
        """0 where nothing says it."""
        return int(self.values.get("HOPE_GPUS_PER_NODE", "") or 0)

    @property
    def gpu(self) -> str:
        """Name of the kind of GPU for the planner."""
        return self.values.get("HOPE_GPU", "") or "h100"

    @property
    def container(self) -> str:
        """`none`, or what starts the image."""
        return self.values.get("HOPE_CONTAINER", "") or "none"

    @property
    def mounts(self) -> list[Path]:
        """Where HOPE_MOUNTS (SOURCE:TARGET[:options], separated by commas) can be seen inside the container."""
        parts = [one.split(":") for one in self.values.get("HOPE_MOUNTS", "").split(",") if one]
        return [Path(one[1] if len(one) > 1 else one[0]) for one in parts]

    def problems(self) -> list[str]:
        """What is wrong with the values, one sentence each."""
        found = []
        for key in self.values:
            if key.startswith("HOPE_") and key not in KEYS:
                near = difflib.get_close_matches(key, KEYS, n=1)
                found.append(f"cluster {self.name!r}: unknown key {key}" + (f"; did you mean {near[0]}?" if near else ""))
        gpus = self.values.get("HOPE_GPUS_PER_NODE", "")
        if gpus and not gpus.isdigit():
            found.append(f"cluster {self.name!r}: HOPE_GPUS_PER_NODE = {gpus!r}: expected a number")
        container, image = self.container, self.values.get("HOPE_IMAGE", "")
        if container not in CONTAINERS:
            found.append(f"cluster {self.name!r}: HOPE_CONTAINER = {container!r}: expected none, pyxis or apptainer")
        elif container != "none" and not image:
            found.append(f"cluster {self.name!r}: HOPE_CONTAINER = {container!r} without HOPE_IMAGE; name the image")
        elif container != "none" and image.startswith("/") and not Path(image).exists():
            found.append(f"cluster {self.name!r}: HOPE_IMAGE = {image}: no such file")
        return found


def read_cluster(name: str, environment: Mapping[str, str]) -> Cluster:
    """The cluster called `name` (or the file of that path), empty for no name. Raises ConfigError for a missing file or a bad line."""
    if not name:
        return Cluster("", {key: value for key, value in environment.items() if key in KEYS})
    path = Path(name) if "/" in name else SCRIPTS / "clusters" / f"{name}.env"
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError:
        known = ", ".join(sorted(found.stem for found in (SCRIPTS / "clusters").glob("*.env"))) or "none"
        raise ConfigError(f"cluster {name!r}: there is no {path}; known: {known}; copy example.env and fill it in") from None
    values = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        if not _LINE.fullmatch(line):
            raise ConfigError(f"{path}:{number}: {line!r}: expected KEY=value")
        key, _, value = line.partition("=")
        values[key] = environment.get(key, value)
    return Cluster(name, values)
