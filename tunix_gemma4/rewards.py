# SPDX-License-Identifier: Apache-2.0
"""Reward functions with TRL's signature: `f(prompts, completions, **columns)` gives a list.

A completion is a string, or, where the prompt is a conversation, a list of one message; a column is
a list with one value per completion. A function names the columns that it reads. The list holds a
number per completion, or None to abstain. The run checks it: see `plugin.rl.rewards.checked`.
"""

from __future__ import annotations

import ast
import functools
import importlib
import importlib.util
import inspect
import math
import numbers
import re
from collections.abc import Callable, Mapping, Sequence
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

RewardFn = Callable[..., Sequence[float | None]]
Column = Sequence[Any]
Answers = Column | None

_DIGITS = r"(?:[0-9][0-9,]*(?:\.[0-9]+)?|\.[0-9]+)"
_POWER = r"(?:[eE][-+]?[0-9]{1,3}(?!\.?[0-9]))?"
_NUMBER = re.compile(rf"[-+]?{_DIGITS}{_POWER}(?:/{_DIGITS})*")
_FINAL = re.compile(rf"####\s*([-+]?[0-9.,]+{_POWER}(?:/{_DIGITS})*)")
_LONGEST_NUMBER = 100  # characters; a policy may write digits without end


def completion_text(completion: str | Sequence[Mapping[str, Any]]) -> str:
    """The text of a completion, whether that is a string or a list of messages."""
    if isinstance(completion, str):
        return completion
    return "".join(message["content"] for message in completion)


def _texts(completions: Column) -> list[str]:
    return [completion_text(completion) for completion in completions]


def _scores(completions: Column, read: Callable[[str], Any], wanted: Column) -> list[float]:
    """1 where what is read of a completion is what is wanted."""
    pairs = zip(_texts(completions), wanted, strict=True)
    return [float(read(said) == right) for said, right in pairs]


# ---- Whether the answer is right. Each reads the column `answer`, or else `solution`.


def exact_answer(
    prompts: Column, completions: Column, answer: Answers = None, solution: Answers = None
) -> list[float]:
    """1 where the completion is the answer to the letter, but for space around it."""
    wanted = _wanted(answer, solution, lambda right: str(right).strip())
    return _scores(completions, str.strip, wanted)


def numeric_answer(
    prompts: Column, completions: Column, answer: Answers = None, solution: Answers = None
) -> list[float]:
    """1 where the completion's number equals the answer's.

    The number is the last one behind `####`, as GSM8K writes it, or else the last of the text;
    thousands may have commas, and 42, 42.0, $42, 4.2e1 and 84/2 are the same.
    """
    wanted = _wanted(answer, solution, _number_of)
    return _scores(completions, read_number, wanted)


def _number_of(right: Any) -> Fraction:
    written = _written(str(right))
    if written is not None and len(written) > _LONGEST_NUMBER:
        raise ValueError(
            f"the number in the answer {right!r:.80} has {len(written)} characters; expected at "
            f"most {_LONGEST_NUMBER}"
        )
    number = read_number(str(right))
    if number is None:
        raise ValueError(f"there is no number in the answer {right!r:.80}")
    return number


def read_number(text: str) -> Fraction | None:
    """The number that a solution ends in, exactly; None if there is none."""
    written = _written(text)
    if written is None or len(written) > _LONGEST_NUMBER:
        return None
    *above, last = [Fraction(part) for part in written.replace(",", "").split("/")]
    # 1/2/2024 is no fraction, and neither is 1/0.
    return above[0] / last if len(above) == 1 and last else last


def _written(text: str) -> str | None:
    """The number that a solution ends in as it stands there."""
    text = text.replace("$", "").replace("\N{MINUS SIGN}", "-")
    finals = _FINAL.findall(text)
    found = _NUMBER.findall(finals[-1] if finals else _separated(text))
    return found[-1] if found else None


def _separated(text: str) -> str:
    """`text` where a sign or comma between numbers is no part of them: 3-4, (1, 2)."""
    text = re.sub(r"(?<=[\w)])(?<![0-9][eE])[-+](?=[0-9.])", " ", text)
    return re.sub(r",(?![0-9]{3}(?![0-9]))", " ", text)


