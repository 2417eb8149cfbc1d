# SPDX-License-Identifier: Apache-2.0
"""Reward functions in TRL's form, which stop the run and name the sample when they go wrong.

The host adds NaN as zero, takes an array of any length, reports a crash without its input, waits
for ever, and knows neither functions that abstain nor asynchronous ones.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import contextvars
import functools
import inspect
import math
import os
import queue
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from typing import Any

import numpy as np
from absl import logging

from ...data.images import to_rgb
from ...data.messages import split_thought
from ..hooks import around
from .context import current
from .prompts import IMAGE_COLUMNS

RewardFn = Callable[..., list[float | None]]
REWARDS = "rewards/"  # before the name of a function's metric
_SHOWN = 400  # characters of a prompt or completion in a message
WARN_AFTER = 60.0  # seconds
_LIMIT = "reward_timeout"


class RewardError(RuntimeError):
    """A reward function raised, or returned something that is not one number per completion."""


def checked(reward_fn: RewardFn) -> Callable[..., list[float]]:
    """`reward_fn(prompts, completions, **columns)`, its result checked, NaN for None.

    It gets the prompts and columns as the data set has them, images as PIL images, and of all that
    is offered only what its signature names, unless that ends in `**kwargs`. A completion has its
    prompt's form: a list of one message where that is a list of messages, or else a string. It may
    be asynchronous.

    Raises:
        RewardError: naming the function and the sample that caused it.
    """
    parameters = inspect.signature(reward_fn).parameters.values()
    takes_all = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters)
    names = {p.name for p in parameters}
    called = getattr(reward_fn, "__name__", type(reward_fn).__name__)
    # The host's own count the letters of a completion.
    of_host = (getattr(reward_fn, "__module__", None) or "").split(".")[0] == "tunix"
    call = Timed(reward_fn, called)

    @functools.wraps(reward_fn)
    def reward(prompts: list[Any], completions: list[str], **columns: Any) -> list[float]:
        context = current()
        if context is not None:
            prompts = prompts if context.prompts is None else context.prompts
            columns |= context.for_rewards
        said = completions
        if not of_host:
            said = [_answer(*pair) for pair in zip(prompts, completions, strict=True)]
        given = {"prompts": prompts, "completions": said, **columns}
        if not takes_all:
            given = {name: value for name, value in given.items() if name in names}
        try:
            given |= {name: _pictures(given[name]) for name in IMAGE_COLUMNS if name in given}
            # Lists of its own, so that one that sorts or empties them harms no other.
            copies = {n: list(v) if isinstance(v, list) else v for n, v in given.items()}
            with _same_folder(called):
                found = call(copies)
        except RewardTimeout as error:
            first = _sample(0, prompts, said)
            raise RewardError(
                f"{error}; it had {len(said)} completions, the first is:\n{first}"
            ) from error
        except (Exception, SystemExit) as error:
            message = f"reward function {called} raised {type(error).__name__}: {error}"
            culprit = _culprit(call, given, prompts, said)
            raise RewardError(f"{message}{_hint(error, said)}\n{culprit}") from error
        return _numbers(called, found, prompts, said)

    reward.__name__ = called
    return reward


@contextlib.contextmanager
def _same_folder(called: str) -> Iterator[None]:
    """Goes back to the current folder, which the paths of the run are relative to."""
    before = os.getcwd()
    try:
        yield
    finally:
        try:
            after = os.getcwd()
        except OSError:
            after = "one that is gone"
        if after != before:
            os.chdir(before)
            logging.log_first_n(
                logging.WARNING,
                "reward function %s changed the current folder to %s; the run goes back to %s.",
                1,
                *(called, after, before),
            )


def _answer(prompt: Any, completion: str) -> Any:
    """A completion in the form of its prompt."""
    if isinstance(prompt, str) or not isinstance(prompt, Sequence | np.ndarray):
        return completion
    if not len(prompt) or not all(isinstance(message, Mapping) for message in prompt):
        return completion
    thought, text = split_thought(completion)
    message = {"role": "assistant", "content": text}
    return [message | ({"reasoning_content": thought} if thought else {})]


def _pictures(cells: Any) -> Any:
    """A column of images, opened; what several completions share is opened once."""
    opened: dict[int, Any] = {}

    def one(cell: Any) -> Any:
        if cell is None or hasattr(cell, "getbands"):  # a PIL image already
            return cell
        if isinstance(cell, list | tuple):
            return [one(part) for part in cell]
        if id(cell) not in opened:
            opened[id(cell)] = to_rgb(cell)
        return opened[id(cell)]

    return [one(cell) for cell in cells]


def _call(reward_fn: RewardFn, given: dict[str, Any]) -> Any:
    """What the function returns, awaited if it is asynchronous."""
    found = reward_fn(**given)
    if not inspect.isawaitable(found):
        return found

    async def result() -> Any:
        return await found

    # In a thread of its own, because a notebook's has an event loop already.
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        return pool.submit(asyncio.run, result()).result()


def _hint(error: BaseException, completions: list[Any]) -> str:
    """What a function written for strings is told when it is given messages."""
    of_lists = isinstance(error, AttributeError | TypeError) and "list" in str(error)
    if of_lists and isinstance(completions[0], list):
        return (
            " (a completion is a list of one message here, because the prompt is a conversation: "
            'its text is completion[0]["content"])'
        )
    return ""


def _numbers(called: str, found: Any, prompts: list[Any], completions: list[Any]) -> list[float]:
    scalar = np.ndim(found) == 0 if isinstance(found, np.ndarray) else not hasattr(found, "__len__")
    if scalar or isinstance(found, str | bytes | Mapping | Set):
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
        if value is None:
            rewards.append(math.nan)
            continue
        number = _number(value)
        if not _is_finite(number):
            raise RewardError(
                f"reward function {called}: expected a finite number, or None to abstain, found "
                f"{value!r}\n{_sample(index, prompts, completions)}"
            )
        rewards.append(number)
    return rewards


def _number(value: Any) -> float:
    """The number that `value` is, NaN where it is none."""
    if isinstance(value, str | bytes) or np.ndim(value) or value is np.ma.masked:
        return math.nan
    if np.asarray(value).dtype.kind in "cmM":  # Complex numbers, dates, spans of time.
        return math.nan
    try:
        return float(np.asarray(value, dtype=float))
    except (TypeError, ValueError, OverflowError):
        return math.nan


def _is_finite(rewards: Any) -> Any:
    """Whether a step, which reckons in float32, has finite numbers for them."""
    with np.errstate(over="ignore"):
        return np.isfinite(np.asarray(rewards, np.float32))


def _culprit(
    call: Callable, given: dict[str, Any], prompts: list[Any], completions: list[Any]
) -> str:
    """The first sample that raises by itself, or does not return in time."""
    count = len(completions)
    for index in range(count):
        one = dict(given)
        for name, value in given.items():
            if isinstance(value, list | tuple | np.ndarray) and len(value) == count:  # a column
                one[name] = [value[index]]
        try:
            call(one)
        except (Exception, SystemExit):
            return _sample(index, prompts, completions)
    first = _sample(0, prompts, completions)
    return f"each of the {count} samples alone is accepted; the first is:\n{first}"


def _sample(index: int, prompts: list[Any], completions: list[Any]) -> str:
    prompt, completion = f"{prompts[index]!r}", f"{completions[index]!r}"
    return f"sample {index}: prompt {_cut(prompt)}, completion {_cut(completion)}"


def _cut(text: str) -> str:
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}... ({len(text)} characters)"


# ---- How long a function may take.


class RewardTimeout(RuntimeError):
    """A reward function did not return in time."""


def limited(reward_fn: Callable[..., Any], seconds: float) -> Callable[..., Any]:
    """`reward_fn`, which may take so long for a batch."""

    reward = functools.update_wrapper(functools.partial(reward_fn), reward_fn)
    # An object that is called need not have a name.
    reward.__name__ = getattr(reward_fn, "__name__", type(reward_fn).__name__)
    setattr(reward, _LIMIT, seconds)
    return reward


class Timed:
    """Calls a reward function, which is `called` so in messages.

    With a limit, of `limited`, it runs in a thread of its own, the same for all calls, which is
    left behind when it does not return: Python cannot end it. Without one it runs in the caller's.
    """

    def __init__(self, reward_fn: RewardFn, called: str):
        self._function, self._called = reward_fn, called
        self._limit: float | None = getattr(reward_fn, _LIMIT, None)
        self._work: queue.SimpleQueue | None = None

    def __call__(self, given: dict[str, Any]) -> Any:
        """What the function returns or raises.

        Raises:
            RewardTimeout: if it does neither in time.
        """
        text = "reward function %s has not returned for %.0f seconds; "
        text += "reward_timeout would end the run."
        timer = threading.Timer(WARN_AFTER, logging.warning, (text, self._called, WARN_AFTER))
        timer.daemon = True
        timer.start()
        try:
            if self._limit is None:
                return _call(self._function, given)
            return self._in_time(given)
        finally:
            timer.cancel()

    def _in_time(self, given: dict[str, Any]) -> Any:
        if self._work is None:
            self._work = queue.SimpleQueue()
            threading.Thread(target=_serve, args=(self._work,), daemon=True).start()
        answer = concurrent.futures.Future()
        self._work.put((contextvars.copy_context(), self._function, given, answer))
        concurrent.futures.wait([answer], self._limit)
        if not answer.done():
            self._work = None  # Its thread is busy.
            raise RewardTimeout(
                f"reward function {self._called} did not return within "
                f"reward_timeout={self._limit:g} seconds"
            )
        return answer.result()


def _serve(work: queue.SimpleQueue) -> None:
    while True:
        context, function, given, answer = work.get()
        try:
            answer.set_result(context.run(_call, function, given))
        except BaseException as error:
            answer.set_exception(error)


# ---- Of several functions, some of which abstain.


@around
def wrap_reward_manager(original, self, prompts: list, completions: list, **columns) -> dict:
    """A reward function may abstain.

    Then it has no part in the host's sum.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # rows without any number
        info = original(self, prompts, completions, **columns)
    log = info["log_metrics"]
    names = [f"{REWARDS}{fn.__name__}" for fn in self.reward_fns]
    matrix = np.stack([np.asarray(log[name][0], float) for name in names], axis=1)
    if not np.isnan(matrix).any():
        return info
    abstained = np.isnan(matrix).all(axis=1)
    # A sum of nothing would be a reward of 0.
    total = np.where(abstained, np.nan, np.nansum(matrix, axis=1))
    rows = {
        "sum": total,
        "mean": total / np.maximum((~np.isnan(matrix)).sum(axis=1), 1),
        "min": np.fmin.reduce(matrix, axis=1),
        "max": np.fmax.reduce(matrix, axis=1),
    }
    log |= {f"rewards/{name}": (values, _nan_mean) for name, values in rows.items()}
    log |= {name: (log[name][0], _nan_mean) for name in names}
    return info | {"rewards": total, "log_metrics": log}


