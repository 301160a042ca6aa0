"""`hope doctor`: what this machine has, what can run on it, and what to install for the rest. It changes nothing and joins nothing.

    facts (machine, torch, GPUs, packages, accelerators, storage)  ->  one `Verdict` for each thing that people want to do

megatron is not imported, only its version read; transformer-engine and apex are imported where they are installed, because a build for
another torch shows in no other way.
"""

import os
import platform
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil

from hope_pt.errors import ConfigError

_GIB = 1 << 30
_LITTLE_DISK_GIB = 10.0
_LITTLE_SHARED_GIB = 1.0
_NO_GPU = "torch {version} is a build for CUDA {cuda} and sees no GPU: check nvidia-smi, the driver and CUDA_VISIBLE_DEVICES"
_CPU_BUILD = "torch {version} is a CPU build: install a CUDA build (pytorch.org) on a machine with a GPU"
_TRAINING = ("train on CPU", "train on GPU")
# What needs which distribution, and how to get it.
_NEEDS = {
    "prepare data": ("sentencepiece", "pip install sentencepiece"),
    "stream data from object stores": ("mosaicml-streaming", "see docs/data.md: pip install --no-deps -r requirements/streaming-cpu.txt"),
    "export to transformers": ("transformers", "pip install 'hope-pt[hf]'"),
    "evaluate with lm-eval": ("lm-eval", "pip install 'hope-pt[eval]'"),
    "submit to Slurm": ("submitit", "pip install 'hope-pt[slurm]'"),
    "track with wandb": ("wandb", "pip install 'hope-pt[track]'"),
}
_PACKAGES = ("numpy", "triton", "transformer-engine", "sentencepiece", "mosaicml-streaming", "transformers", "lm-eval", "submitit", "wandb")


@dataclass(frozen=True)
class Verdict:
    """Whether one thing works here; text: with what, or what is missing and what to do."""

    task: str
    works: bool
    text: str


@dataclass(frozen=True)
class Report:
    """Facts by section, each a name and a JSON-able value, and the verdicts."""

    facts: dict[str, dict[str, Any]]
    verdicts: list[Verdict]

    @property
    def can_train(self) -> bool:
        """On the CPU or on a GPU."""
        return any(verdict.works for verdict in self.verdicts if verdict.task in _TRAINING)

    def as_json(self) -> dict[str, Any]:
        """The report for programs."""
        verdicts = {verdict.task: {"works": verdict.works, "text": verdict.text} for verdict in self.verdicts}
        return {"can_train": self.can_train, **self.facts, "verdicts": verdicts}

    def as_text(self) -> str:
        """The report for people."""
        lines = [
            f"{section}: " + ", ".join(f"{name} {_shown(value)}" for name, value in facts.items()) for section, facts in self.facts.items()
        ]
        width = max(len(verdict.task) for verdict in self.verdicts)
        lines += ["", *(f"{'yes' if v.works else 'no ':3}  {v.task:{width}}  {v.text}" for v in self.verdicts)]
        return "\n".join(lines)


def examine(runs: Path) -> Report:
    """Looks at this machine; `runs` is where runs are written."""
    torch_facts, gpus = _torch()
    engine = _engine()
    storage = _storage(runs)
    facts = {
        "machine": _machine(),
        "torch": torch_facts,
        "gpus": {"count": len(gpus), **{f"gpu {index}": gpu for index, gpu in enumerate(gpus)}},
        "engine": engine,
        "packages": {name: _version(name) for name in _PACKAGES},
        "storage": storage,
    }
    return Report(facts, _verdicts(torch_facts, gpus=gpus, engine=engine, storage=storage))


def _machine() -> dict[str, Any]:
    return {
        "python": platform.python_version(),
        "system": platform.platform(),
        "host": platform.node(),
        "cpus": os.cpu_count(),
        "cpus for this process": len(os.sched_getaffinity(0)),
        "memory GiB": round(psutil.virtual_memory().total / _GIB, 1),
        "memory free GiB": round(psutil.virtual_memory().available / _GIB, 1),
    }


def _torch() -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Facts of torch, with "problem" where it cannot be used, and of each GPU."""
    try:
        import torch
    except (ImportError, OSError) as error:
        return {"version": _version("torch"), "problem": f"torch cannot be imported: {' '.join(str(error).split())}"}, []
    available = torch.cuda.is_available()
    facts = {
        "version": torch.__version__,
        "cuda": torch.version.cuda,
        "nccl": ".".join(map(str, torch.cuda.nccl.version())) if available else None,
        "driver": _driver(),
        "threads": torch.get_num_threads(),
    }
    gpus = []
    for index in range(torch.cuda.device_count() if available else 0):
        properties = torch.cuda.get_device_properties(index)
        capability = f"{properties.major}.{properties.minor}"
        gpus.append({"name": properties.name, "memory GiB": round(properties.total_memory / _GIB, 1), "capability": capability})
    return facts, gpus


def _driver() -> str | None:
    """Version of NVIDIA's kernel driver."""
    try:
        words = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8").split()
    except OSError:
        return None
    return next((word for word in words if word[0].isdigit() and "." in word), None)


