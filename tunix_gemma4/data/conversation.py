# SPDX-License-Identifier: Apache-2.0
"""What training takes of a row: a conversation to learn or to go on with, or two that compete.

row -> Row -> Conversation (supervised: `read_conversation`; to go on with: `read_prompt`; with a
better and a worse answer: `read_preference_pair`)
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from . import keys
from .keys import first_of, is_empty, is_list, one_of
from .messages import ROLES, Message, answer_of_text, join, read_messages
from .rows import (
    PROMPTS,
    TURN,
    Conversation,
    Row,
    form_of,
    read_row,
    templated_parts,
    text_of,
    with_default_system,
    with_system,
    without_bos,
)

__all__ = ["Conversation", "read_conversation", "read_preference_pair", "read_prompt"]


def read_conversation(row: Any, *, prompt_only: bool = False) -> Conversation:
    """Reads a row to learn from, or, with `prompt_only`, to go on with.

    Images stand in their parts, or beside the messages in `images` or `image`: there they fill the
    parts that lack one or the marks (such as `<image>`) in order, or, where there is neither,
    precede the first user message.

    Args:
        row: of any form of docs/how-to/data.md.
        prompt_only: leave out the completion, and refuse a conversation that ends in an answer.

    Raises:
        ValueError: saying what cannot be read, or is not supported.
    """
    read = read_row(row, asked=prompt_only)
    history, completion = read.messages, read.completion or []
    if prompt_only:
        if history and history[-1].role == "assistant":
            raise ValueError(
                "add_generation_prompt=True asks for an answer, and the conversation ends in one "
                "already; leave its last assistant message out"
            )
    elif not completion and (not history or history[-1].role != "assistant"):
        _refuse_preference(read)
    # In a prompt a switch has the last word: what is not learnt by itself may be asked for.
    trained = [read.whole or bool(message.trained) for message in history]
    if prompt_only:
        trained = [False] * len(history)
    conversation = read.view([*history, *completion], trained + [not prompt_only] * len(completion))
    if prompt_only:
        conversation = conversation.before(len(join(history)))
    elif completion:
        conversation.columns.pop(read.answer, None)
    _check(conversation)
    return conversation


def read_prompt(
    row: Any, *, column: str | None = None, system: str | None = None, names: Collection[str] = ()
) -> Conversation:
    """Reads a row to go on with; a last answer is left out and becomes the column `answer`.

    Args:
        row: of any form of docs/how-to/data.md.
        column: that of the prompt, a string or messages; None: where the forms have it.
        system: put before a conversation that has no system message; None or "": nothing is.
        names: of reward functions' parameters: such a key is a column too, whatever it means.
    """
    read = read_row(row, column=column, names=names, asked=True, expected=PROMPTS)
    history = with_default_system(read, system) if system else read.messages
    completion = read.completion or []
    if read.form in keys.PROMPTS and history and history[-1].role == "assistant":
        raise ValueError(
            f"{read.form!r} ends in an assistant message, and to go on with one is not supported; "
            "leave it out, or name the whole 'messages'"
        )
    # Marks are those of the whole row; what the answer holds goes with it.
    whole = read.view([*history, *completion], [False] * (len(history) + len(completion)))
    end = len(whole.messages) if not completion else len(join(history))
    if not completion and end and whole.messages[-1]["role"] == "assistant":
        end -= 1
        answer = _answer_of(whole.messages[end], read.messages)
        if answer and is_empty(read.columns.get("answer")):
            read.columns["answer"] = answer
    conversation = whole.before(end)
    _check(conversation)
    return conversation


def _answer_of(message: Mapping[str, Any], given: Sequence[Message]) -> str | dict[str, Any]:
    """The answer that ends `given`, for rewards: its text, or the whole of one with calls."""
    if message.get("tool_calls"):
        return dict(message)
    said = itertools.takewhile(lambda one: one.role == "assistant", reversed(given))
    (answer,) = join([dataclasses.replace(one, trained=None) for one in said][::-1])
    return answer.text()


def read_preference_pair(row: Any) -> dict[str, Conversation]:
    """Reads a better and a worse answer, each with its prompt: `chosen` and `rejected`.

    Only the answers are learnt.
    """
    names = [
        one_of(row, found) if isinstance(row, Mapping) else None
        for found in (keys.CHOSEN, keys.REJECTED)
    ]
    pictures = None
    if isinstance(row, Mapping):
        pictures = row.get("rejected_images")
        pictures = list(pictures) if is_list(pictures) else [pictures]
        pictures = [picture for picture in pictures if not keys.is_blank(picture)] or None
        row = {key: value for key, value in row.items() if key != "rejected_images"}
    if names[0] is None and (names[1] is not None or pictures):
        return _answers_of_one(row, names[1], pictures)  # The chosen answer ends the messages.
    if None in names:
        found = sorted(row) if isinstance(row, Mapping) else type(row).__name__
        raise ValueError(f"expected 'prompt', 'chosen' and 'rejected', found {found}")
    sides = {}
    for side, name in zip(("chosen", "rejected"), names, strict=True):
        try:
            prompt, answer, read = _side(row, name)
            learnt = _learnt(prompt, answer)
            images = pictures if side == "rejected" else None
            sides[side] = read.view([*prompt, *answer], learnt, images)
            _check(sides[side])
            _check_answer(sides[side])
        except ValueError as error:
            raise ValueError(f"{name!r}: {error}") from error
    return sides


def _side(row: Mapping[str, Any], name: str) -> tuple[list[Message], list[Message], Row]:
    """Prompt and answer of one side."""
    answer = row[name]
    if not isinstance(answer, str):
        answer = read_messages([answer] if isinstance(answer, Mapping) else answer, name)
    rest = {key: row[key] for key in row if key not in (*keys.CHOSEN, *keys.REJECTED)}
    if isinstance(answer, str) and (parts := templated_parts(answer)):
        # The prompt is in both sides, as the template has written it.
        prompt, answer = parts
        if is_empty(rest.get("prompt")):
            rest["prompt"] = prompt
        elif without_bos(str(rest["prompt"])) != without_bos(prompt):
            raise ValueError("it begins with another prompt than 'prompt'; give the answer alone")
    # Messages that end in an answer are no prompt: ultrafeedback_binarized has both.
    ended = {key: v for key, v in rest.items() if key in keys.CONVERSATIONS and _ended(v)}
    rest = {key: value for key, value in rest.items() if key not in ended}
    form = form_of(rest, answered=True)
    is_whole = not isinstance(answer, str) and len(answer) > 1
    if form is None or (is_empty(rest[form]) and is_whole):
        if not is_whole:
            hint = f"; {next(iter(ended))!r} ends in an answer: remove that" if ended else ""
            raise ValueError(
                "without 'prompt' it has to be a whole conversation, the prompt's messages and "
                f"the answer{hint}"
            )
        read = read_row(rest | {"messages": row[name]})
        read.columns.update(ended)
        return read.messages[:-1], read.messages[-1:], read
    read = read_row(rest, answered=True)
    read.columns.update(ended)
    if isinstance(answer, str):
        return read.messages, [answer_of_text(answer)], read
    if len(answer) > 1 and _repeats(answer[:-1], read):
        longer = answer[:-1] if len(answer) - 1 > len(read.messages) else read.messages
        return longer, answer[-1:], read
    if len(answer) != 1:
        raise ValueError(f"expected one assistant message, found {len(answer)}")
    return read.messages, answer, read


def _ended(messages: Any) -> bool:
    last = messages[-1] if is_list(messages) and len(messages) else None
    key = first_of(last, ("role", "from")) if isinstance(last, Mapping) else None
    role = None if key is None else last[key]
    return isinstance(role, str) and ROLES.get(role) == "assistant"


def _repeats(given: list[Message], read: Row) -> bool:
    """Whether these messages are the prompt again; a system message may be theirs alone."""

    def told(messages: Sequence[Message]) -> list[tuple]:
        return [(message.role, message.text().strip()) for message in messages]

    without = given[1:] if given[0].role == "system" else given
    prompt = told(read.messages)
    if prompt and prompt[0][0] == "system" and given[0].role != "system":
        prompt = prompt[1:]
    return read.text is None and prompt in (told(given), told(without))


def _answers_of_one(
    row: Mapping[str, Any], name: str | None, pictures: list[Any] | None
) -> dict[str, Conversation]:
    """ms-swift's form: messages that end in the better answer, and what is worse beside them."""
    read = read_row({key: row[key] for key in row if key not in keys.REJECTED}, answered=True)
    start = 1 + max(
        (index for index, m in enumerate(read.messages) if m.role == "user"), default=-1
    )
    prompt, chosen = read.messages[:start], read.messages[start:] + (read.completion or [])
    if not chosen:
        raise ValueError(
            f"expected 'prompt', 'chosen' and 'rejected', or messages that end in the better "
            f"answer, found {sorted(row)}"
        )
    worse = prompt, chosen
    if name is not None:
        given = row[name]
        if isinstance(given, str):
            given = [{"role": "assistant", "content": given}]
        given = read_messages(given, name)
        worse = prompt, given
        if name == "rejected_messages":
            worse = with_system(given[:-1], row, None), given[-1:]
    sides = {}
    for side, (before, answer), images in (
        ("chosen", (prompt, chosen), None),
        ("rejected", worse, pictures),
    ):
        sides[side] = read.view([*before, *answer], _learnt(before, answer), images)
        _check(sides[side])
        _check_answer(sides[side])
    return sides


