"""When modules are imported: names on first access (PEP 562), or every module of a package, so that all register."""

import importlib
import pkgutil
from collections.abc import Callable, Collection, Mapping
from typing import Any


def lazy(package: str, places: Mapping[str, str]) -> Callable[[str], Any]:
    """A package's ``__getattr__``.

    Args:
        package: Its ``__name__``.
        places: Public name -> the module below the package that defines it; "" for a module of that name.
    """

    def getattr_(name: str) -> Any:
        if name not in places:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        module = importlib.import_module(f"{package}.{places[name] or name}")
        return getattr(module, name) if places[name] else module

    return getattr_


def import_all(package: str, besides: Collection[str] = ()) -> None:
    """Import every module of a package: a file that registers something needs no line elsewhere.

    Args:
        package: Its ``__name__``; called at the end of its ``__init__``.
        besides: Modules that register nothing, and would only make the start slow.
    """
    for module in pkgutil.iter_modules(importlib.import_module(package).__path__):
        if module.name not in besides:
            importlib.import_module(f"{package}.{module.name}")
