# SPDX-License-Identifier: Apache-2.0
"""The keys of a row that data sets of other tools give a meaning: read, or refused by name.

docs/how-to/data.md lists them with the tools they come from; every other key is a column.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import numpy as np

# Where the conversation may stand, the first that is there counting.
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
# Types of a message's parts that are images.
IMAGE_PARTS = ("image", "image_url", "input_image")
TEMPLATE = ("chat_template_kwargs", "enable_thinking")

# What is read here and is no column. Answers are columns: they are no part of a prompt.
CONSUMED = (
    *CONVERSATIONS,
    *PROMPTS,
    *SYSTEMS,
    *TOOLS,
    *IMAGES,
    *TEMPLATE,
    *("history", "rejected_images"),
)


def is_list(value: Any) -> bool:
    """Whether it is a list; parquet readers give lists as arrays of objects."""
    return isinstance(value, list | tuple) or (
        isinstance(value, np.ndarray) and value.dtype == object
    )


def is_empty(value: Any) -> bool:
    """Whether a key says nothing: readers of tables fill missing keys with such values."""
    if value is None or (isinstance(value, float) and value != value):
        return True
    return isinstance(value, str | list | tuple | Mapping) and len(value) == 0


def first_of(row: Mapping[str, Any], names: Collection[str]) -> str | None:
    """The first of `names` that the row has a value for."""
    return next((name for name in names if row.get(name) is not None), None)


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

    Args:
        row: of any form.
        names: keys that are columns whatever they mean elsewhere: a reward function asks for them.
    """
    for key, (applies, why) in REFUSED.items():
        if key in row and key not in names and applies(row, key):
            raise ValueError(f"{key!r} {why}")


def columns(row: Mapping[str, Any], consumed: Collection[str]) -> dict[str, Any]:
    """What is left of a row once `consumed` is taken out."""
    return {key: value for key, value in row.items() if key not in consumed}
