# SPDX-License-Identifier: Apache-2.0
"""Wrappers on the host's functions: put in place, checked, and taken away again.

What our subclasses of the host's classes override is checked with them.
"""

from __future__ import annotations

import dataclasses
import functools
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
        wrap: from the original to its wrapper, which passes everything else on; see `around`.
        parameters: parameters of the original that the wrapper relies on; "a|b" is one of two
            names.
        why: one sentence, for `register.status` and the documentation; by default the first of
            the wrapper's docstring.
        optional: the host may lack the target. `wrap` then gets None, and the name goes away again
            with the hook.
    """

    target: str
    wrap: Callable[[Any], Any]
    parameters: tuple[str, ...]
    why: str = ""
    optional: bool = False

    def __post_init__(self):
        if not self.why:
            first, _, _ = (self.wrap.__doc__ or "").partition("\n\n")
            object.__setattr__(self, "why", " ".join(first.split()).removesuffix("."))

    def place(self) -> tuple[Any, str]:
        """The module or class that holds the target, and the attribute's name."""
        module, _, path = self.target.partition(":")
        holder = importlib.import_module(module)
        *parents, name = path.split(".")
        for parent in parents:
            holder = getattr(holder, parent)
        return holder, name


def on(holder: str, *rows: tuple) -> tuple[Hook, ...]:
    """Hooks on attributes of one module, "module:", or class, "module:Class.".

    A row is a name, `Hook.wrap`, `Hook.parameters` with spaces between, and perhaps `Hook.why`.
    """
    return tuple(
        Hook(holder + name, wrap, tuple(parameters.split()), *why)
        for name, wrap, parameters, *why in rows
    )


def around(function: Callable[..., Any]) -> Callable[[Any], Any]:
    """Makes `function(original, *arguments)` what turns an original into its wrapper.

    The wrapper has the original's name and signature. In place of a classmethod, whose original is
    bound to its class already, stands a staticmethod.
    """

    @functools.wraps(function)
    def wrap(original: Callable[..., Any]) -> Any:
        @functools.wraps(original)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            return function(original, *args, **kwargs)

        return staticmethod(wrapper) if inspect.ismethod(original) else wrapper

    return wrap


def call_of(function: Callable[..., Any], *args: Any, **kwargs: Any) -> inspect.BoundArguments:
    """A call's arguments by the parameters of `function`, defaults left out."""
    return inspect.signature(function).bind(*args, **kwargs)


# Classes of ours and what they call of the host's; see `extends`.
_EXTENSIONS: list[tuple[type, dict[str, Any]]] = []


def overrides(*parameters: str) -> Callable[[Any], Any]:
    """Marks a method that the host calls in place of its own, which has these parameters."""

    def mark(method: Any) -> Any:
        method.__overrides__ = parameters
        return method

    return mark


def extends(**calls: tuple[str, ...] | set[tuple[str, ...]]) -> Callable[[Class], Class]:
    """Marks a class of ours, whose first base is the host's and some methods `overrides` marks.

    Args:
        calls: methods of the host that ours call, and all of their parameters; or a set of such,
            of several versions.
    """

    def mark(kind: Class) -> Class:
        _EXTENSIONS.append((kind, calls))
        return kind

    return mark


def check_host(hooks: Sequence[Hook] = ()) -> None:
    """Looks whether the host is what `hooks` and our subclasses take it to be.

    Raises:
        RuntimeError: naming every target that is gone or has other parameters.
    """
    host = version.found()
    moved = [problem for hook in hooks if (problem := _problem(hook))]
    moved += [problem for kind, calls in _EXTENSIONS for problem in _problems(kind, calls)]
    if moved:
        raise RuntimeError(
            f"{host} is not the one that tunix_gemma4 hooks into:\n  "
            + "\n  ".join(moved)
            + f"\n{host.advice()}"
        )


class Installed:
    """Hooks that are in place, and what they replaced."""

    def __init__(self):
        self._undo: list[tuple[Hook, Callable[[], None]]] = []

    def __bool__(self) -> bool:
        return bool(self._undo)

    def install(self, hooks: Sequence[Hook]) -> None:
        """Puts all of them in place, or none where the host has changed.

        Raises:
            RuntimeError: as `check_host`.
        """
        check_host(hooks)
        for hook in hooks:
            holder, name = hook.place()
            # A method that a class inherits goes back to being inherited, what the host lacks to
            # being absent, and a classmethod to being one.
            undo = functools.partial(delattr, holder, name)
            if name in vars(holder):
                undo = functools.partial(setattr, holder, name, vars(holder)[name])
            setattr(holder, name, hook.wrap(getattr(holder, name, None)))
            self._undo.append((hook, undo))

    def restore(self) -> None:
        """Puts the originals back, the last first."""
        while self._undo:
            _, undo = self._undo.pop()
            undo()

    def hooks(self) -> list[Hook]:
        return [hook for hook, _ in self._undo]


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


def _problems(kind: type, calls: dict[str, Any]) -> list[str]:
    """What is not there, or has other parameters; under another name it is never called."""
    base = kind.__mro__[1]
    overridden = {
        name: value.__overrides__
        for name, value in vars(kind).items()
        if hasattr(value, "__overrides__")
    }
    problems = []
    for verb, methods in (("overrides", overridden), ("calls", calls)):
        for name, expected in methods.items():
            target = f"{base.__module__}:{base.__qualname__}.{name}"
            accepted = expected if isinstance(expected, set) else {expected}
            method = getattr(base, name, None)
            if not callable(method):
                problems.append(f"{target}: gone; {kind.__name__} {verb} it")
                continue
            found = tuple(inspect.signature(method).parameters)[1:]  # without `self`
            if found not in accepted:
                problems.append(
                    f"{target}: its parameters are {_listed({found})}; {kind.__name__} {verb} it "
                    f"with {_listed(accepted)}"
                )
    return problems


def _listed(several: set[tuple[str, ...]]) -> str:
    return " or ".join(sorted(f"({', '.join(parameters)})" for parameters in several))
