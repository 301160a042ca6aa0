"""A stand-in for transformer-engine on the CPU: the public signatures that megatron's adapters call, with plain torch behind them.

Submodules and names that megatron only imports exist and do nothing.
"""

import importlib
import importlib.abc
import importlib.machinery
import sys
from types import ModuleType

__version__ = "2.8.0"


def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)
    return importlib.import_module(f"{__name__}.{name}")


class Anything:
    """A name that is imported and never used."""


class Blank(ModuleType):
    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (Anything,), {}) if name[0].isupper() else importlib.import_module(f"{self.__name__}.{name}")


class BlankFinder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, fullname, path=None, target=None):
        inside = fullname.startswith(f"{__name__}.")
        return importlib.machinery.ModuleSpec(fullname, self, is_package=True) if inside else None

    def create_module(self, spec):
        return Blank(spec.name)

    def exec_module(self, module):
        module.__path__ = []


sys.meta_path.append(BlankFinder())

from transformer_engine import pytorch as pytorch  # noqa: E402
