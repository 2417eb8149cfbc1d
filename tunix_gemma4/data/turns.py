# SPDX-License-Identifier: Apache-2.0
"""Which assistant messages make one turn of the model, and what of them has to be in it."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from .conversation import Conversation

_CALL, _RESULT, _RESULT_END = "<|tool_call>", "<|tool_response>", "<tool_response|>"


@dataclasses.dataclass(frozen=True)
class Turn:
    """A turn of the model: an assistant message, or several with results of tools between them.

    Attributes:
        messages: of the assistant.
        trained: whether it is learnt.
        thoughts: text by the index of its message.
    """

    messages: list[dict[str, Any]]
    trained: bool
    thoughts: dict[int, str]

    def singles(self) -> list[Turn]:
        """Each message as a turn, as some templates have them."""
        return [
            Turn([message], self.trained, {0: self.thoughts[i]} if i in self.thoughts else {})
            for i, message in enumerate(self.messages)
        ]

    def missing_from(self, written: str, own: str) -> str | None:
        """A text of the messages that is not in what the template has written; None: all are.

        Args:
            written: the turn.
            own: the turn without what tools answered.
        """
        said = [text for message in self.messages for text in _said(message)]
        called = [text for message in self.messages for text in _called(message)]
        return _not_in(written, said) or _not_in(own, called)

    def misplaced_in(self, written: str) -> str | None:
        """A text that stands behind the answer of the tool that its message calls; None: none."""
        chunks = [chunk.split(_RESULT)[0] for chunk in written.split(_RESULT_END)]
        called = 0
        for message in self.messages:
            first, called = called, called + len(message.get("tool_calls", ()))
            texts = [text.strip() for text in _said(message)]
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
                turns.append(Turn([], learnt, {}))
            elif turns[-1].trained != learnt:
                raise ValueError(
                    f"message {index}: it goes on with the turn of a tool's call, and one of the "
                    "two is to be learnt and one is not; give both the same loss switch"
                )
            turn = turns[-1]
            if message.get("reasoning_content"):
                turn.thoughts[len(turn.messages)] = message["reasoning_content"]
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
    first, end = _kept(conversation, prompt=prompt)
    if policy == "none":
        first = end
    kept, left_out = [], 0
    for index, message in enumerate(messages):
        if "reasoning_content" in message and not first <= index < end:
            message = {key: value for key, value in message.items() if key != "reasoning_content"}
            left_out += 1
        kept.append(message)
    return dataclasses.replace(conversation, messages=kept), left_out


def _kept(conversation: Conversation, *, prompt: bool) -> tuple[int, int]:
    """The messages whose thoughts stay: from the first to before the second."""
    messages = conversation.messages
    if prompt:
        asked = [index for index, message in enumerate(messages) if message["role"] == "user"]
        return (asked[-1] if asked else 0), len(messages)
    spans = [span for span, learnt in _spans(conversation) if learnt]
    return spans[-1] if spans else (0, 0)


def _spans(conversation: Conversation) -> list[tuple[tuple[int, int], bool]]:
    """First and last message (behind it) of each turn of the model, and whether it is learnt."""
    spans: list[tuple[tuple[int, int], bool]] = []
    trained = iter(conversation.trained)
    previous = None
    for index, message in enumerate(conversation.messages):
        if message["role"] == "assistant":
            learnt = next(trained)
            goes_on = previous == "tool"
            start = spans.pop()[0][0] if goes_on else index
            spans.append(((start, index + 1), learnt))
        previous = message["role"]
    return spans


def each_turn(conversation: Conversation) -> list[Conversation]:
    """A conversation that ends in each of the learnt turns, which alone is learnt in it."""
    result = []
    for (start, end), learnt in _spans(conversation):
        if not learnt:
            continue
        part = conversation.before(end)
        trained = [
            index >= start
            for index, message in enumerate(part.messages)
            if message["role"] == "assistant"
        ]
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
        yield from _leaves(call["function"]["arguments"])


def _said(message: Mapping[str, Any]) -> Iterator[str]:
    content = message["content"]
    if isinstance(content, str):
        yield content
    else:
        yield from (part["text"] for part in content if part["type"] == "text")


def _leaves(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, part in value.items():
            yield key
            yield from _leaves(part)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _leaves(part)
