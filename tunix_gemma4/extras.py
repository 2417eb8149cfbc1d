# SPDX-License-Identifier: Apache-2.0
"""Packages that only some uses need, looked for before the use begins."""

from __future__ import annotations

import importlib.util
from pathlib import Path


def is_installed(module: str) -> bool:
    """Whether `import module` gives a package; the folder wandb/ of earlier runs is none."""
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is not None:
        return spec is not None
    places = spec.submodule_search_locations or ()
    return any(Path(place).parent != Path.cwd() for place in places)


def require_extra(module: str, extra: str, use: str) -> None:
    """Raises ValueError with the command that installs `module`, unless it is there.

    `extra` of this package brings it; the message begins with its `use`.
    """
    if not is_installed(module):
        raise ValueError(
            f"{use} needs {module}, which is not installed; pip install 'tunix-gemma4[{extra}]'"
        )
