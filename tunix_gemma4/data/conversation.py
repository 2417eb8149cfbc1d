# SPDX-License-Identifier: Apache-2.0
"""What training takes of a row: a conversation to learn or to go on with, or two that compete.

row -> Row -> Conversation (supervised: `read_conversation`; to go on with: `read_prompt`; with a
better and a worse answer: `read_preference_pair`)
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from ..config.source import naming
from . import keys
from .keys import first_of, is_empty, is_list, one_of
from .messages import (
    ROLES,
    Message,
    answer_of_text,
    join,
    parts_of,
    read_messages,
    text_of,
    texts_of,
)
from .rows import (
    PROMPTS,
    TURN,
    Conversation,
    Row,
    form_of,
    read_row,
    templated_parts,
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
    trained = [not prompt_only and (read.whole or bool(m.trained)) for m in history]
    conversation = read.view([*history, *completion], trained + [not prompt_only] * len(completion))
    if prompt_only:
        conversation = conversation.before(len(join(history)))
    elif completion and read.answer is not None:
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
    return text_of(answer.content)


def read_preference_pair(row: Any) -> dict[str, Conversation]:
    """Reads a better and a worse answer, each with its prompt: `chosen` and `rejected`.

    Only the answers are learnt.
    """
    expected = "expected 'prompt', 'chosen' and 'rejected', found"
    if not isinstance(row, Mapping):
        raise ValueError(f"{expected} {type(row).__name__}")
    chosen, rejected = one_of(row, keys.CHOSEN), one_of(row, keys.REJECTED)
    pictures = row.get("rejected_images")
    pictures = list(pictures) if is_list(pictures) else [pictures]
    pictures = [picture for picture in pictures if not keys.is_blank(picture)] or None
    row = {key: value for key, value in row.items() if key != "rejected_images"}
    if chosen is None and (rejected is not None or pictures):
        return _answers_of_one(row, rejected, pictures)  # The chosen answer ends the messages.
    if chosen is None or rejected is None:
        raise ValueError(f"{expected} {sorted(row)}")
    sides = {}
    for side, name, images in (("chosen", chosen, None), ("rejected", rejected, pictures)):
        with naming(repr(name)):
            sides[side] = _answered(*_side(row, name), images)
    return sides


def _side(row: Mapping[str, Any], name: str) -> tuple[Row, list[Message], list[Message]]:
    """What is read for one side, its prompt and its answer."""
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
        return read, read.messages[:-1], read.messages[-1:]
    read = read_row(rest, answered=True)
    read.columns.update(ended)
    if isinstance(answer, str):
        return read, read.messages, [answer_of_text(answer)]
    if len(answer) > 1 and _repeats(answer[:-1], read):
        longer = answer[:-1] if len(answer) - 1 > len(read.messages) else read.messages
        return read, longer, answer[-1:]
    if len(answer) != 1:
        raise ValueError(f"expected one assistant message, found {len(answer)}")
    return read, read.messages, answer


def _ended(messages: Any) -> bool:
    last = messages[-1] if is_list(messages) and len(messages) else None
    key = first_of(last, ("role", "from")) if isinstance(last, Mapping) else None
    role = last[key] if key is not None and isinstance(last, Mapping) else None
    return isinstance(role, str) and ROLES.get(role) == "assistant"


def _repeats(given: list[Message], read: Row) -> bool:
    """Whether these messages are the prompt again; a system message may be theirs alone."""

    def told(messages: Sequence[Message]) -> list[tuple]:
        return [
            (m.role, m.content if isinstance(m.content, Mapping) else text_of(m.content).strip())
            for m in messages
        ]

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
        is_text = isinstance(given, str)
        given = read_messages([{"role": "assistant", "content": given}] if is_text else given, name)
        worse = prompt, given
        if name == "rejected_messages":
            worse = with_system(given[:-1], row, None), given[-1:]
    return {
        "chosen": _answered(read, prompt, chosen, None),
        "rejected": _answered(read, *worse, pictures),
    }


def _answered(
    read: Row, prompt: list[Message], answer: list[Message], images: list[Any] | None
) -> Conversation:
    """One side, of which the answer is learnt; `images` stand in place of the row's."""
    for index, message in enumerate(prompt):
        if message.trained:
            raise ValueError(
                f"message {index}: its loss switch is on, and in preferences only the two answers "
                "are learnt; remove it"
            )
    side = read.view([*prompt, *answer], [False] * len(prompt) + [True] * len(answer), images)
    _check(side)
    if not any(side.trained):
        raise ValueError(
            "there is no assistant message to learn as its answer; its role is another, or its "
            "loss switch is off"
        )
    return side


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
        shows = any(part["type"] == "image" for part in parts_of(message["content"]))
        if message["role"] == "user" and not shows and not text_of(message["content"]).strip():
            raise ValueError(f"message {index}: the user turn is empty; give it a text")
        if message["role"] != "assistant":
            continue
        says = message.get("tool_calls") or message.get("reasoning_content")
        if not says and not text_of(message["content"]).strip():
            raise ValueError(
                f"message {index}: the assistant turn is empty; give it a text or remove it"
            )


# ---- Turns of the model.


_CALL, _RESULT, _RESULT_END = "<|tool_call>", "<|tool_response>", "<tool_response|>"


