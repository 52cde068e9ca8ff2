"""Lazy imports of a package's public names, so that importing the package does not load PyTorch."""

from __future__ import annotations

import importlib
import sys
import time
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

# Nanoseconds; both packages import this module before any other of theirs, so a source file that is older has
# been imported as it is.
LOADED_AT = time.time_ns()


def installed_version() -> str:
    """Returns the version of the distribution that holds both packages; "unknown" where none is installed."""
    try:
        return version("regionclip")
    except PackageNotFoundError:  # a checkout on the path
        return "unknown"


def lazy(package: str, places: Mapping[str, str]) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Returns the `__getattr__` and the `__dir__` of a package (PEP 562).

    Args:
        package: its `__name__`.
        places: the module that defines each name.
    """

    def find(name: str) -> Any:
        if name == "__version__":
            return installed_version()
        if name not in places:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(places[name]), name)
        setattr(sys.modules[package], name, value)  # from now on it is found without this function
        return value

    def names() -> list[str]:
        return sorted({*vars(sys.modules[package]), *places})

    return find, names
