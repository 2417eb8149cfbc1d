# SPDX-License-Identifier: Apache-2.0
"""Names of a package that are imported when they are first used."""

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any


def attach(
    package: str, home: Mapping[str, str], modules: tuple[str, ...] = ()
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """A package's `__getattr__` and `__dir__`.

    Args:
        package: its `__name__`.
        home: the module of each name, from `package` on, as in "..settings.sft".
        modules: that are attributes of the package themselves.
    """

    def get(name: str) -> Any:
        if name in home:
            return getattr(import_module(home[name], package), name)
        if name in modules:
            return import_module(f".{name}", package)
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    return get, lambda: sorted([*home, *modules])
