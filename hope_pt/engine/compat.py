"""What is installed around the engine, checked once before the first `import megatron.core`.

megatron-core ships one minor release for each Python floor: 0.16.1 is the newest for 3.11, 0.19.x the newest for 3.12. This file holds
every difference between them that the engine meets, so that the rest of the package reads as if there were one version:

* `check_megatron` refuses a version outside the tested range;
* `prepare_import` makes 0.19 importable without triton (its mixture-of-experts kernels import it at the top of a file we never run);
* `quiet` keeps megatron from announcing at import and construction what `capabilities` reports once;
* `capabilities` says which optional accelerator packages are there, by the symbols that are used and not by package name: the package
  called `apex` on PyPI is a web framework, which `prepare_import` hides from megatron.
"""

import contextlib
import functools
import importlib
import logging
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.machinery import ModuleSpec
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

from packaging.version import Version

from hope_pt.errors import ConfigError

OLDEST_TESTED = Version("0.16.1")
FIRST_UNTESTED = Version("0.20")
_LOG = logging.getLogger(__name__)
_TRITON_ONLY_MODULE = "megatron.core.transformer.moe.ops.paged_stash"


@dataclass(frozen=True)
class Capabilities:
    """Optional accelerator packages, found by symbol."""

    megatron: str
    triton: bool
    transformer_engine: bool
    apex: bool


def check_megatron() -> Version:
    """Version of the installed megatron-core; ConfigError if it is missing or was never tested with this engine."""
    try:
        installed = Version(version("megatron-core"))
    except PackageNotFoundError:
        raise ConfigError('megatron-core is not installed; install it with pip install "megatron-core>=0.16.1,<0.20"') from None
    if not OLDEST_TESTED <= installed < FIRST_UNTESTED:
        raise ConfigError(
            f"megatron-core {installed} is outside the tested range {OLDEST_TESTED} <= version < {FIRST_UNTESTED}; "
            'install it with pip install "megatron-core>=0.16.1,<0.20"'
        )
    return installed


def problem(module: str, symbol: str) -> str:
    """Why `symbol` of `module` cannot be used here, "" if it can: a package that only shares the name is of no use."""
    root = module.partition(".")[0]
    if find_spec(root) is None:
        return "not installed"
    try:
        found = hasattr(importlib.import_module(module), symbol)
    except Exception as error:  # a build for another torch or CUDA fails in many ways
        return f"cannot be imported: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return "" if found else f"{module} has no {symbol}"


@functools.cache
def apex_is_foreign() -> bool:
    """True if the installed package `apex` is not NVIDIA's: PyPI's is a toolkit for web applications. Nothing of it is imported."""
    spec = _spec("apex")
    return spec is not None and not any((Path(folder) / "optimizers").is_dir() for folder in spec.submodule_search_locations or [])


def apex_problem() -> str:
    """Why NVIDIA apex cannot be used here, "" if it can."""
    if apex_is_foreign():
        return "the installed package 'apex' is not NVIDIA's but PyPI's toolkit for web applications: pip uninstall apex"
    reason = problem("apex.optimizers", "FusedAdam") or problem("apex.normalization", "MixedFusedRMSNorm")
    if reason:
        return reason
    missing = [name for name in ("amp_C", "fused_layer_norm_cuda") if find_spec(name) is None]
    return f"built without its CUDA extensions: no {', '.join(missing)}" if missing else ""


def transformer_engine_problem() -> str:
    """Why transformer-engine cannot be used here, "" if it can."""
    return problem("transformer_engine.pytorch", "Linear") or problem("transformer_engine.pytorch.optimizers", "FusedAdam")


def collective_backends() -> list[str]:
    """Back ends of torch.distributed that this torch was built with; nothing is initialised."""
    from torch import distributed

    if not distributed.is_available():
        return []
    return [name for name, found in (("gloo", distributed.is_gloo_available()), ("nccl", distributed.is_nccl_available())) if found]


def capabilities() -> Capabilities:
    """Probe the optional packages."""
    return Capabilities(
        megatron=str(check_megatron()),
        triton=find_spec("triton") is not None,
        transformer_engine=not transformer_engine_problem(),
        apex=not apex_problem(),
    )


def prepare_import() -> None:
    """Make `import megatron.core` work here: check the version, stand in for the one module that needs triton, hide a foreign apex.

    Without triton the stand-in has the three names that 0.19 imports from it; calling either kernel fails, and only mixture-of-experts
    models would. 0.16.1 has no such module, so nothing is read from the stand-in there. megatron takes any package called apex for
    NVIDIA's where it chooses a default norm, and an error of its import other than ImportError would end the import of megatron.
    """
    check_megatron()
    if apex_is_foreign():
        sys.modules["apex"] = None  # type: ignore[assignment]  # import apex fails as if it were not installed
        _LOG.warning("not used: %s", apex_problem())
    if find_spec("triton") is None and _TRITON_ONLY_MODULE not in sys.modules:
        module = ModuleType(_TRITON_ONLY_MODULE, "Stand-in: the kernels of this module need triton.")
        vars(module).update(GLOBAL_BLOCK_SIZE=1024, paged_stash_copy_kernel=None, paged_stash_pop_kernel=None)
        sys.modules[_TRITON_ONLY_MODULE] = module


def _spec(name: str) -> ModuleSpec | None:
    """Of the installed package, whatever stands for it in sys.modules."""
    specs = (finder.find_spec(name, None) for finder in sys.meta_path)
    return next((spec for spec in specs if spec is not None), None)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Within it megatron's import-time and construction-time notices (missing accelerators, deprecations) are not shown; errors are."""
    logger = logging.getLogger("megatron")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=UserWarning, module=r"megatron\.")
            yield
    finally:
        logger.setLevel(level)