def multiple_choice(
    prompts: Column, completions: Column, answer: Answers = None, solution: Answers = None
) -> list[float]:
    """1 where the completion chooses the answer's letter.

    That is a capital letter A to J that stands alone, the first behind the last word "answer" or,
    where there is none, the first of all: "B", "(B)", "B. Paris", "The answer is B."
    """
    wanted = _wanted(answer, solution, _letter_of)
    return _scores(completions, read_choice, wanted)


def _letter_of(right: Any) -> str:
    letter = read_choice(str(right))
    if letter is None:
        raise ValueError(f"there is no letter A to J in the answer {right!r:.80}")
    return letter


def read_choice(text: str) -> str | None:
    """The letter that an answer to a multiple-choice question gives; None if there is none."""
    behind = re.split("answer", text, flags=re.IGNORECASE)[-1]
    for part in (behind, text):
        # "A" and "I" are words where others follow without a mark.
        chosen = re.search(r"(?<![A-Za-z'])(?:[B-HJ]|[AI](?!\s+[a-z]))(?![A-Za-z'])", part)
        if chosen:
            return chosen[0]
    return None


def _wanted(answer: Answers, solution: Answers, read: Callable[[Any], Any]) -> list[Any]:
    """What `read` makes of each answer, which is a text or a number; all rewards take theirs here.

    Raises:
        ValueError: an answer is neither, or is empty, or `read` refuses it; says which.
    """
    name, column = ("solution", solution) if answer is None else ("answer", answer)
    if column is None:
        raise ValueError("the data has neither a column 'answer' nor 'solution'")
    wanted = []
    for index, right in enumerate(column):
        is_text = isinstance(right, str) and right.strip()
        is_number = isinstance(right, numbers.Real | Decimal) and right - right == 0
        if not is_text and not is_number:
            raise ValueError(
                f"sample {index}: {name!r}: expected a text or a finite number, found {right!r:.80}"
            )
        try:
            wanted.append(read(right))
        except ValueError as error:
            raise ValueError(f"sample {index}: {name!r}: {error}") from error
    return wanted


# ---- How the answer is written.


def final_answer_format(prompts: Column, completions: Column) -> list[float]:
    """1 where the last line is `####` and a number."""
    pattern = re.compile(r"(?:^|\n)#### ?\$?[-+]?[\d.,]*\d(?:[eE][-+]?\d+)?(?:/\d+)?\s*$")
    return [float(pattern.search(said) is not None) for said in _texts(completions)]


def matches(pattern: str) -> RewardFn:
    """1 where the whole completion, but for space around it, matches the regular expression."""
    try:
        compiled = re.compile(pattern, re.DOTALL)
    except re.error as error:
        raise ValueError(f"pattern={pattern!r}: not a regular expression ({error})") from error

    def matches(prompts: Column, completions: Column) -> list[float]:
        return [float(compiled.fullmatch(said.strip()) is not None) for said in _texts(completions)]

    return matches


def soft_overlong(max_length: int, buffer: int) -> RewardFn:
    """A penalty for length: 0 up to `max_length - buffer` characters, then down to -1.

    Args:
        max_length: characters from which on it is -1.
        buffer: characters over which it falls.
    """
    if not 0 < buffer <= max_length < math.inf:
        raise ValueError(
            f"soft_overlong: expected 0 < buffer <= max_length, found buffer={buffer}, "
            f"max_length={max_length}"
        )

    def soft_overlong(prompts: Column, completions: Column) -> list[float]:
        over = [len(said) - (max_length - buffer) for said in _texts(completions)]
        return [-min(max(excess / buffer, 0.0), 1.0) for excess in over]

    return soft_overlong


# ---- By name.

PLAIN = {
    function.__name__: function
    for function in (exact_answer, numeric_answer, multiple_choice, final_answer_format)
}
WITH_ARGUMENTS = {function.__name__: function for function in (matches, soft_overlong)}


