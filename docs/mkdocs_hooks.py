# SPDX-License-Identifier: Apache-2.0
"""What mkdocs does besides: the reference of public names, and no page that asks another host."""

import importlib
import re
from types import ModuleType
from typing import Any

from mkdocs.exceptions import PluginError

_MARK = re.compile(r"^<!-- names of (\S+) -->$", re.MULTILINE)
_ASKED = re.compile(
    r"<(?:link|script|img|iframe|source)\b[^>]*?(?:href|src)=\"((?:https?:)?//[^\"]+)"
)


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Puts directives of mkdocstrings in place of each `<!-- names of PACKAGE -->`.

    A name that two packages have is described with the later one.
    """
    packages = _MARK.findall(markdown)
    home = {name: package for package in packages for name in _names(package)}

    def reference(match: re.Match[str]) -> str:
        package = match[1]
        own = [name for name in _names(package) if home[name] == package]
        more = [f"[`{name}`](#{name.lower()})" for name in _names(package) if name not in own]
        parts = [f"### {name}\n\n{_described(package, name)}" for name in own]
        return "\n\n".join(parts + [f"Described below: {', '.join(more)}."] * bool(more))

    return _MARK.sub(reference, markdown)


def on_post_page(output: str, page: Any, **_: Any) -> None:
    """Refuses a page that loads something from another host."""
    if asked := _ASKED.findall(output):
        raise PluginError(f"{page.file.src_uri}: it would load {', '.join(asked)}")


def _names(package: str) -> list[str]:
    return sorted(importlib.import_module(package).__all__, key=str.lower)


def _described(package: str, name: str) -> str:
    """The directive of what this project defines, and a sentence for the rest."""
    value = getattr(importlib.import_module(package), name)
    if isinstance(value, ModuleType):
        path = value.__name__
        if hasattr(value, "__path__"):
            return f"A module: {(value.__doc__ or '').strip()}"
    elif not hasattr(value, "__qualname__"):
        return "What is wrapped of Tunix, and why: [hooks](hooks.md)."
    else:
        path = f"{value.__module__}.{value.__qualname__}"
    if path.split(".")[0] != package.split(".")[0]:
        return f"`{path}` itself."
    return f"::: {path}\n    options: {{heading_level: 4}}"