@dataclasses.dataclass(frozen=True)
class Turn:
    """A turn of the model: an assistant message, or several with results of tools between them."""

    places: list[int]  # of its messages in the conversation
    messages: list[dict[str, Any]]  # of the assistant
    trained: bool  # whether it is learnt
    thoughts: dict[int, str]  # text by the index of its message

    def singles(self) -> list[Turn]:
        """Each message as a turn, as some templates have them."""
        pairs = enumerate(zip(self.places, self.messages, strict=True))
        thoughts = self.thoughts
        return [
            Turn([place], [message], self.trained, {0: thoughts[i]} if i in thoughts else {})
            for i, (place, message) in pairs
        ]

    def missing_from(self, written: str, own: str) -> str | None:
        """A text of the messages that is not in the turn as the template has written it, or None.

        `own` is the turn without what tools answered.
        """
        said = [text for message in self.messages for text in texts_of(message["content"])]
        called = [text for message in self.messages for text in _called(message)]
        return _not_in(written, said) or _not_in(own, called)

    def misplaced_in(self, written: str) -> str | None:
        """A text that stands behind the answer of the tool that its message calls; None: none."""
        chunks = [chunk.split(_RESULT)[0] for chunk in written.split(_RESULT_END)]
        called = 0
        for message in self.messages:
            first, called = called, called + len(message.get("tool_calls", ()))
            texts = [text.strip() for text in texts_of(message["content"])]
            if first == called or not any(texts) or _RESULT_END not in written:
                continue
            counts = itertools.accumulate(chunk.count(_CALL) for chunk in chunks)
            place = next((i for i, count in enumerate(counts) if count > first), 0)
            missing = [text for text in texts if text not in chunks[place]]
            if missing:
                return missing[0]
        return None

    def place_of(self, index: int, body: Sequence[Any]) -> int:
        """Where what message `index` says begins in the pieces of the turn."""
        if index == 0:
            return 0
        if self.messages[index].get("tool_calls"):
            before = sum(len(m.get("tool_calls", ())) for m in self.messages[:index])
            calls = [i for i, p in enumerate(body) if p.special and p.text == _CALL]
            if before < len(calls):
                return calls[before]
        ends = [i for i, p in enumerate(body) if p.special and p.text == _RESULT_END]
        return ends[-1] + 1 if ends else 0


def model_turns(conversation: Conversation) -> list[Turn]:
    """The turns of the model in order, with the thoughts that are to stand in them."""
    turns: list[Turn] = []
    trained = iter(conversation.trained)
    previous = None
    for index, message in enumerate(conversation.messages):
        if message["role"] == "assistant":
            learnt = next(trained)
            if previous != "tool":
                turns.append(Turn([], [], learnt, {}))
            elif turns[-1].trained != learnt:
                raise ValueError(
                    f"message {index}: it goes on with the turn of a tool's call, and one of the "
                    "two is to be learnt and one is not; give both the same loss switch"
                )
            turn = turns[-1]
            if message.get("reasoning_content"):
                turn.thoughts[len(turn.messages)] = message["reasoning_content"]
            turn.places.append(index)
            turn.messages.append(message)
        previous = message["role"]
    return turns


def keep_thoughts(
    conversation: Conversation, policy: str, *, prompt: bool
) -> tuple[Conversation, int]:
    """The conversation as it is rendered, and how many thoughts were left out.

    Thoughts of earlier turns are left out, as they are when a model is asked. Those that stay are
    of the last learnt turn, or, in a prompt, of the turn that a tool has interrupted.
    """
    messages = conversation.messages
    first, end = 0, len(messages)
    if prompt:
        first = max(
            (i for i, message in enumerate(messages) if message["role"] == "user"), default=0
        )
    else:
        learnt = [turn.places for turn in model_turns(conversation) if turn.trained]
        first, end = (learnt[-1][0], learnt[-1][-1] + 1) if learnt else (0, 0)
    if policy == "none":
        first = end
    kept, left_out = [], 0
    for index, message in enumerate(messages):
        if "reasoning_content" in message and not first <= index < end:
            message = without_thought(message)
            left_out += 1
        kept.append(message)
    return dataclasses.replace(conversation, messages=kept), left_out


def without_thought(message: Mapping[str, Any]) -> dict[str, Any]:
    """The message, which its thought is not part of."""
    return {key: value for key, value in message.items() if key != "reasoning_content"}


def each_turn(conversation: Conversation) -> list[Conversation]:
    """A conversation that ends in each of the learnt turns, which alone is learnt in it."""
    result = []
    for turn in model_turns(conversation):
        if turn.trained:
            part = conversation.before(turn.places[-1] + 1)
            answers = [i for i, m in enumerate(part.messages) if m["role"] == "assistant"]
            trained = [index >= turn.places[0] for index in answers]
            result.append(dataclasses.replace(part, trained=trained))
    return result


def _not_in(written: str, texts: Sequence[str]) -> str | None:
    for text in sorted((text.strip() for text in texts), key=len, reverse=True):
        if text not in written:
            return text
        written = written.replace(text, "\0", 1)
    return None


def _called(message: Mapping[str, Any]) -> Iterator[str]:
    for call in message.get("tool_calls", ()):
        yield call["function"]["name"]
        for path, value in keys.walk(call["function"]["arguments"]):
            yield from (text for text in (*path[-1:], value) if isinstance(text, str))
