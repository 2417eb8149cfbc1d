# SPDX-License-Identifier: Apache-2.0
"""The forms in which data sets write a conversation, made one."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

_ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "model": "assistant",
    "gpt": "assistant",
}
_IMAGE_KEYS = ("image", "path", "url", "bytes", "image_url")
_FORMS = (
    "a list of messages, or an object with 'messages', with 'conversations' (from, value), or "
    "with 'prompt' and 'completion'"
)


@dataclasses.dataclass(frozen=True)
class Conversation:
    """Messages as a chat template takes them, and what it does not take.

    Attributes:
        messages: `role` (system, user or assistant) and `content`, a string or a list of parts;
            image parts carry no image.
        images: one for each image part, in order.
        trained: for each assistant message, whether it is to be learnt.
    """

    messages: list[dict[str, Any]]
    images: list[Any]
    trained: list[bool]


def read_conversation(row: Any, *, prompt_only: bool = False) -> Conversation:
    """Reads any of the accepted forms.

    Images stand in their parts (`image`, `path`, `url` of a file, `bytes`), or beside the messages
    in `images` or `image`: there they fill the parts that lack one in order, or, where there is
    no image part at all, precede the first user message.

    Args:
        row: see `_FORMS`.
        prompt_only: leave out the completion, and refuse a conversation that ends in an answer.
    """
    given, history, completion = _forms(row)
    if prompt_only:
        completion = []
    images = _Images(_beside(row))
    messages = [images.place(message) for message in (*history, *completion)]
    if images.beside and not images.parts:
        _put_first(messages, len(images.beside))
        images.found = images.beside
    elif images.used != len(images.beside):
        raise ValueError(
            f"{len(images.beside)} images are given beside the messages, which have "
            f"{images.used} image parts without an image of their own; there must be one for each"
        )
    if not messages:
        raise ValueError("the conversation is empty; expected at least one message")
    for index, message in enumerate(messages):
        if message["role"] == "assistant" and not _text(message["content"]).strip():
            raise ValueError(
                f"message {index}: the assistant turn is empty; give it a text or remove it"
            )
    if prompt_only and messages[-1]["role"] == "assistant":
        raise ValueError(
            "add_generation_prompt=True asks for an answer, and the conversation ends in one "
            "already; leave its last assistant message out"
        )
    first_trained = len(history) if given == "prompt" else 0
    trained = [
        index >= first_trained
        for index, message in enumerate(messages)
        if message["role"] == "assistant"
    ]
    return Conversation(messages, images.found, trained)


def _forms(row: Any) -> tuple[str, list[dict], list[dict]]:
    """The form's name, its messages, and those of a separate completion."""
    if _is_list(row):
        return "messages", _messages(row), []
    if not isinstance(row, Mapping):
        raise ValueError(f"expected {_FORMS}, found {type(row).__name__}")
    if row.get("tools"):
        raise ValueError("'tools' are not supported yet; remove them")
    for name in ("messages", "conversations"):
        if row.get(name) is not None:
            if not _is_list(row[name]):
                found = type(row[name]).__name__
                raise ValueError(f"{name!r}: expected a list of messages, found {found}")
            return name, _messages(row[name], split_images=_beside(row) != []), []
    if row.get("prompt") is None:
        raise ValueError(f"expected {_FORMS}, found an object with {sorted(row)}")
    sides = []
    for name, role in (("prompt", "user"), ("completion", "assistant")):
        side = row.get(name)
        if side is None:
            side = []
        sides.append(_messages([{"role": role, "content": side}] if not _is_list(side) else side))
    return "prompt", *sides


def _is_list(value: Any) -> bool:
    # Parquet readers give lists as arrays of objects.
    return isinstance(value, list | tuple) or (
        isinstance(value, np.ndarray) and value.dtype == object
    )


def _beside(row: Any) -> list[Any]:
    """The images of the row's columns `images` and `image`."""
    if not isinstance(row, Mapping):
        return []
    images = row.get("images")
    images = [] if images is None else list(images) if _is_list(images) else [images]
    return images if row.get("image") is None else [*images, row["image"]]


def _messages(messages: Sequence[Any], *, split_images: bool = False) -> list[dict[str, Any]]:
    return [
        _message(message, f"message {index}", split_images)
        for index, message in enumerate(messages)
    ]