def require_sums(rewards: np.ndarray) -> None:
    """Raises RewardError for a sum of rewards that is not finite as float32; NaN is no reward."""
    bad = ~(_is_finite(rewards) | np.isnan(rewards))
    if bad.any():
        index = int(np.argmax(bad))
        raise RewardError(
            f"sample {index}: the reward functions add up to {rewards[index]:g}, which is not "
            "finite as float32; scale them down"
        )


def without_spread(group: np.ndarray) -> bool:
    """Whether the rewards of a group are the same, as float32 tells numbers apart."""
    if len(group) < 2:
        return True
    return bool(np.ptp(group) <= np.finfo(np.float32).eps * np.abs(group).max())


def _nan_mean(values: np.ndarray) -> float:
    """The mean of what there is; 0 where there is nothing."""
    kept = values[~np.isnan(values)]
    return float(kept.mean()) if kept.size else 0.0


def without_abstained(rewards: np.ndarray, groups: bool) -> np.ndarray:
    """Rewards for the host's own metrics, in which NaN would spread.

    The completions that every function abstained on get the mean of the others, which leaves mean,
    least and greatest as they are; advantages leave them out, see `wrap_get_advantage_estimator`.

    Rewards are [B], NaN where all abstained; `groups`: completions are compared within such.
    """
    abstained = np.isnan(rewards)
    context = current()
    if context is not None:
        context.record.abstained = abstained if abstained.any() else None
    if not abstained.any():
        return rewards
    if abstained.all():
        logging.warning(
            "No reward function gave any of %d completions a number: nothing is learnt from them.",
            len(rewards),
        )
    if not groups:
        raise RewardError(
            f"sample {int(np.argmax(abstained))}: every reward function returned None, and this "
            "learner has no group of completions to leave it out of; let one return a number"
        )
    return np.where(abstained, _nan_mean(rewards), rewards)


@around
def wrap_get_advantage_estimator(original, name: str) -> Callable:
    """Completions that no reward function judged have advantage 0 and leave the others alone.

    They are left out of their groups.
    """
    estimator = original(name)

    @functools.wraps(estimator)
    def estimate(*args: Any, **kwargs: Any) -> Any:
        context = current()
        if args or kwargs.keys() != {"rewards", "num_generations"}:
            return estimator(*args, **kwargs)
        left_out = np.isnan(kwargs["rewards"])
        # The host gets the others' mean in their place: see `without_abstained`.
        if context is not None and context.record.abstained is not None:
            left_out = left_out | context.record.abstained
        if not left_out.any():
            return estimator(**kwargs)
        rewards = np.asarray(kwargs["rewards"], float)
        advantages = np.zeros_like(rewards)
        for group in np.arange(rewards.size).reshape(-1, kwargs["num_generations"]):
            kept = group[~left_out[group]]
            if len(kept) > 1:
                advantages[kept] = estimator(rewards=rewards[kept], num_generations=len(kept))
        return advantages

    return estimate
