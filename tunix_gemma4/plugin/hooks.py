# SPDX-License-Identifier: Apache-2.0
"""Wrappers on the host's functions: put in place, checked, and taken away again.

What our subclasses of the host's classes override is checked with them.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from . import version

Class = TypeVar("Class", bound=type)


@dataclasses.dataclass(frozen=True)
class Hook:
    """One wrapper on something that the host looks up late.

    Attributes:
        target: "module:attribute" or "module:Class.method".
        wrap: from the original to its wrapper, which passes everything else on.
        parameters: parameters of the original that the wrapper relies on; "a|b" is one of two
            names.
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


@dataclasses.dataclass(frozen=True)
class Extension:
    """A class of ours and what it takes the host's to be.

    Attributes:
        kind: ours; its first base is the host's.
        calls: methods of the host that ours call, and all of their parameters; or a set of such,
            of several versions.
    """

    kind: type
    calls: dict[str, tuple[str, ...] | set[tuple[str, ...]]]

    def problems(self) -> list[str]:
        """What is not there, or has other parameters; under another name it is never called."""
        base = self.kind.__mro__[1]
        overridden = {
            name: value.__overrides__
            for name, value in vars(self.kind).items()
            if hasattr(value, "__overrides__")
        }
        problems = []
        for verb, methods in (("overrides", overridden), ("calls", self.calls)):
            for name, expected in methods.items():
                target = f"{base.__module__}:{base.__qualname__}.{name}"
                found = _parameters(base, name)
                if found is None:
                    problems.append(f"{target}: gone; {self.kind.__name__} {verb} it")
                elif isinstance(expected, set) and found in expected:
                    continue
                elif found != expected:
                    problems.append(
                        f"{target}: its parameters are {_listed(found)}; {self.kind.__name__} "
                        f"{verb} it with {_listed(expected)}"
                    )
        return problems


_EXTENSIONS: list[Extension] = []


def overrides(*parameters: str) -> Callable[[Any], Any]:
    """Marks a method that the host calls in place of its own, which has these parameters."""

    def mark(method: Any) -> Any:
        method.__overrides__ = parameters
        return method

    return mark


def extends(**calls: tuple[str, ...] | set[tuple[str, ...]]) -> Callable[[Class], Class]:
    """Marks a class of ours with methods that `overrides` marks; see `Extension.calls`."""

    def mark(kind: Class) -> Class:
        _EXTENSIONS.append(Extension(kind, calls))
        return kind

    return mark


def check_host(hooks: Sequence[Hook] = ()) -> None:
    """Looks whether the host is what `hooks` and our subclasses take it to be.

    Raises:
        RuntimeError: naming every target that is gone or has other parameters.
    """
    host = version.found()
    moved = [problem for hook in hooks if (problem := _problem(hook))]
    moved += [problem for extension in _EXTENSIONS for problem in extension.problems()]
    if moved:
        raise RuntimeError(
            f"{host} is not the one that tunix_gemma4 hooks into:\n  "
            + "\n  ".join(moved)
            + f"\n{host.advice()}"
        )


class Installed:
    """Hooks that are in place, and what they replaced."""

    def __init__(self):
        self._replaced: list[tuple[Hook, Any, str, Any, bool]] = []

    def __bool__(self) -> bool:
        return bool(self._replaced)

    def install(self, hooks: Sequence[Hook]) -> None:
        """Puts all of them in place, or none where the host has changed.

        Raises:
            RuntimeError: as `check_host`.
        """
        check_host(hooks)
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
    lost = [one for one in hook.parameters if not set(one.split("|")) & set(found)]
    if lost:
        return f"{hook.target}: no parameter {', '.join(lost)}; it has {', '.join(found)}"
    return None


def _parameters(kind: type, name: str) -> tuple[str, ...] | None:
    """Of a method, `self` left out; None if there is none."""
    method = getattr(kind, name, None)
    return tuple(inspect.signature(method).parameters)[1:] if callable(method) else None


def _listed(parameters: tuple[str, ...] | set[tuple[str, ...]]) -> str:
    if isinstance(parameters, set):
        return " or ".join(sorted(map(_listed, parameters)))
    return f"({', '.join(parameters)})"
