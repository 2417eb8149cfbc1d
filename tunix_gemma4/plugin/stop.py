# SPDX-License-Identifier: Apache-2.0
"""Ctrl-C and SIGTERM: a run ends behind the step it is in, with that step's checkpoint written.

Handlers set a mark, which `CheckpointManager.save` looks at after every step; outside training,
and at the second signal, the run ends at once.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import types
from collections.abc import Iterator
from typing import Any, NoReturn

import jax

_NAMES: dict[int, str] = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM"}


class Interrupted(KeyboardInterrupt):
    """Ctrl-C ended a run; what was kept."""

    exit_code = 128 + signal.SIGINT


class Terminated(SystemExit):
    """SIGTERM ended a run; what was kept."""

    exit_code = 128 + signal.SIGTERM

    def __init__(self, message: str):
        super().__init__(self.exit_code)
        self._message = message

    def __str__(self) -> str:
        return self._message


# Of this process: the signal that came while a step was under way, whether a signal waits for the
# step's end, and whether a second one came.
_mark = types.SimpleNamespace(signal=None, waits=False, at_once=False)


@contextlib.contextmanager
def handled() -> Iterator[None]:
    """Answers both signals within; handlers that others have put in place stay theirs.

    Signals reach the main thread alone: elsewhere this changes nothing. Nor where there are several
    processes, which must stop at the same step: JAX sees to that, see `CheckpointManager`.
    """
    if threading.current_thread() is not threading.main_thread() or jax.process_count() > 1:
        yield
        return
    defaults = (signal.SIG_DFL, signal.default_int_handler)
    before = {number: signal.getsignal(number) for number in _NAMES}
    ours = [number for number, handler in before.items() if handler in defaults]
    if ours:
        _mark.signal, _mark.at_once = None, False
    for number in ours:
        signal.signal(number, _handle)
    try:
        yield
    finally:
        if ours:
            _mark.signal = None
        for number in ours:
            signal.signal(number, before[number])


def _handle(number: int, frame: Any) -> None:
    del frame
    if not _mark.waits or _mark.signal is not None:
        _mark.at_once = _mark.waits
        end(number)
    _mark.signal = number
    # Not print: the signal may have come in the middle of one.
    again = "; Ctrl-C again stops at once" if number == signal.SIGINT else ""
    os.write(2, f"\n{_NAMES[number]}: stopping after this step{again}\n".encode())


@contextlib.contextmanager
def after_the_step() -> Iterator[None]:
    """Within, a signal waits until the step that is under way is done and its checkpoint written.

    Raises:
        Interrupted, Terminated: at the end of the block, if a signal still waits.
    """
    before, _mark.waits = _mark.waits, True
    try:
        yield
    finally:
        _mark.waits = before
    number = asked()
    if number is not None:
        end(number, "when training was done")


def asked() -> int | None:
    """The signal that waits for the end of a step, if there is one."""
    return _mark.signal


def at_once() -> bool:
    """Whether a second signal came: no thread is to be waited for, such as that of a rollout."""
    return _mark.at_once


def end(number: int, where: str = "") -> NoReturn:
    """Raises what ends the run, saying by which signal and `where`."""
    kind = Interrupted if number == signal.SIGINT else Terminated
    raise kind(f"stopped by {_NAMES[number]} {where}".rstrip())
