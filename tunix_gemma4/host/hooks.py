# SPDX-License-Identifier: Apache-2.0
"""Wrappers on the host's functions: put in place, checked, and taken away again."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
from collections.abc import Callable, Sequence
from typing import Any


@dataclasses.dataclass(frozen=True)
class Hook:
    """One wrapper on something that the host looks up late.

    Attributes:
        target: "module:attribute" or "module:Class.method".
        wrap: from the original to its wrapper, which passes everything else on.
        parameters: parameters of the original that the wrapper relies on.
        why: one sentence, for `register.status` and the documentation.
        optional: the host may lack the target. `wrap` then gets None, and the name goes away again
            with the hook.
    """

    target: str
    wrap: Callable[[Any], Any]
    parameters: tuple[str, ...]
    why: str
    optional: bool = False

    def place(self) -> tuple[Any, str]:
        """The module or class that holds the target, and the attribute's name."""
        module, _, path = self.target.partition(":")
        holder = importlib.import_module(module)
        *parents, name = path.split(".")
        for parent in parents:
            holder = getattr(holder, parent)
        return holder, name


class Installed:
    """Hooks that are in place, and what they replaced."""

    def __init__(self):
        self._replaced: list[tuple[Hook, Any, str, Any, bool]] = []

    def __bool__(self) -> bool:
        return bool(self._replaced)

    def install(self, hooks: Sequence[Hook]) -> None:
        """Puts all of them in place, or none where the host has changed.

        Raises:
            RuntimeError: naming every target that is gone or has lost a parameter.
        """
        moved = [problem for hook in hooks if (problem := _problem(hook))]
        if moved:
            raise RuntimeError(
                "this google-tunix is not the one that tunix_gemma4 hooks into:\n  "
                + "\n  ".join(moved)
                + "\nInstall google-tunix>=0.1.7,<0.2, or a newer tunix_gemma4"
            )
        for hook in hooks:
            holder, name = hook.place()
            original = getattr(holder, name, None)
            # A method that a class inherits goes back to being inherited, what the host lacks to
            # being absent, and a classmethod to being one.
            own = name in vars(holder)
            stored = vars(holder).get(name)
            setattr(holder, name, hook.wrap(original))
            self._replaced.append((hook, holder, name, stored, own))

    def restore(self) -> None:
        """Puts the originals back, the last first."""
        while self._replaced:
            _, holder, name, original, own = self._replaced.pop()
            if own:
                setattr(holder, name, original)
            else:
                delattr(holder, name)

    def hooks(self) -> list[Hook]:
        return [hook for hook, *_ in self._replaced]


def _problem(hook: Hook) -> str | None:
    """What about the target is not as the wrapper expects; None if nothing."""
    try:
        holder, name = hook.place()
        if hook.optional and not hasattr(holder, name):
            return None
        original = getattr(holder, name)
    except (ImportError, AttributeError) as error:
        return f"{hook.target}: {error}"
    if not hook.parameters:
        return None
    found = inspect.signature(original).parameters
    lost = [parameter for parameter in hook.parameters if parameter not in found]
    if lost:
        return f"{hook.target}: no parameter {', '.join(lost)}; it has {', '.join(found)}"
    return None
