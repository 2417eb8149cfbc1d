# SPDX-License-Identifier: Apache-2.0
"""The recipes that come with the package, found by name from any folder.

path = find_recipe("e2b_lora_image")
"""

from __future__ import annotations

import difflib
from pathlib import Path

# configs/ of a clone, by a link; a folder of its own once installed from a wheel.
_ROOT = Path(__file__).parents[1] / "configs"
_SHOWN = 5


def recipe_names() -> list[str]:
    """Every shipped recipe, such as "sft/e2b_lora_image"."""
    return sorted(path.relative_to(_ROOT).with_suffix("").as_posix() for path in _files())


def find_recipe(where: str | Path) -> Path:
    """The YAML file that is meant.

    Args:
        where: a path; or the name of a shipped recipe, with or without its folder and ".yaml",
            such as "configs/sft/e2b_lora_image.yaml", "sft/e2b_lora_image" or "e2b_lora_image".
            A file in the current folder comes first.

    Raises:
        ValueError: there is neither, with the nearest names.
    """
    given = Path(where)
    with_suffix = given if given.suffix in (".yaml", ".yml") else Path(f"{given}.yaml")
    for path in (given, with_suffix):
        if path.is_file():
            return path
    if given.is_dir():
        raise ValueError(f"{where}: expected a YAML file, found a folder")
    asked = with_suffix.with_suffix("").as_posix().removeprefix("configs/")
    found = [name for name in recipe_names() if asked in (name, name.split("/")[1])]
    if found:
        return _ROOT / f"{found[0]}.yaml"
    raise ValueError(
        f"{where}: there is no such file (current folder: {Path.cwd()}) and no recipe of that "
        f"name; {_near(asked)}. `tunix-gemma4 recipes` lists all"
    )


def command_of(path: Path) -> str | None:
    """The command that runs a shipped recipe, "sft" or "grpo"; None for a file of one's own."""
    return path.parent.name if path in _files() else None


def _near(asked: str) -> str:
    """The names that come nearest to what was asked for."""
    last = asked.split("/")[-1]
    names = {name.split("/")[1]: name for name in recipe_names()}
    close = difflib.get_close_matches(last, names, n=_SHOWN, cutoff=0.4)
    if not close:
        return f"there are {len(names)}, such as {', '.join(list(names.values())[-_SHOWN:])}"
    return f"near are {', '.join(names[name] for name in close)}"


def _files() -> list[Path]:
    return list(_ROOT.glob("*/*.yaml"))
