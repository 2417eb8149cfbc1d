# SPDX-License-Identifier: Apache-2.0
"""How long a reward function may take: a warning that names it, and a limit where one is set."""

from __future__ import annotations

import contextvars
import functools
import queue
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from absl import logging

WARN_AFTER = 60.0  # seconds
_LIMIT = "reward_timeout"


class RewardTimeout(RuntimeError):
    """A reward function did not return in time."""


def limited(reward_fn: Callable[..., Any], seconds: float) -> Callable[..., Any]:
    """`reward_fn`, which may take so long for a batch."""

    @functools.wraps(reward_fn)
    def reward(*args: Any, **columns: Any) -> Any:
        return reward_fn(*args, **columns)

    # An object that is called need not have a name.
    reward.__name__ = getattr(reward_fn, "__name__", type(reward_fn).__name__)
    setattr(reward, _LIMIT, seconds)
    return reward


def limit_of(reward_fn: Callable[..., Any]) -> float | None:
    """Seconds that `limited` allowed; None: any."""
    return getattr(reward_fn, _LIMIT, None)


class Timed:
    """Calls a reward function's code.

    With a limit it runs in a thread of its own, the same for all calls, which is left behind when
    it does not return: Python cannot end it. Without one it runs in the caller's.

    Args:
        called: the function's name.
        limit: seconds.
    """

    def __init__(self, called: str, limit: float | None):
        self._called, self._limit = called, limit
        self._work: queue.SimpleQueue | None = None

    def __call__(self, function: Callable[[], Any]) -> Any:
        """What `function()` returns or raises.

        Raises:
            RewardTimeout: if it does neither in time.
        """
        with self._warning():
            if self._limit is None:
                return function()
            return self._in_time(function)

    @contextmanager
    def _warning(self) -> Iterator[None]:
        timer = threading.Timer(
            WARN_AFTER,
            logging.warning,
            (
                "reward function %s has not returned for %.0f seconds; reward_timeout would end "
                "the run.",
                *(self._called, WARN_AFTER),
            ),
        )
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()

    def _in_time(self, function: Callable[[], Any]) -> Any:
        if self._work is None:
            self._work = queue.SimpleQueue()
            threading.Thread(target=_serve, args=(self._work,), daemon=True).start()
        answer: queue.SimpleQueue = queue.SimpleQueue()
        self._work.put((contextvars.copy_context(), function, answer))
        try:
            result, error = answer.get(timeout=self._limit)
        except queue.Empty:
            self._work = None  # Its thread is busy.
            raise RewardTimeout(
                f"reward function {self._called} did not return within "
                f"reward_timeout={self._limit:g} seconds"
            ) from None
        if error is not None:
            raise error
        return result


def _serve(work: queue.SimpleQueue) -> None:
    while True:
        context, function, answer = work.get()
        try:
            answer.put((context.run(function), None))
        except BaseException as error:
            answer.put((None, error))