def _message(message: Any, place: str, split_images: bool) -> dict[str, Any]:
    """`role` and `content`; the parts keep their images."""
    if not isinstance(message, Mapping):
        raise ValueError(
            f"{place}: expected an object with 'role' and 'content', found {message!r:.80}"
        )
    sharegpt = "from" in message
    role = message.get("from" if sharegpt else "role")
    if role not in _ROLES:
        hint = "; tool turns are not supported yet" if role in ("tool", "function") else ""
        raise ValueError(
            f"{place}: there is no role {role!r}; expected system, developer, user, assistant or "
            f"model{hint}"
        )
    if message.get("tool_calls"):
        raise ValueError(f"{place}: 'tool_calls' are not supported yet; remove them")
    content = message.get("value" if sharegpt else "content")
    if isinstance(content, str):
        # ShareGPT marks the place of an image by a word of its own.
        if sharegpt and split_images and "<image>" in content:
            content = _at_marks(content)
    elif _is_list(content):
        content = [_part(part, place) for part in content]
    else:
        raise ValueError(
            f"{place}: expected its content to be a string or a list of parts, found "
            f"{type(content).__name__}"
        )
    result = {"role": _ROLES[role], "content": content}
    for key in ("reasoning", "reasoning_content"):
        if isinstance(message.get(key), str):
            result[key] = message[key]
    return result


def _at_marks(content: str) -> list[dict[str, Any]]:
    parts: list[dict[str, Any]] = []
    for index, text in enumerate(content.split("<image>")):
        if index:
            parts.append({"type": "image"})
        if text.strip():
            parts.append({"type": "text", "text": text.strip()})
    return parts


def _part(part: Any, place: str) -> dict[str, Any]:
    """One part, its image (if it is one and has one) under `image`."""
    if isinstance(part, str):
        return {"type": "text", "text": part}
    if not isinstance(part, Mapping):
        raise ValueError(f"{place}: expected each part to be an object, found {part!r:.80}")
    kind = part.get("type")
    if kind == "text":
        if not isinstance(part.get("text"), str):
            raise ValueError(f"{place}: a text part needs a string 'text', found {part!r:.80}")
        return {"type": "text", "text": part["text"]}
    if kind in ("image", "image_url"):
        for key in _IMAGE_KEYS:
            image = part.get(key)
            if image is not None:
                is_url = key == "image_url" and isinstance(image, Mapping)
                return {"type": "image", "image": image["url"] if is_url else image}
        return {"type": "image"}
    if kind in ("audio", "input_audio", "video", "video_url"):
        raise ValueError(f"{place}: {kind!r} parts are not supported; supported: text and image")
    raise ValueError(f"{place}: unknown part type {kind!r}; expected 'text' or 'image'")


class _Images:
    """Takes the images out of messages, filling parts without one from those beside."""

    def __init__(self, beside: list[Any]):
        self.beside, self.found = beside, []
        self.used = self.parts = 0

    def place(self, message: dict[str, Any]) -> dict[str, Any]:
        if isinstance(message["content"], str):
            return message
        return message | {"content": [self._strip(part) for part in message["content"]]}

    def _strip(self, part: dict[str, Any]) -> dict[str, Any]:
        if part["type"] != "image":
            return part
        self.parts += 1
        if "image" in part:
            self.found.append(part["image"])
        else:
            if self.used < len(self.beside):
                self.found.append(self.beside[self.used])
            elif not self.beside:
                raise ValueError(
                    'an image part without an image; give it in the part, as {"type": "image", '
                    "\"image\": path}, or in a list 'images' beside the messages"
                )
            self.used += 1
        return {"type": "image"}


def _put_first(messages: list[dict[str, Any]], count: int) -> None:
    """Puts `count` image parts before the first user message's text."""
    for message in messages:
        if message["role"] == "user":
            content = message["content"]
            if isinstance(content, str):
                content = [{"type": "text", "text": content}]
            message["content"] = [{"type": "image"}] * count + content
            return
    raise ValueError(f"{count} images are given and there is no user message to hold them")


def _text(content: str | list[dict[str, Any]]) -> str:
    if isinstance(content, str):
        return content
    return "".join(part["text"] for part in content if part["type"] == "text")