def _learnt(prompt: Sequence[Message], answer: Sequence[Message]) -> list[bool]:
    """Which messages of a side are learnt: the answer's."""
    for index, message in enumerate(prompt):
        if message.trained:
            raise ValueError(
                f"message {index}: its loss switch is on, and in preferences only the two answers "
                "are learnt; remove it"
            )
    return [False] * len(prompt) + [True] * len(answer)


def _check_answer(conversation: Conversation) -> None:
    if not any(conversation.trained):
        raise ValueError(
            "there is no assistant message to learn as its answer; its role is another, or its "
            "loss switch is off"
        )


def _refuse_preference(read: Row) -> None:
    found = [key for key in (*keys.CHOSEN, *keys.REJECTED) if not is_empty(read.columns.get(key))]
    if found:
        raise ValueError(
            f"{', '.join(map(repr, found))} make it a row of preferences, which DPO and ORPO "
            "train on; to learn an answer give it as 'completion'"
        )


def _check(conversation: Conversation) -> None:
    if not conversation.messages and conversation.text is None:
        raise ValueError("the conversation is empty; expected at least one message")
    for index, message in enumerate(conversation.messages):
        if found := TURN.search(text_of(message["content"])):
            raise ValueError(
                f"message {index}: it holds {found[0].strip()!r}, with which the chat template "
                "begins a turn, and would be read letter by letter; give the turns as messages"
            )
        if message["role"] == "user" and _says_nothing(message["content"]):
            raise ValueError(f"message {index}: the user turn is empty; give it a text")
        if message["role"] != "assistant":
            continue
        says = message.get("tool_calls") or message.get("reasoning_content")
        if not says and not text_of(message["content"]).strip():
            raise ValueError(
                f"message {index}: the assistant turn is empty; give it a text or remove it"
            )


def _says_nothing(content: str | list[dict[str, Any]]) -> bool:
    """Whether there is neither text nor image."""
    shown = not isinstance(content, str) and any(part["type"] == "image" for part in content)
    return not shown and not text_of(content).strip()
