# SPDX-License-Identifier: Apache-2.0
"""Writes the tables of docs/reference/ from the code: `python docs/tables.py`, `make docs-tables`.

A table stands between `<!-- table: NAME -->` and `<!-- end -->`. Its name is that of a class of
settings, with `.section` for those of a section, with `- OTHER` without what another class says
likewise; or HOOKS.
"""

import os
import re
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

import tunix_gemma4
from tunix_gemma4 import recipes
from tunix_gemma4.settings.reference import Setting, settings_of

_DOCS = Path(__file__).resolve().parent
_TABLE = re.compile(r"(<!-- table: (.*?) -->\n).*?(<!-- end -->)", re.DOTALL)
_PAGE = re.compile(r"docs/([\w/-]+\.md)(#[\w-]+)?")


def page_with_tables(page: Path) -> str:
    """The text of a page, its tables as the code has them."""

    def table(match: re.Match[str]) -> str:
        return f"{match[1]}\n{_table(page, match[2])}\n\n{match[3]}"

    return _TABLE.sub(table, page.read_text("utf-8"))


def pages() -> list[Path]:
    return [path for path in sorted(_DOCS.rglob("*.md")) if _TABLE.search(path.read_text("utf-8"))]


def _table(page: Path, name: str) -> str:
    if name == "HOOKS":
        rows = [(f"`{hook.target}`", hook.why) for hook in tunix_gemma4.HOOKS]
        return _rows(("wrapped", "why"), rows)
    kind, _, other = name.partition(" - ")
    said = set(_settings(other)) if other else set()
    settings = [one for one in _settings(kind) if one not in said]
    rows = []
    # Settings that share a sentence share a row.
    for meaning, group in groupby(settings, key=lambda one: one.meaning):
        members = list(group)
        names = ", ".join(f"`{one.name}`" for one in members)
        defaults = list(dict.fromkeys(f"`{one.default}`" for one in members if one.default))
        rows.append((names, ", ".join(defaults), _linked(page, meaning)))
    return _rows(("key", "default", "meaning"), rows)


def _settings(name: str) -> list[Setting]:
    name, _, section = name.partition(".")
    kind = getattr(recipes, name, None) or getattr(tunix_gemma4, name)
    found = settings_of(kind)
    if not section:
        return found
    (inner,) = [one.section for one in found if one.name == section]
    return settings_of(inner)


def _linked(page: Path, text: str) -> str:
    """`docs/how-to/data.md` becomes a link that says the page's title."""

    def link(match: re.Match[str]) -> str:
        target = _DOCS / match[1]
        title = target.read_text("utf-8").partition("\n")[0].removeprefix("# ")
        return f"[{title}]({os.path.relpath(target, page.parent)}{match[2] or ''})"

    return _PAGE.sub(link, re.sub(r'"([^" ]+)"', r"`\1`", text)).replace("|", r"\|")


def _rows(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |".replace("|  |", "| |") for line in lines)


if __name__ == "__main__":
    for path in pages():
        path.write_text(page_with_tables(path), "utf-8")
