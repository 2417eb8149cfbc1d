# SPDX-License-Identifier: Apache-2.0
"""Reward functions that stop the run, naming the sample, when they go wrong.

The host adds NaN as zero, takes an array of any length, and reports a crash without its input.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable
from typing import Any

import numpy as np

from .binding import bound

RewardFn = Callable[..., list[float]]
_SHOWN = 400  # characters of a prompt or completion in a message


class RewardError(RuntimeError):
    """A reward function raised, or returned something that is not one number per completion."""


def checked(reward_fn: RewardFn) -> RewardFn:
    """`reward_fn(prompts, completions, **columns)`, its result checked.

    It gets the prompts and columns as the data set has them, and of the columns only those that
    its signature names, unless that ends in `**kwargs`.

    Raises:
        RewardError: naming the function and the sample that caused it.
    """
    parameters = inspect.signature(reward_fn).parameters.values()
    takes_all = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters)
    names = {p.name for p in parameters}
    called = getattr(reward_fn, "__name__", type(reward_fn).__name__)

    @functools.wraps(reward_fn)
    def reward(prompts: list[Any], completions: list[str], **columns: Any) -> list[float]:
        work = bound()
        if work is not None and work.prompts is not None:
            prompts = work.prompts
        if not takes_all:
            columns = {name: value for name, value in columns.items() if name in names}
        try:
            found = reward_fn(prompts=prompts, completions=completions, **columns)
        except Exception as error:
            place = _culprit(reward_fn, prompts, completions, columns)
            raise RewardError(
                f"reward function {called} raised {type(error).__name__}: {error}\n{place}"
            ) from error
        return _numbers(called, found, prompts, completions)

    reward.__name__ = called
    return reward


def _numbers(called: str, found: Any, prompts: list[Any], completions: list[str]) -> list[float]:
    if found is None or isinstance(found, str) or not hasattr(found, "__len__"):
        raise RewardError(
            f"reward function {called}: expected a list of {len(completions)} numbers, found "
            f"{type(found).__name__}"
        )
    if len(found) != len(completions):
        first_without = min(len(found), len(prompts) - 1)
        raise RewardError(
            f"reward function {called}: expected {len(completions)} rewards, one per completion, "
            f"found {len(found)}\n{_sample(first_without, prompts, completions)}"
        )
    rewards = []
    for index, value in enumerate(found):
        try:
            number = float(np.asarray(value, dtype=float))
        except (TypeError, ValueError):
            number = math.nan
        if not math.isfinite(number):
            raise RewardError(
                f"reward function {called}: expected a finite number, found {value!r}\n"
                + _sample(index, prompts, completions)
            )
        rewards.append(number)
    return rewards


def _culprit(
    reward_fn: RewardFn, prompts: list[Any], completions: list[str], columns: dict[str, Any]
) -> str:
    """The first sample that raises by itself."""
    count = len(completions)
    for index in range(count):
        one = {
            name: [value[index]] if _is_column(value, count) else value
            for name, value in columns.items()
        }
        try:
            reward_fn(prompts=[prompts[index]], completions=[completions[index]], **one)
        except Exception:
            return _sample(index, prompts, completions)
    return f"each of the {count} samples alone is accepted; the first is:\n" + _sample(
        0, prompts, completions
    )


def _is_column(value: Any, count: int) -> bool:
    return isinstance(value, list | tuple | np.ndarray) and len(value) == count


def _sample(index: int, prompts: list[Any], completions: list[str]) -> str:
    prompt, completion = f"{prompts[index]!r}", f"{completions[index]!r}"
    return f"sample {index}: prompt {_cut(prompt)}, completion {_cut(completion)}"


def _cut(text: str) -> str:
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}... ({len(text)} characters)"