def _engine() -> dict[str, Any]:
    """megatron-core, the back ends of torch.distributed, the providers; "problem" where megatron cannot be used."""
    try:
        from hope_pt.engine import compat
    except ConfigError as error:
        return {"megatron-core": _version("megatron-core"), "problem": str(error)}
    return {
        "megatron-core": _version("megatron-core"),
        "tested megatron-core": f">={compat.OLDEST_TESTED},<{compat.FIRST_UNTESTED}",
        "back ends": compat.collective_backends(),
        "transformer-engine": compat.transformer_engine_problem() or "usable",
        "apex": compat.apex_problem() or "usable",
    }


def _storage(runs: Path) -> dict[str, Any]:
    """Space where runs are written and in shared memory, GiB."""
    place = runs.absolute()
    while not place.exists():
        place = place.parent
    shared = Path("/dev/shm")
    return {
        "runs": str(place),
        "free GiB": round(psutil.disk_usage(str(place)).free / _GIB, 1),
        "writable": os.access(place, os.W_OK),
        "shared memory GiB": round(psutil.disk_usage(str(shared)).total / _GIB, 1) if shared.exists() else 0.0,
    }


def _verdicts(torch_facts: dict[str, Any], *, gpus: list[dict[str, Any]], engine: dict[str, Any], storage: dict[str, Any]) -> list[Verdict]:
    problem = torch_facts.get("problem") or engine.get("problem") or ""
    backends = engine.get("back ends", [])
    cpu = problem or ("" if "gloo" in backends else "this torch has no gloo: install a build from pytorch.org")
    gpu = problem or _gpu_problem(torch_facts, gpus=gpus, backends=backends)
    shim = "gloo" if gpus else "gloo, with the CPU shim around megatron-core (docs/engine.md): no GPU"
    verdicts = [
        Verdict("train on CPU", not cpu, cpu or shim),
        Verdict("train on GPU", not gpu, gpu or f"{len(gpus)} x {gpus[0]['name']}, NCCL {torch_facts['nccl']}"),
    ]
    for name, key in (("te", "transformer-engine"), ("apex", "apex")):
        reason = engine.get(key, engine.get("problem", ""))
        reason = "" if reason == "usable" else reason
        verdicts.append(
            Verdict(f'provider "{name}"', not (gpu or reason), f"{reason}: see docs/providers.md" if reason else gpu or "usable")
        )
    kernels = gpu or ("" if _version("triton") else "triton is missing: pip install triton")
    verdicts.append(Verdict("Triton kernels", not kernels, kernels or f"triton {_version('triton')}"))
    for task, (distribution, remedy) in _NEEDS.items():
        found = _version(distribution)
        verdicts.append(Verdict(task, found is not None, f"{distribution} {found}" if found else f"{distribution} is missing: {remedy}"))
    return [*verdicts, _space(storage)]


def _gpu_problem(torch_facts: dict[str, Any], *, gpus: list[dict[str, Any]], backends: list[str]) -> str:
    if not gpus:
        return (_NO_GPU if torch_facts["cuda"] else _CPU_BUILD).format(**torch_facts)
    return "" if "nccl" in backends else "this torch has no NCCL: install a CUDA build for Linux from pytorch.org"


def _space(storage: dict[str, Any]) -> Verdict:
    problems = []
    if not storage["writable"]:
        problems.append(f"{storage['runs']} is not writable: set out to another directory")
    if storage["free GiB"] < _LITTLE_DISK_GIB:
        problems.append(f"{storage['free GiB']} GiB are free at {storage['runs']}: checkpoints of a 760M model take 9 GiB each")
    if storage["shared memory GiB"] < _LITTLE_SHARED_GIB:
        problems.append(
            f"/dev/shm has {storage['shared memory GiB']} GiB, which NCCL needs between GPUs of a host: docker run --shm-size=8g"
        )
    return Verdict("write runs", not problems, "; ".join(problems) or f"{storage['free GiB']} GiB free at {storage['runs']}")


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return "(" + ", ".join(f"{name} {_shown(item)}" for name, item in value.items()) + ")"
    if isinstance(value, list):
        return "+".join(map(str, value)) or "none"
    return "none" if value is None else str(value)
