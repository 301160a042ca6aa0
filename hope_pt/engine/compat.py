"""What is installed around the engine, checked once before the first `import megatron.core`.

megatron-core ships one minor release for each Python floor: 0.16.1 is the newest for 3.11, 0.19.x the newest for 3.12. This file holds
every difference between them that the engine meets, so that the rest of the package reads as if there were one version:

* `check_megatron` refuses a version outside the tested range;
* `prepare_import` makes 0.19 importable without triton (its mixture-of-experts kernels import it at the top of a file we never run);
* `accepted` drops keyword arguments that a constructor of the installed version does not know;
* `quiet` keeps megatron from announcing at import and construction what `capabilities` reports once;
* `capabilities` says which optional accelerator packages are there, by the symbols that are used and not by package name: the package
  called `apex` on PyPI is a web framework.
"""

import contextlib
import importlib
import inspect
import logging
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from types import ModuleType
from typing import Any

from packaging.version import Version

from hope_pt.errors import ConfigError

OLDEST_TESTED = Version("0.16.1")
FIRST_UNTESTED = Version("0.20")
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


def has_symbol(module: str, symbol: str) -> bool:
    """True if `module` can be imported and has the attribute `symbol`; a package that only shares the name does not count."""
    root = module.partition(".")[0]
    if find_spec(root) is None:
        return False
    try:
        return hasattr(importlib.import_module(module), symbol)
    except ImportError:
        return False


def capabilities() -> Capabilities:
    """Probe the optional packages. ConfigError if `apex` is installed and is not NVIDIA's: megatron-core would only see its name."""
    apex = has_symbol("apex.optimizers", "FusedAdam")
    if find_spec("apex") is not None and not apex:
        raise ConfigError("the installed package 'apex' is not NVIDIA's (no apex.optimizers.FusedAdam); remove it: pip uninstall apex")
    return Capabilities(
        megatron=str(check_megatron()),
        triton=find_spec("triton") is not None,
        transformer_engine=has_symbol("transformer_engine.pytorch", "Linear"),
        apex=apex,
    )


def prepare_import() -> None:
    """Make `import megatron.core` work here: check the version and, without triton, stand in for the one module that needs it.

    The stand-in has the three names that 0.19 imports from it; calling either kernel fails, and only mixture-of-experts models would.
    0.16.1 has no such module, so nothing is read from the stand-in there.
    """
    check_megatron()
    if find_spec("triton") is None and _TRITON_ONLY_MODULE not in sys.modules:
        module = ModuleType(_TRITON_ONLY_MODULE, "Stand-in: the kernels of this module need triton.")
        vars(module).update(GLOBAL_BLOCK_SIZE=1024, paged_stash_copy_kernel=None, paged_stash_pop_kernel=None)
        sys.modules[_TRITON_ONLY_MODULE] = module


def accepted(function: Callable, /, **kwargs: Any) -> dict[str, Any]:
    """The entries of `kwargs` that `function` has a parameter for: arguments that exist in some supported versions only."""
    parameters = inspect.signature(function).parameters
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
        return kwargs
    return {name: value for name, value in kwargs.items() if name in parameters}


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
