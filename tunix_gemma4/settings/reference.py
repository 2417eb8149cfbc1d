# SPDX-License-Identifier: Apache-2.0
"""What each setting means, as the docstrings of the classes say: for `--help` and the docs."""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
import textwrap
from collections.abc import Iterator
from typing import Any

from omegaconf import MISSING

from .load_config import sections

_SECTION = re.compile(r"^Attributes:\n((?:(?: {4}.*)?\n)+)", re.MULTILINE)
_ENTRY = re.compile(r"^ {4}(\w[\w, ]*): (.*(?:\n {5,}.*)*)", re.MULTILINE)


@dataclasses.dataclass(frozen=True)
class Setting:
    """One setting.

    Attributes:
        name: dotted, as on the command line.
        default: as YAML; empty where there is none, and for sections.
        meaning: in one paragraph.
        section: the class of a section, whose settings follow under its name.
    """

    name: str
    default: str
    meaning: str
    section: type | None


def settings_of(kind: type) -> list[Setting]:
    """Those of a dataclass, in its order, without those of its sections."""
    meanings: dict[str, str] = {}
    for parent in reversed(kind.__mro__):
        if section := _SECTION.search(inspect.cleandoc(vars(parent).get("__doc__") or "") + "\n"):
            for names, text in _ENTRY.findall(section[1]):
                meanings |= dict.fromkeys(names.split(", "), " ".join(text.split()))
    inner, found = sections(kind), []
    for field in dataclasses.fields(kind):
        section = inner.get(field.name)
        meaning = meanings[field.name]
        if section is not None:
            meaning = re.sub(r"^see `[\w.]+`", "a section", meaning)
        found.append(Setting(field.name, _default(field), meaning, section))
    return found


def help_text(kind: type, prefix: str = "") -> Iterator[str]:
    """Lines about every setting, those of sections too."""
    for setting in settings_of(kind):
        name = prefix + setting.name
        given = f"={setting.default}" if setting.default else ""
        yield f"  {name}{given}"
        yield textwrap.indent(textwrap.fill(setting.meaning, 92, break_on_hyphens=False), " " * 6)
        if setting.section is not None:
            yield from help_text(setting.section, f"{name}.")


def _default(field: dataclasses.Field) -> str:
    value: Any = field.default
    if field.default_factory is not dataclasses.MISSING:
        value = field.default_factory()
    if value in (MISSING, dataclasses.MISSING) or dataclasses.is_dataclass(value):
        return ""
    if isinstance(value, float):
        return f"{value:g}"
    return value if isinstance(value, str) else json.dumps(value)
