# SPDX-License-Identifier: Apache-2.0
"""The keys of a row that data sets of other tools give a meaning: read, or refused by name.

docs/how-to/data.md lists them with the tools they come from; every other key is a column.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, TypeGuard

import numpy as np

# Where the conversation may stand: the first that says something counts, others are columns.
CONVERSATIONS = ("messages", "conversations", "conversation")
# A prompt on its own, and the words for one that are so common that an answer must stand beside.
PROMPTS = ("prompt", "instruction")
PROMPTS_WITH_ANSWER = ("query", "question", "problem", "input")
ANSWERS = ("completion", "response", "output", "answer")
# The better and the worse answer of preferences.
CHOSEN = ("chosen", "chosen_response", "preferred_output")
REJECTED = ("rejected", "rejected_response", "non_preferred_output", "rejected_messages")
SYSTEMS = ("system", "system_prompt")
TOOLS = ("tools", "functions")
IMAGES = ("images", "image")
# Types of a message's parts that are images, and keys of an object that may hold an image.
IMAGE_PARTS = ("image", "image_url", "input_image")
IMAGE_KEYS = ("image", "bytes", "base64", "data", "path", "url", "image_url", "source")
TEMPLATE = ("chat_template_kwargs", "enable_thinking")

# What the template writes around a conversation's messages. These are never columns.
BESIDE = (*SYSTEMS, *TOOLS, *TEMPLATE, "history")
# What has a meaning here. Answers are columns all the same: they are no part of a prompt.
CONSUMED = (*CONVERSATIONS, *PROMPTS, *BESIDE, *IMAGES, "rejected_images")


def is_list(value: Any) -> TypeGuard[Sequence[Any]]:
    """Whether it is a list; parquet readers give lists as arrays of objects."""
    return isinstance(value, list | tuple) or (
        isinstance(value, np.ndarray) and value.dtype == object
    )


def is_empty(value: Any) -> bool:
    """Whether a key says nothing: readers of tables fill missing keys with such values."""
    return is_blank(value) or ((isinstance(value, Mapping) or is_list(value)) and len(value) == 0)


def is_blank(value: Any) -> bool:
    """Whether it is nothing at all or an empty string: a cell of a table without a value."""
    return is_null(value) or (isinstance(value, str) and not value)


def is_null(value: Any) -> bool:
    """Whether it is nothing at all: None or NaN."""
    return value is None or (isinstance(value, float | np.floating) and value != value)


def walk(value: Any) -> Iterator[tuple[tuple, Any]]:
    """Every value in lists and objects in each other, in order, with its path."""
    parts: list[tuple[tuple, Any]] = [((), value)]
    while parts:
        path, value = parts.pop()
        yield path, value
        inner = enumerate(value) if isinstance(value, list | tuple) else ()
        inner = value.items() if isinstance(value, Mapping) else inner
        parts += reversed([((*path, key), part) for key, part in inner])


def first_of(row: Mapping[str, Any], names: Collection[str]) -> str | None:
    """The first of `names` that says something; where none does, the first that is no null."""
    there = [name for name in names if not is_null(row.get(name))]
    return next((name for name in there if not is_empty(row[name])), there[0] if there else None)


def one_of(row: Mapping[str, Any], names: Collection[str]) -> str | None:
    """The one of several words for one thing that the row has: `first_of` that allows no second.

    Raises:
        ValueError: where two of them say different things, of which one would be lost.
    """
    found = first_of(row, names)
    for name in names:
        if found and not is_empty(row.get(name)) and repr(row[name]) != repr(row[found]):
            raise ValueError(f"{found!r} and {name!r} mean the same and differ; keep one of them")
    return found


def image_in(value: Any) -> Any:
    """An image without the objects around it: `{"bytes", "path"}`, `{"url"}`, `{"image"}`, ...

    Raises:
        ValueError: for an object that holds none.
    """
    while isinstance(value, Mapping):
        key = first_of(value, IMAGE_KEYS)
        if key is None:
            raise ValueError(
                f"expected an object with 'url', 'path', 'bytes' or another of {IMAGE_KEYS}, "
                f"found {value!r:.80}"
            )
        value = value[key]
    return value


def _given(row: Mapping[str, Any], key: str) -> bool:
    value = row[key]
    return not is_empty(value) and not (isinstance(value, np.ndarray) and value.size == 0)


def _is_grounding(row: Mapping[str, Any], key: str) -> bool:
    value = row[key]
    return isinstance(value, Mapping) and any(not is_empty(value.get(n)) for n in ("ref", "bbox"))


def _is_feedback(row: Mapping[str, Any], key: str) -> bool:
    return isinstance(row[key], bool | np.bool_)


def _are_steps(row: Mapping[str, Any], key: str) -> bool:
    return _given(row, key) and any(not is_empty(row.get(n)) for n in ("completions", "input_ids"))


def _are_segments(row: Mapping[str, Any], key: str) -> bool:
    value = row[key]
    return is_list(value) and len(value) > 0 and isinstance(value[0], Mapping)


_MEDIA = "is not supported: images are; remove the row, or the key where it means nothing"
_KTO = "is feedback on one answer (KTO), which is not supported; keep the good rows, remove the key"
_TOKENS = "is of rows that are tokenized already, which are not read; give the conversation"
# Key: when it has its meaning, and what is said of it.
REFUSED: dict[str, tuple[Callable[[Mapping[str, Any], str], bool], str]] = {
    **dict.fromkeys(("videos", "video", "audios", "audio"), (_given, _MEDIA)),
    **dict.fromkeys(("rejected_videos", "rejected_audios"), (_given, _MEDIA)),
    "rejected_tools": (_given, "is not supported: both answers have the tools of the prompt"),
    "objects": (_is_grounding, "is not supported: write boxes and names into the texts"),
    **dict.fromkeys(("label", "kto_tag"), (_is_feedback, _KTO)),
    "labels": (_are_steps, "are of single steps or tokens, which is not supported; remove them"),
    "input_ids": (_given, _TOKENS),
    "segments": (_are_segments, "are not supported; give the conversation as messages"),
}


def refuse(row: Mapping[str, Any], names: Collection[str] = ()) -> None:
    """Raises ValueError for a key that would change what is trained and is not read.

    `names` are columns whatever they mean elsewhere: a reward function asks for them.
    """
    for key, (applies, why) in REFUSED.items():
        if key in row and key not in names and applies(row, key):
            raise ValueError(f"{key!r} {why}")


def columns(
    row: Mapping[str, Any], consumed: Collection[str], names: Collection[str]
) -> dict[str, Any]:
    """What is left of a row: every key that was not `consumed`, and `names` all the same.

    A key of another form is a column, unless it is empty.
    """
    return {
        key: value
        for key, value in row.items()
        if key in names or (key not in consumed and not (key in CONSUMED and is_empty(value)))
    }