def load_reward(spec: str) -> RewardFn:
    """The reward function that a setting names.

    Args:
        spec: "numeric_answer", "soft_overlong(max_length=1200, buffer=300)",
            "package.module:function" or "path/to/file.py:function".

    Raises:
        ValueError: what is unknown or missing, and what there is.
    """
    if spec in PLAIN:
        return PLAIN[spec]
    if "(" in spec and spec.endswith(")") and spec.split("(")[0].strip().isidentifier():
        return _called(spec)
    if spec in WITH_ARGUMENTS:
        raise ValueError(f"{spec!r} needs arguments: {_form(spec)}")
    place, separator, name = spec.rpartition(":")
    if not separator or not place or not name.isidentifier():
        raise ValueError(
            f"there is no reward function {spec!r}; there are {', '.join(PLAIN)}, "
            f"{', '.join(WITH_ARGUMENTS)} with arguments, and your own as package.module:function "
            "or path/to/file.py:function"
        )
    module: Any = _module(place)
    if name not in vars(module):
        functions = [key for key, value in vars(module).items() if inspect.isfunction(value)]
        raise ValueError(f"{place}: it has no {name!r}; its functions are {', '.join(functions)}")
    function: RewardFn = getattr(module, name)
    if not callable(function) or inspect.isclass(function):
        kind = "a class" if inspect.isclass(function) else type(function).__name__
        raise ValueError(
            f"{spec!r}: expected a function, or an object that is called, found {kind}"
        )
    return function


def source_files(specs: Sequence[str]) -> dict[str, Path]:
    """The file that each function of your own stands in, by what names it."""
    files = {}
    for spec in specs:
        place, separator, _ = spec.rpartition(":")
        if not separator or "(" in place:
            continue
        # A module of C, or of a namespace, has none.
        file = place if place.endswith(".py") else getattr(_module(place), "__file__", None)
        if file is not None:
            files[spec] = Path(file)
    return files


def _called(spec: str) -> RewardFn:
    """`name(key=value, ...)`, with literal values."""
    try:
        call = ast.parse(spec, mode="eval").body
        if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name):
            raise ValueError("no call of a name")
        name = call.func.id
        arguments = {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in call.keywords}
    except (SyntaxError, ValueError) as error:
        raise ValueError(f"{spec!r}: expected name(key=value, ...)") from error
    if name not in WITH_ARGUMENTS:
        raise ValueError(
            f"{spec!r}: {name} takes no arguments here; those that do are "
            f"{', '.join(WITH_ARGUMENTS)}"
        )
    maker = WITH_ARGUMENTS[name]
    if call.args or arguments.keys() != inspect.signature(maker).parameters.keys():
        raise ValueError(f"{spec!r}: expected {_form(name)}")
    try:
        return maker(**arguments)
    except TypeError as error:
        raise ValueError(f"{spec!r}: an argument is of another kind ({error})") from error


def _form(name: str) -> str:
    parameters = inspect.signature(WITH_ARGUMENTS[name]).parameters
    return f"{name}({', '.join(f'{parameter}=...' for parameter in parameters)})"


def _module(place: str) -> Any:
    path = Path(place)
    if place.endswith(".py") and not path.is_file():
        raise ValueError(f"{path}: there is no such file (current folder: {Path.cwd()})")
    try:
        if not place.endswith(".py"):
            return importlib.import_module(place)
        module_spec = importlib.util.spec_from_file_location(path.stem, path)
        if module_spec is None or module_spec.loader is None:
            raise ImportError("nothing loads it")
        module = importlib.util.module_from_spec(module_spec)
        module_spec.loader.exec_module(module)
        return module
    except (Exception, SystemExit) as error:  # Whatever the file does when it is run.
        raise ValueError(f"{place}: cannot be imported: {type(error).__name__}: {error}") from error


def weighted(reward_fn: RewardFn, weight: float) -> RewardFn:
    """`weight` times the function's rewards, under its name and with its signature."""

    def scaled(found: Any) -> Any:
        # What is no list is left to the check, which names it.
        if isinstance(found, str | Mapping) or not hasattr(found, "__len__"):
            return found
        return [None if value is None else weight * value for value in found]

    async def later(found: Any) -> Any:
        return scaled(await found)

    @functools.wraps(reward_fn)
    def reward(*args: Any, **columns: Any) -> Any:
        found = reward_fn(*args, **columns)
        return later(found) if inspect.isawaitable(found) else scaled(found)

    # An object that is called need not have a name.
    reward.__name__ = getattr(reward_fn, "__name__", type(reward_fn).__name__)
    return reward
